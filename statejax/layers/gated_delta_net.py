"""Gated DeltaNet: one decay per value head (arXiv 2412.06464)."""

import flax.linen as nn

from statejax.config import GatedDeltaNetConfig
from statejax.layers import delta
from statejax.layers.common import Proj


class GatedDeltaNet(nn.Module):
  """`y = out(norm(delta(conv q, conv k, conv v)) * silu(gate x))`.

  With q, k of unit length, `beta = max_erase sigmoid(b x)`, and
  `log_decay = -exp(A) softplus(a x + dt)`. See `statejax.ops.delta_rule`.
  """

  config: GatedDeltaNetConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns the `DeltaState` of `Spec`; its size ignores `capacity`."""
    del capacity
    return delta.state_specs(rows, config.heads, config.value_heads,
                             config.key, config.value, config.conv, dtype)

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    keys, values = (c.heads, c.key), (c.value_heads, c.value)
    gate = Proj(values, ('embed', 'heads', 'value'), name='gate')(x)
    rate = Proj((c.value_heads,), ('embed', 'heads'), name='rate')(x)
    log_decay = delta.decay_gate(self, rate, ('heads',), rate_min=c.rate_min,
                                 dt_bias=c.dt_bias)
    beta = delta.beta(x, c.value_heads, c.max_erase)
    q, k, v, tails = delta.query_key_value(
        x, state, context, query=keys, key=keys, value=values, taps=c.conv,
        key_axes=('key_heads', 'key'))
    y, matrix = delta.delta_rule(
        delta.unit(q), delta.unit(k), v, log_decay, beta, beta, state.matrix,
        context.n_valid, context.document, chunk_size=c.chunk)
    y = delta.output(self, y, gate, x.shape[-1], eps=c.eps)
    return y, delta.DeltaState(matrix, **tails)
