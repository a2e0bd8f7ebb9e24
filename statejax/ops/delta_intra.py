"""What the tokens of one chunk of the delta rule are to each other.

The part of `delta_chunk` that does not depend on the state: decays, the pair
matrices A (reading) and L (erasing), their gradients, and the inverse of I + L.

Arrays are [B, HK, R, C, D]. Queries and erasing keys are multiplied by the
same things, so they are joined along C; without erasing keys e is None.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# exp is 0 below this in every float type; -inf itself would give 0 * -inf.
_NO_MEMORY = -1e4


class Intra(NamedTuple):
  """What the tokens of a chunk are to each other, whatever the state."""

  pre: jax.Array  # decay from the chunk's start to a token, [.., C, 1 or K]
  suf: jax.Array  # decay from a token to the chunk's end, [.., C, 1 or K]
  tot: jax.Array  # decay across the chunk, [.., 1 or K]
  reading: jax.Array  # A, [B, HK, R, C, C]
  erasing: jax.Array | None  # L, [B, HK, R, C, C]
  saved: object  # for the adjoint


def dot(spec, a, b):
  """An einsum that no accelerator rounds."""
  return jnp.einsum(
      spec, a, b, precision=lax.Precision.HIGHEST,
      preferred_element_type=a.dtype,
  )


def join(a, b):
  """Joins along C; with None there is nothing to join."""
  return a if b is None else jnp.concatenate([a, b], axis=-2)


def split(x, e):
  """Undoes `join(q, e)`."""
  if e is None:
    return x, None
  size = e.shape[-2]
  return x[..., :size, :], x[..., size:, :]


def sum_last(x):
  """Sums the last axis by a product, which XLA on CPU does much faster."""
  return dot('...d,d->...', x, jnp.ones(x.shape[-1:], x.dtype))


def sum_groups(x):
  """Sums R, kept as 1, by additions: XLA on CPU fuses those, not the sum."""
  parts = [x[:, :, r : r + 1] for r in range(x.shape[2])]
  return functools.reduce(operator.add, parts)


def ladder_inverse(lower):
  """Inverts I + lower, strictly lower triangular [.., C, C].

  After the step with b the result inverts every diagonal block of size 2b. No
  power of `lower` is formed: as stable as substitution, but only products.
  """
  size = lower.shape[-1]
  i = jnp.arange(size)
  result = jnp.eye(size, dtype=lower.dtype)[None, None, None]
  result = jnp.broadcast_to(result, lower.shape)
  zero = jnp.zeros((), lower.dtype)
  b = 1
  while b < size:
    separated = (i[:, None] // b == i[None, :] // b + 1) & (
        i[:, None] // (2 * b) == i[None, :] // (2 * b)
    )
    block = jnp.where(separated[None, None, None], lower, zero)
    if b == 1:
      result -= block
    else:
      left = dot('bhrij,bhrjk->bhrik', result, block)
      result -= dot('bhrij,bhrjk->bhrik', left, result)
    b *= 2
  return result


# Decays and pairs. One decay per head: a matrix of decays times plain products.


def intra_chunk(x):
  """Returns the `Intra` of a chunk with fields q, k, e, v and log_decay."""
  if x.log_decay is None or x.log_decay.shape[-1] == 1:
    return _intra_head(x)
  return _intra_channel(x)


def intra_chunk_backward(x, intra, d_reading, d_erasing, d_pre, d_suf, d_tot):
  """Returns gradients of q, e, k and log_decay.

  d_pre and d_suf [.., C, K] and d_tot [.., 1 or K] are by the logarithms of
  the decays; where there is one per head, the first two are yet to be summed.
  """
  if x.log_decay is None:
    return *_head_pairs_backward(x, intra, d_reading, d_erasing), None
  by_kind = (
      _intra_head_backward
      if x.log_decay.shape[-1] == 1 else _intra_channel_backward
  )
  return by_kind(x, intra, d_reading, d_erasing, d_pre, d_suf, d_tot)


def _triangles(size, dtype):
  """Returns [i >= j] and [i > j], each [1, 1, 1, C, C]."""
  i = jnp.arange(size)[None, None, None, :]
  inclusive = (i[..., :, None] >= i[..., None, :]).astype(dtype)
  return inclusive, (i[..., :, None] > i[..., None, :]).astype(dtype)


def _intra_head(x):
  pre, suf, tot, decay = _head_decays(x)
  inclusive, strict = _triangles(x.k.shape[-2], x.k.dtype)
  # The rows of all that shares a key head, in one product.
  rows = x.q if x.e is None else jnp.concatenate([x.q, x.e], axis=2)
  pairs = dot('bhrik,bhjk->bhrij', rows, x.k[:, :, 0])
  reading, erasing = pairs[:, :, :1] * (decay * inclusive), None
  if x.e is not None:
    erasing = pairs[:, :, 1:] * (decay * strict)
  return Intra(pre, suf, tot, reading, erasing, decay)


def _head_decays(x):
  """Returns pre, suf and tot of `Intra` and the decay of each pair."""
  if x.log_decay is None:  # XLA leaves out a product with a constant 1
    one = jnp.ones((1, 1, x.v.shape[2], 1, 1), x.k.dtype)
    return one, one, one[..., 0], one
  g = jnp.maximum(x.log_decay[..., 0], jnp.asarray(_NO_MEMORY, x.k.dtype))
  inclusive, strict = _triangles(g.shape[-1], g.dtype)
  # Sums of g over j < t <= i: terms of one sign, none subtracted.
  to_token = g[..., None, :] * inclusive
  decay = jnp.exp(dot('bhrit,tj->bhrij', to_token, strict[0, 0, 0]))
  pre = jnp.exp(dot('bhrt,it->bhri', g, inclusive[0, 0, 0]))
  suf = jnp.exp(dot('bhrt,tj->bhrj', g, strict[0, 0, 0]))
  return pre[..., None], suf[..., None], pre[..., -1, None], decay


def _head_pairs_backward(x, intra, d_reading, d_erasing):
  """Returns gradients of q, e and k through the pair matrices."""
  inclusive, strict = _triangles(d_reading.shape[-1], d_reading.dtype)
  d_reading = sum_groups(d_reading * (intra.saved * inclusive))[:, :, 0]
  k = x.k[:, :, 0]
  d_q = dot('bhij,bhjk->bhik', d_reading, k)
  d_k = dot('bhij,bhik->bhjk', d_reading, x.q[:, :, 0])
  d_e = None
  if x.e is not None:
    d_erasing = d_erasing * (intra.saved * strict)
    d_e = dot('bhrij,bhjk->bhrik', d_erasing, k)
    d_k += dot('bhrij,bhrik->bhjk', d_erasing, x.e)
  return d_q[:, :, None], d_e, d_k[:, :, None]


def _intra_head_backward(x, intra, d_reading, d_erasing, d_pre, d_suf, d_tot):
  inclusive, strict = _triangles(d_reading.shape[-1], d_reading.dtype)
  by_pair = d_reading * intra.reading
  if x.e is not None:
    by_pair += d_erasing * intra.erasing
  # A pair adds to every decay in between; summing exactly these pairs gives
  # exact zeros across a reset, where a reverse sum would leave rounding.
  ones = jnp.ones(d_reading.shape[-1:], d_reading.dtype)
  spans = dot('bhrij,tj->bhrit', by_pair, strict[0, 0, 0])
  spans += sum_last(d_pre)[..., :, None]
  d_g = dot('bhrit,i->bhrt', spans * inclusive, ones)
  d_g += dot('bhrj,tj->bhrt', sum_last(d_suf), strict[0, 0, 0])
  d_g += d_tot
  pairs = _head_pairs_backward(x, intra, d_reading, d_erasing)
  return *pairs, d_g[..., None]


# One decay per channel: a binary tree. Two tokens are separated at exactly one
# level, where the earlier is in the left and the later in the right half of a
# block of 2b; the decay between them is (start of the right half to the later)
# times (the earlier to the end of the left half).


def _intra_channel(x):
  *lead, size, width = x.log_decay.shape
  blocks = lambda x: x.reshape(*x.shape[:3], size, 1, width)
  decay = jnp.exp(x.log_decay)
  pre, tot = blocks(decay), blocks(decay)
  suf = jnp.ones_like(pre)
  reading = jnp.broadcast_to(sum_last(x.q * x.k), (*lead, size))
  reading = reading[..., None, None]
  erasing = None if x.e is None else jnp.zeros_like(reading)
  q, k, e = jax.tree.map(blocks, (x.q, x.k, x.e))
  levels = []
  while pre.shape[3] > 1:
    pre_left, pre_right = _halves(pre)
    suf_left, suf_right = _halves(suf)
    tot_left, tot_right = _halves(tot)
    rows = _right_rows(q, e, pre_right)
    keys = _halves(k)[0] * suf_left
    levels.append((rows, keys, pre_right, suf_left))
    pairs = dot('bhrnik,bhrnjk->bhrnij', rows, keys)
    between, between_e = split(pairs, e)
    reading = _block_lower(reading, between)
    if e is not None:
      erasing = _block_lower(erasing, between_e)
    pre = jnp.concatenate([pre_left, pre_right * tot_left], axis=-2)
    suf = jnp.concatenate([suf_left * tot_right, suf_right], axis=-2)
    tot = tot_left * tot_right
    q, k, e = jax.tree.map(_pair_up, (q, k, e))
  pre, suf, tot, reading, erasing = jax.tree.map(
      lambda x: x[:, :, :, 0], (pre, suf, tot, reading, erasing)
  )
  return Intra(pre, suf, tot[..., 0, :], reading, erasing, levels)


def _right_rows(q, e, pre):
  right = _halves(q)[1] * pre
  return right if e is None else join(right, _halves(e)[1] * pre)


def _halves(x):
  """Splits [.., 2n, b, D] into the even and the odd blocks of b rows."""
  x = x.reshape(*x.shape[:3], -1, 2, *x.shape[-2:])
  return x[..., 0, :, :], x[..., 1, :, :]


def _pair_up(x):
  """Views [.., 2n, b, D] as [.., n, 2b, D]."""
  return x.reshape(*x.shape[:3], -1, 2 * x.shape[-2], x.shape[-1])


def _interleave(even, odd):
  """Undoes `_halves`: [.., n, b, D] twice to [.., 2n, b, D]."""
  x = jnp.stack([even, odd], axis=-3)
  return x.reshape(*x.shape[:3], -1, *x.shape[-2:])


def _block_lower(diagonal, below):
  """Two diagonal blocks and the block below make one of twice the size."""
  top, bottom = _halves(diagonal)
  return jnp.concatenate([
      jnp.concatenate([top, jnp.zeros_like(top)], axis=-1),
      jnp.concatenate([below, bottom], axis=-1),
  ], axis=-2)


def _intra_channel_backward(
    x, intra, d_reading, d_erasing, d_pre, d_suf, d_tot
):
  # From the top of the tree down; no sum ever has terms that must cancel, so
  # that nothing leaks across a reset.
  block = lambda x: x[:, :, :, None]
  d_tot = block(d_tot[..., None, :])
  d_reading, d_pre, d_suf = block(d_reading), block(d_pre), block(d_suf)
  d_q, d_k = jnp.zeros_like(d_pre), jnp.zeros_like(d_pre)
  d_e = None
  if x.e is not None:
    d_e, d_erasing = jnp.zeros_like(d_pre), block(d_erasing)
  for rows, keys, pre, suf in reversed(intra.saved):
    b = keys.shape[-2]
    d_between = d_reading[..., b:, :b]
    d_reading = _diagonal_blocks(d_reading)
    if x.e is not None:
      d_between = join(d_between, d_erasing[..., b:, :b])
      d_erasing = _diagonal_blocks(d_erasing)
    d_rows = dot('bhrnij,bhrnjk->bhrnik', d_between, keys)
    d_keys = dot('bhrnij,bhrnik->bhrnjk', d_between, rows)
    d_level, d_level_e = split(rows * d_rows, None if x.e is None else keys)
    d_rows, d_rows_e = split(d_rows, None if x.e is None else keys)
    d_q = _interleave(_upper(d_q), _lower(d_q) + d_rows * pre)
    d_k = _interleave(_upper(d_k) + d_keys * suf, _lower(d_k))
    if x.e is not None:
      d_level += d_level_e
      d_e = _interleave(_upper(d_e), _lower(d_e) + d_rows_e * pre)
    d_tot = _interleave(
        d_tot + jnp.sum(_lower(d_pre), axis=-2, keepdims=True),
        d_tot + jnp.sum(_upper(d_suf), axis=-2, keepdims=True),
    )
    d_pre = _interleave(_upper(d_pre), _lower(d_pre) + d_level)
    d_suf = _interleave(_upper(d_suf) + keys * d_keys, _lower(d_suf))
  rows = lambda x: x[..., 0, :]
  d_self = d_reading[..., 0]
  d_q = sum_groups(rows(d_q) + d_self * x.k)
  d_k = sum_groups(rows(d_k) + d_self * x.q)
  d_e = None if d_e is None else rows(d_e)
  return d_q, d_e, d_k, rows(d_pre + d_tot)


def _diagonal_blocks(x):
  """The two diagonal blocks of [.., n, 2b, 2b] as [.., 2n, b, b]."""
  b = x.shape[-1] // 2
  return _interleave(x[..., :b, :b], x[..., b:, b:])


def _upper(x):
  return x[..., : x.shape[-2] // 2, :]


def _lower(x):
  return x[..., x.shape[-2] // 2 :, :]
