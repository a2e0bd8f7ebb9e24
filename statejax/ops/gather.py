"""Attention to chosen parts of a long store, and choosing them."""

import functools
import math

import jax
import jax.numpy as jnp

from statejax.ops import attend, dispatch, index, select

# Numbers gathered at a time, and keys scored at a time, without a kernel.
_GATHERED, _SCORED = 2 ** 23, 4096
_KERNEL_DTYPES = {'float32', 'bfloat16'}


def gather_attend(q, k, v, ids, last, *, block, scale, sink=None,
                  implementation=None):
  """One softmax over the keys in the blocks that each query names.

    p_j = exp(scale q.k_j) / (exp(sink) + sum_i exp(scale q.k_i))
    out = sum_j p_j v_j;   lse = log(exp(sink) + sum_i exp(scale q.k_i))
    over j <= last with j // block in ids

  Heads choose in S sets: head h reads group h // (H / G) of the store, and
  what the ids of set h // (H / S) name.
  Equals `attend` with the same choice as a mask, but reads what is chosen
  alone. Rows that no query sees may hold anything finite.

  Args:
    q: [B, T, H, K]; or a tuple of parts, whose scores add.
    k: [B, G, N, K]; or a tuple of as many parts, each with its own K.
    v: [B, G, N, V]; None takes the first part of k: a latent is both.
    ids: blocks of each query and set, distinct, [B, T, S, M] int32; -1 names
      none; S is a multiple of G. Block i is the slots `i block .. i block +
      block - 1`; with block 1 ids are slots.
    last: the last slot that a query may see, [B, T] int32; -1 sees none.
    block: slots per block, static.
    scale: factor on the scores.
    sink: logit per head, [H] float32, or None.
    implementation: see `statejax.ops.dispatch`: 'pallas_tpu' (the first choice
      on a single TPU), 'xla', which gathers for some queries at a time, or
      'reference', which masks.

  Returns:
    out: [B, T, H, V] in q.dtype; 0 where nothing is seen.
    lse: [B, T, H] float32; -1e30 where nothing is seen and there is no sink.

  Raises:
    ValueError: a shape or dtype disagrees, or the implementation asked for
      cannot run.

  Reference: arXiv 2502.11089 (NSA, blocks), DeepSeek-V3.2 (slots).
  """
  q, k = _parts(q), _parts(k)
  _check(q, k, v, ids, last, block, sink)
  q, k = filled(q, k)
  run = dispatch.choose('gather_attend', implementation, {
      'pallas_tpu': on_tpu(
          'gather_attend', implementation, (*q, *k, *_parts(v)),
          q, k, v, ids, block=block),
      'xla': _gathered, 'reference': _masked,
  })
  return run(q, k, v, ids, last, sink, block=block, scale=scale)


def slots(ids, last, block):
  """The slots of blocks that one query of each row names.

  Args:
    ids: [B, M] int32, -1 for none.
    last: [B, 1] int32.
    block: slots per block.

  Returns:
    [B, M block] int32, -1 for none.
  """
  at = ids[..., None] * block + jnp.arange(block, dtype=jnp.int32)[None, None]
  seen = (ids >= 0)[..., None] & (at <= last[..., None])
  return jnp.where(seen, at, -1).reshape(ids.shape[0], -1)


def index_scores(q, w, k, *, count=None, relu=True, implementation=None):
  """`statejax.ops.index.scores` without holding the scores of every head.

  Args:
    q: index queries, [B, T, HI, dI].
    w: weights of the heads, [B, T, HI]; None sums the heads as they are.
    k: index keys, one for all heads, [B, N, dI].
    count: slots of each row that any query sees, [B] int32, or None for all;
      scores past it may be anything finite.
    relu: whether a head's score below 0 counts as 0.
    implementation: 'pallas_tpu', 'xla', which scores some keys at a time, or
      'reference', which None takes for one query of a short store.

  Returns:
    [B, T, N] float32 (float64 of float64 queries).

  Raises:
    ValueError: a shape disagrees, or the implementation cannot run.

  Reference: DeepSeek-V3.2, equation 1.
  """
  if q.ndim != 4 or k.shape != (q.shape[0], *k.shape[1:2], q.shape[3]) or (
      w is not None and w.shape != q.shape[:3]):
    raise ValueError(
        f'index: expected q [B, T, HI, dI], w [B, T, HI] and k [B, N, dI], got '
        f'{q.shape}, {None if w is None else w.shape} and {k.shape}.')
  few = q.shape[1] == 1 and k.shape[1] < 2 * _SCORED
  if implementation is None and (few or not k.shape[1]):
    implementation = 'reference'
  run = dispatch.choose('index_topk', implementation, {
      'pallas_tpu': on_tpu('index_topk', implementation, (q, k), q, k),
      'xla': _tiled, 'reference': _at_once,
  })
  return run(q, w, k, count, relu=relu)


def index_topk(q, w, k, visible, k_count, *, relu=True, parts=None,
               implementation=None):
  """The slots of the highest index scores, `select.top` of `index_scores`.

  Exact: score descending, slot ascending. No gradient runs through it.

  Args:
    q: index queries, [B, T, HI, dI].
    w: weights of the heads, [B, T, HI]; None sums the heads as they are.
    k: index keys, one for all heads, [B, N, dI].
    visible: slots that each query may choose, [B, T, N] bool.
    k_count: at most so many.
    relu: whether a head's score below 0 counts as 0.
    parts: pieces of the first of two stages; None chooses. Changes no id.
    implementation: see `index_scores`.

  Returns:
    [B, T, k_count] int32, best first; -1 past the number of visible slots.

  Raises:
    ValueError: see `index_scores`, `statejax.ops.select.top_two_stage`.

  Reference: DeepSeek-V3.2, the lightning indexer.
  """
  slots = jnp.arange(1, k.shape[1] + 1, dtype=jnp.int32)[None, None]
  count = jnp.max(jnp.where(visible, slots, 0), axis=(1, 2), initial=0)
  scores = index_scores(q, w, k, count=count, relu=relu,
                        implementation=implementation)
  if parts is None:
    parts = select.stages(k.shape[1], k_count)
  return select.top_two_stage(scores, visible, k_count, parts)


def _check(q, k, v, ids, last, block, sink):
  """Raises unless the arguments of `gather_attend` belong together."""
  batch, length, heads = q[0].shape[:3]
  groups, slots = k[0].shape[1:3]
  stores = [*k, *_parts(v)]
  if len(q) != len(k) or any(
      a.shape != (batch, length, heads, b.shape[-1]) for a, b in zip(q, k)):
    raise ValueError(
        'gather_attend: expected q [B, T, H, K] and k [B, G, N, K] in as many '
        f'parts of the same widths, got {[a.shape for a in q]} and '
        f'{[a.shape for a in k]}.')
  if heads % groups or any(
      x.shape[:-1] != (batch, groups, slots) for x in stores):
    raise ValueError(
        f'gather_attend: expected k and v of one [B={batch}, G, N] with H a '
        f'multiple of G, got {[x.shape for x in stores]} for H={heads}.')
  if ids.ndim != 4 or ids.shape[:2] != (batch, length) or (
      ids.dtype != jnp.int32 or ids.shape[2] % groups
      or heads % max(1, ids.shape[2]) or not ids.shape[2]):
    raise ValueError(
        f'gather_attend: expected ids [{batch}, {length}, S, M] int32, S a '
        f'multiple of {groups} groups that divides {heads} heads, got '
        f'{ids.shape} {ids.dtype}; for one set broadcast it to the groups.')
  if last.shape != (batch, length) or last.dtype != jnp.int32:
    raise ValueError(f'gather_attend: expected last [{batch}, {length}] int32, '
                     f'got {last.shape} {last.dtype}.')
  if block < 1 or (sink is not None and sink.shape != (heads,)):
    raise ValueError(
        f'gather_attend: expected block >= 1 and a sink [{heads}] or None, got '
        f'{block} and {None if sink is None else sink.shape}.')


def filled(q, k):
  """Parts of queries and keys without those of no channel."""
  return zip(*((a, b) for a, b in zip(q, k, strict=True) if b.shape[-1]))


def _parts(x):
  if x is None:
    return ()
  return x if isinstance(x, tuple) else (x,)


def on_tpu(op, implementation, floats, *args, **kwargs):
  """The TPU kernel, or the reason why it declines."""
  run = dispatch.kernel(op, 'pallas_tpu')
  if isinstance(run, str):
    return run
  odd = sorted({x.dtype.name for x in floats} - _KERNEL_DTYPES)
  if odd:
    return f'it takes float32 and bfloat16, got {", ".join(odd)}'
  if implementation is None and jax.device_count() > 1:
    return ('XLA cannot partition it over several devices by itself; inside '
            'jax.shard_map ask for it by name')
  return dispatch.declines(op, 'pallas_tpu', *args, **kwargs) or run


# The forms of gather_attend.


def _slots(ids, last, block, slots):
  """Which slots the ids name, [B, T, S, M block], and which of them count."""
  at = ids[..., None] * block + jnp.arange(block, dtype=jnp.int32).reshape(
      1, 1, 1, 1, block)
  seen = (ids >= 0)[..., None] & (at < slots) & (
      at <= last[:, :, None, None, None])
  flat = (*ids.shape[:3], -1)
  return at.reshape(flat), seen.reshape(flat)


def _masked(q, k, v, ids, last, sink, *, block, scale):
  """Every key is scored."""
  slots = k[0].shape[2]
  at, seen = _slots(ids, last, block, slots)
  visible = select.to_mask(jnp.where(seen, at, -1), slots).swapaxes(1, 2)
  segment = attend.Segment(k, k[0] if v is None else v, visible)
  return attend.attend(q, [segment], scale=scale, sink=sink)


def _gathered(q, k, v, ids, last, sink, *, block, scale):
  """Gathers for as many queries at a time as have room."""
  batch, length, sets, count = ids.shape
  width = sum(x.shape[-1] for x in (*k, *_parts(v)))
  size = max(1, _GATHERED // max(1, batch * sets * count * block * width))

  def piece(q, ids, last):
    return _gather(q, k, v, ids, last, sink, block=block, scale=scale)

  if size >= length:
    return piece(q, ids, last)
  pieces = -(-length // size)
  size = -(-length // pieces)

  def cut(x, fill=0):
    x = jnp.pad(x, [(0, 0), (0, pieces * size - length)]
                + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, pieces, size, *x.shape[2:]), 1, 0)

  found = jax.lax.map(
      lambda x: jax.checkpoint(piece)(*x),
      (tuple(map(cut, q)), cut(ids, -1), cut(last)))
  return jax.tree.map(
      lambda x: jnp.moveaxis(x, 0, 1).reshape(
          batch, -1, *x.shape[3:])[:, :length], found)


def _gather(q, k, v, ids, last, sink, *, block, scale):
  batch, length, sets, _ = ids.shape
  groups, slots = k[0].shape[1:3]
  at, seen = _slots(ids, last, block, slots)
  by_group = jnp.where(seen, at, 0).swapaxes(1, 2).reshape(
      batch, groups, -1, 1)
  # Queries stand beside rows, each with keys of its own.
  rows = batch * length
  seen = seen.reshape(rows, sets, 1, -1)

  def take(x):
    x = jnp.take_along_axis(x, by_group, axis=2)
    x = x.reshape(batch, sets, length, -1, x.shape[-1]).swapaxes(1, 2)
    x = x.reshape(rows, sets, -1, x.shape[-1])
    return jnp.where(seen.swapaxes(2, 3), x, jnp.zeros((), x.dtype))

  keys = tuple(map(take, k))
  segment = attend.Segment(keys, keys[0] if v is None else take(v), seen)
  q = tuple(x.reshape(rows, 1, *x.shape[2:]) for x in q)
  found = attend.attend(q, [segment], scale=scale, sink=sink)
  return jax.tree.map(
      lambda x: x.reshape(batch, length, *x.shape[2:]), found)


# The forms of index_scores.


def _at_once(q, w, k, count, *, relu):
  del count
  return index.scores(q, w, k, relu=relu)


def _tiled(q, w, k, count, *, relu):
  """Some keys at a time, where there are many."""
  slots = k.shape[1]
  tiles = max(1, slots // _SCORED)
  size = math.ceil(slots / tiles)
  if tiles == 1:
    return _at_once(q, w, k, count, relu=relu)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def tile(begin):
    # The last one reaches back and scores some keys again.
    keys = jax.lax.dynamic_slice_in_dim(k, begin, size, axis=1)
    return index.scores(q, w, keys, relu=relu)

  begins = [min(i * size, slots - size) for i in range(tiles)]
  found = jnp.moveaxis(
      jax.lax.map(tile, jnp.asarray(begins, jnp.int32)), 0, 2)
  extra = tiles * size - slots
  head = found[:, :, :-1].reshape(*found.shape[:2], -1)
  return jnp.concatenate([head, found[:, :, -1, extra:]], axis=-1)
