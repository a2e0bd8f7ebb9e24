"""What the tokens of one chunk of the delta rule are to each other, on a TPU.

The kernels work on packs: the chunks of p heads, one below the other, so that
p * C rows fill the 128 lanes once they stand in a pair matrix. Two forms:

  rows   [p * C, D]   one row per head and token
  pairs  [C, p * C]   row: token i; lane: head and token j

Log decays have base 2. All is float32 but for the operands of products, which
are bfloat16 unless `exact`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

_TILE = 8  # rows of a register
_ENDED = object()


class Pack(NamedTuple):
  """Static facts of a pack: C tokens of each of `heads` heads."""

  size: int
  heads: int
  exact: bool

  @property
  def rows(self):
    return self.size * self.heads

  def operand(self, x):
    """x as a product takes it."""
    return x if self.exact else x.astype(jnp.bfloat16)


class Decay(NamedTuple):
  """Decays within a chunk: products over exactly the tokens they span.

  Attributes:
    pre: from the chunk's start to a token, [p * C, K or 1].
    suf: from a token to the chunk's end, [p * C, K or 1].
    tot: across the chunk, one [1, K or 1] per head.
    between: per channel a list over levels, per head the pairs themselves.
  """

  pre: jax.Array
  suf: jax.Array
  tot: list
  between: object


def in_turns(tasks):
  """Runs generators in turns until all have ended.

  They yield where another may go on: so that independent operations of several
  packs stand side by side in the program, and hide each other's latency.
  """
  while tasks:
    tasks = [task for task in tasks if next(task, _ENDED) is not _ENDED]


def product(a, b, exact):
  """a @ b."""
  return _dot(a, b, (((1,), (0,)), ((), ())), exact)


def product_nt(a, b, exact):
  """a @ b.T."""
  return _dot(a, b, (((1,), (1,)), ((), ())), exact)


def _dot(a, b, dimensions, exact):
  if exact:
    return lax.dot_general(
        a.astype(jnp.float32), b.astype(jnp.float32), dimensions,
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )
  return lax.dot_general(
      a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), dimensions,
      preferred_element_type=jnp.float32,
  )


def iota(shape, axis):
  """Indices along an axis."""
  return lax.broadcasted_iota(jnp.int32, shape, axis)


def head_rows(x, h, pack):
  """The rows of head h."""
  return x[h * pack.size : (h + 1) * pack.size]


def to_pairs(x, pack):
  """From every pair of rows [p * m, p * C] to those of one head [m, p * C]."""
  m = x.shape[0] // pack.heads
  out = x[:m]
  lane = iota(out.shape, 1)
  for h in range(1, pack.heads):
    out = jnp.where(lane >= h * pack.size, x[h * m : (h + 1) * m], out)
  return out


def apply_pairs(pairs, x, pack):
  """Multiplies rows [p * C, D] by pairs [m, p * C], head by head."""
  if pack.heads == 1:
    return product(pairs, x, pack.exact)
  out = []
  for h in range(pack.heads):
    low, high = h * pack.size, (h + 1) * pack.size
    out.append(product(pairs[:, low:high], x[low:high], pack.exact))
  return jnp.concatenate(out, axis=0)


def columns_to_pairs(column, pack):
  """Spreads one number per row, [p * C, 1], over the lanes of its head."""
  shape = (pack.size, pack.rows)
  out = jnp.broadcast_to(head_rows(column, 0, pack), shape)
  lane = iota(shape, 1)
  for h in range(1, pack.heads):
    out = jnp.where(lane >= h * pack.size, head_rows(column, h, pack), out)
  return out


def level_mask(shape, b, pack, row):
  """True where tokens i and j are separated at level b, i the later one.

  `row` maps the row of `shape` to i.
  """
  i, j = row(iota(shape, 0)), iota(shape, 1) & (pack.size - 1)
  return ((i ^ j) & ~(b - 1) == b) & (i & b != 0)


# Decays. Two tokens are separated at exactly one level of a binary tree, where
# the earlier is in the left and the later in the right half of a block of 2b.


def channel_intra(g, q, e, k, pack):
  """Returns `Decay`, A and L (without gate) for log decays [p * C, K].

  L is None if e is None.
  """
  rows, width = g.shape
  pre = tot = jnp.exp2(g).reshape(rows // _TILE, _TILE, width)
  suf = jnp.ones_like(pre)
  sublane = iota(pre.shape, 1)
  reading = _diagonal(q, k, pack)
  erasing = None if e is None else jnp.zeros(reading.shape, jnp.float32)
  levels: list = []
  b = 1
  while b < _TILE:
    right = sublane & b != 0
    here = jnp.where(right, pre, suf)
    levels.append(here.reshape(rows, width))
    reading, erasing = _low_pairs(
        b, levels[-1], q, e, k, reading, erasing, pack
    )
    sibling = swap(tot, b)
    here = here * sibling
    pre = jnp.where(right, here, pre)
    suf = jnp.where(right, suf, here)
    tot = tot * sibling
    b *= 2
  while b < pack.size:
    shape = (rows // (2 * b), 2, b // _TILE, _TILE, width)
    left_pre, right_pre = halves(pre.reshape(shape))
    left_suf, right_suf = halves(suf.reshape(shape))
    left_tot, right_tot = halves(tot.reshape(shape[0], 2, 1, _TILE, width))
    levels.append((
        right_pre.reshape(rows // 2, width), left_suf.reshape(rows // 2, width)
    ))
    reading, erasing = _high_pairs(
        b, levels[-1], q, e, k, reading, erasing, pack
    )
    pre = interleave(left_pre, right_pre * left_tot)
    suf = interleave(left_suf * right_tot, right_suf)
    tot = left_tot * right_tot
    b *= 2
  tot = tot.reshape(pack.heads, _TILE, width)
  decay = Decay(
      pre.reshape(rows, width), suf.reshape(rows, width),
      [tot[h, :1] for h in range(pack.heads)], levels,
  )
  return decay, reading, erasing


def swap(x, b):
  """Exchanges rows i and i ^ b within tiles, [.., 8, D]."""
  axis = x.ndim - 2
  back = pltpu.roll(x, b, axis)
  if 2 * b == _TILE:
    return back
  ahead = pltpu.roll(x, _TILE - b, axis)
  return jnp.where(iota(x.shape, axis) & b != 0, back, ahead)


def halves(x):
  """Left and right parts of blocks, [n, 2, ..]."""
  return x[:, 0], x[:, 1]


def interleave(left, right):
  """Undoes `halves`."""
  return jnp.concatenate([left[:, None], right[:, None]], axis=1)


def split_rows(x, b):
  """Left and right rows of the blocks of 2b, [rows / 2, D] each, b >= 8."""
  rows, width = x.shape
  left, right = halves(x.reshape(rows // (2 * b), 2, b, width))
  return left.reshape(rows // 2, width), right.reshape(rows // 2, width)


def join_rows(left, right, b):
  """Undoes `split_rows`."""
  rows, width = left.shape
  shape = (rows // b, b, width)
  return interleave(left.reshape(shape), right.reshape(shape)).reshape(
      2 * rows, width
  )


def _low_pairs(b, between, q, e, k, reading, erasing, pack):
  keys = k * between
  left = q * between
  if e is not None:  # the left rows are free: row i + b of e stands in row i
    right = iota(q.shape, 0) & b != 0
    e = keys if e is k else e * between
    left = jnp.where(right, left, _roll_tiles(e, _TILE - b))
  pairs = to_pairs(product_nt(left, keys, pack.exact), pack)
  mask = level_mask(pairs.shape, b, pack, lambda i: i)
  reading = jnp.where(mask, pairs, reading)
  if e is not None:
    erasing = jnp.where(mask, _roll_tiles(pairs, b), erasing)
  return reading, erasing


def _roll_tiles(x, b):
  """Moves rows down by b, around within each tile."""
  tiles = x.reshape(-1, _TILE, x.shape[-1])
  return pltpu.roll(tiles, b, 1).reshape(x.shape)


def _high_pairs(b, between, q, e, k, reading, erasing, pack):
  pre, suf = between
  k_left, k_right = split_rows(k, b)
  rows = [split_rows(q, b)[1] * pre]
  if e is k:
    k_right = k_right * pre
    rows.append(k_right)
  elif e is not None:
    rows.append(split_rows(e, b)[1] * pre)
  keys = join_rows(k_left * suf, k_right, b)
  pairs = product_nt(jnp.concatenate(rows, axis=0), keys, pack.exact)
  m = pairs.shape[0] // len(rows)
  reading = _place_right(reading, to_pairs(pairs[:m], pack), b, pack)
  if e is not None:
    erasing = _place_right(erasing, to_pairs(pairs[m:], pack), b, pack)
  return reading, erasing


def _diagonal(q, k, pack):
  column = jnp.sum(q * k, axis=1, keepdims=True)
  shape = (pack.size, pack.rows)
  mask = iota(shape, 0) == iota(shape, 1) & (pack.size - 1)
  return jnp.where(mask, columns_to_pairs(column, pack), 0.0)


def right_mask(b, pack):
  """`level_mask` of the right rows alone, [C / 2, p * C]."""
  row = lambda i: ((i & ~(b - 1)) << 1) | b | (i & (b - 1))
  return level_mask((pack.size // 2, pack.rows), b, pack, row)


def _place_right(old, new, b, pack):
  left, right = split_rows(old, b)
  return join_rows(left, jnp.where(right_mask(b, pack), new, right), b)


# One decay per head: heads and tokens along the lanes, all packs at once.


def lane_prefix(x, size):
  """Inclusive sums along the lanes of every block of `size`."""
  lane = iota(x.shape, 1) & (size - 1)
  b = 1
  while b < size:
    x = x + jnp.where(lane >= b, pltpu.roll(x, b, 1), 0.0)
    b *= 2
  return x


def lane_suffix(x, size):
  """Inclusive sums along the lanes of every block of `size`, from its end."""
  lane = iota(x.shape, 1) & (size - 1)
  b = 1
  while b < size:
    ahead = pltpu.roll(x, x.shape[1] - b, 1)
    x = x + jnp.where(lane < size - b, ahead, 0.0)
    b *= 2
  return x


def lane_shift(x, size, by):
  """Moves lanes within every block of `size` by one, on (1) or back (-1)."""
  lane = iota(x.shape, 1) & (size - 1)
  edge = lane == (0 if by == 1 else size - 1)
  return jnp.where(edge, 0.0, pltpu.roll(x, by % x.shape[1], 1))


def head_intra(decay, q, e, k, pack):
  """`channel_intra` for one decay per head.

  `decay` is (log decays [1, p * C], columns pre and suf).
  """
  g, pre, suf = decay
  size = pack.size
  shape = (size, pack.rows)
  i, j = iota(shape, 0), iota(shape, 1) & (size - 1)
  between = jnp.exp2(_spans(g, pack))
  tot = [head_rows(pre, h, pack)[size - 1 :] for h in range(pack.heads)]
  decay = Decay(pre, suf, tot, between)
  left = q if e is None else jnp.concatenate([q, e], axis=0)
  pairs = product_nt(left, k, pack.exact)
  reading = to_pairs(pairs[: pack.rows], pack) * between
  reading = jnp.where(i >= j, reading, 0.0)
  if e is None:
    return decay, reading, None
  erasing = to_pairs(pairs[pack.rows :], pack) * between
  return decay, reading, jnp.where(i > j, erasing, 0.0)


def _spans(g, pack):
  """Sums of g over the tokens after j, up to i, as pairs; 0 where i <= j.

  A product with ones: exact where g is split into three of bfloat16.
  """
  shape = (pack.size, pack.rows)
  until = iota(shape, 0) >= (iota(shape, 1) & (pack.size - 1))
  t, j = iota((pack.rows,) * 2, 0), iota((pack.rows,) * 2, 1)
  same = (t ^ j) < pack.size
  after = jnp.where(same & (t > j), 1.0, 0.0)
  if pack.exact:
    return product(jnp.where(until, g, 0.0), after, True)
  parts = []
  for _ in range(3):
    part = g.astype(jnp.bfloat16).astype(jnp.float32)
    parts.append(pack.operand(jnp.where(until, part, 0.0)))
    g = g - part
  sums = product(jnp.concatenate(parts), after, False)
  return sums[: shape[0]] + (sums[shape[0] : -shape[0]] + sums[-shape[0] :])
