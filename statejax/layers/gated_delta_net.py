"""Gated DeltaNet: one decay per value head (arXiv 2412.06464)."""

import flax.linen as nn
import jax

from statejax.config import GatedDeltaNetConfig
from statejax.layers import delta
from statejax.layers.common import Proj, weight
from statejax.ops import norm


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
    key_axes, value_axes = ('key_heads', 'key'), ('heads', 'value')
    q = Proj(keys, ('embed', *key_axes), name='q')(x)
    k = Proj(keys, ('embed', *key_axes), name='k')(x)
    v = Proj(values, ('embed', *value_axes), name='v')(x)
    gate = Proj(values, ('embed', *value_axes), name='gate')(x)
    beta = Proj((c.value_heads,), ('embed', 'heads'), name='beta')(x)
    rate = Proj((c.value_heads,), ('embed', 'heads'), name='rate')(x)
    a = weight(self, 'a_log', ('heads',), (c.value_heads,),
               delta.rate_init(1.0, 16.0))
    bias = weight(self, 'dt_bias', ('heads',), (c.value_heads,),
                  delta.step_init())

    conv = lambda name, axes: delta.HeadConv(c.conv, axes, name=name)
    q, tail_q = conv('conv_q', key_axes)(q, state.tail_q, context)
    k, tail_k = conv('conv_k', key_axes)(k, state.tail_k, context)
    v, tail_v = conv('conv_v', value_axes)(v, state.tail_v, context)
    beta = c.max_erase * jax.nn.sigmoid(beta.astype('float32'))
    y, matrix = delta.delta_rule(
        norm.l2_norm(q).astype(x.dtype), norm.l2_norm(k).astype(x.dtype), v,
        delta.log_decay(rate, a, bias), beta, beta, state.matrix,
        context.n_valid, context.document, chunk_size=c.chunk)
    w = weight(self, 'norm', ('value',), (c.value,), nn.initializers.ones)
    y = norm.gated_rms_norm(y, gate, w, eps=c.eps, activation=jax.nn.silu)
    y = Proj(x.shape[-1:], (*value_axes, 'embed'), contract=2, name='out')(y)
    return y, delta.DeltaState(matrix, tail_q, tail_k, tail_v)
