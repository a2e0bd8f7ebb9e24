"""The chunked delta rule in plain JAX: decay tree, ladder inverse, own VJP.

Per row, value head and chunk of C tokens, with S0 the state before the chunk,
G the inclusive sum of log decays inside it (a notation, never formed and
subtracted), e = erase * k, u = write * v:

  A_ij = sum_d q_id k_jd exp(G_id - G_jd), i >= j
  L_ij = sum_d e_id k_jd exp(G_id - G_jd), i > j
  R    = (I + L)^-1 (u - (e * exp(G)) S0)
  y    = (q * exp(G)) S0 + A R
  S1   = diag(exp(G_C)) S0 + (k * exp(G_C - G))^T R

Every decay is a product of factors <= 1, or the exponential of a sum of terms
<= 0, over exactly the tokens it spans: nothing overflows and a decay of -inf
is a reset.

Inside a chunk arrays are [B, HK, R, C, D]: R value heads share a key head.
`rows` stacks the queries and, unless erase is 0, the erasing keys on an axis
Z behind R, so that one product serves both.

Reference: arXiv 2412.06464, 2510.26692.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

# exp is 0 below this in every float type; -inf itself would give 0 * -inf.
_NO_MEMORY = -1e4


class Inputs(NamedTuple):
  """What `chunked` differentiates, in the layout of the public op.

  Attributes:
    q: queries, [B, T, HK, K].
    k: keys, [B, T, HK, K].
    v: values, [B, T, HV, V].
    log_decay: [B, T, HV] or [B, T, HV, K].
    erase: [B, T, HV] or [B, T, HV, K]; None for 0.
    write: [B, T, HV] or [B, T, HV, V]; None for 1.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  log_decay: jax.Array
  erase: jax.Array | None
  write: jax.Array | None


class _Chunk(NamedTuple):
  """One chunk of `Inputs` in accumulation precision, neutral where padded."""

  rows: jax.Array  # [B, HK, R, Z, C, K]
  k: jax.Array  # [B, HK, 1, C, K]
  v: jax.Array  # [B, HK, R, C, V]
  log_decay: jax.Array  # [B, HK, R, C, 1 or K]
  erase: jax.Array | None
  write: jax.Array | None


class _Intra(NamedTuple):
  """What the tokens of a chunk are to each other, whatever the state."""

  pre: jax.Array  # decay from the chunk's start to a token, [.., C, 1 or K]
  suf: jax.Array  # decay from a token to the chunk's end, [.., C, 1 or K]
  tot: jax.Array  # decay across the chunk, [.., 1 or K]
  pairs: jax.Array  # A and L, [B, HK, R, Z, C, C]
  saved: object  # for the adjoint


def _dot(spec, a, b):
  return jnp.einsum(
      spec, a, b, precision=lax.Precision.HIGHEST,
      preferred_element_type=a.dtype,
  )


def chunked(inputs, state, n_valid, resets, *, scale, chunk_size):
  """Runs the delta rule chunk by chunk.

  Args:
    inputs: `Inputs`.
    state: [B, HV, K, V], in accumulation precision.
    n_valid: [B] int32, or None if all tokens are real.
    resets: [B, T] bool, True where memory is emptied first; None for never.
    scale: static factor on q.
    chunk_size: static power of two.

  Returns:
    y [B, T, HV, V] in v.dtype and the state after n_valid tokens.
  """
  length = inputs.q.shape[1]
  padding = -length % chunk_size
  if padding:
    pad = lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    inputs, resets = jax.tree.map(pad, (inputs, resets))
  heads = inputs.q.shape[2]
  groups = state.shape[1] // heads
  grouped = state.reshape(state.shape[0], heads, groups, *state.shape[2:])
  y, final = _run(scale, chunk_size, inputs, grouped, n_valid, resets)
  final = final.reshape(state.shape)
  if n_valid is not None:  # S * 1 + 0 would lose the sign of a zero
    final = jnp.where(n_valid[:, None, None, None] > 0, final, state)
  return y[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(scale, size, inputs, state, n_valid, resets):
  y, state, _ = _scan_forward(
      scale, size, inputs, state, n_valid, resets, keep=False
  )
  return y, state


def _run_forward(scale, size, inputs, state, n_valid, resets):
  y, final, starts = _scan_forward(
      scale, size, inputs, state, n_valid, resets, keep=True
  )
  return (y, final), (inputs, starts, n_valid, resets)


def _run_backward(scale, size, residuals, cotangents):
  inputs, starts, n_valid, resets = residuals
  d_y, d_state = cotangents

  def body(carry, index_and_start):
    d_state, buffers = carry
    index, start = index_and_start
    valid = _valid(index, size, n_valid)
    reset = None if resets is None else _slice(resets, index, size)
    heads = inputs.q.shape[2]
    x = _load_chunk(inputs, index, size, scale, valid, reset, start.dtype)
    d_out = _load(d_y, index, size, heads, valid, start.dtype)
    grads, d_state = _chunk_backward(x, start, d_out, d_state)
    grads = grads._replace(q=grads.q * scale)
    buffers = jax.tree.map(
        lambda b, g: _store(b, g, index, valid), buffers, grads
    )
    return (d_state, buffers), None

  zeros = jax.tree.map(jnp.zeros_like, inputs)
  count = starts.shape[0]
  (d_state, grads), _ = lax.scan(
      body, (d_state, zeros), (jnp.arange(count), starts), reverse=True
  )
  return grads, d_state, None, None


_run.defvjp(_run_forward, _run_backward)


def _scan_forward(scale, size, inputs, state, n_valid, resets, keep):
  """Returns y, the final state and, if kept, the state before each chunk."""

  def body(carry, index):
    state, y = carry
    valid = _valid(index, size, n_valid)
    reset = None if resets is None else _slice(resets, index, size)
    x = _load_chunk(inputs, index, size, scale, valid, reset, state.dtype)
    out, after = _chunk_forward(x, state)
    return (after, _store(y, out, index, valid)), state if keep else None

  count = inputs.q.shape[1] // size
  y = jnp.zeros_like(inputs.v)
  (state, y), starts = lax.scan(body, (state, y), jnp.arange(count))
  return y, state, starts


# Moving chunks between the public layout and [B, HK, R, C, D].


def _slice(x, index, size):
  return lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _valid(index, size, n_valid):
  if n_valid is None:
    return None
  return index * size + jnp.arange(size)[None, :] < n_valid[:, None]


def _load(x, index, size, heads, valid, dtype):
  """Takes one chunk of [B, T, H] or [B, T, H, D]; padding becomes zero."""
  x = _slice(x, index, size).astype(dtype)
  if x.ndim == 3:
    x = x[..., None]
  if valid is not None:
    x = jnp.where(valid[:, :, None, None], x, jnp.zeros((), dtype))
  batch, _, all_heads, width = x.shape
  x = x.reshape(batch, size, heads, all_heads // heads, width)
  return x.transpose(0, 2, 3, 1, 4)


def _store(buffer, x, index, valid):
  """Puts one chunk [B, HK, R, C, D] back; padding becomes zero."""
  batch, heads, groups, size, width = x.shape
  x = x.transpose(0, 3, 1, 2, 4).reshape(batch, size, heads * groups, width)
  if valid is not None:
    x = jnp.where(valid[:, :, None, None], x, jnp.zeros((), x.dtype))
  x = x.reshape(batch, size, *buffer.shape[2:]).astype(buffer.dtype)
  return lax.dynamic_update_slice_in_dim(buffer, x, index * size, axis=1)


def _load_chunk(inputs, index, size, scale, valid, reset, dtype):
  """Reads the tokens of one chunk."""
  heads = inputs.q.shape[2]
  x = jax.tree.map(
      lambda x: _load(x, index, size, heads, valid, dtype), inputs
  )
  log_decay = x.log_decay
  if reset is not None:
    if valid is not None:
      reset = reset & valid
    infinity = jnp.asarray(-jnp.inf, dtype)
    log_decay = jnp.where(reset[:, None, None, :, None], infinity, log_decay)
  groups = x.v.shape[2]
  q = jnp.broadcast_to(x.q * scale, (*x.q.shape[:2], groups, *x.q.shape[3:]))
  rows = [q] if x.erase is None else [q, x.erase * x.k]
  return _Chunk(
      jnp.stack(rows, axis=3), x.k, x.v, log_decay, x.erase, x.write
  )


# One chunk.


def _chunk_forward(x, state):
  intra = _intra(x)
  from_state = _dot(
      'bhrzck,bhrkv->bhrzcv', x.rows * intra.pre[:, :, :, None], state
  )
  residual = x.v if x.write is None else x.write * x.v
  if x.erase is not None:
    inverse = _ladder_inverse(intra.pairs[:, :, :, 1])
    residual = _dot(
        'bhrij,bhrjv->bhriv', inverse, residual - from_state[:, :, :, 1]
    )
  y = from_state[:, :, :, 0] + _dot(
      'bhrij,bhrjv->bhriv', intra.pairs[:, :, :, 0], residual
  )
  after = intra.tot[..., None] * state + _dot(
      'bhrck,bhrcv->bhrkv', x.k * intra.suf, residual
  )
  return y, after


def _chunk_backward(x, state, d_y, d_after):
  """Returns the gradients of the chunk's `Inputs` and of its first state."""
  intra = _intra(x)
  reads = x.rows * intra.pre[:, :, :, None]
  keys = x.k * intra.suf
  residual = x.v if x.write is None else x.write * x.v
  d_residual = _dot(
      'bhrij,bhriv->bhrjv', intra.pairs[:, :, :, 0], d_y
  ) + _dot('bhrck,bhrkv->bhrcv', keys, d_after)
  d_from_state = [d_y]
  if x.erase is not None:
    inverse = _ladder_inverse(intra.pairs[:, :, :, 1])
    from_state = _dot('bhrck,bhrkv->bhrcv', reads[:, :, :, 1], state)
    residual = _dot('bhrij,bhrjv->bhriv', inverse, residual - from_state)
    d_residual = _dot('bhrij,bhriv->bhrjv', inverse, d_residual)
    d_from_state.append(-d_residual)
  d_from_state = jnp.stack(d_from_state, axis=3)
  d_pairs = _dot('bhrziv,bhrjv->bhrzij', d_from_state, residual)
  d_reads = _dot('bhrzcv,bhrkv->bhrzck', d_from_state, state)
  d_keys = _dot('bhrcv,bhrkv->bhrck', residual, d_after)
  d_state = intra.tot[..., None] * d_after + _dot(
      'bhrzck,bhrzcv->bhrkv', reads, d_from_state
  )
  # Derivatives by the logarithms of pre, suf and tot.
  d_pre = jnp.sum(reads * d_reads, axis=3)
  d_suf = keys * d_keys
  d_tot = intra.tot * jnp.sum(state * d_after, axis=-1)
  d_rows, d_k, d_log_decay = _intra_backward(
      x, intra, d_pairs, d_pre, d_suf, d_tot
  )
  d_rows += d_reads * intra.pre[:, :, :, None]
  d_k += jnp.sum(d_keys * intra.suf, axis=2, keepdims=True)
  return _inputs_backward(x, d_rows, d_k, d_residual, d_log_decay), d_state


def _inputs_backward(x, d_rows, d_k, d_u, d_log_decay):
  """From e = erase * k and u = write * v to what they are made of."""
  d_q = jnp.sum(d_rows[:, :, :, 0], axis=2, keepdims=True)
  d_erase = d_write = None
  d_v = d_u
  if x.erase is not None:
    d_e = d_rows[:, :, :, 1]
    d_k += jnp.sum(x.erase * d_e, axis=2, keepdims=True)
    d_erase = _sum_like(x.k * d_e, x.erase)
  if x.write is not None:
    d_v = x.write * d_u
    d_write = _sum_like(x.v * d_u, x.write)
  return Inputs(d_q, d_k, d_v, d_log_decay, d_erase, d_write)


def _sum_like(x, gate):
  return x if gate.shape[-1] > 1 else jnp.sum(x, axis=-1, keepdims=True)


def _ladder_inverse(lower):
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
      left = _dot('bhrij,bhrjk->bhrik', result, block)
      result -= _dot('bhrij,bhrjk->bhrik', left, result)
    b *= 2
  return result


# Decays and pairs. One decay per head: a matrix of decays times plain products.


def _intra(x):
  if x.log_decay.shape[-1] == 1:
    return _intra_head(x)
  return _intra_channel(x)


def _intra_backward(x, intra, d_pairs, d_pre, d_suf, d_tot):
  if x.log_decay.shape[-1] == 1:
    return _intra_head_backward(x, intra, d_pairs, d_pre, d_suf, d_tot)
  return _intra_channel_backward(x, intra, d_pairs, d_pre, d_suf, d_tot)


def _triangles(size, dtype):
  """Returns [i >= j] and [i > j], each [1, 1, 1, C, C]."""
  i = jnp.arange(size)[None, None, None, :]
  inclusive = (i[..., :, None] >= i[..., None, :]).astype(dtype)
  return inclusive, (i[..., :, None] > i[..., None, :]).astype(dtype)


def _intra_head(x):
  g = jnp.maximum(x.log_decay[..., 0], jnp.asarray(_NO_MEMORY, x.k.dtype))
  inclusive, strict = _triangles(g.shape[-1], g.dtype)
  # Sums of g over j < t <= i: terms of one sign, none subtracted.
  to_token = g[..., None, :] * inclusive
  sums = _dot('bhrit,tj->bhrij', to_token, strict[0, 0, 0])
  decay = jnp.exp(sums) * inclusive
  products = _dot('bhrzik,bhjk->bhrzij', x.rows, x.k[:, :, 0])
  masks = jnp.stack([inclusive, strict][:x.rows.shape[3]], axis=3)
  pre = jnp.exp(jnp.sum(to_token, axis=-1))
  suf = jnp.exp(jnp.sum(g[..., :, None] * strict, axis=-2))
  tot = jnp.exp(jnp.sum(g, axis=-1))
  decay = decay[:, :, :, None] * masks
  return _Intra(
      pre[..., None], suf[..., None], tot[..., None], products * decay, decay
  )


def _intra_head_backward(x, intra, d_pairs, d_pre, d_suf, d_tot):
  inclusive, strict = _triangles(d_pairs.shape[-1], d_pairs.dtype)
  # A pair adds to every decay in between; summing exactly these pairs gives
  # exact zeros across a reset, where a reverse sum would leave rounding.
  by_pair = jnp.sum(d_pairs * intra.pairs, axis=3)
  spans = _dot('bhrij,tj->bhrit', by_pair, strict[0, 0, 0])
  spans += jnp.sum(d_pre, axis=-1)[..., :, None]
  d_g = jnp.sum(spans * inclusive, axis=-2)
  d_g += jnp.sum(jnp.sum(d_suf, axis=-1)[..., None, :] * strict, axis=-1)
  d_g += jnp.sum(d_tot, axis=-1)[..., None]
  d_products = d_pairs * intra.saved
  d_rows = _dot('bhrzij,bhjk->bhrzik', d_products, x.k[:, :, 0])
  d_k = _dot('bhrzij,bhrzik->bhjk', d_products, x.rows)
  return d_rows, d_k[:, :, None], d_g[..., None]


# One decay per channel: a binary tree. Two tokens are separated at exactly one
# level, where the earlier is in the left and the later in the right half of a
# block of 2b; the decay between them is (start of the right half to the later)
# times (the earlier to the end of the left half).


def _intra_channel(x):
  batch, heads, groups, count, size, width = x.rows.shape
  lead = (batch, heads, groups)
  a = jnp.exp(x.log_decay)
  pre = a.reshape(*lead, size, 1, width)
  suf = jnp.ones_like(pre)
  tot = a
  diagonal = jnp.sum(x.rows[:, :, :, 0] * x.k, axis=-1)[:, :, :, None]
  if count > 1:
    diagonal = jnp.concatenate([diagonal, jnp.zeros_like(diagonal)], axis=3)
  pairs = diagonal[..., None, None]
  levels = []
  b, n = 1, size // 2
  while n:
    pre_left, pre_right = _halves(pre, n)
    suf_left, suf_right = _halves(suf, n)
    tot = tot.reshape(*lead, n, 2, 1, width)
    tot_left, tot_right = tot[..., 0, :, :], tot[..., 1, :, :]
    rows = x.rows.reshape(*lead, count, n, 2, b, width)[..., 1, :, :]
    rows = rows * pre_right[:, :, :, None]
    keys = x.k.reshape(batch, heads, 1, n, 2, b, width)[..., 0, :, :]
    keys = keys * suf_left
    levels.append((rows, keys, pre_right, suf_left))
    block = _dot('bhrznik,bhrnjk->bhrznij', rows, keys)
    top, bottom = _halves(pairs, n)
    pairs = jnp.concatenate([
        jnp.concatenate([top, jnp.zeros_like(top)], axis=-1),
        jnp.concatenate([block, bottom], axis=-1),
    ], axis=-2)
    pre = jnp.concatenate([pre_left, pre_right * tot_left], axis=-2)
    suf = jnp.concatenate([suf_left * tot_right, suf_right], axis=-2)
    tot = tot_left * tot_right
    b, n = 2 * b, n // 2
  pairs = pairs.reshape(x.rows.shape[:5] + (size,))
  shape = (*lead, size, width)
  return _Intra(
      pre.reshape(shape), suf.reshape(shape), tot.reshape(*lead, width),
      pairs, levels,
  )


def _halves(x, n):
  """Splits [.., 2n, b, D] into the even and the odd blocks of b rows."""
  x = x.reshape(*x.shape[:-3], n, 2, *x.shape[-2:])
  return x[..., 0, :, :], x[..., 1, :, :]


def _intra_channel_backward(x, intra, d_pairs, d_pre, d_suf, d_tot):
  count, size, width = x.rows.shape[3:]
  # From the top of the tree down; no sum ever has terms that must cancel, so
  # that nothing leaks across a reset.
  d_pre, d_suf = d_pre[:, :, :, None], d_suf[:, :, :, None]
  d_tot = d_tot[:, :, :, None, None]
  d_pairs = d_pairs[:, :, :, :, None]
  d_rows = jnp.zeros_like(x.rows)[:, :, :, :, None]
  d_k = jnp.zeros_like(d_pre)
  b = size // 2
  for rows, keys, pre, suf in reversed(intra.saved):
    block = d_pairs[..., b:, :b]
    d_pairs = _join(d_pairs[..., :b, :b], d_pairs[..., b:, b:])
    d_level = _dot('bhrznij,bhrnjk->bhrznik', block, keys)
    d_keys = _dot('bhrznij,bhrznik->bhrnjk', block, rows)
    left, right = d_rows[..., :b, :], d_rows[..., b:, :]
    d_rows = _join(left, right + d_level * pre[:, :, :, None])
    left, right = d_k[..., :b, :], d_k[..., b:, :]
    d_k = _join(left + d_keys * suf, right)
    pre_left, pre_right = d_pre[..., :b, :], d_pre[..., b:, :]
    suf_left, suf_right = d_suf[..., :b, :], d_suf[..., b:, :]
    d_tot = _join(
        d_tot + jnp.sum(pre_right, axis=-2, keepdims=True),
        d_tot + jnp.sum(suf_left, axis=-2, keepdims=True),
    )
    d_pre = _join(pre_left, pre_right + jnp.sum(rows * d_level, axis=3))
    d_suf = _join(suf_left + keys * d_keys, suf_right)
    b //= 2
  shape = d_k.shape[:3] + (size, width)
  d_rows = d_rows.reshape(x.rows.shape)
  diagonal = d_pairs.reshape(x.rows.shape[:5])[:, :, :, 0, :, None]
  d_k = d_k.reshape(shape) + diagonal * x.rows[:, :, :, 0]
  d_query = diagonal * x.k
  if count > 1:
    d_query = jnp.stack([d_query, jnp.zeros_like(d_query)], axis=3)
  else:
    d_query = d_query[:, :, :, None]
  d_k = jnp.sum(d_k, axis=2, keepdims=True)
  return d_rows + d_query, d_k, (d_pre + d_tot).reshape(shape)


def _join(even, odd):
  """Undoes `_halves`: [.., n, b, D] twice to [.., 2n, b, D]."""
  x = jnp.stack([even, odd], axis=-3)
  return x.reshape(*x.shape[:-4], -1, *x.shape[-2:])
