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

The backward pass is by hand. Per chunk it is given S0, (I + L)^-1 and R, which
are 4 (K V / C + C + V) bytes for each token and head, and forms the rest again.

Inside a chunk arrays are [B, HK, R, C, D]: R value heads share a key head.
Queries and erasing keys are multiplied by the same things, so they are joined
along C, [.., Z * C, D] with Z = 2, or Z = 1 where erase is 0 (then e is None).

Reference: arXiv 2412.06464, 2510.26692.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from statejax.ops.delta_intra import (
  dot,
  intra_chunk,
  intra_chunk_backward,
  join,
  ladder_inverse,
  split,
  sum_groups,
  sum_last,
)


class Inputs(NamedTuple):
  """What `chunked` differentiates, in the layout of the public op.

  Attributes:
    q: queries, [B, T, HK, K].
    k: keys, [B, T, HK, K].
    v: values, [B, T, HV, V].
    log_decay: [B, T, HV] or [B, T, HV, K]; None for 0, without resets.
    erase: [B, T, HV] or [B, T, HV, K]; None for 0.
    write: [B, T, HV] or [B, T, HV, V]; None for 1.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  log_decay: jax.Array | None
  erase: jax.Array | None
  write: jax.Array | None


class Chunk(NamedTuple):
  """One chunk in accumulation precision, neutral where padded."""

  q: jax.Array  # [B, HK, 1, C, K]
  k: jax.Array  # [B, HK, 1, C, K]
  e: jax.Array | None  # [B, HK, R, C, K]
  v: jax.Array  # [B, HK, R, C, V]
  log_decay: jax.Array | None  # [B, HK, R, C, 1 or K]
  erase: jax.Array | None
  write: jax.Array | None


class Kept(NamedTuple):
  """What the backward pass does not compute again; without erase, R = u."""

  state: jax.Array  # before the chunk, [B, HK, R, K, V]
  inverse: jax.Array | None  # (I + L)^-1, [B, HK, R, C, C]
  residual: jax.Array | None  # R, [B, HK, R, C, V]


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
  y, final, kept = _scan_forward(
      scale, size, inputs, state, n_valid, resets, keep=True
  )
  return (y, final), (inputs, kept, n_valid, resets)


def _run_backward(scale, size, residuals, cotangents):
  inputs, kept, n_valid, resets = residuals
  d_y, d_state = cotangents

  def body(carry, index_and_kept):
    d_state, buffers = carry
    index, kept = index_and_kept
    dtype = kept.state.dtype
    valid = valid_tokens(index, size, n_valid)
    reset = None if resets is None else slice_tokens(resets, index, size)
    heads = inputs.q.shape[2]
    x = load_chunk(inputs, index, size, scale, valid, reset, dtype)
    d_out = load(d_y, index, size, heads, valid, dtype)
    grads, d_state = chunk_backward(x, kept, d_out, d_state)
    grads = grads._replace(q=grads.q * scale)
    buffers = jax.tree.map(
        lambda b, g: store(b, g, index, valid), buffers, grads
    )
    return (d_state, buffers), None

  zeros = jax.tree.map(jnp.zeros_like, inputs)
  count = kept.state.shape[0]
  (d_state, grads), _ = lax.scan(
      body, (d_state, zeros), (jnp.arange(count), kept), reverse=True
  )
  return grads, d_state, None, None


_run.defvjp(_run_forward, _run_backward)


def _scan_forward(scale, size, inputs, state, n_valid, resets, keep):
  """Returns y, the final state and, if asked to `keep`, `Kept` by chunk."""

  def body(carry, index):
    state, y = carry
    valid = valid_tokens(index, size, n_valid)
    reset = None if resets is None else slice_tokens(resets, index, size)
    x = load_chunk(inputs, index, size, scale, valid, reset, state.dtype)
    out, after, kept = _chunk_forward(x, state)
    return (after, store(y, out, index, valid)), kept if keep else None

  count = inputs.q.shape[1] // size
  y = jnp.zeros_like(inputs.v)
  (state, y), kept = lax.scan(body, (state, y), jnp.arange(count))
  return y, state, kept


# Moving chunks between the public layout and [B, HK, R, C, D].


def slice_tokens(x, index, size):
  """Takes one chunk of [B, T, ...]."""
  return lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def valid_tokens(index, size, n_valid):
  """Returns which tokens of a chunk are real, [B, C], or None for all."""
  if n_valid is None:
    return None
  return index * size + jnp.arange(size)[None, :] < n_valid[:, None]


def load(x, index, size, heads, valid, dtype):
  """Takes one chunk of [B, T, H] or [B, T, H, D]; padding becomes zero."""
  x = slice_tokens(x, index, size).astype(dtype)
  if x.ndim == 3:
    x = x[..., None]
  if valid is not None:
    x = jnp.where(valid[:, :, None, None], x, jnp.zeros((), dtype))
  batch, _, all_heads, width = x.shape
  x = x.reshape(batch, size, heads, all_heads // heads, width)
  return x.transpose(0, 2, 3, 1, 4)


def store(buffer, x, index, valid):
  """Puts one chunk [B, HK, R, C, D] back; padding becomes zero."""
  batch, heads, groups, size, width = x.shape
  x = x.transpose(0, 3, 1, 2, 4).reshape(batch, size, heads * groups, width)
  if valid is not None:
    x = jnp.where(valid[:, :, None, None], x, jnp.zeros((), x.dtype))
  x = x.reshape(batch, size, *buffer.shape[2:]).astype(buffer.dtype)
  return lax.dynamic_update_slice_in_dim(buffer, x, index * size, axis=1)


def load_chunk(inputs, index, size, scale, valid, reset, dtype):
  """Reads the tokens of one chunk."""
  heads = inputs.q.shape[2]
  x = jax.tree.map(
      lambda x: load(x, index, size, heads, valid, dtype), inputs
  )
  log_decay = x.log_decay
  if reset is not None:
    if valid is not None:
      reset = reset & valid
    infinity = jnp.asarray(-jnp.inf, dtype)
    log_decay = jnp.where(reset[:, None, None, :, None], infinity, log_decay)
  e = None if x.erase is None else x.erase * x.k
  return Chunk(x.q * scale, x.k, e, x.v, log_decay, x.erase, x.write)


# One chunk.


def from_state(x, intra):
  """Queries and erasing keys as they meet the chunk's first state."""
  erasing = None if x.e is None else x.e * intra.pre
  return join(x.q * intra.pre, erasing)


def _chunk_forward(x, state):
  """Returns y, the state after the chunk, and what is kept."""
  intra = intra_chunk(x)
  recalled = dot('bhrck,bhrkv->bhrcv', from_state(x, intra), state)
  y, erased = split(recalled, x.e)
  residual = x.v if x.write is None else x.write * x.v
  kept = Kept(state, None, None)
  if x.e is not None:
    inverse = ladder_inverse(intra.erasing)
    residual = dot('bhrij,bhrjv->bhriv', inverse, residual - erased)
    kept = Kept(state, inverse, residual)
  y += dot('bhrij,bhrjv->bhriv', intra.reading, residual)
  after = intra.tot[..., None] * state + dot(
      'bhrck,bhrcv->bhrkv', x.k * intra.suf, residual
  )
  return y, after, kept


def chunk_backward(x, kept, d_y, d_after):
  """Returns the gradients of the chunk's `Inputs` and of its first state."""
  intra = intra_chunk(x)
  reads = from_state(x, intra)
  keys = x.k * intra.suf
  state, residual = kept.state, kept.residual
  if x.e is None:
    residual = x.v if x.write is None else x.write * x.v
  d_u = dot('bhrij,bhriv->bhrjv', intra.reading, d_y)
  d_u += dot('bhrck,bhrkv->bhrcv', keys, d_after)
  d_erased = None
  if x.e is not None:
    d_u = dot('bhrij,bhriv->bhrjv', kept.inverse, d_u)
    d_erased = -d_u
  d_recalled = join(d_y, d_erased)
  d_pairs = dot('bhriv,bhrjv->bhrij', d_recalled, residual)
  d_reads = dot('bhrcv,bhrkv->bhrck', d_recalled, state)
  d_keys = dot('bhrcv,bhrkv->bhrck', residual, d_after)
  d_state = intra.tot[..., None] * d_after + dot(
      'bhrck,bhrcv->bhrkv', reads, d_recalled
  )
  # Derivatives by the logarithms of pre, suf and tot.
  d_pre, d_pre_e = split(reads * d_reads, x.e)
  d_pre = d_pre if x.e is None else d_pre + d_pre_e
  d_suf = keys * d_keys
  if intra.tot.shape[-1] > 1:
    d_tot = intra.tot * dot('bhrkv,bhrkv->bhrk', state, d_after)
  else:
    d_tot = intra.tot * dot('bhrkv,bhrkv->bhr', state, d_after)[..., None]
  d_q, d_e, d_k, d_log_decay = intra_chunk_backward(
      x, intra, *split(d_pairs, x.e), d_pre, d_suf, d_tot
  )
  d_reads, d_reads_e = split(d_reads, x.e)
  d_q += sum_groups(d_reads * intra.pre)
  d_k += sum_groups(d_keys * intra.suf)
  if d_e is not None and d_reads_e is not None:
    d_e += d_reads_e * intra.pre
  return _inputs_backward(x, d_q, d_e, d_k, d_u, d_log_decay), d_state


def _inputs_backward(x, d_q, d_e, d_k, d_u, d_log_decay):
  """From e = erase * k and u = write * v to what they are made of."""
  d_erase = d_write = None
  d_v = d_u
  if x.erase is not None:
    d_k += sum_groups(x.erase * d_e)
    d_erase = _sum_like(x.k * d_e, x.erase)
  if x.write is not None:
    d_v = x.write * d_u
    d_write = _sum_like(x.v * d_u, x.write)
  return Inputs(d_q, d_k, d_v, d_log_decay, d_erase, d_write)


def _sum_like(x, gate):
  return x if gate.shape[-1] > 1 else sum_last(x)[..., None]
