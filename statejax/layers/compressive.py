"""Compressive transformer: what leaves the memory goes on in fewer rows."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import CompressiveConfig
from statejax.layers import common, transformer_xl
from statejax.layers.common import Proj
from statejax.ops import attend, blocks, segments, window
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressiveState(transformer_xl.HiddenState):
  """Layer inputs, and entries of those that have left the memory.

  Attributes:
    compressed: entry j, of rows `rate j .. rate j + rate - 1`, is in slot
      j mod Mc, [B, Mc, D], store dtype; fixed. None where there are none.
  """

  compressed: Array | None = leaf('batch window channels')


class Compressive(nn.Module):
  """`TransformerXL` that also sees its Mc last entries behind the memory.

    entry_j = sum_i W_i h_{rate j + i}

  A segment sees the entries of all rows that are not in its memory, up to Mc of
  them; an entry stands at the place of its last row. The published code counts
  an entry as one place; here distances are of tokens.

  `compress_loss` is of each token the mean square between attention to the rows
  that leave at the end of its segment and attention to their entries; all but
  W is detached in it.

  Reference: arXiv 1911.05507.
  """

  config: CompressiveConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `CompressiveState` of `Spec`."""
    c = config
    kept = Spec((rows, c.compressed, c.width), dtype)
    return CompressiveState(
        Spec((rows, c.slots, c.width), dtype), kept if c.compressed else None)

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    new, both = transformer_xl.joined(c, x, state.hidden)
    queries, keys = transformer_xl.relative(self, c, x, context)
    own, memory, far = transformer_xl.sights(c, context)
    sources = [keys(both, far, own),
               keys(transformer_xl.cut(c, both), far, memory)]
    compressed = None
    if c.compressed:
      made = self._entries(state, both, context)
      rows, places, seen = made.sight(c, context)
      sources.append(keys(rows.astype(x.dtype), places, seen))
      compressed = made.kept(c, state.compressed, context)
      self._learn(made, queries, keys, both, (own | memory, far), context)
    y, _ = attend.attend(queries, sources, scale=c.key ** -0.5)
    return transformer_xl.output(x, y), CompressiveState(
        transformer_xl.write(state.hidden, new, context), compressed)

  def _entries(self, state, both, context):
    """The entries that a step can see or has to keep."""
    c, plan = self.config, context.blocks(self.config.rate)
    both = transformer_xl.cut(c, both)
    held = both[:, :c.slots].reshape(both.shape[0], -1, c.rate, c.width)
    made = segments.pick(both, segments.columns(plan, c.slots))
    y = Proj((c.width,), ('taps', 'embed', 'channels'), contract=2,
             name='compress')(jnp.concatenate([held, made], axis=1))
    left = bound(c, context.length)
    return Entries(
        jnp.concatenate([state.compressed, y.astype(state.compressed.dtype)],
                        axis=1),
        window.positions(left, c.compressed),
        window.positions(context.length, c.slots)[:, ::c.rate] // c.rate,
        left, plan)

  def _learn(self, made, queries, keys, both, sight, context):
    c, still = self.config, jax.lax.stop_gradient
    seen, far = sight
    begin = transformer_xl.begins(c, context)
    held = window.positions(context.length, c.slots)
    at = jnp.concatenate([held, context.positions], axis=1)[:, None, :]
    low, high = begin - c.memory, begin - c.memory + min(c.memory, c.segment)
    leaves = seen & (at >= low) & (at < high)
    rows, places, known = made.known(c, context)
    number = made.numbers[:, None, c.compressed:] * c.rate
    rows, places = rows[:, c.compressed:], places[:, c.compressed:]
    known = known[..., c.compressed:] & (number >= low) & (number < high)
    def look(rows, far, visible):
      y, _ = attend.attend(
          still(queries), [keys(rows, far, visible, still)],
          scale=c.key ** -0.5)
      return y.astype(jnp.float32)
    want = still(look(both, far, leaves))
    got = look(rows.astype(both.dtype), places, known)
    cost = jnp.mean((got - want) ** 2, axis=(2, 3))
    common.add_loss(self, 'compress_loss', jnp.sum(
        jnp.where(context.valid, cost, 0.)))


def bound(config, length):
  """Entries that have left the memory of a row of `length` tokens."""
  begin = length // config.segment * config.segment
  return jnp.maximum(begin - config.memory, 0) // config.rate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
  """Entries [kept, of rows in the ring, of rows of the step].

  Attributes:
    rows: [B, Mc + N / rate + W, D], store dtype.
    old: numbers of those kept, [B, Mc]; negative where empty.
    ring: numbers of those in the ring, [B, N / rate]; only from `left` to what
      is complete they mean something.
    left: entries that had left the memory before the step, [B].
    plan: `statejax.ops.blocks.Blocks` of the entries.
  """

  rows: jax.Array
  old: jax.Array
  ring: jax.Array
  left: jax.Array
  plan: blocks.Blocks

  @property
  def numbers(self):
    """Of each entry in its document, [B, ...]."""
    return jnp.concatenate([self.old, self.ring, self.plan.block], axis=1)

  def known(self, config, context):
    """Rows, their places from the anchors, and which of them are complete and
    of the document of each query, [B, T, ...]."""
    rate, plan = config.rate, self.plan
    length = context.length[:, None]
    held = (self.ring >= self.left[:, None]) & (self.ring < length // rate)
    past = jnp.concatenate(
        [self.old, jnp.where(held, self.ring, -1)], axis=1)
    seen = jnp.concatenate([context.visible_past(past * rate),
                            blocks.visible_new(plan)], axis=2)
    first = (jnp.broadcast_to(length, plan.block.shape)
             if plan.document is None
             else jnp.where(plan.document == 0, length, 0))
    start = jnp.concatenate(
        [jnp.broadcast_to(length, past.shape), first], axis=1)
    return self.rows, self.numbers * rate + rate - 1 - start, seen

  def sight(self, config, context):
    """`known` of what is seen: the last Mc that have left the memory."""
    rows, places, seen = self.known(config, context)
    top = bound(config, context.positions)[..., None]
    number = self.numbers[:, None, :]
    return rows, places, seen & (number < top) & (
        number >= top - config.compressed)

  def kept(self, config, old, context):
    """The ring of entries after the step, [B, Mc, D]."""
    c, plan = config, self.plan
    number = window.positions(bound(c, context.new_length), c.compressed)
    slot = jnp.arange(c.compressed, dtype=jnp.int32)[None]
    ring = c.compressed + number * c.rate % c.slots // c.rate
    step = c.compressed + c.slots // c.rate + (
        plan.first - plan.slot)[:, None] + number
    goes_on = (context.start == 0)[:, None]
    source = jnp.where(goes_on & (number < self.left[:, None]), slot, jnp.where(
        goes_on & (number < context.length[:, None] // c.rate), ring, step))
    source = jnp.clip(jnp.where(number < 0, slot, source), 0,
                      self.rows.shape[1] - 1)
    taken = jnp.take_along_axis(self.rows, source[..., None], axis=1)
    empty = (number < 0) & (context.n_valid > 0)[:, None]
    return jnp.where(empty[..., None], jnp.zeros((), old.dtype), taken)
