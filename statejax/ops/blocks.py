"""Blocks of consecutive positions: where one step begins and ends them.

Block j of a document is its positions `j size .. j size + size - 1`, whatever
the phase at which a step meets the row. A step lists the blocks that it
completes, in order, and the block that it leaves open. Attention then has the
columns [tokens of the store, tokens of the step] and the entries [entries of
the store, entries of the step]; the functions below say who sees what, and
which entry holds which column.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
  """The blocks of one step of T tokens; W = ceil(T / size) of them at most.

  Attributes:
    length: tokens of the row's document before the step, [B].
    n_valid: real tokens of the step, [B].
    positions: of each token in its document, [B, T].
    token_document: borders up to each token, [B, T]; None without borders.
    start: index of the first token of the row's last document, [B].
    end: index in the step of the last token of the w-th completed block,
      [B, W]; T where there is none.
    block: number of that block in its document, [B, W]; 0 where none.
    document: borders up to that block, [B, W], -1 where none; None without
      borders.
    slot: where the entries of the row's last document go in a store, [B].
    first: the first completed block of that document, [B].
    count: completed blocks of the row, [B].
    phase: tokens in the block left open, [B].
    size: tokens per block; static.
    All arrays are int32. `store.append(entries, slot, first, count)` keeps the
    entries of the last document.
  """

  length: jax.Array
  n_valid: jax.Array
  positions: jax.Array
  token_document: jax.Array | None
  start: jax.Array
  end: jax.Array
  block: jax.Array
  document: jax.Array | None
  slot: jax.Array
  first: jax.Array
  count: jax.Array
  phase: jax.Array
  size: int = dataclasses.field(metadata=dict(static=True))

  @property
  def exists(self):
    """Whether there is a w-th completed block, [B, W] bool."""
    index = jnp.arange(self.end.shape[1], dtype=jnp.int32)
    return index[None] < self.count[:, None]

  @property
  def spans(self):
    """Whether completed block 0 began before the step, [B] bool."""
    return (self.count > 0) & (self.end[:, 0] < self.size - 1)

  @property
  def continues(self):
    """Whether the open block began before the step, [B] bool."""
    return self.phase > self.n_valid

  @property
  def valid(self):
    """[B, T] bool."""
    steps = jnp.arange(self.positions.shape[1], dtype=jnp.int32)
    return steps[None] < self.n_valid[:, None]


def plan(length, n_valid, positions, document, start, base, size):
  """Finds the blocks of a step; the arguments are fields of `Context`.

  Args:
    length: tokens of the row's document before the step, [B] int32.
    n_valid: real tokens of the step, left-packed, [B] int32.
    positions: of each token in its document, [B, T] int32.
    document: borders up to each token, [B, T] int32; 0 continues the state.
      None where the step has no borders.
    start: index of the first token of the row's last document, [B] int32.
    base: position of that token, [B] int32.
    size: tokens per block.

  Returns:
    `Blocks`.

  Raises:
    ValueError: size or T is below 1.

  Reference: the parallel compressor of DeepSeek-V4 attention at any phase.
  """
  steps = positions.shape[1]
  if size < 1 or steps < 1:
    raise ValueError(f'blocks: expected size >= 1 and a step of T >= 1 tokens, '
                     f'got size={size}, T={steps}; leave empty steps out.')
  # At most one completed block began before the step: its document's first,
  # and blocks of later documents begin with them. All others lie in the step
  # whole and that one has a token in it, so (w - 1) size + 1 <= T.
  most = -(-steps // size)
  index = jnp.arange(steps, dtype=jnp.int32)[None]
  last = _last_of_block(n_valid, positions, size)
  count = jnp.sum(last, axis=1, dtype=jnp.int32)
  if document is None:
    number = (length // size)[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
    end = (number + 1) * size - 1 - length[:, None]
    end = jnp.where(end < n_valid[:, None], end, steps)
  else:
    end = jnp.sort(jnp.where(last, index, steps), axis=1)[:, :most]
  take = lambda x: jnp.take_along_axis(x, jnp.minimum(end, steps - 1), axis=1)
  exists = end < steps
  return Blocks(
      length=length, n_valid=n_valid, positions=positions,
      token_document=document, start=start, end=end,
      block=jnp.where(exists, take(positions) // size, 0),
      document=(None if document is None
                else jnp.where(exists, take(document), -1)),
      slot=base // size,
      first=jnp.sum(last & (index < start[:, None]), axis=1, dtype=jnp.int32),
      count=count, phase=(base + n_valid - start) % size, size=size)


def _last_of_block(n_valid, positions, size):
  """Which real tokens complete their block, [B, T] bool."""
  index = jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
  return (index < n_valid[:, None]) & ((positions + 1) % size == 0)


def members(blocks):
  """The step's tokens of each completed block, at most M = min(size, T).

  Returns:
    index: [B, W, M] int32, in order, the block's last token last; within
      0..T-1 even where masked.
    mask: [B, W, M] bool; false for tokens before the step (of block 0 where it
      `spans`) and for blocks that do not exist.
  """
  steps = blocks.positions.shape[1]
  width = min(blocks.size, steps)
  index = blocks.end[..., None] + jnp.arange(
      1 - width, 1, dtype=jnp.int32)[None, None]
  return (jnp.clip(index, 0, steps - 1),
          blocks.exists[..., None] & (index >= 0))


def open_members(blocks):
  """The step's tokens of the open block, at most M = min(size - 1, T).

  Returns:
    index: [B, M] int32, in order; within 0..T-1 even where masked.
    mask: [B, M] bool.
  """
  steps = blocks.positions.shape[1]
  width = min(blocks.size - 1, steps)
  index = blocks.n_valid[:, None] + jnp.arange(
      -width, 0, dtype=jnp.int32)[None]
  begin = jnp.maximum(blocks.n_valid - blocks.phase, 0)
  return jnp.clip(index, 0, steps - 1), index >= begin[:, None]


def visible_new(blocks):
  """Which entries of this step each query sees, [B, T, W] bool.

  Those of its document whose last token is the query or before it.
  """
  index = jnp.arange(blocks.positions.shape[1], dtype=jnp.int32)
  # Blocks that do not exist end at T, after every query.
  seen = blocks.end[:, None, :] <= index[None, :, None]
  seen &= blocks.valid[..., None]
  if blocks.token_document is not None:
    seen &= blocks.token_document[..., None] == blocks.document[:, None, :]
  return seen


def visible_old(blocks, slots):
  """Which of a store's `slots` entries each query sees, [B, T, slots] bool.

  Those completed before the step, from queries of the document they are of.
  Entries of this step are `visible_new`, also where the store has them.
  """
  index = jnp.arange(slots, dtype=jnp.int32)[None]
  seen = index < (blocks.length // blocks.size)[:, None]
  seen = seen[:, None, :] & blocks.valid[..., None]
  if blocks.token_document is not None:
    seen &= (blocks.token_document == 0)[..., None]
  return seen


def entry_of_column(blocks, tokens, entries):
  """The entry that holds each token, [B, tokens + T] int32.

  Args:
    blocks: `Blocks`.
    tokens: slots of the token store; slot i holds position i.
    entries: slots of the entry store; slot j holds block j.

  Returns:
    An index into [entries of the store, entries of the step], so `entries + w`
    for the w-th block of the step; -1 where the token's block is not complete
    after the step, or where there is no token.
  """
  size = blocks.size
  length = blocks.length[:, None]
  slot = jnp.arange(tokens, dtype=jnp.int32)[None]
  old = jnp.where(slot // size < length // size, slot // size,
                  jnp.where(blocks.spans[:, None], entries, -1))
  old = jnp.where(slot < length, old, -1)

  # The next block to complete holds a token unless it begins after it.
  last = _last_of_block(blocks.n_valid, blocks.positions, size)
  last = last.astype(jnp.int32)
  number = jnp.cumsum(last, axis=1, dtype=jnp.int32) - last
  end = jnp.take_along_axis(
      blocks.end, jnp.minimum(number, blocks.end.shape[1] - 1), axis=1)
  index = jnp.arange(blocks.positions.shape[1], dtype=jnp.int32)[None]
  inside = (number < blocks.count[:, None]) & (end - size < index)
  return jnp.concatenate(
      [old, jnp.where(inside, entries + number, -1)], axis=1)


def block_of_column(blocks, tokens):
  """Number of each column's block in its document, [B, tokens + T] int32.

  Complete or open; -1 where there is no token. As a query sees tokens of one
  document only, this number tells apart all blocks that it may choose from.

  Args:
    blocks: `Blocks`.
    tokens: slots of the token store.
  """
  slot = jnp.arange(tokens, dtype=jnp.int32)[None]
  old = jnp.where(slot < blocks.length[:, None], slot // blocks.size, -1)
  new = jnp.where(blocks.valid, blocks.positions // blocks.size, -1)
  return jnp.concatenate([old, new], axis=1)


def own_block(blocks, tokens):
  """Which columns are in the query's own block, [B, T, tokens + T] bool.

  Later tokens of the block too: combine it with what the query may see.

  Args:
    blocks: `Blocks`.
    tokens: slots of the token store.
  """
  column = block_of_column(blocks, tokens)
  query = jnp.where(blocks.valid, column[:, tokens:], -2)
  own = query[..., None] == column[:, None, :]
  if blocks.token_document is None:
    return own
  document = jnp.pad(blocks.token_document, ((0, 0), (tokens, 0)))
  return own & (blocks.token_document[..., None] == document[:, None, :])


def spread(chosen, of_column):
  """What was chosen for entries or blocks, said of their tokens.

  Args:
    chosen: [B, ..., J] bool.
    of_column: index into J of each column, negative for none, [B, N] int32.

  Returns:
    [B, ..., N] bool; false where the index is negative.
  """
  shape = (of_column.shape[0],) + (1,) * (chosen.ndim - 2) + (-1,)
  index = of_column.reshape(shape)
  taken = jnp.take_along_axis(
      chosen, jnp.clip(index, 0, chosen.shape[-1] - 1), axis=-1)
  return taken & (index >= 0)
