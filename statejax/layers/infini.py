"""Infini-attention: local attention, and a matrix of the segments before."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import InfiniConfig
from statejax.layers import rotary, weights
from statejax.layers.attention import RingState
from statejax.layers.common import Proj
from statejax.layers.dst import own_segment
from statejax.layers.transformer_xl import output
from statejax.ops import attend, infini, segments
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InfiniState(RingState):
  """The matrices, and the open segment.

  Attributes:
    k: keys of the open segment before rope; its token i is in slot i,
      [B, G, S, K], store dtype; fixed.
    v: [B, G, S, V], store dtype; fixed.
    memory: M, of the segments that are complete, [B, G, K, V] float32; fixed.
    mass: z, [B, G, K] float32; fixed.
  """

  memory: Array = leaf('batch kv_heads key value')
  mass: Array = leaf('batch kv_heads key')


class Infini(nn.Module):
  """Attention to the own segment, mixed per head with a read of a matrix.

    y = g f(q) M / (f(q) z) + (1 - g) attention,  g = sigmoid(b_h), f = elu + 1
    behind a segment  M += f(k)^T (v - f(k) M / (f(k) z)),  z += sum f(k)

  The matrix has unrotated keys, and nothing of the own segment.

  Laws: split (L1), start (L2), padding (L3), packed (L4).
  Reference: arXiv 2404.07143.
  """

  config: InfiniConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns an `InfiniState` of `Spec`."""
    c = config
    return InfiniState(
        k=Spec((rows, c.kv_heads, c.segment, c.key), dtype),
        v=Spec((rows, c.kv_heads, c.segment, c.value), dtype),
        memory=Spec((rows, c.kv_heads, c.key, c.value), 'float32'),
        mass=Spec((rows, c.kv_heads, c.key), 'float32'))

  @nn.compact
  def __call__(self, x, state, context):
    c, stored = self.config, state.k.dtype
    plan, turn = context.blocks(c.segment), rotary.rotation(c.rope, c.key)
    q, k, v = (Proj((n, width), ('embed', heads, side), name=name)(x)
               for name, n, width, heads, side in (
                   ('q', c.heads, c.key, 'heads', 'key'),
                   ('k', c.kv_heads, c.key, 'kv_heads', 'key'),
                   ('v', c.kv_heads, c.value, 'kv_heads', 'value')))
    k, v = k.astype(stored), v.astype(stored)
    new_k, new_v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    place = context.positions % c.segment
    sources, held = own_segment(
        state, new_k, new_v, context, c.segment,
        turn=lambda k, places: turn(k.swapaxes(1, 2), places).swapaxes(1, 2))
    near, _ = attend.attend(turn(q, place), sources, scale=c.key ** -0.5)

    index = segments.columns(plan, c.segment)
    whole = lambda ring, new: segments.pick(
        jnp.concatenate([ring.swapaxes(1, 2), new], axis=1),
        index).swapaxes(2, 3).astype(jnp.float32)
    def update(memory, part):
      return infini.write(infini.features(part[0]), part[1], *memory,
                          delta=c.write == 'delta', eps=c.eps)
    memory, after = segments.carry(
        plan, (state.memory, state.mass), (whole(state.k, k),
                                           whole(state.v, v)), update)
    far = self._read(q, memory, plan)
    gate = jax.nn.sigmoid(weights.weight(
        self, 'gate', ('heads',), (c.heads,), weights.zeros))
    gate = gate[None, None, :, None]
    y = gate * far + (1 - gate) * near.astype(jnp.float32)
    return output(x, y.astype(x.dtype)), InfiniState(held.k, held.v, *after)

  def _read(self, q, memory, plan):
    """What each token recalls, [B, T, H, V] float32."""
    c, (rows, steps) = self.config, q.shape[:2]
    cells, at, mine = segments.cells(plan)
    q = infini.features(segments.pick(q, cells))
    # Queries of a group are more rows of one product.
    count, size = cells.shape[1:]
    q = q.reshape(rows, count, size, c.kv_heads, -1, c.key)
    q = q.transpose(0, 1, 3, 2, 4, 5).reshape(
        rows, count, c.kv_heads, -1, c.key)
    y = infini.read(q, *memory, eps=c.eps)
    y = y.reshape(rows, count, c.kv_heads, size, -1, c.value)
    y = y.transpose(0, 1, 3, 2, 4, 5).reshape(
        rows, count * size, c.heads, c.value)
    y = segments.pick(y, at[:, None]).reshape(rows, steps, c.heads, c.value)
    return jnp.where(mine[..., None, None], y, 0.)
