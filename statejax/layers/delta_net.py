"""DeltaNet: the delta rule without decay (arXiv 2406.06484)."""

import flax.linen as nn

from statejax.config import DeltaNetConfig
from statejax.layers import delta
from statejax.layers.common import Proj


class DeltaNet(nn.Module):
  """`y = out(norm(delta(conv q, conv k, conv v)))`, optionally gated by SiLU.

  With q, k of unit length and `beta = max_erase sigmoid(b x)`.
  """

  config: DeltaNetConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns the `DeltaState` of `Spec`; its size ignores `capacity`."""
    del capacity
    return delta.state_specs(rows, config.heads, config.heads, config.key,
                             config.value, config.conv, dtype)

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    keys, values = (c.heads, c.key), (c.heads, c.value)
    gate = None
    if c.output_gate:
      gate = Proj(values, ('embed', 'heads', 'value'), name='gate')(x)
    beta = delta.beta(x, c.heads, c.max_erase)
    q, k, v, tails = delta.query_key_value(
        x, state, context, query=keys, key=keys, value=values, taps=c.conv)
    y, matrix = delta.delta_rule(
        delta.unit(q), delta.unit(k), v, 0, beta, beta, state.matrix,
        context.n_valid, context.document, chunk_size=c.chunk)
    y = delta.output(self, y, gate, x.shape[-1], eps=c.eps)
    return y, delta.DeltaState(matrix, **tails)
