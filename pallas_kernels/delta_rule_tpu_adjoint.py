"""Gradients of the pair matrices of one chunk, on a TPU.

The adjoint of `delta_rule_tpu_chunk`. Gradients by a log decay are summed down
the decay tree, over exactly the pairs that span it: no sum has terms that must
cancel, so that nothing leaks across a reset.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import delta_rule_tpu_chunk as chunk

_TILE = 8


def apply_transposed(turned, x, pack):
  """Multiplies rows x by the transposes of pairs; turned is pairs.T."""
  return jnp.concatenate([
      chunk.product(
          chunk.head_rows(turned, h, pack), chunk.head_rows(x, h, pack),
          pack.exact,
      ) for h in range(pack.heads)
  ], axis=0)


def lower(x, pack, *, strict):
  """Sets pairs above the diagonal to zero."""
  i = chunk.iota(x.shape, 0)
  j = chunk.iota(x.shape, 1) & (pack.size - 1)
  return jnp.where(i > j if strict else i >= j, x, 0.0)


def channel_adjoint(
    q, e, k, decay, d_reading, d_erasing, d_pre, d_suf, d_tot, pack
):
  """Adjoint of `channel_intra`; yields in turns.

  Args:
    q, e, k: rows; e may be None.
    decay: `Decay`.
    d_reading, d_erasing: by A and L, [C, p * C].
    d_pre, d_suf: by the logarithms of pre and suf, rows.
    d_tot: by the logarithm of tot, one [1, K] per head.
    pack: `Pack`.

  Returns:
    dq, de, dk and the gradient of the log decay, but for the diagonal of A.
  """
  rows, width = q.shape
  pairs = d_reading
  if e is not None:
    pairs = jnp.concatenate([d_reading, d_erasing], axis=0)
  turned = pairs.T
  top = chunk.iota((_TILE, width), 0) == 0
  d_tot = jnp.stack([jnp.where(top, x, 0.0) for x in d_tot])
  zeros = jnp.zeros((rows, width), jnp.float32)
  grads = zeros, zeros, zeros
  for level in reversed(range(len(decay.between))):
    b = 1 << level
    between = decay.between[level]
    if b >= _TILE:
      grads, d_pre, d_suf, d_tot = _high_level(
          b, between, q, e, k, pairs, turned, grads, d_pre, d_suf, d_tot, pack
      )
      yield
      continue
    if 2 * b == _TILE:  # from sums over rows to the sum in every row
      tile = (rows // _TILE, _TILE, width)
      d_tot, d_pre, d_suf = [x.reshape(tile) for x in (d_tot, d_pre, d_suf)]
      d_tot = _sum_blocks(d_tot, _TILE)
    grads, d_pre, d_suf, d_tot = _low_level(
        b, between, q, e, k, pairs, turned, grads, d_pre, d_suf, d_tot, pack
    )
    yield
  dq, de, dk = grads
  return dq, None if e is None else de, dk, (d_pre + d_tot).reshape(q.shape)


def _high_level(
    b, between, q, e, k, pairs, turned, grads, d_pre, d_suf, d_tot, pack
):
  pre, suf = between
  rows, width = q.shape
  q, k = chunk.split_rows(q, b)[1], chunk.split_rows(k, b)[0]
  e = None if e is None else chunk.split_rows(e, b)[1]
  zeros = jnp.zeros_like(pre)
  keys = chunk.join_rows(k * suf, zeros, b)
  mask = chunk.right_mask(b, pack)
  masked = [
      jnp.where(mask, chunk.split_rows(x, b)[1], 0.0)
      for x in _parts(pairs, pack)
  ]
  d_rows = chunk.apply_pairs(jnp.concatenate(masked), keys, pack)
  d_rows = [x * pre for x in _rows(d_rows, pack, e)]
  queries = [
      chunk.join_rows(zeros, x * pre, b) for x in (q, e) if x is not None
  ]
  left = chunk.split_rows(turned, b)[0]
  row = lambda i: ((i & ~(b - 1)) << 1) | (i & (b - 1))
  left = jnp.where(_turned_mask(left.shape, b, pack, row), left, 0.0)
  d_keys = _by_head(left, queries, pack) * suf
  dq, de, dk = grads
  dq = _add_half(dq, d_rows[0], b, 1)
  dk = _add_half(dk, d_keys, b, 0)
  by_row = q * d_rows[0]
  if e is not None:
    de = _add_half(de, d_rows[1], b, 1)
    by_row += e * d_rows[1]
  tiles = (rows // (2 * b), b // _TILE, _TILE, width)
  over = lambda x, side: jnp.sum(
      chunk.split_rows(x, b)[side].reshape(tiles), axis=1
  )
  d_tot = chunk.interleave(d_tot + over(d_pre, 1), d_tot + over(d_suf, 0))
  d_tot = d_tot.reshape(rows // b, _TILE, width)
  d_pre = _add_half(d_pre, by_row, b, 1)
  d_suf = _add_half(d_suf, k * d_keys, b, 0)
  return (dq, de, dk), d_pre, d_suf, d_tot


def _low_level(
    b, between, q, e, k, pairs, turned, grads, d_pre, d_suf, d_tot, pack
):
  mask = chunk.level_mask((pack.size, pack.rows), b, pack, lambda i: i)
  masked = [jnp.where(mask, x, 0.0) for x in _parts(pairs, pack)]
  d_rows = chunk.apply_pairs(jnp.concatenate(masked), k * between, pack)
  d_rows = [x * between for x in _rows(d_rows, pack, e)]
  queries = [x * between for x in (q, e) if x is not None]
  mask = _turned_mask(turned.shape, b, pack, lambda i: i)
  left = jnp.where(mask, turned, 0.0)
  d_keys = _by_head(left, queries, pack) * between
  dq, de, dk = grads
  dq, dk = dq + d_rows[0], dk + d_keys
  by_row = q * d_rows[0]
  if e is not None:
    de = de + d_rows[1]
    by_row += e * d_rows[1]
  right = chunk.iota(d_pre.shape, 1) & b != 0
  half = _sum_blocks(jnp.where(right, d_pre, d_suf), b)
  d_tot = d_tot + chunk.swap(half, b)
  d_pre = d_pre + by_row.reshape(d_pre.shape)
  d_suf = d_suf + (k * d_keys).reshape(d_pre.shape)
  return (dq, de, dk), d_pre, d_suf, d_tot


def _parts(pairs, pack):
  return [
      pairs[i : i + pack.size] for i in range(0, pairs.shape[0], pack.size)
  ]


def _rows(x, pack, e):
  """Splits what `apply_pairs` made of joined pairs into that of each."""
  if e is None:
    return [x]
  m = x.shape[0] // (2 * pack.heads)
  return [
      jnp.concatenate([
          x[(2 * h + part) * m : (2 * h + part + 1) * m]
          for h in range(pack.heads)
      ], axis=0) for part in (0, 1)
  ]


def _by_head(turned, queries, pack):
  """Products of turned pairs [p * m, 2 C] with joined queries."""
  m = turned.shape[0] // pack.heads
  return jnp.concatenate([
      chunk.product(
          turned[h * m : (h + 1) * m],
          jnp.concatenate([chunk.head_rows(x, h, pack) for x in queries]),
          pack.exact,
      ) for h in range(pack.heads)
  ], axis=0)


def _turned_mask(shape, b, pack, row):
  j = row(chunk.iota(shape, 0)) & (pack.size - 1)
  i = chunk.iota(shape, 1) & (pack.size - 1)
  return ((i ^ j) & ~(b - 1) == b) & (i & b != 0)


def _add_half(x, half, b, side):
  left, right = chunk.split_rows(x, b)
  if side:
    return chunk.join_rows(left, right + half, b)
  return chunk.join_rows(left + half, right, b)


def _sum_blocks(x, b):
  """Sums over the blocks of b rows of tiles [.., 8, D], in every row."""
  step = 1
  while step < b:
    x = x + chunk.swap(x, step)
    step *= 2
  return x


def head_adjoint(
    q, e, k, decay, intra, d_reading, d_erasing, d_pre, d_suf, d_tot, pack
):
  """`channel_adjoint` for one decay per head, the diagonal included.

  `intra` are A and L; d_pre and d_suf are columns, d_tot one [1, 1] per head.
  In place of the gradient of the log decay it returns what `sum_spans` takes.
  """
  by_pair = d_reading * intra[0]
  pairs = [d_reading * decay.between]
  queries = [q]
  if e is not None:
    by_pair += d_erasing * intra[1]
    pairs.append(d_erasing * decay.between)
    queries.append(e)
  pairs = jnp.concatenate(pairs)
  d_rows = _rows(chunk.apply_pairs(pairs, k, pack), pack, e)
  dk = _by_head(pairs.T, queries, pack)
  spans = lower(_suffix_sum(by_pair), pack, strict=True)
  last = chunk.iota((pack.size, 1), 0) == pack.size - 1
  d_pre += jnp.concatenate([jnp.where(last, x, 0.0) for x in d_tot])
  d_decay = pairs_to_column(spans, pack), d_pre, d_suf
  return d_rows[0], None if e is None else d_rows[1], dk, d_decay


def _suffix_sum(x):
  """Inclusive sums over the rows from the last, [C, D]."""
  size, row, b = x.shape[0], chunk.iota(x.shape, 0), 1
  while b < size:
    x = x + jnp.where(row < size - b, pltpu.roll(x, size - b, 0), 0.0)
    b *= 2
  return x


def sum_spans(own, d_pre, d_suf, size):
  """The gradient of log decays, all [packs, p * C].

  A decay to token i is made of those up to i, one from j of those after j.
  """
  before = chunk.lane_prefix(chunk.lane_shift(d_suf, size, 1), size)
  return own + chunk.lane_suffix(d_pre, size) + before


def pairs_to_column(x, pack):
  """Sums the lanes of each head, from [C, p * C] to [p * C, 1]."""
  head = chunk.iota(x.shape, 1) >> (pack.size.bit_length() - 1)
  return jnp.concatenate([
      jnp.sum(jnp.where(head == h, x, 0.0), axis=1, keepdims=True)
      for h in range(pack.heads)
  ], axis=0)
