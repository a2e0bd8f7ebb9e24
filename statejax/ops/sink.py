"""The first tokens of a document, kept for good: position p is in slot p."""

import jax.numpy as jnp


def write(kept, new, base, first, count):
  """Writes those of the tokens `new[first:count]` that have a slot.

  Args:
    kept: [B, G, S, K], of positions 0 .. S - 1.
    new: [B, G, T, K].
    base: position of token `first`, [B] int32. Where it is 0 a document
      begins, and slots that it does not reach become zero.
    first: [B] int32.
    count: [B] int32.

  Returns:
    [B, G, S, K]; bit-equal where `count` is 0.

  Reference: arXiv 2309.17453 (StreamingLLM).
  """
  slot = jnp.arange(kept.shape[2], dtype=jnp.int32)[None]
  source = slot - base[:, None] + first[:, None]
  fresh = (slot >= base[:, None]) & (source < count[:, None])
  # As in a ring: past the row's new length nothing stays of another document.
  stale = (source >= count[:, None]) & (count > 0)[:, None]
  moved = jnp.take_along_axis(
      new, jnp.clip(source, 0, new.shape[2] - 1)[:, None, :, None], axis=2)
  old = jnp.where(stale[:, None, :, None], jnp.zeros((), kept.dtype), kept)
  return jnp.where(fresh[:, None, :, None], moved.astype(kept.dtype), old)
