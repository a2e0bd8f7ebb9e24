"""A state of matrix and tail, and the grid of chunks that advances it.

Two ways over the grid. `walk` takes one chunk of every row at a time, from
wherever the row stands; the arithmetic of a chunk is one program of one shape,
whatever the call, so that bits do not depend on how tokens arrive. `parallel`
is `delta_chunk` up to the last chunk's start, then that chunk; it has a
gradient.

Tails are [B, H, N, D], tokens [B, T, H, D], so that a step multiplies the tail
where it lies.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from statejax.ops import delta_chunk
from statejax.ops.delta_intra import (
  dot,
  intra_chunk,
  join,
  ladder_inverse,
  split,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
  """Carried state of `delta_rule_deferred`; slots past `count` are zero.

  Attributes:
    matrix: S at the last chunk end, [B, HV, K, V] float32.
    count: tokens since, fewer than C, [B] int32.
    k: their keys, [B, HK, N, K] float32, N = C + longest draft.
    u: their residuals, with parity their write * v, [B, HV, N, V].
    log_decay: [B, HV, N, 1 or K].
    erase: with parity the erase gates, [B, HV, N, 1 or K], else None: an entry
      (k, r) is a token that erases nothing and writes r.
  """

  matrix: jax.Array
  count: jax.Array
  k: jax.Array
  u: jax.Array
  log_decay: jax.Array
  erase: jax.Array | None = None


class Tokens(NamedTuple):
  """Tokens in accumulation precision, [B, T, H, D], or entries alike."""

  q: jax.Array | None  # times scale
  k: jax.Array
  u: jax.Array  # write * v
  log_decay: jax.Array
  erase: jax.Array | None  # None for 0


def shapes(rows, key_heads, heads, key, value, *, chunk_size, draft=0,
           decay='head', erase=None) -> dict[str, tuple[int, ...]]:
  """Returns {field of `Deferred`: shape}, without `erase` where it is None."""
  slots = chunk_size + draft
  width = {'head': 1, 'channel': key}
  out: dict[str, tuple[int, ...]] = dict(
      matrix=(rows, heads, key, value), count=(rows,),
      k=(rows, key_heads, slots, key), u=(rows, heads, slots, value),
      log_decay=(rows, heads, slots, width[decay]))
  if erase is not None:
    out['erase'] = (rows, heads, slots, width[erase])
  return out


def checked(count, size):
  """Returns the count in 0..C-1, and where it was not: rows that are lost."""
  return jnp.clip(count, 0, size - 1), (count < 0) | (count >= size)


def where(rows, new, old):
  """Selects whole rows of two trees."""
  def one(a, b):
    return jnp.where(rows.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)
  return jax.tree.map(one, new, old)


def map_tail(function, state):
  """Maps a function over the tail's arrays [B, H, N, D]."""
  names = ('k', 'u', 'log_decay', 'erase')
  return dataclasses.replace(state, **{
      name: jax.tree.map(function, getattr(state, name)) for name in names})


def entries(state):
  """Returns the tail as `Tokens` that read nothing."""
  tokens = jax.tree.map(
      lambda x: jnp.swapaxes(x, 1, 2),
      Tokens(None, state.k, state.u, state.log_decay, state.erase))
  return tokens._replace(q=jnp.zeros_like(tokens.k))


# One chunk.


class _Piece(NamedTuple):
  """A chunk in the layout of `delta_intra`, [B, HK, R, C, D]."""

  q: jax.Array
  k: jax.Array
  e: jax.Array | None
  v: jax.Array
  log_decay: jax.Array


def _piece(x):
  """From [B, H, C, D]; R value heads share a key head."""
  heads = x.k.shape[1]
  group = lambda x: x.reshape(x.shape[0], heads, -1, *x.shape[2:])
  q, k, u, log_decay = map(group, (x.q, x.k, x.u, x.log_decay))
  e = None if x.erase is None else group(x.erase) * k
  return _Piece(q, k, e, u, log_decay)


def _read(x, matrix):
  """Returns y and residuals of a chunk, its keys as they will be, and decay.

  Args:
    x: tokens [B, H, C, D].
    matrix: before the chunk, [B, HV, K, V].

  Returns:
    y, residual: [B, HV, C, V].
    keys: decayed to the chunk's end, [B, HK, R, C, K].
    total: decay of the whole chunk, [B, HK, R, 1 or K].
  """
  x = _piece(x)
  intra = intra_chunk(x)
  state = matrix.reshape(*x.v.shape[:3], *matrix.shape[2:])
  reads = join(x.q * intra.pre, None if x.e is None else x.e * intra.pre)
  y, erased = split(dot('bhrck,bhrkv->bhrcv', reads, state), x.e)
  residual = x.v
  if erased is not None:
    inverse = ladder_inverse(intra.erasing)
    residual = dot('bhrij,bhrjv->bhriv', inverse, x.v - erased)
  y = y + dot('bhrij,bhrjv->bhriv', intra.reading, residual)
  flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
  return flat(y), flat(residual), x.k * intra.suf, intra.tot


def _fold(matrix, full, keys, total, residual):
  """Writes a chunk into the matrix of the rows that are full, one by one.

  Rows are at different phases: a select over all of them would write every
  matrix whenever any row is full.
  """
  order = jnp.argsort(~full, stable=True)
  row = lambda x, b: lax.dynamic_slice_in_dim(x, b, 1)

  def body(i, matrix):
    b = order[i]
    k, r, t, old = (row(x, b) for x in (keys, residual, total, matrix))
    r, old = (x.reshape(*k.shape[:3], *x.shape[2:]) for x in (r, old))
    new = t[..., None] * old + dot('bhrck,bhrcv->bhrkv', k, r)
    return lax.dynamic_update_slice_in_dim(
        matrix, new.reshape(1, *matrix.shape[1:]), b, 0)

  return lax.fori_loop(0, jnp.sum(full), body, matrix)


# The grid, chunk by chunk.


def walk(size, state, x, n_valid, resets):
  """Absorbs tokens; every row takes a chunk, or what its chunk lacks, per turn.

  Args:
    size: C.
    state: `Deferred`.
    x: `Tokens`.
    n_valid: [B].
    resets: [B, T] bool, False at t = 0 and past n_valid, or None.

  Returns:
    y and residuals, [B, T, HV, V], and the state.
  """
  first = lambda x: x[:, :, :size]
  count, lost = checked(state.count, size)
  ends = _document_ends(resets, n_valid, x.k.shape[1])

  def body(carry):
    matrix, tail, count, at, out = carry
    here = jnp.minimum(at, x.k.shape[1] - 1)[:, None]
    if resets is not None:
      border = jnp.take_along_axis(resets, here, axis=1)[:, 0] & (at < n_valid)
      count = jnp.where(border, 0, count)
      matrix = lax.cond(
          jnp.any(border), lambda m: where(~border, m, jnp.zeros_like(m)),
          lambda m: m, matrix)
    end = jnp.take_along_axis(ends, here, axis=1)[:, 0]
    take = jnp.clip(jnp.minimum(size - count, end - at), 0)
    piece = _fill(tail, x, count, take, at)
    # Fences keep the compiler from merging a chunk's arithmetic with what
    # surrounds it, which differs from call to call.
    fenced = lax.optimization_barrier((piece, matrix))
    y, residual, keys, total = lax.optimization_barrier(_read(*fenced))
    full = count + take == size
    matrix = _fold(matrix, full & (take > 0), keys, total, residual)
    if tail.erase is None:
      piece = piece._replace(u=residual, erase=None)
    piece = piece._replace(q=None)
    kept = jax.tree.map(
        lambda x: jnp.where(full[:, None, None, None], 0.0, x), piece)
    tail = where(take > 0, kept, tail)
    out = jax.tree.map(
        lambda o, p: _emit(o, p, count, take, at), out, (y, residual))
    count = jnp.where(full, 0, count + take)
    return matrix, tail, count, at + take, out

  tail = Tokens(None, *map(
      lambda x: jax.tree.map(first, x),
      (state.k, state.u, state.log_decay, state.erase)))
  out = (jnp.zeros_like(x.u),) * 2
  matrix, tail, new_count, _, out = lax.while_loop(
      lambda carry: jnp.any(carry[3] < n_valid), body,
      (state.matrix, tail, count, jnp.zeros_like(count), out))
  y, residual = out
  y = jnp.where((lost & (n_valid > 0))[:, None, None, None], jnp.nan, y)
  put = lambda old, new: new if new.shape == old.shape else old.at[
      :, :, :size].set(new)
  tail = tail._asdict()
  return y, residual, Deferred(
      matrix, jnp.where(n_valid > 0, new_count, state.count), **{
          name: jax.tree.map(put, getattr(state, name), tail[name])
          for name in ('k', 'u', 'log_decay', 'erase')})


def _document_ends(resets, n_valid, length):
  """Index of the first token after the document of each token, [B, T]."""
  n_valid = n_valid[:, None]
  if resets is None:
    return jnp.broadcast_to(n_valid, (n_valid.shape[0], length))
  index = jnp.arange(length)[None]
  starts = jnp.where(resets, index, length)
  after = jnp.pad(starts[:, 1:], [(0, 0), (0, 1)], constant_values=length)
  after = lax.cummin(after, axis=1, reverse=True)
  return jnp.minimum(after, n_valid).astype(n_valid.dtype)


def _fill(tail, x, count, take, at):
  """The tail's entries, then `take` tokens from `at` on, then nothing."""
  size = tail.k.shape[2]
  slot = jnp.arange(size)[None]
  index = jnp.clip(at[:, None] + slot - count[:, None], 0, x.k.shape[1] - 1)
  old = (slot < count[:, None])[:, None, :, None]
  new = (slot >= count[:, None]) & (slot < (count + take)[:, None])
  new = new[:, None, :, None]

  def one(token, entry):
    token = jnp.swapaxes(jnp.take_along_axis(
        token, index[:, :, None, None], axis=1), 1, 2)
    entry = jnp.zeros_like(token) if entry is None else entry
    return jnp.where(new, token, jnp.where(old, entry, 0.0))

  erase = None if x.erase is None else one(x.erase, tail.erase)
  return Tokens(one(x.q, None), one(x.k, tail.k), one(x.u, tail.u),
                one(x.log_decay, tail.log_decay), erase)


def _emit(out, piece, count, take, at):
  """Puts the piece's new rows to their places in time."""
  slot = jnp.arange(piece.shape[2])[None]
  new = (slot >= count[:, None]) & (slot < (count + take)[:, None])
  to = jnp.where(new, at[:, None] + slot - count[:, None], out.shape[1])
  rows = jnp.arange(out.shape[0])[:, None]
  return out.at[rows, to].set(jnp.swapaxes(piece, 1, 2), mode='drop')


# The grid as ordinary chunks, with a gradient.


def parallel(size, state, x, n_valid, resets):
  """As `walk`, for long calls and for gradients; returns y and the state."""
  rows, length = x.k.shape[:2]
  count, lost = checked(state.count, size)
  room = size - 1
  packed = _packed(state, x, count, room)
  total = count + n_valid
  index = jnp.arange(length)[None]
  begin = jnp.zeros_like(total)
  if resets is not None:
    start = jnp.max(jnp.where(resets, index, 0), axis=1).astype(total.dtype)
    begin = jnp.where(start > 0, count + start, 0)
    at = index + count[:, None]
    resets = jnp.zeros((rows, room + length), bool).at[
        jnp.arange(rows)[:, None], at].set(resets)
  rest = (total - begin) % size
  whole = total - rest
  scan_size = min(max(size, 32), 1 << (room + length - 1).bit_length())
  y, matrix = delta_chunk.chunked(
      delta_chunk.Inputs(packed.q, packed.k, packed.u, packed.log_decay,
                         packed.erase, None),
      state.matrix, whole, resets, scale=1.0, chunk_size=scan_size)
  fresh = (begin > 0) & (whole == begin)
  matrix = where(fresh, jnp.zeros_like(matrix), matrix)

  slots = state.k.shape[2]
  slot = jnp.arange(slots)[None]
  piece = jax.tree.map(
      lambda x: _gather(x, whole[:, None] + slot, slot < rest[:, None]), packed)
  piece = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), piece)
  y_rest, residual, _, _ = _read(_padded(piece), matrix)
  y_rest, residual = (
      jnp.swapaxes(x[:, :, :slots], 1, 2) for x in (y_rest, residual))
  place = index + count[:, None]
  at_end = place >= whole[:, None]
  valid = index < n_valid[:, None]
  y = jnp.where(at_end[:, :, None, None], _gather(
      y_rest, place - whole[:, None], valid), _gather(y, place, valid))
  y = jnp.where((lost & (n_valid > 0))[:, None, None, None], jnp.nan, y)
  u = piece.u
  if state.erase is None:
    u = jnp.where((slot < rest[:, None])[:, None, :, None],
                  jnp.swapaxes(residual, 1, 2), 0.0)
  new = Deferred(matrix, rest, piece.k, u, piece.log_decay,
                 None if state.erase is None else piece.erase)
  return y, where(n_valid > 0, new, state)


def _gather(x, index, valid):
  """x[b, index[b, i]] where valid, else zero."""
  index = jnp.clip(index, 0, x.shape[1] - 1)[:, :, None, None]
  return jnp.where(valid[:, :, None, None],
                   jnp.take_along_axis(x, index, axis=1), 0.0)


def _packed(state, x, count, room):
  """The tail's entries and then the tokens, [B, room + T, H, D]."""
  length = x.k.shape[1]
  past = jax.tree.map(lambda x: x[:, :room], entries(state))
  if x.erase is not None and past.erase is None:
    past = past._replace(erase=jnp.zeros(
        (*past.log_decay.shape[:3], x.erase.shape[-1]), x.erase.dtype))
  place = jnp.arange(room + length)[None]
  index = jnp.where(place < count[:, None], place,
                    place - count[:, None] + room)
  valid = place < count[:, None] + length
  return jax.tree.map(
      lambda old, new: _gather(
          jnp.concatenate([old, new], axis=1), index, valid), past, x)


def _padded(piece):
  """A chunk of the next power of two."""
  slots = piece.k.shape[2]
  extra = (1 << (slots - 1).bit_length()) - slots
  if not extra:
    return piece
  return jax.tree.map(
      lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0)]), piece)


# Entries into the tail, and out of it.


def block(size, state, x, n_valid):
  """Reads with the whole tail as one chunk; nothing is folded.

  Returns:
    y and residuals, [B, T, HV, V].
  """
  count, lost = checked(state.count, size)
  tail = Tokens(None, state.k, state.u, state.log_decay, state.erase)
  piece = _fill(tail, x, count, n_valid, jnp.zeros_like(count))
  out = _read(_padded(piece), state.matrix)[:2]
  index = count[:, None] + jnp.arange(x.k.shape[1])[None]
  valid = jnp.arange(x.k.shape[1])[None] < n_valid[:, None]
  y, residual = (_gather(jnp.swapaxes(x, 1, 2), index, valid) for x in out)
  y = jnp.where((lost & (n_valid > 0))[:, None, None, None], jnp.nan, y)
  return y, residual


def append(state, x, n_valid):
  """Puts tokens [B, T, H, D] behind the tail's entries."""
  zero = jnp.zeros_like(state.count)
  tail = Tokens(None, state.k, state.u, state.log_decay, state.erase)
  if state.erase is None:
    x = x._replace(erase=None)
  new = _fill(tail, x, state.count, n_valid, zero)._asdict()
  del new['q']
  new = dataclasses.replace(state, count=state.count + n_valid, **new)
  return where(n_valid > 0, new, state)


def append_one(tail, entry, at):
  """Puts [B, H, 1, D] to slot at[b] of [B, H, N, D]; past the end: nowhere."""
  rows = jnp.arange(at.shape[0])
  return tail.at[rows, :, at].set(entry[:, :, 0], mode='drop')


def fold_full(state, size, full):
  """Folds the tails of the rows that are full, one by one, and empties them."""
  order = jnp.argsort(~full, stable=True)
  heads, groups = state.k.shape[1], state.u.shape[1] // state.k.shape[1]
  split = lambda x: x.reshape(1, heads, groups, *x.shape[2:])
  strict = jnp.arange(size)[:, None] < jnp.arange(size)[None]
  strict = strict.astype(state.matrix.dtype)

  def body(i, arrays):
    matrix, tail = arrays
    b = order[i]
    row = lambda x: lax.dynamic_slice_in_dim(x, b, 1)
    g = split(jnp.maximum(row(tail[2])[:, :, :size], -1e4))
    later = jnp.exp(dot('bhrtd,jt->bhrjd', g, strict))
    keys = row(tail[0])[:, :, None, :size] * later
    total = jnp.exp(jnp.sum(g, axis=3))
    new = total[..., None] * split(row(matrix)) + dot(
        'bhrck,bhrcv->bhrkv', keys, split(row(tail[1])[:, :, :size]))
    matrix = lax.dynamic_update_slice_in_dim(
        matrix, new.reshape(1, *matrix.shape[1:]), b, 0)
    clear = lambda x: lax.dynamic_update_slice_in_dim(
        x, jnp.zeros((1, *x.shape[1:]), x.dtype), b, 0)
    return matrix, tuple(map(clear, tail))

  matrix, (k, u, log_decay) = lax.fori_loop(
      0, jnp.sum(full), body,
      (state.matrix, (state.k, state.u, state.log_decay)))
  return dataclasses.replace(
      state, matrix=matrix, k=k, u=u, log_decay=log_decay,
      count=jnp.where(full, 0, state.count))
