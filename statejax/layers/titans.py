"""Titans: a neural memory that goes on learning while it serves."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import TitansConfig
from statejax.layers import delta, weights
from statejax.layers.common import Proj
from statejax.ops import titans
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TitansState:
  """Weights of the memories, less those they begin with, and their momentum.

  Attributes:
    start: as the open segment has found them, [B, H, K, V] float32; fixed. Of
      a memory of two layers the first, [B, H, K, F].
    now: of the same shape and kind, and so is
    momentum.
    start_out, now_out, momentum_out: of the second layer, [B, H, F, V] float32;
      fixed. None where there is one.
  """

  start: Array = leaf('batch heads key channels')
  now: Array = leaf('batch heads key channels')
  momentum: Array = leaf('batch heads key channels')
  start_out: Array | None = leaf('batch heads channels value')
  now_out: Array | None = leaf('batch heads channels value')
  momentum_out: Array | None = leaf('batch heads channels value')


class Titans(nn.Module):
  """`statejax.ops.titans.neural_memory` of keys and queries of unit length.

    eta, theta, alpha = sigmoid(W_e x), rate sigmoid(W_t x), sigmoid(W_a x)

  each per head, the last one small at first. It is the memory alone: beside
  attention or before it, a model has it as a layer of its own.

  Laws: split (L1), start (L2), padding (L3), packed (L4), float32 (L9).
  Reference: arXiv 2501.00663.
  """

  config: TitansConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `TitansState` of `Spec`."""
    c = config
    one = Spec((rows, c.heads, c.key, c.hidden or c.value), 'float32')
    out = None if c.hidden is None else Spec(
        (rows, c.heads, c.hidden, c.value), 'float32')
    return TitansState(one, one, one, out, out, out)

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    q, k, v = (Proj((c.heads, width), ('embed', 'heads', side), name=name)(x)
               for name, width, side in (('q', c.key, 'key'),
                                         ('k', c.key, 'key'),
                                         ('v', c.value, 'value')))
    wide = lambda a: a.astype(jnp.float32)
    tokens = titans.Tokens(
        wide(delta.unit(q)), wide(delta.unit(k)), wide(v),
        self._gate(x, 'keep', 0.), c.rate * self._gate(x, 'rate', 0.),
        self._gate(x, 'forget', -4.))
    first = context.positions == 0
    resets = (jnp.zeros_like(first) if context.document is None
              else first & (context.document > 0))
    held = ((state.start,), (state.now,), (state.momentum,))
    if c.hidden is not None:
      outs = state.start_out, state.now_out, state.momentum_out
      held = tuple((*w, out) for w, out in zip(held, outs))
    y, new = titans.neural_memory(
        tokens, held, self._first(), context.positions % c.segment == 0,
        resets, context.valid)
    y = delta.output(self, y.astype(x.dtype), None, x.shape[-1], eps=c.eps)
    return y, TitansState(*(w[0] for w in new), *(
        w[1] if c.hidden else None for w in new))

  def _gate(self, x, name, bias):
    """A share of each token and head, [B, T, H] float32."""
    shape = (self.config.heads,)
    y = Proj(shape, ('embed', 'heads'), name=name)(x)
    b = weights.weight(self, f'bias_{name}', ('heads',), shape,
                       weights.constant(bias))
    return jax.nn.sigmoid(y.astype(jnp.float32) + b[None, None])

  def _first(self):
    """The weights that a memory begins with: a matrix with none."""
    c = self.config
    if c.hidden is None:
      return (jnp.zeros((c.heads, c.key, c.value)),)
    return tuple(weights.weight(
        self, name, ('heads', *axes), (c.heads, *shape),
        weights.truncated_normal(shape[0] ** -0.5)) for name, axes, shape in (
            ('first', ('key', 'channels'), (c.key, c.hidden)),
            ('second', ('channels', 'value'), (c.hidden, c.value))))
