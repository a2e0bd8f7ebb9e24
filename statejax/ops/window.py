"""The ring of a sliding window: position p lives in slot p mod W."""

import jax.numpy as jnp


def positions(length, window):
  """Returns the position held by each slot, negative where empty.

  Slot i holds `(L-1) - ((L-1-i) mod W)`, the newest position below the length
  L that is congruent to i.

  Args:
    length: tokens written so far, [B] int32.
    window: W.

  Returns:
    [B, W] int32.
  """
  last = length[:, None] - 1
  return last - (last - jnp.arange(window, dtype=jnp.int32)[None]) % window


def write(ring, new, base, first, count):
  """Writes the last W of the tokens `new[first:count]` into their slots.

  Read before writing: the ring that a chunk's queries need is the old one.

  Args:
    ring: [B, G, W, K].
    new: [B, G, T, K].
    base: position of token `first`, [B] int32. Where it is 0 a document
      begins, and slots that it does not reach become zero.
    first: [B] int32.
    count: [B] int32.

  Returns:
    [B, G, W, K]; bit-equal where `count` is 0.
  """
  held = positions(base + count - first, ring.shape[2])
  fresh = held >= base[:, None]
  source = jnp.clip(first[:, None] + held - base[:, None], 0, new.shape[2] - 1)
  moved = jnp.take_along_axis(new, source[:, None, :, None], axis=2)
  stale = (held < 0) & (count > 0)[:, None]
  kept = jnp.where(stale[:, None, :, None], jnp.zeros((), ring.dtype), ring)
  return jnp.where(fresh[:, None, :, None], moved.astype(ring.dtype), kept)
