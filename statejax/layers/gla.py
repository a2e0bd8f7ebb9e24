"""Gated linear attention: decay per key channel, no erasing (2312.06635)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import GLAConfig
from statejax.layers import delta
from statejax.layers.common import Proj
from statejax.state import Spec


class GLA(nn.Module):
  """`y = out(norm(S^T q) * silu(gate x))`, `S = diag(exp(g)) S + k v^T`.

  With `g = log sigmoid(f_b f_a x + bias) / divisor` per key channel.
  """

  config: GLAConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns the `MatrixState` of `Spec`; its size ignores `capacity`."""
    del capacity, dtype
    return delta.MatrixState(Spec(
        (rows, config.heads, config.key, config.value), 'float32'))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    keys, values = (c.heads, c.key), (c.heads, c.value)
    key_axes, value_axes = ('heads', 'key'), ('heads', 'value')
    q = Proj(keys, ('embed', *key_axes), name='q')(x)
    k = Proj(keys, ('embed', *key_axes), name='k')(x)
    v = Proj(values, ('embed', *value_axes), name='v')(x)
    gate = Proj(values, ('embed', *value_axes), name='gate')(x)
    rate = delta.low_rank(self, x, 'decay', c.rank, keys, key_axes, bias=True)
    log_decay = jax.nn.log_sigmoid(rate.astype(jnp.float32)) / c.divisor
    y, new = delta.carry(
        state, q, k, v, log_decay, 0, 1, context.n_valid, context.document,
        chunk_size=c.chunk)
    y = delta.output(self, y, gate, x.shape[-1], eps=c.eps)
    return y, delta.MatrixState(**new)
