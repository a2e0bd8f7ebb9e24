"""Multi-scale retention: a constant decay per head (arXiv 2307.08621)."""

import flax.linen as nn
import numpy as np

from statejax.config import RetNetConfig
from statejax.layers import delta, rotary
from statejax.layers.common import Proj
from statejax.state import Spec


class RetNet(nn.Module):
  """`y = out(norm(S^T q) * silu(gate x))`, `S = (1 - 2^(-5-h)) S + k v^T`.

  Queries and keys are rotated by their position in the document.
  """

  config: RetNetConfig

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
    turn = rotary.rotation(c.rope, c.key)
    q, k = turn(q, context.positions), turn(k, context.positions)
    log_decay = np.log1p(-2.0 ** (-5.0 - np.arange(c.heads)))
    y, new = delta.carry(
        state, q, k, v, delta.constant(log_decay, x), 0, 1, context.n_valid,
        context.document, chunk_size=c.chunk)
    y = delta.output(self, y, gate, x.shape[-1], eps=c.eps)
    return y, delta.MatrixState(**new)
