"""From the tokens of a step to the events of its segments.

A segment is a block of `blocks.Blocks`. Its events are the strongest of its
tokens that want one, in the order of their positions; those of the segment left
open wait in the state. Which they are does not depend on where steps end: the
best of the best so far and of what is new are the best of all.
"""

import math

import jax.numpy as jnp

from statejax.ops import blocks, select


def strongest(waiting, strength, plan, count):
  """The tokens that give each segment its events.

  Args:
    waiting: strength of the events that wait, in order, [B, E]; -1 where none.
    strength: of what each token wants, [B, T] float32; -1 where nothing.
    plan: `Blocks` of the step; the waiting ones are of the open segment before.
    count: E.

  Returns:
    Indices into [waiting events, tokens of the step], ascending, -1 for none:
    [B, W, E] of the segments that the step completes, and [B, E] of the one
    that it leaves open.
  """
  held = jnp.arange(count, dtype=jnp.int32)
  def best(index, mask, goes_on):
    at = jnp.take_along_axis(
        strength, index.reshape(index.shape[0], -1), axis=1)
    at = jnp.where(mask, at.reshape(index.shape), -1.)
    lead = (*index.shape[:-1], count)
    before = waiting.reshape(-1, *(1,) * (index.ndim - 2), count)
    old = jnp.where(goes_on[..., None], jnp.broadcast_to(before, lead), -1.)
    score = jnp.concatenate([old, at], axis=-1)
    where = jnp.concatenate(
        [jnp.broadcast_to(held.reshape((1,) * (index.ndim - 1) + (count,)),
                          lead), index + count], axis=-1)
    ids = select.top(score, score >= 0, count)
    found = jnp.take_along_axis(where, jnp.maximum(ids, 0), axis=-1)
    last = jnp.iinfo(jnp.int32).max
    found = jnp.sort(jnp.where(ids < 0, last, found), axis=-1)
    return jnp.where(found == last, -1, found)

  index, mask = blocks.members(plan)
  first = jnp.arange(index.shape[1], dtype=jnp.int32)[None] == 0
  done = best(index, mask, first & plan.spans[:, None])
  return done, best(*_open(plan), plan.continues)


def _open(plan):
  if plan.size == 1:
    # Nothing waits; the one column there has to be is masked.
    zero = jnp.zeros((plan.end.shape[0], 1), jnp.int32)
    return zero, zero > 0
  return blocks.open_members(plan)


def window(tail, new, at, position):
  """The last tokens of a statement.

  Args:
    tail: what came before the step, [B, N - 1]; -1 where nothing.
    new: the step's, [B, T].
    at: indices of tokens of the step, [B, E].
    position: of those tokens in their document, [B, E].

  Returns:
    [B, E, N], oldest first, the token itself last; -1 before its document.
  """
  size = tail.shape[1] + 1
  both = jnp.concatenate([tail, new], axis=1)
  back = jnp.arange(size, dtype=jnp.int32)
  index = at[..., None] + back[None, None]
  found = jnp.take_along_axis(
      both, index.reshape(index.shape[0], -1), axis=1).reshape(index.shape)
  age = size - 1 - back
  return jnp.where(age[None, None] <= position[..., None], found, -1)


def keep(tail, new, start, n_valid):
  """The tail after a step: its document's last N - 1 tokens.

  Args:
    tail: [B, N - 1].
    new: [B, T].
    start: index of the first token of the row's last document, [B].
    n_valid: real tokens of the step, [B].
  """
  size = tail.shape[1]
  both = jnp.concatenate([tail, new], axis=1)
  index = n_valid[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
  kept = jnp.take_along_axis(both, index, axis=1)
  old = (index - size < start[:, None]) & (start[:, None] > 0)
  return jnp.where(old, -1, kept)


def last_run(tokens, tagged, size):
  """The last run of tagged tokens, cut to its last `size`.

  Args:
    tokens: [..., N].
    tagged: [..., N] bool.
    size: of the result.

  Returns:
    The tokens, [..., size], -1 behind the last; the index of the first in
    0..N-1, N where none is tagged; and how many, [...].
  """
  n, lead = tokens.shape[-1], (1,) * (tokens.ndim - 1)
  index = jnp.arange(n, dtype=jnp.int32).reshape(*lead, n)
  end = jnp.max(jnp.where(tagged, index, -1), axis=-1)
  gap = jnp.where(~tagged & (index <= end[..., None]), index, -1)
  begin = jnp.maximum(jnp.max(gap, axis=-1), end - size) + 1
  count = end + 1 - begin
  at = begin[..., None] + jnp.arange(size, dtype=jnp.int32).reshape(*lead, size)
  found = jnp.take_along_axis(tokens, jnp.minimum(at, n - 1), axis=-1)
  found = jnp.where((at <= end[..., None]) & (end >= 0)[..., None], found, -1)
  return found, jnp.where(end < 0, n, begin), jnp.where(end < 0, 0, count)


def pick(arrays, at, fill=None):
  """Rows of several arrays, one gather for all of a dtype.

  Args:
    arrays: {name: [B, N, ...]}.
    at: indices into N, [B, ...] int32; negative for none.
    fill: {name: what stands for none}; 0 where absent.

  Returns:
    {name: [B, ..., ...]}.
  """
  fill, out, lead = fill or {}, {}, at.shape
  none = at.reshape(lead[0], -1, 1) < 0
  index = jnp.maximum(at, 0).reshape(lead[0], -1, 1)
  for dtype in sorted({x.dtype for x in arrays.values()}, key=str):
    mine = {n: x for n, x in arrays.items() if x.dtype == dtype}
    widths = [math.prod(x.shape[2:]) for x in mine.values()]
    flat = jnp.concatenate([x.reshape(*x.shape[:2], w)
                            for x, w in zip(mine.values(), widths)], axis=-1)
    found, begin = jnp.take_along_axis(flat, index, axis=1), 0
    for (name, x), width in zip(mine.items(), widths):
      part = found[..., begin:begin + width]
      begin += width
      part = jnp.where(none, jnp.asarray(fill.get(name, 0), dtype), part)
      out[name] = part.reshape(*lead, *x.shape[2:])
  return out
