"""Lightning attention: a constant decay per head and layer (2401.04658)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from statejax.config import LightningConfig
from statejax.layers import delta
from statejax.layers.common import Proj
from statejax.state import Spec


class Lightning(nn.Module):
  """`y = out(norm(S^T q) * sigmoid(gate x))`, `S = exp(-s_h) S + k v^T`.

  With `s_h = slope 2^(-8 (h+1) / H)`, SiLU on q, k and v, no scale, and one
  norm over all heads. As in MiniMax-Text-01 (arXiv 2501.08313).
  """

  config: LightningConfig

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
    silu = lambda y: jax.nn.silu(y.astype(jnp.float32)).astype(x.dtype)
    q = silu(Proj(keys, ('embed', *key_axes), name='q')(x))
    k = silu(Proj(keys, ('embed', *key_axes), name='k')(x))
    v = silu(Proj(values, ('embed', *value_axes), name='v')(x))
    gate = Proj(values, ('embed', *value_axes), name='gate')(x)
    log_decay = -c.slope * 2.0 ** (-8.0 * (1 + np.arange(c.heads)) / c.heads)
    y, new = delta.carry(
        state, q, k, v, delta.constant(log_decay, x), 0, 1, context.n_valid,
        context.document, scale=1.0, chunk_size=c.chunk)
    y = delta.output(self, y, gate, x.shape[-1], eps=c.eps,
                     activation=jax.nn.sigmoid, groups=1)
    return y, delta.MatrixState(**new)
