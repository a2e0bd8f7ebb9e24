"""The chunked delta rule for devices that want much work at once.

`delta_chunk` takes one chunk after the other: little memory, but on a GPU its
many small products wait for each other. Here a group of chunks is taken at
once, as if they were rows of a batch, and only the state goes chunk by chunk,
by one product each. With the letters of `delta_chunk`, T = (I + L)^-1 and Qg,
Eg, Kg the queries, erasing keys and keys times their decays,

  M = diag(exp(G_C)) - Kg^T T Eg
  S1 = M S0 + Kg^T T u
  dS0 = M^T dS1 + Qg^T dy - Eg^T T^T A^T dy

and all else, R = T (u - Eg S0) included, is as there.
"""

import functools
from typing import NamedTuple

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
from statejax.ops.delta_intra import (
  dot,
  intra_chunk,
  join,
  ladder_inverse,
  split,
)

# Tokens of all heads and rows that make a group, and chunks in sequence that
# are compiled as one; the best seen, see experiments/results/gpu_check.json.
GROUP, UNROLL = 2 ** 18, 8


class _Plan(NamedTuple):
  """How tokens are taken: chunks of `size`, `count` of them at once."""

  size: int
  count: int
  unroll: int

  @property
  def span(self):
    return self.size * self.count


def chunked(inputs, state, n_valid, resets, *, scale, chunk_size, group=GROUP,
            unroll=UNROLL):
  """Runs the delta rule group by group; see `delta_chunk.chunked`.

  Args:
    inputs, state, n_valid, resets, scale, chunk_size: as there.
    group: static, most tokens of all heads and rows to take at once, at least
      one chunk of each.
    unroll: static, chunks compiled as one where they wait for each other.

  Returns:
    As there.
  """
  batch, length, heads = inputs.q.shape[:3]
  chunks = -(-length // chunk_size)
  most = max(1, group // (batch * state.shape[1] * chunk_size))
  count = -(-chunks // -(-chunks // most))  # groups of like size
  plan = _Plan(chunk_size, count, min(unroll, count))
  padding = -length % plan.span
  if padding:
    pad = lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    inputs, resets = jax.tree.map(pad, (inputs, resets))
  groups = state.shape[1] // heads
  grouped = state.reshape(batch, heads, groups, *state.shape[2:])
  y, final = _run(scale, plan, inputs, grouped, n_valid, resets)
  final = final.reshape(state.shape)
  if n_valid is not None:  # S * 1 + 0 would lose the sign of a zero
    final = jnp.where(n_valid[:, None, None, None] > 0, final, state)
  return y[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(scale, plan, inputs, state, n_valid, resets):
  return _forward(scale, plan, inputs, state, n_valid, resets)[:2]


def _run_forward(scale, plan, inputs, state, n_valid, resets):
  y, final, kept = _forward(
      scale, plan, inputs, state, n_valid, resets, keep=True)
  return (y, final), (inputs, kept, n_valid, resets)


def _run_backward(scale, plan, residuals, cotangents):
  inputs, kept, n_valid, resets = residuals
  d_y, d_state = cotangents

  def body(carry, index_and_kept):
    d_state, buffers = carry
    index, kept = index_and_kept
    x, valid = _load_group(
        scale, plan, inputs, n_valid, resets, index, kept.state.dtype)
    d_out = _fold(load(d_y, index, plan.span, inputs.q.shape[2], valid,
                       kept.state.dtype), plan.count)
    d_after, d_state = _states_backward(x, kept, d_out, d_state, plan)
    grads, _ = chunk_backward(x, kept, d_out, d_after)
    grads = grads._replace(q=grads.q * scale)
    buffers = jax.tree.map(
        lambda b, g: store(b, _unfold(g, plan.count), index, valid),
        buffers, grads)
    return (d_state, buffers), None

  zeros = jax.tree.map(jnp.zeros_like, inputs)
  (d_state, grads), _ = lax.scan(
      body, (d_state, zeros), (jnp.arange(kept.state.shape[0]), kept),
      reverse=True)
  return grads, d_state, None, None


_run.defvjp(_run_forward, _run_backward)


def _forward(scale, plan, inputs, state, n_valid, resets, keep=False):
  """Returns y, the final state and, if asked to `keep`, `Kept` by group."""

  def body(carry, index):
    state, y = carry
    x, valid = _load_group(
        scale, plan, inputs, n_valid, resets, index, state.dtype)
    out, after, kept = _group_forward(x, state, plan)
    return (after, store(y, _unfold(out, plan.count), index, valid)), (
        kept if keep else None)

  groups = inputs.q.shape[1] // plan.span
  (state, y), kept = lax.scan(
      body, (state, jnp.zeros_like(inputs.v)), jnp.arange(groups))
  return y, state, kept


def _load_group(scale, plan, inputs, n_valid, resets, index, dtype):
  """Reads the tokens of one group, its chunks as rows, and which are real."""
  valid = valid_tokens(index, plan.span, n_valid)
  reset = None if resets is None else slice_tokens(resets, index, plan.span)
  x = load_chunk(inputs, index, plan.span, scale, valid, reset, dtype)
  return jax.tree.map(lambda x: _fold(x, plan.count), x), valid


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


def _group_forward(x, state, plan):
  """Returns y, the state after the group, and what is kept."""
  intra = intra_chunk(x)
  reads, keys = from_state(x, intra), x.k * intra.suf
  residual = x.v if x.write is None else x.write * x.v
  inverse, written = None, residual
  if x.e is not None:
    inverse = ladder_inverse(intra.erasing)
    written = dot('bhrij,bhrjv->bhriv', inverse, residual)
  written = dot('bhrck,bhrcv->bhrkv', keys, written)

  def body(state, chunk):
    across, written = chunk
    return _advance('bhrjk,bhrkv->bhrjv', across, state) + written, state

  across = _across(x, intra.tot, keys, reads, inverse)
  after, states = lax.scan(body, state, jax.tree.map(
      lambda x: _by_chunk(x, plan.count), (across, written)),
      unroll=plan.unroll)
  states = states.reshape(-1, *states.shape[2:])
  y, erased = split(dot('bhrck,bhrkv->bhrcv', reads, states), x.e)
  if x.e is not None:
    residual = dot('bhrij,bhrjv->bhriv', inverse, residual - erased)
  y += dot('bhrij,bhrjv->bhriv', intra.reading, residual)
  return y, after, Kept(states, inverse, None if x.e is None else residual)


def _across(x, tot, keys, reads, inverse):
  """What a chunk makes of the state before it: M [N * B, HK, R, K, K], or
  where nothing is erased its diagonal [N * B, HK, R, 1 or K]."""
  if x.e is None:
    return jnp.broadcast_to(tot, (*x.v.shape[:3], tot.shape[-1]))
  erases = dot('bhrij,bhrjk->bhrik', inverse, split(reads, x.e)[1])
  one = jnp.eye(keys.shape[-1], dtype=tot.dtype)[None, None, None]
  return tot[..., None] * one - dot('bhrcj,bhrck->bhrjk', keys, erases)


def _advance(spec, across, state):
  """The product of `_across` with a state."""
  if across.ndim == state.ndim:
    return dot(spec, across, state)
  return across[..., None] * state


def _states_backward(x, kept, d_y, d_after, plan):
  """Returns the gradients of the state after each chunk, and of the first."""
  intra = intra_chunk(x)
  reads, keys = from_state(x, intra), x.k * intra.suf
  d_erased = None
  if x.e is not None:
    d_erased = -dot('bhrij,bhriv->bhrjv', kept.inverse, dot(
        'bhrij,bhriv->bhrjv', intra.reading, d_y))
  d_read = dot('bhrck,bhrcv->bhrkv', reads, join(d_y, d_erased))

  def body(d_after, chunk):
    across, d_read = chunk
    return _advance('bhrkj,bhrkv->bhrjv', across, d_after) + d_read, d_after

  across = _across(x, intra.tot, keys, reads, kept.inverse)
  d_state, d_after = lax.scan(body, d_after, jax.tree.map(
      lambda x: _by_chunk(x, plan.count), (across, d_read)), reverse=True,
      unroll=plan.unroll)
  return d_after.reshape(-1, *d_after.shape[2:]), d_state
