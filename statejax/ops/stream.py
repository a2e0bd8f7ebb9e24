"""Attention to a store so long that its scores should not be held at once."""

import jax
import jax.numpy as jnp

from statejax.ops import attend as at_once
from statejax.ops import dispatch, gather
from statejax.ops.attend import MASKED, Segment
from statejax.ops.merge import merge
from statejax.ops.product import einsum

# Keys at a time. Twice as many are still attended to at once.
_SIZE = 4096
# Slots that the TPU kernel fetches together.
_BLOCK = 1024


def is_long(slots):
  """Whether a store of so many slots is read piece by piece."""
  return slots > 2 * _SIZE


def attend(q, k, v, last, *, scale):
  """Attends to the first slots of a store.

    `statejax.ops.attend.attend` with slot j visible to query t if j <= last_t

  One query of each row reads on a single TPU what it sees and no more, in the
  kernel for chosen blocks; elsewhere a long store is read as by `masked`.

  Args:
    q: [B, T, H, K]; or a tuple of such parts, whose scores add.
    k: [B, G, N, K]; or a tuple of as many parts.
    v: [B, G, N, V]; None takes the first part of k.
    last: the last slot that a query sees, [B, T] int32; -1 sees none.
    scale: factor on the scores.

  Returns:
    out [B, T, H, V] in q.dtype and lse [B, T, H] float32, as `attend`.
  """
  q, k = (x if isinstance(x, tuple) else (x,) for x in (q, k))
  q, k = gather.filled(q, k)
  slots = k[0].shape[2]

  def pieces():
    visible = jnp.arange(slots, dtype=jnp.int32)[None, None] <= last[..., None]
    return masked(q, Segment(k, k[0] if v is None else v, visible), scale=scale)

  if q[0].shape[1] > 1 or not is_long(slots):
    return pieces()
  ids = blocks(last, k[0].shape[1], slots)
  kernel = gather.on_tpu(
      'gather_attend', None, (*q, *k, *(() if v is None else (v,))),
      q, k, v, ids, block=_BLOCK)
  run = dispatch.choose('gather_attend', None, {
      'pallas_tpu': kernel, 'xla': lambda *_, **__: pieces()})
  return run(q, k, v, ids, last, None, block=_BLOCK, scale=scale)


def blocks(last, groups, slots):
  """Ids of the blocks of a store that queries see, [B, T, G, M] int32."""
  ids = jnp.arange(-(-slots // _BLOCK), dtype=jnp.int32)
  ids = ids[None, None, None]
  ids = jnp.where(ids * _BLOCK <= last[..., None, None], ids, -1)
  return jnp.broadcast_to(ids, (*last.shape, groups, ids.shape[-1]))


def beside(q, k, v, last, segments, *, scale, sink=None):
  """One softmax over the first slots of a store and over segments.

  Args:
    q: [B, T, H, K].
    k: [B, G, N, K].
    v: [B, G, N, V].
    last: the last slot that a query sees, [B, T] int32; -1 sees none.
    segments: a list of `statejax.ops.attend.Segment`, not empty.
    scale: factor on the scores.
    sink: logit per head, [H] float32, or None.

  Returns:
    out [B, T, H, V] in q.dtype and lse [B, T, H] float32, as `attend`.
  """
  slots = k.shape[2]
  if is_long(slots):
    return merge([attend(q, k, v, last, scale=scale),
                  at_once.attend(q, segments, scale=scale, sink=sink)])
  visible = jnp.arange(slots, dtype=jnp.int32)[None, None] <= last[..., None]
  return at_once.attend(q, [Segment(k, v, visible), *segments], scale=scale,
                        sink=sink)


def masked(q, segment, *, scale):
  """`statejax.ops.attend.attend` of one segment, its keys piece by piece.

  Maximum, sum and weighted sum are carried in float32; pieces are read where
  they lie. Of a segment of few keys it is the same program.

  Args:
    q: [B, T, H, K]; or a tuple of such arrays.
    segment: `statejax.ops.attend.Segment`.
    scale: factor on the scores.

  Returns:
    out [B, T, H, V] in q.dtype and lse [B, T, H] float32, as `attend`.

  Reference: arXiv 1805.02867, the online softmax.
  """
  slots = segment.v.shape[2]
  if not is_long(slots):
    return at_once.attend(q, [segment], scale=scale)
  q = q if isinstance(q, tuple) else (q,)
  keys = segment.k if isinstance(segment.k, tuple) else (segment.k,)
  dtype, (batch, length, heads, _) = q[0].dtype, q[0].shape
  wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
  q = [(a * jnp.asarray(scale, dtype)).swapaxes(1, 2) for a in q]
  masked = jnp.asarray(MASKED, wide)
  visible = segment.visible
  if visible.ndim == 3:
    visible = visible[:, None]
  visible = jnp.repeat(visible, heads // visible.shape[1], axis=1) if (
      visible.shape[1] > 1) else visible

  def product(equation, a, b):
    """Heads of a group are rows of one matrix."""
    rows = a.reshape(batch, b.shape[1], -1, a.shape[-1])
    return einsum(equation, rows, b).reshape(batch, heads, length, -1)

  def piece(carry, i):
    # The last one reaches back; what it repeats counts no more.
    begin = jnp.minimum(i * _SIZE, slots - _SIZE)
    cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(
        x, begin, _SIZE, axis=axis)
    fresh = begin + jnp.arange(_SIZE, dtype=jnp.int32) >= i * _SIZE
    seen = cut(visible, 3) & fresh[None, None, None]
    first, *more = (product('bgrk,bgnk->bgrn', a, cut(k, 2))
                    for a, k in zip(q, keys))
    # As `at_once` adds it: what is not a number is passed on.
    scores = sum(more, start=first) + jnp.where(
        seen, jnp.zeros((), wide), masked)
    before, total, weighted = carry
    top = jnp.maximum(before, jax.lax.stop_gradient(jnp.max(scores, axis=-1)))
    fade = jnp.exp(before - top)
    # Below a visible score this is 0; where there is none, `some` drops it.
    p = jnp.exp(scores - top[..., None])
    total = fade * total + jnp.sum(p, axis=-1)
    weighted = fade[..., None] * weighted + product(
        'bgrn,bgnv->bgrv', p.astype(dtype), cut(segment.v, 2))
    return (top, total, weighted), None

  rows = batch, heads, length
  empty = (jnp.full(rows, masked), jnp.zeros(rows, wide),
           jnp.zeros((*rows, segment.v.shape[-1]), wide))
  (top, total, weighted), _ = jax.lax.scan(
      jax.checkpoint(piece, prevent_cse=False), empty,
      jnp.arange(-(-slots // _SIZE), dtype=jnp.int32))
  some = ~(top <= 0.5 * MASKED)
  out = jnp.where(some[..., None], weighted / total[..., None],
                  jnp.zeros((), wide))
  lse = jnp.where(some, top + jnp.log(total), masked)
  return out.swapaxes(1, 2).astype(dtype), lse.swapaxes(1, 2)
