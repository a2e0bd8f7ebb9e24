"""Kimi Delta Attention: one decay per key channel (arXiv 2510.26692)."""

import flax.linen as nn
import jax

from statejax.config import KDAConfig
from statejax.layers import delta


class KDA(nn.Module):
  """`y = out(norm(delta(conv q, conv k, conv v)) * sigmoid(g_b g_a x))`.

  With q, k of unit length, `beta = max_erase sigmoid(b x)`, and
  `log_decay = -exp(A) softplus(f_b f_a x + dt)` per channel, or with a lower
  bound `bound * sigmoid(exp(A) (f_b f_a x + dt))`.
  """

  config: KDAConfig

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
    rate = delta.low_rank(self, x, 'decay', c.rank, keys, ('heads', 'key'))
    log_decay = delta.decay_gate(self, rate, ('heads', 'key'),
                                 lower_bound=c.lower_bound)
    gate = delta.low_rank(self, x, 'gate', c.rank, values, ('heads', 'value'),
                          bias=c.gate_bias)
    beta = delta.beta(x, c.heads, c.max_erase)
    q, k, v, tails = delta.query_key_value(
        x, state, context, query=keys, key=keys, value=values, taps=c.conv)
    y, matrix = delta.delta_rule(
        delta.unit(q), delta.unit(k), v, log_decay, beta, beta, state.matrix,
        context.n_valid, context.document, chunk_size=c.chunk)
    y = delta.output(self, y, gate, x.shape[-1], eps=c.eps,
                     activation=jax.nn.sigmoid)
    return y, delta.DeltaState(matrix, **tails)
