"""Kwai summary attention: summary tokens run through the whole network."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import KSAConfig
from statejax.layers import rotary
from statejax.layers.attention import RingState, StoreState, remember
from statejax.layers.common import Proj, RMSNorm
from statejax.ops import attend, blocks, stream
from statejax.ops import window as ring
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summaries:
  """The summary tokens of a step: m for each of the W chunks it may complete.

  In what runs through the layers they stand behind the step's T tokens, chunk
  by chunk.

  Attributes:
    chunks: the text chunks, `statejax.ops.blocks.Blocks`.
    count: m; static.
  """

  chunks: blocks.Blocks
  count: int = dataclasses.field(metadata=dict(static=True))

  @property
  def exists(self):
    """[B, W m] bool."""
    return jnp.repeat(self.chunks.exists, self.count, axis=1)

  @property
  def positions(self):
    """Of the text that a summary stands for the last of, [B, W m] int32.

    The chunk's text is cut in m parts; summary u bears the position of the last
    token of part u.
    """
    size = self.chunks.size
    last = jnp.arange(1, self.count + 1, dtype=jnp.int32) * size
    found = (self.chunks.block * size)[..., None] + (
        last // self.count - 1)[None, None]
    return found.reshape(found.shape[0], -1)


def append(config, embedding, x, context):
  """Appends the summary tokens of the chunks that a step completes.

  Args:
    config: `SummaryConfig`.
    embedding: of the m summary tokens, [m, D].
    x: embedded tokens, [B, T, D].
    context: of the step.

  Returns:
    [B, T + W m, D], and the context that knows of them.
  """
  plan = context.blocks(config.chunk)
  each = jnp.tile(embedding.astype(x.dtype), (plan.end.shape[1], 1))[None]
  x = jnp.concatenate(
      [x, jnp.broadcast_to(each, (x.shape[0], *each.shape[1:]))], axis=1)
  return x, dataclasses.replace(
      context, summary=Summaries(plan, config.count))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SummaryState(RingState):
  """The last text as a ring of whole chunks, and the summaries of all chunks.

  Attributes:
    summary_k: key of summary u of chunk j in slot [u, j], after norm and rope,
      [B, G, m, N / C, K], store dtype; growing.
    summary_v: [B, G, m, N / C, V], store dtype; growing.
  """

  summary_k: Array = leaf('batch kv_heads entries capacity key', 'growing')
  summary_v: Array = leaf('batch kv_heads entries capacity value', 'growing')


class KSA(nn.Module):
  """Attention of text and of summary tokens.

  A text token of chunk i sees, in one softmax, its own chunk up to itself, the
  text of `chunks` chunks before it, and the summaries of all chunks before
  those: every earlier token as text or in a summary, never in both. A full
  layer (`chunks=None`) has the text of all chunks instead. A summary token sees
  the text of its chunk, the chunk's summaries before it, and itself; what it
  gathers there, text sees in the layers that follow.

  Queries, keys and values of summaries are `mix` times those of projections of
  their own, the rest from those of text.

  Reference: arXiv 2604.24432 and its published code.
  """

  config: KSAConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns `Spec`s in a `SummaryState`, of a full layer a `StoreState`."""
    c, size = config, config.summary.chunk
    def pair(*shape, stride=1):
      return (Spec((rows, c.kv_heads, *shape, c.key), dtype, stride),
              Spec((rows, c.kv_heads, *shape, c.value), dtype, stride))
    if c.chunks is None:
      return StoreState(*pair(capacity))
    return SummaryState(
        *pair((c.chunks + 1) * size),
        *pair(c.summary.count, -(-capacity // size), stride=size))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    (q, k, v), (own_q, own_k, own_v) = self._project(x, context)
    # Keys enter this step as they enter the store.
    stored = (state.k.data if c.chunks is None else state.k).dtype
    k, v, own_k, own_v = (
        a.swapaxes(1, 2).astype(stored) for a in (k, v, own_k, own_v))
    step = self._full if c.chunks is None else self._near
    (far, *near), last, text, state = step(
        state, (k, v), (own_k, own_v), context)
    y, _ = stream.attend(q, far, near, scale=c.key ** -0.5, last=last)
    own = _summarise(own_q, (own_k, own_v), text, context.summary,
                     scale=c.key ** -0.5)
    y = Proj(x.shape[-1:], ('heads', 'value', 'embed'), contract=2,
             name='out')(jnp.concatenate([y, own], axis=1))
    return y, state

  def _project(self, x, context):
    """Returns q, k, v of the text and of the summaries, [B, .., heads, K]."""
    c = self.config
    steps = context.positions.shape[1]
    sides = {'q': (c.heads, c.key, 'heads', 'key'),
             'k': (c.kv_heads, c.key, 'kv_heads', 'key'),
             'v': (c.kv_heads, c.value, 'kv_heads', 'value')}
    norms = {name: RMSNorm(c.eps, axis='key', name=f'norm_{name}')
             for name in 'qk' if c.qk_norm}
    def projections(suffix):
      made = {name: Proj((heads, width), ('embed', *axes), name=name + suffix)
              for name, (heads, width, *axes) in sides.items()}
      return lambda x: [norms.get(name, lambda y: y)(proj(x))
                        for name, proj in made.items()]
    of_text, of_summary = projections(''), projections('_summary')
    text, own = of_text(x[:, :steps]), of_summary(x[:, steps:])
    if c.mix < 1:
      own = [c.mix * a + (1 - c.mix) * b
             for a, b in zip(own, of_text(x[:, steps:]), strict=True)]
    turn = rotary.rotation(c.rope, c.key)
    return [(turn(q, at), turn(k, at), v) for (q, k, v), at in (
        (text, context.positions), (own, context.summary.positions))]

  def _full(self, state, new, own, context):
    """Returns what text sees, what is far first; the last slot it sees of that,
    if all before are seen; the open chunk's old text; the new state."""
    k, v = new
    (*old, seen), after = remember(state, k, v, context)
    segments = [attend.Segment.of(old, seen),
                attend.Segment.of(new, context.visible_chunk(), causal=True)]
    return segments, context.last, _chunk_text(old, new, context), after

  def _near(self, state, new, own, context):
    """See `_full`."""
    c, plan = self.config, context.summary.chunks
    old, size, slots = (state.k, state.v), plan.size, state.k.shape[2]
    held = ring.positions(context.length, slots)
    # The first chunk of which a query sees the text.
    first = (context.positions // size - c.chunks)[..., None]
    seen_old = context.visible_past(held) & (held[:, None] // size >= first)
    seen_new = context.visible_chunk() & (
        context.positions[:, None] // size >= first)
    segments = [attend.Segment.of(old, seen_old),
                attend.Segment.of(new, seen_new, causal=True)]

    # [B, G, m, W, K], as in the store.
    made = [a.reshape(*a.shape[:2], -1, context.summary.count, a.shape[-1])
            .swapaxes(2, 3) for a in own]
    past, after = zip(*(context.append(a, b, plan) for a, b in zip(
        (state.summary_k, state.summary_v), made)))
    entries = jnp.arange(past[0].shape[3], dtype=jnp.int32)
    far = [(list(past), blocks.visible_old(plan, entries.size)
            & (entries[None, None] < first))]
    # A step that is no longer sees none of the summaries that it makes.
    if context.positions.shape[1] > c.chunks * size + 1:
      far.append((made, blocks.visible_new(plan)
                  & (plan.block[:, None] < first)))
    segments = [attend.Segment.of(
        [a.reshape(*a.shape[:2], -1, a.shape[-1]) for a in kv],
        jnp.tile(seen, (1, 1, context.summary.count)))
                for kv, seen in far] + segments
    where = (context.base, context.start, context.n_valid)
    return segments, None, _chunk_text(old, new, context), SummaryState(
        *(ring.write(a, b, *where) for a, b in zip(old, new)), *after)


def _chunk_text(old, new, context):
  """Returns keys and values of the text of each chunk that a step completes.

  Args:
    old: keys and values [B, G, N, K] of a store, or of a ring of whole chunks.
    new: those of the step, [B, G, T, K].
    context: of the step.

  Returns:
    Two arrays [B, W, G, C, K]; anything where there is no such chunk.
  """
  plan, steps = context.summary.chunks, new[0].shape[2]
  size, slots = plan.size, old[0].shape[2]
  inside = jnp.arange(size, dtype=jnp.int32)
  # Only the chunk that was open has text before the step, and a token's place
  # in that chunk says where it is.
  begin = context.length // size * size
  index = plan.end[..., None] + (inside - (size - 1))[None, None]
  index = jnp.where(index < 0, inside[None, None],
                    size + jnp.minimum(index, steps - 1))
  def one(old, new):
    if not slots:  # a fresh state without stores: no text before the step
      tail = jnp.zeros((*old.shape[:2], size, old.shape[-1]), new.dtype)
    else:
      tail = _chunk_of(old, begin % slots if slots % size == 0 else begin, size)
    found = _take(jnp.concatenate([tail, new], axis=2),
                  index.reshape(index.shape[0], -1))
    rows, heads, _, width = found.shape
    return found.reshape(rows, heads, -1, size, width).swapaxes(1, 2)
  return one(old[0], new[0]), one(old[1], new[1])


def _chunk_of(x, begin, size):
  """x [B, G, N, K] at `begin .. begin + size - 1` of each row; anything where
  that is past the end. Row after row: a gather would copy the store."""
  width = min(size, x.shape[2])
  first = jnp.clip(begin, 0, x.shape[2] - width)
  def one(row):
    return jax.lax.dynamic_slice(
        x, (row, 0, first[row], 0), (1, x.shape[1], width, x.shape[3]))[0]
  found = jax.lax.map(one, jnp.arange(x.shape[0], dtype=jnp.int32))
  # A store that ends within the chunk does not hold the rest of it.
  index = (begin - first)[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
  return _take(found, jnp.minimum(index, width - 1))


def _take(x, index):
  """x [B, G, N, K] at index [B, M]."""
  return jnp.take_along_axis(x, index[:, None, :, None], axis=2)


def _summarise(q, own, text, summaries, *, scale):
  """Attention of the summary tokens, each chunk for itself.

  Args:
    q: [B, W m, H, K].
    own: keys and values of the summaries, [B, G, W m, K].
    text: those of the chunks' text, [B, W, G, C, K].
    summaries: `Summaries`.
    scale: factor on the scores.

  Returns:
    [B, W m, H, V].
  """
  rows, chunks, heads, size, _ = text[0].shape
  m = summaries.count
  flat = lambda a: a.reshape(rows * chunks, *a.shape[2:])
  exists = summaries.chunks.exists.reshape(-1, 1, 1)
  own = [flat(a.reshape(rows, heads, chunks, m, -1).swapaxes(1, 2))
         for a in own]
  shown = lambda mask: jnp.broadcast_to(
      exists & mask[None], (rows * chunks, *mask.shape))
  y, _ = attend.attend(
      q.reshape(rows * chunks, m, *q.shape[2:]),
      [attend.Segment.of(map(flat, text), shown(jnp.ones((m, size), bool))),
       attend.Segment.of(own, shown(jnp.tril(jnp.ones((m, m), bool))))],
      scale=scale)
  return y.reshape(rows, chunks * m, *y.shape[2:])
