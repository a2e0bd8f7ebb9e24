"""Entries that overlap: one of l tokens for every s of them, l = n s.

A document is cut into pieces of s tokens, the blocks of a `blocks.Blocks`. The
entry of tokens i s .. i s + l - 1 is complete with piece i + n - 1, and stands
in that piece's slot: a store of stride s then holds as many slots as pieces
are complete, of which the first n - 1 stay zero in every document.
"""

import jax
import jax.numpy as jnp

from statejax.ops import blocks as bk
from statejax.ops.product import einsum


def windows(tokens, ring, blocks, length):
  """Gathers the tokens of the entries that a step completes.

  Args:
    tokens: of the step, [B, G, T, K].
    ring: the l - 1 tokens before it, position p in slot p mod (l - 1), as
      `window.write` leaves them; [B, G, l - 1, K].
    blocks: `Blocks` of size s.
    length: l.

  Returns:
    tokens [B, G, W, l, K], zero where there is no entry; and whether the w-th
    completed piece completes an entry, [B, W] bool.

  Raises:
    ValueError: l is below 2, or no multiple of s.
  """
  if length < 2 or length % blocks.size:
    raise ValueError(f'windows: expected length >= 2, a multiple of the stride '
                     f'{blocks.size}, got {length}.')
  before = length - 1
  batch, groups, _, width = tokens.shape
  slots = jnp.arange(before, dtype=jnp.int32)[None]
  # Oldest first: the newest of L tokens is in slot (L - 1) mod (l - 1).
  order = (blocks.length[:, None] + slots) % before
  line = jnp.concatenate(
      [jnp.take_along_axis(ring, order[:, None, :, None], axis=2),
       tokens.astype(ring.dtype)], axis=2)
  exists = blocks.exists & (blocks.block >= length // blocks.size - 1)
  index = blocks.end[..., None] + jnp.arange(
      length, dtype=jnp.int32)[None, None]
  index = jnp.where(exists[..., None], index, 0).reshape(batch, 1, -1, 1)
  taken = jnp.take_along_axis(line, index, axis=2)
  taken = taken.reshape(batch, groups, -1, length, width)
  return jnp.where(exists[:, None, :, None, None], taken,
                   jnp.zeros((), taken.dtype)), exists


def visible(blocks, slots, length):
  """Which entries each query sees, as `blocks.visible_old` and `visible_new`.

  Args:
    blocks: `Blocks` of size s.
    slots: of the store of entries.
    length: l.

  Returns:
    [B, T, slots] and [B, T, W] bool: i s + l - 1 <= t, so in slot w those with
    n - 1 <= w < floor((t + 1) / s).
  """
  first = length // blocks.size - 1
  old = bk.visible_old(blocks, slots)
  old &= (jnp.arange(slots, dtype=jnp.int32) >= first)[None, None]
  return old, bk.visible_new(blocks) & (blocks.block >= first)[:, None]


def mass(q, k, seen, lse, *, scale):
  """Attention probabilities, summed over the query heads of a group.

    P_tj = sum_{h of the group} exp(scale q_th . k_j - lse_th), visible j

  Without gradient.

  Args:
    q: [B, T, H, K].
    k: [B, G, N, K].
    seen: [B, T, N] bool.
    lse: of the whole attention, as from `attend.attend`, [B, T, H].
    scale: factor on the scores.

  Returns:
    [B, G, T, N] float32 (float64 of float64 queries).
  """
  q, k, lse = jax.lax.stop_gradient((q, k, lse))
  batch, length, heads, width = q.shape
  groups = k.shape[1]
  rows = (q * jnp.asarray(scale, q.dtype)).reshape(
      batch, length, groups, heads // groups, width)
  s = einsum('btghk,bgnk->bghtn', rows, k)
  lse = lse.reshape(batch, length, groups, -1).transpose(0, 2, 3, 1)
  seen = seen[:, None, None]
  zero = jnp.zeros((), s.dtype)
  # Where nothing is seen lse is -1e30: no exponential of what is not.
  gap = jnp.where(seen, s - lse[..., None].astype(s.dtype), zero)
  return jnp.sum(jnp.where(seen, jnp.exp(gap), zero), axis=2)


def importance(old, new, blocks, length, size, count):
  """What blocks of tokens weigh, from what the entries weigh.

    I[j] = sum_{m < size / s} sum_{u < l / s} P[j size / s + m - u]

  over entries P: each counts once for every piece that it shares with block j.

  Args:
    old: P of the entries in the store's slots, [B, G, T, slots]; zero where
      the query does not see them.
    new: P of the entries which the step completes, [B, G, T, W]; the same.
    blocks: `Blocks` of size s.
    length: l.
    size: tokens per block, a multiple of s.
    count: J, blocks from the document's first one on.

  Returns:
    [B, G, T, J].

  Reference: arXiv 2502.11089 (NSA), importance scores of token selection.
  """
  each = size // blocks.size
  pieces, overlap = each * count, length // blocks.size
  # One line of slots for all: a query sees entries of one document only, and
  # there no two have the same slot.
  place = blocks.block[..., None] == jnp.arange(
      pieces, dtype=jnp.int32)[None, None]
  place &= blocks.exists[..., None]
  line = einsum('bgtw,bwp->bgtp', new, place.astype(new.dtype))
  room = pieces - old.shape[-1]
  line += jnp.pad(old[..., :pieces], [(0, 0)] * 3 + [(0, max(room, 0))])
  # A piece is in the entries that stand in its slot and the n - 1 behind it.
  line = jnp.pad(line, [(0, 0)] * 3 + [(0, overlap - 1)])
  first, *more = (line[..., u:u + pieces] for u in range(overlap))
  total = sum(more, start=first)
  return jnp.sum(total.reshape(*total.shape[:-1], count, each), axis=-1)
