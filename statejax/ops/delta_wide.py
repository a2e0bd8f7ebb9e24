"""The chunked delta rule for devices that want much work at once.

`delta_chunk` takes one chunk after the other: little memory, but on a GPU its
many small products wait for each other. Here a group of chunks is taken at
once, as if they were rows of a batch, and only what the state needs goes chunk
by chunk: forward R and S1, backward the gradient of S1 (letters of
`delta_chunk`),

  R = (I + L)^-1 (u - Eg S0);  S1 = diag(exp(G_C)) S0 + Kg^T R
  dB = (I + L)^-T (A^T dy + Kg dS1)
  dS0 = diag(exp(G_C)) dS1 + Qg^T dy - Eg^T dB

with Qg, Eg, Kg the queries, erasing keys and keys times their decays.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from statejax.ops.delta_chunk import (
  Kept,
  chunk_backward,
  from_state,
  load,
  load_chunk,
  slice_tokens,
  store,
  valid_tokens,
)
from statejax.ops.delta_intra import dot, intra_chunk, ladder_inverse, split

# Tokens of all heads and rows that make a group.
GROUP = 2 ** 16


def chunked(inputs, state, n_valid, resets, *, scale, chunk_size, group=GROUP):
  """Runs the delta rule group by group; see `delta_chunk.chunked`.

  Args:
    inputs, state, n_valid, resets, scale, chunk_size: as there.
    group: static, most tokens of all heads and rows to take at once, at least
      one chunk of each.

  Returns:
    As there.
  """
  batch, length, heads = inputs.q.shape[:3]
  chunks = -(-length // chunk_size)
  most = max(1, group // (batch * state.shape[1] * chunk_size))
  count = -(-chunks // -(-chunks // most))  # groups of like size
  padding = -length % (count * chunk_size)
  if padding:
    pad = lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    inputs, resets = jax.tree.map(pad, (inputs, resets))
  groups = state.shape[1] // heads
  grouped = state.reshape(batch, heads, groups, *state.shape[2:])
  y, final = _run(scale, chunk_size, count, inputs, grouped, n_valid, resets)
  final = final.reshape(state.shape)
  if n_valid is not None:  # S * 1 + 0 would lose the sign of a zero
    final = jnp.where(n_valid[:, None, None, None] > 0, final, state)
  return y[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(scale, size, count, inputs, state, n_valid, resets):
  return _forward(scale, size, count, inputs, state, n_valid, resets)[:2]


def _run_forward(scale, size, count, inputs, state, n_valid, resets):
  y, final, kept = _forward(
      scale, size, count, inputs, state, n_valid, resets, keep=True)
  return (y, final), (inputs, kept, n_valid, resets)


def _run_backward(scale, size, count, residuals, cotangents):
  inputs, kept, n_valid, resets = residuals
  d_y, d_state = cotangents

  def body(carry, index_and_kept):
    d_state, buffers = carry
    index, kept = index_and_kept
    x, valid = _load_group(
        scale, size, count, inputs, n_valid, resets, index, kept.state.dtype)
    d_out = _fold(load(d_y, index, size * count, inputs.q.shape[2], valid,
                       kept.state.dtype), count)
    d_after, d_state = _states_backward(x, kept, d_out, d_state, count)
    grads, _ = chunk_backward(x, kept, d_out, d_after)
    grads = grads._replace(q=grads.q * scale)
    buffers = jax.tree.map(
        lambda b, g: store(b, _unfold(g, count), index, valid), buffers, grads)
    return (d_state, buffers), None

  zeros = jax.tree.map(jnp.zeros_like, inputs)
  (d_state, grads), _ = lax.scan(
      body, (d_state, zeros), (jnp.arange(kept.state.shape[0]), kept),
      reverse=True)
  return grads, d_state, None, None


_run.defvjp(_run_forward, _run_backward)


def _forward(scale, size, count, inputs, state, n_valid, resets, keep=False):
  """Returns y, the final state and, if asked to `keep`, `Kept` by group."""

  def body(carry, index):
    state, y = carry
    x, valid = _load_group(
        scale, size, count, inputs, n_valid, resets, index, state.dtype)
    out, after, kept = _group_forward(x, state, count)
    return (after, store(y, _unfold(out, count), index, valid)), (
        kept if keep else None)

  groups = inputs.q.shape[1] // (size * count)
  (state, y), kept = lax.scan(
      body, (state, jnp.zeros_like(inputs.v)), jnp.arange(groups))
  return y, state, kept


def _load_group(scale, size, count, inputs, n_valid, resets, index, dtype):
  """Reads the tokens of one group, its chunks as rows, and which are real."""
  span = size * count
  valid = valid_tokens(index, span, n_valid)
  reset = None if resets is None else slice_tokens(resets, index, span)
  x = load_chunk(inputs, index, span, scale, valid, reset, dtype)
  return jax.tree.map(lambda x: _fold(x, count), x), valid


def _fold(x, count):
  """From [B, HK, R, N * C, D] to [N * B, HK, R, C, D]."""
  x = x.reshape(*x.shape[:3], count, -1, x.shape[-1])
  x = jnp.moveaxis(x, 3, 0)
  return x.reshape(-1, *x.shape[2:])


def _unfold(x, count):
  """Undoes `_fold`."""
  x = jnp.moveaxis(_by_chunk(x, count), 0, 3)
  return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _by_chunk(x, count):
  """Chunks first, as a scan takes them: [N, B, ...]."""
  return x.reshape(count, -1, *x.shape[1:])


def _across(x, tot, count):
  """The decays across chunks by chunk, [N, B, HK, R, 1 or K]."""
  lead = x.v.shape[:3]
  return _by_chunk(jnp.broadcast_to(tot, (*lead, tot.shape[-1])), count)


def _group_forward(x, state, count):
  """Returns y, the state after the group, and what is kept."""
  intra = intra_chunk(x)
  reads, erases = split(from_state(x, intra), x.e)
  residual = x.v if x.write is None else x.write * x.v
  inverse = None if x.e is None else ladder_inverse(intra.erasing)

  def body(state, chunk):
    erases, inverse, residual, keys, tot = chunk
    if erases is not None:
      erased = dot('bhrck,bhrkv->bhrcv', erases, state)
      residual = dot('bhrij,bhrjv->bhriv', inverse, residual - erased)
    after = tot[..., None] * state + dot(
        'bhrck,bhrcv->bhrkv', keys, residual)
    return after, (state, residual)

  chunks = jax.tree.map(
      lambda x: _by_chunk(x, count),
      (erases, inverse, residual, x.k * intra.suf))
  after, kept = lax.scan(body, state, (*chunks, _across(x, intra.tot, count)))
  states, residual = jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:]), kept)
  y = dot('bhrck,bhrkv->bhrcv', reads, states)
  y += dot('bhrij,bhrjv->bhriv', intra.reading, residual)
  return y, after, Kept(states, inverse, None if x.e is None else residual)


def _states_backward(x, kept, d_y, d_after, count):
  """Returns the gradients of the state after each chunk, and of the first."""
  intra = intra_chunk(x)
  reads, erases = split(from_state(x, intra), x.e)

  def body(d_after, chunk):
    erases, inverse, d_u, keys, d_read, tot = chunk
    d_state = tot[..., None] * d_after + d_read
    if erases is not None:
      d_u += dot('bhrck,bhrkv->bhrcv', keys, d_after)
      d_u = dot('bhrij,bhriv->bhrjv', inverse, d_u)
      d_state -= dot('bhrck,bhrcv->bhrkv', erases, d_u)
    return d_state, d_after

  chunks = jax.tree.map(lambda x: _by_chunk(x, count), (
      erases, kept.inverse,
      dot('bhrij,bhriv->bhrjv', intra.reading, d_y), x.k * intra.suf,
      dot('bhrck,bhrcv->bhrkv', reads, d_y)))
  d_state, d_after = lax.scan(
      body, d_after, (*chunks, _across(x, intra.tot, count)), reverse=True)
  return d_after.reshape(-1, *d_after.shape[2:]), d_state
