"""Attention to a store so long that its scores should not be held at once."""

import jax
import jax.numpy as jnp

from statejax.ops import attend as at_once
from statejax.ops import dispatch, gather
from statejax.ops.attend import MASKED
from statejax.ops.merge import merge
from statejax.ops.product import einsum

# Keys at a time. Twice as many are still attended to at once.
_SIZE = 4096
# Slots that the TPU kernel fetches together.
_BLOCK = 1024


def attend(q, past, beside=(), *, scale, sink=None, last=None):
  """`statejax.ops.attend.attend`, of which the first segment may be long.

  A long one is attended to piece by piece, and merged with what stands beside
  it; one query of each row reads on a single TPU what it sees and no more, in
  the kernel for chosen blocks. Of a short one it is the same program.

  Args:
    q: [B, T, H, K]; or a tuple of such arrays, whose scores add.
    past: the `statejax.ops.attend.Segment` of a store.
    beside: other segments.
    scale: factor on the scores.
    sink: logit per head, [H] float32, or None.
    last: promises that past.visible is `slot <= last`, [B, T] int32, so that a
      kernel may do without the mask; or None.

  Returns:
    out [B, T, H, V] in q.dtype and lse [B, T, H] float32, as `attend`.
  """
  slots = past.v.shape[2]
  if slots <= 2 * _SIZE:
    return at_once.attend(q, [past, *beside], scale=scale, sink=sink)
  groups = {x.shape[1] for x in jax.tree.leaves((past.k, past.v))}
  one = last is not None and past.visible.shape[-2] == 1 and len(groups) == 1
  parts = [(_blocks if one else _pieces)(q, past, scale, last)]
  if beside or sink is not None:
    none = jax.tree.map(lambda x: x[:, :, :0], (past.k, past.v))
    empty = at_once.Segment.of(none, past.visible[..., :0])
    parts.append(at_once.attend(q, [empty, *beside], scale=scale, sink=sink))
  return merge(parts)


def blocks(last, groups, slots):
  """Ids of the blocks of a store that queries see, [B, T, G, M] int32."""
  ids = jnp.arange(-(-slots // _BLOCK), dtype=jnp.int32)[None, None, None]
  ids = jnp.where(ids * _BLOCK <= last[..., None, None], ids, -1)
  return jnp.broadcast_to(ids, (*last.shape, groups, ids.shape[-1]))


def _blocks(q, past, scale, last):
  """Where the kernel runs, all blocks that are seen; else pieces."""
  parts, k = (x if isinstance(x, tuple) else (x,) for x in (q, past.k))
  v = None if past.v is k[0] else past.v
  parts, k = gather.filled(parts, k)
  ids = blocks(last, k[0].shape[1], past.v.shape[2])
  kernel = gather.on_tpu('gather_attend', None, (*parts, *k, past.v), parts, k,
                         v, ids, block=_BLOCK)
  run = dispatch.choose('gather_attend', None, {
      'pallas_tpu': kernel,
      'xla': lambda *_, **__: _pieces(q, past, scale, last)})
  return run(parts, k, v, ids, last, None, block=_BLOCK, scale=scale)


def _pieces(q, segment, scale, last):
  """Maximum, sum and weighted sum are carried in float32; pieces are read where
  they lie. See arXiv 1805.02867, the online softmax."""
  del last  # the mask says the same
  slots = segment.v.shape[2]
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
    each = heads // b.shape[1] * length
    rows = a.reshape(batch, b.shape[1], each, a.shape[-1])
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
