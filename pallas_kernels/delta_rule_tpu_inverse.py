"""Inverse of the unit triangular pair matrices of a pack, on a TPU."""

import jax.numpy as jnp

from pallas_kernels import delta_rule_tpu_chunk as chunk

_BASE = 16  # blocks of this size are inverted without the MXU
_TILE = 8  # rows of a register


def inverse(lower, pack):
  """Inverts I + lower for strictly lower triangular pairs, yields in turns.

  Blocks of 16 by substitution, then block by block: no power of `lower` is
  formed. Products are float32, or three of bfloat16, which is as good here.
  """
  size, rows = lower.shape
  lane = chunk.iota((_BASE, rows), 1)
  block = (lane & (size - 1)) >> 4
  diagonal = jnp.zeros((_BASE, rows), jnp.float32)
  for r in range(size // _BASE):
    here = lower[r * _BASE : (r + 1) * _BASE]
    diagonal = jnp.where(block == r, here, diagonal)
  base = yield from _substitute(diagonal)
  result = jnp.concatenate([
      jnp.where(block == r, base, 0.0) for r in range(size // _BASE)
  ], axis=0)
  b = _BASE
  while b < size:
    below = chunk.split_rows(lower, b)[1]
    below = jnp.where(chunk.right_mask(b, pack), below, 0.0)
    below = _product3(below, result, pack)
    yield
    below = chunk.join_rows(jnp.zeros_like(below), below, b)
    left, right = chunk.split_rows(result, b)
    result = chunk.join_rows(left, right - _product3(right, below, pack), b)
    yield
    b *= 2
  return result


def _substitute(lower):
  """Inverts I + the blocks of 16 that stand side by side, [16, p * C]."""
  lane = chunk.iota((_TILE, lower.shape[1]), 1)
  row = chunk.iota((_TILE, lower.shape[1]), 0)
  one = lambda i: jnp.where(lane & (_BASE - 1) == i, 1.0, 0.0)
  top, bottom = one(row), one(row + _TILE)
  for j in range(_BASE - 1):
    column = lambda x, j=j: jnp.take_along_axis(
        x, (lane & ~(_BASE - 1)) + j, axis=1, mode='promise_in_bounds'
    )
    if j < _TILE:
      pivot = top[j : j + 1]
      top = top - column(lower[:_TILE]) * pivot
    else:
      pivot = bottom[j - _TILE : j - _TILE + 1]
    bottom = bottom - column(lower[_TILE:]) * pivot
    yield
  return jnp.concatenate([top, bottom], axis=0)


def _product3(a, b, pack):
  """a b of every head, for pairs a [m, p * C] and b [C, p * C]."""
  if pack.exact:
    return chunk.product(a, block_diagonal(b, pack), True)
  m = a.shape[0]
  a_high, b_high = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
  a_low = (a - a_high.astype(jnp.float32)).astype(jnp.bfloat16)
  b_low = (b - b_high.astype(jnp.float32)).astype(jnp.bfloat16)
  b_high = block_diagonal(b_high, pack)
  both = chunk.product(jnp.concatenate([a_high, a_low], axis=0), b_high, False)
  low = chunk.product(a_high, block_diagonal(b_low, pack), False)
  return both[:m] + (both[m:] + low)


def block_diagonal(x, pack):
  """Pairs [C, p * C] as [p * C, p * C], zero between heads."""
  if pack.heads == 1:
    return x
  head = chunk.iota(x.shape, 1) >> (pack.size.bit_length() - 1)
  zero = jnp.zeros_like(x)
  return jnp.concatenate([
      jnp.where(head == h, x, zero) for h in range(pack.heads)
  ], axis=0)
