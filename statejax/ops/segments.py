"""Memories that change where a segment ends, and nowhere else.

A segment is a block of `statejax.ops.blocks.Blocks`. The memory M_w before the
w-th segment that a step completes is read by the tokens up to the end of that
segment; M_0 is the state's. A document begins with an empty memory.
"""

import jax
import jax.numpy as jnp


def columns(plan, slots):
  """Where the tokens of each completed segment are.

  Args:
    plan: `Blocks` of S tokens each.
    slots: N >= S of a ring in which position p is in slot p mod N.

  Returns:
    Indices into [slots of the ring, tokens of the step], [B, W, S] int32, in
    order; any where there is no segment.
  """
  inside = jnp.arange(plan.size, dtype=jnp.int32)[None, None]
  step = plan.end[..., None] - (plan.size - 1) + inside
  ring = (plan.block[..., None] * plan.size + inside) % slots
  most = plan.positions.shape[1] - 1
  return jnp.where(step < 0, ring, slots + jnp.minimum(step, most))


def pick(x, index):
  """Rows of x [B, N, ...] at index [B, W, S]: [B, W, S, ...]."""
  flat = index.reshape(index.shape[0], -1, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, flat, axis=1).reshape(
      *index.shape, *x.shape[2:])


def owners(plan):
  """The document of each of M_0 .. M_W, [B, W + 1] int32; None without
  borders."""
  if plan.document is None:
    return None
  made = jnp.where(plan.exists, plan.document, -1)
  # A row's state is of document 0; where nothing is made nothing changes.
  return jax.lax.cummax(jnp.pad(made, ((0, 0), (1, 0))), axis=1)


def reads(plan):
  """Which memory each token reads.

  Returns:
    w of M_w, [B, T] int32, and whether it is of the token's document, [B, T]
    bool; where it is not, the token reads an empty one.
  """
  index = jnp.arange(plan.positions.shape[1], dtype=jnp.int32)
  which = jnp.sum(plan.end[:, None, :] < index[None, :, None], axis=-1,
                  dtype=jnp.int32)
  owner = owners(plan)
  if owner is None:
    return which, jnp.ones(which.shape, bool)
  mine = jnp.take_along_axis(owner, which, axis=1) == plan.token_document
  return which, mine


def cells(plan):
  """Tokens by the memory that they read, so that it is read once for all.

  Returns:
    indices of tokens, [B, W + 1, M] int32, M = min(S, T), in order; more than
      read it where they end. Place of each token in them, counted through,
      [B, T] int32; and whether it reads a memory of its document, [B, T] bool:
      of other tokens the place says nothing.
  """
  steps = plan.positions.shape[1]
  width = min(plan.size, steps)
  begin = jnp.pad(plan.end + 1, ((0, 0), (1, 0)))
  inside = jnp.arange(width, dtype=jnp.int32)[None, None]
  found = jnp.minimum(begin[..., None] + inside, steps - 1)
  which, mine = reads(plan)
  index = jnp.arange(steps, dtype=jnp.int32)[None]
  place = index - jnp.take_along_axis(begin, which, axis=1)
  return found, which * width + jnp.clip(place, 0, width - 1), mine


def carry(plan, memory, parts, update):
  """Runs a memory over the segments that a step completes.

  Args:
    plan: `Blocks` of the segments.
    memory: M_0, a tree of [B, ...]; zeros are an empty one.
    parts: what `update` wants of each segment, a tree of [B, W, ...].
    update: function of (memory, parts of a segment, [B, ...]) that gives the
      memory behind the segment.

  Returns:
    M_0 .. M_W, a tree of [B, W + 1, ...], and the memory after the step, of
    the row's last document, bit-equal where no token has been absorbed.
  """
  first = lambda x: jnp.moveaxis(x, 1, 0)
  fresh = jnp.zeros(plan.exists.shape, bool)
  last = jnp.zeros(plan.count.shape, bool)
  owner = owners(plan)
  if owner is not None:
    fresh = plan.exists & (plan.document != owner[:, :-1])
    at = jnp.maximum(plan.n_valid - 1, 0)[:, None]
    now = jnp.take_along_axis(plan.token_document, at, axis=1)
    last = now[:, 0] != owner[:, -1]

  # What it computes is made again for the gradient, not kept.
  again = jax.checkpoint(update, prevent_cse=False)

  def one(memory, segment):
    exists, fresh, parts = segment
    # In most steps of one token no segment ends.
    after = jax.lax.cond(
        jnp.any(exists), lambda m: again(_cleared(m, fresh), parts),
        lambda m: m, memory)
    return _where(exists, after, memory), memory

  after, before = jax.lax.scan(one, memory, (
      first(plan.exists), first(fresh), jax.tree.map(first, parts)))
  whole = jax.tree.map(
      lambda b, a: jnp.concatenate([jnp.moveaxis(b, 0, 1), a[:, None]], axis=1),
      before, after)
  return whole, _cleared(after, last)


def _where(keep, new, old):
  """`new` in rows [B] that `keep`, else `old`; of trees."""
  return jax.tree.map(lambda a, b: jnp.where(
      keep.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)


def _cleared(memory, rows):
  return _where(rows, jax.tree.map(jnp.zeros_like, memory), memory)
