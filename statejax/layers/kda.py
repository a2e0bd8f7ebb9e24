"""Kimi Delta Attention: one decay per key channel (arXiv 2510.26692)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import KDAConfig
from statejax.layers import delta
from statejax.layers.common import Proj, weight
from statejax.ops import norm


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
    key_axes, value_axes = ('heads', 'key'), ('heads', 'value')
    q = Proj(keys, ('embed', *key_axes), name='q')(x)
    k = Proj(keys, ('embed', *key_axes), name='k')(x)
    v = Proj(values, ('embed', *value_axes), name='v')(x)
    beta = Proj((c.heads,), ('embed', 'heads'), name='beta')(x)
    low = Proj((c.rank,), ('embed', 'rank'), name='decay_a')(x)
    rate = Proj(keys, ('rank', *key_axes), name='decay_b')(low)
    low = Proj((c.rank,), ('embed', 'rank'), name='gate_a')(x)
    gate = Proj(values, ('rank', *value_axes), name='gate_b')(low)

    conv = lambda name, axes: delta.HeadConv(c.conv, axes, name=name)
    q, tail_q = conv('conv_q', key_axes)(q, state.tail_q, context)
    k, tail_k = conv('conv_k', key_axes)(k, state.tail_k, context)
    v, tail_v = conv('conv_v', value_axes)(v, state.tail_v, context)
    beta = c.max_erase * jax.nn.sigmoid(beta.astype('float32'))
    y, matrix = delta.delta_rule(
        norm.l2_norm(q).astype(x.dtype), norm.l2_norm(k).astype(x.dtype), v,
        self._log_decay(rate), beta, beta, state.matrix,
        context.n_valid, context.document, chunk_size=c.chunk)
    w = weight(self, 'norm', ('value',), (c.value,), nn.initializers.ones)
    y = norm.gated_rms_norm(y, gate, w, eps=c.eps, activation=jax.nn.sigmoid)
    y = Proj(x.shape[-1:], (*value_axes, 'embed'), contract=2, name='out')(y)
    return y, delta.DeltaState(matrix, tail_q, tail_k, tail_v)

  def _log_decay(self, rate):
    c = self.config
    a = weight(self, 'a_log', ('heads',), (c.heads,),
               delta.rate_init(1.0, 16.0))
    bias = weight(self, 'dt_bias', ('heads', 'key'), (c.heads, c.key),
                  delta.step_init())
    if c.lower_bound is None:
      return delta.log_decay(rate, a, bias)
    wide = rate.astype(jnp.float32) + bias[None, None]
    return c.lower_bound * jax.nn.sigmoid(
        jnp.exp(a)[None, None, :, None] * wide)
