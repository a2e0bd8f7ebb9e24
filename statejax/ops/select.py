"""Choosing the k best columns: score descending, position ascending.

One tie rule for the project, so that a query chooses the same whatever chunk,
batch or shard computes it. Exact ties are common: a ReLU makes them, and text
that repeats. Equal keys in products of other shapes have scores that differ in
their last bits, so scores are compared to 13 bits only. Noise of 2e-7 of a
score then parts equal ones only where it straddles a step of 2^-12; where
weighted heads cancel it is larger, and 3 of 1,000 fell on two sides of a step.
"""

import math

import jax
import jax.numpy as jnp

_BITS = 12
# The largest number of so many bits behind the first.
_LARGEST = (2 - 2.0 ** -_BITS) * 2.0 ** 127
# Columns of a part of the first stage, at least.
_PART = 8192
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)


def top(scores, visible, k, forced=None):
  """Returns the k best visible columns, best first.

  Forced columns come before all others, inside k, by position. Scores are
  compared as float32 rounded to 13 significant bits, -0.0 and numbers below its
  normal range as 0.0, as accelerators do. A score of -inf is not chosen; NaN,
  like +inf, counts as the largest number.

  Args:
    scores: [..., N], any float dtype; anything where not visible.
    visible: [..., N] bool.
    k: at most so many.
    forced: [..., N] bool or None; forced columns that are not visible are not
      chosen.

  Returns:
    [..., k] int32; -1 past the number of visible columns.

  Raises:
    ValueError: k is negative, or shapes differ.

  Reference: `jax.lax.top_k` returns equal elements lower index first.
  """
  key = _key(scores, visible, k, forced)
  return _pad(*_best(key, k), k)


def top_two_stage(scores, visible, k, parts, forced=None):
  """`top` in two stages: the best of each part, then the best of those.

  The same ids for any number of parts: a part keeps the tie rule, and parts
  follow each other in the order of their positions. Needs less memory for long
  rows, and is what shards of a store do.

  Args:
    scores: [..., N].
    visible: [..., N] bool.
    k: at most so many.
    parts: pieces into which N is cut, >= 1; the last may be shorter.
    forced: [..., N] bool or None.

  Returns:
    [..., k] int32; -1 past the number of visible columns.

  Raises:
    ValueError: k is negative, parts is below 1, or shapes differ.
  """
  if parts < 1:
    raise ValueError(f'top_two_stage: expected parts >= 1, got {parts}.')
  if parts == 1:
    return top(scores, visible, k, forced)
  key = _key(scores, visible, k, forced)
  length = key.shape[-1]
  width = -(-length // parts)
  key = jnp.pad(key, [(0, 0)] * (key.ndim - 1) + [(0, parts * width - length)],
                constant_values=-jnp.inf)
  values, index = _best(key.reshape(*key.shape[:-1], parts, width), k)
  index = index + width * jnp.arange(parts, dtype=jnp.int32).reshape(
      (1,) * (key.ndim - 1) + (parts, 1))
  flat = (*key.shape[:-1], parts * values.shape[-1])
  values, order = _best(values.reshape(flat), k)
  return _pad(values, jnp.take_along_axis(index.reshape(flat), order, axis=-1),
              k)


def top_mask(scores, visible, k, forced=None):
  """The set that `top` returns, as a mask, without sorting.

  The k-th largest key is found bit by bit, 32 counts over N; of the columns
  equal to it the first ones fill up k.

  Args:
    scores: [..., N].
    visible: [..., N] bool.
    k: at most so many.
    forced: [..., N] bool or None.

  Returns:
    [..., N] bool; at most k are true in a row.

  Raises:
    ValueError: k is negative, or shapes differ.
  """
  key = _key(scores, visible, k, forced)
  bits = jax.lax.bitcast_convert_type(key, jnp.uint32)
  high = jnp.uint32(1 << 31)
  # Order-preserving: negative floats descend with their bits.
  bits = jnp.where(bits >= high, ~bits, bits | high)
  count = lambda mask: jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)

  def one(i, least):
    tried = least | (high >> i.astype(jnp.uint32))
    return jnp.where(count(bits >= tried) >= k, tried, least)

  # The largest number that k columns reach; 0 where there are fewer.
  least = jax.lax.fori_loop(
      0, 32, one, jnp.zeros((*key.shape[:-1], 1), jnp.uint32))
  above, equal = bits > least, bits == least
  order = jnp.cumsum(equal, axis=-1, dtype=jnp.int32)
  return (above | (equal & (order <= k - count(above)))) & (key > -jnp.inf)


def to_mask(ids, columns):
  """The set of ids as a mask.

  Args:
    ids: [..., k] int32, -1 for none.
    columns: N.

  Returns:
    [..., N] bool.
  """
  rows = math.prod(ids.shape[:-1])
  row = jnp.arange(rows, dtype=jnp.int32)[:, None]
  # A negative index would count from the end.
  flat = jnp.where(ids < 0, columns, ids).reshape(rows, ids.shape[-1])
  mask = jnp.zeros((rows, columns), bool)
  mask = mask.at[row, flat].set(True, mode='drop')
  return mask.reshape(*ids.shape[:-1], columns)


def choose(scores, visible, k, forced=None):
  """`top` where it is worth gathering what is chosen, else `top_mask`.

  Args:
    scores: [B, ..., T, N].
    visible: [B, ..., T, N] bool.
    k: at most so many.
    forced: [B, ..., T, N] bool or None.

  Returns:
    ids [B, ..., k] int32 for one query of more than k columns; else a mask
    [B, ..., T, N] bool.
  """
  if scores.shape[-2] > 1 or scores.shape[-1] <= k:
    return top_mask(scores, visible, k, forced)
  # One sort of a long row is the faster one on a CPU.
  parts = 1 if jax.default_backend() == 'cpu' else stages(scores.shape[-1], k)
  return top_two_stage(scores, visible, k, parts, forced)[..., 0, :]


def stages(columns, k):
  """Parts of `top_two_stage` for so many columns, of which k are chosen."""
  return max(1, columns // max(_PART, 4 * k))


def take(ids, *arrays):
  """Gathers chosen rows of a store.

  Args:
    ids: [B, k] int32; those below 0 or past the store are left out.
    *arrays: [B, N, D] each, of one N.

  Returns:
    which ids are rows of the store, [B, k] bool, and the rows [B, k, D] of
    each array; what is left out is row 0.
  """
  found = (ids >= 0) & (ids < arrays[0].shape[1])
  at = jnp.where(found, ids, 0)[..., None]
  return found, *(jnp.take_along_axis(a, at, axis=1) for a in arrays)


def _key(scores, visible, k, forced):
  """Float32 that sorts as the rule says; -inf is never chosen."""
  shapes = {x.shape for x in (scores, visible, forced) if x is not None}
  if k < 0 or len(shapes) != 1:
    raise ValueError(f'select: expected k >= 0 and scores, visible and forced '
                     f'of one shape [..., N], got k={k}, {sorted(shapes)}; '
                     f'broadcast them first.')
  key = jax.lax.stop_gradient(scores).astype(jnp.float32)
  finite = key > -jnp.inf
  key = jax.lax.reduce_precision(key, exponent_bits=8, mantissa_bits=_BITS)
  largest = jnp.float32(_LARGEST)
  key = jnp.where(jnp.isnan(key) | (key > largest), largest, key)
  key = jnp.where(finite & (key < -largest), -largest, key)
  key = jnp.where(jnp.abs(key) < jnp.float32(_SMALLEST), jnp.float32(0), key)
  if forced is not None:
    key = jnp.where(forced, jnp.float32(jnp.inf), key)
  return jnp.where(visible, key, jnp.float32(-jnp.inf))


def _best(key, k):
  values, index = jax.lax.top_k(key, min(k, key.shape[-1]))
  return values, index.astype(jnp.int32)


def _pad(values, index, k):
  ids = jnp.where(values > -jnp.inf, index, -1)
  missing = [(0, 0)] * (ids.ndim - 1) + [(0, k - ids.shape[-1])]
  return jnp.pad(ids, missing, constant_values=-1)
