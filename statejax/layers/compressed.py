"""Attention over a window and compressed entries (DeepSeek-V4's CSA, HCA)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import CompressedConfig
from statejax.layers import common, rotary, weights
from statejax.layers.common import Proj, RMSNorm
from statejax.ops import attend, blocks, compress, gather, index, norm, select
from statejax.ops import window as ring
from statejax.ops.product import einsum
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowState:
  """The last W tokens; position p is in slot p mod W.

  Attributes:
    kv: key and value in one, after rope, [B, 1, W, K], store dtype; fixed.
  """

  kv: Array = leaf('batch kv_heads window key')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedState(WindowState):
  """A window, entries, and what the open block has gathered.

  Attributes:
    entries: an entry for every `ratio` tokens, after norm and rope,
      [B, N / ratio, K], store dtype; growing.
    pool: of the open block, [B, P, K] float32: the maximum, sum and weighted
      sum of `statejax.ops.compress.Pool`, with overlap (P = 6) also those
      for the block after it; fixed.
  """

  entries: Array = leaf('batch capacity key', 'growing')
  pool: Array = leaf('batch pool key')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexedEntriesState(CompressedState):
  """A `CompressedState` with the indexer's own entries.

  Attributes:
    index: [B, N / ratio, dI], store dtype; growing.
    index_pool: [B, P, dI] float32; fixed.
  """

  index: Array = leaf('batch capacity index', 'growing')
  index_pool: Array = leaf('batch pool index')


class Compressed(nn.Module):
  """One softmax over a window, compressed entries and a learned sink.

    q_h = rope(rms(q_b^h RMS(q_a x)), t),   kv = rope(RMS(kv x), t)
    e_w = rope(RMS(pool of block w of (values x, gates x + bias)), w ratio)
    o_h = rope^-1(sum_j p_hj kv_j, t) over the window and the entries seen
    y = out_b concat_g out_a^g(o of the heads of g)

  An entry is seen from its block's last token on; with an indexer, if it is
  among the k best by `statejax.ops.index.scores`. See `compress.gated` and
  `compress.gated_overlap`. The indexer reads its inputs without gradient and
  learns from the attention's own weight on each entry (`ops.index.loss`).

  Reference: DeepSeek-V4, as in its published code.
  """

  config: CompressedConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns the state of `Spec` that ratio and indexer need."""
    c = config
    kv = Spec((rows, 1, c.window, c.width), dtype)
    if c.ratio is None:
      return WindowState(kv)
    slots, pools = -(-capacity // c.ratio), 6 if c.overlap else 3
    def pair(width):
      return (Spec((rows, slots, width), dtype, stride=c.ratio),
              Spec((rows, pools, width), 'float32'))
    if c.index is None:
      return CompressedState(kv, *pair(c.width))
    return IndexedEntriesState(kv, *pair(c.width), *pair(c.index.width))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    turn = rotary.rotation(c.rope, c.width)
    low = Proj((c.q_rank,), ('embed', 'rank'), name='q_a')(x)
    low = RMSNorm(c.eps, axis='rank', name='norm_q')(low)
    q = Proj((c.heads, c.width), ('rank', 'heads', 'key'), name='q_b')(low)
    q = turn(norm.rms_norm(q, None, eps=c.eps), context.positions)
    kv = Proj((c.width,), ('embed', 'key'), name='kv')(x)
    kv = RMSNorm(c.eps, axis='key', name='norm_kv')(kv)
    kv = turn(kv[:, :, None], context.positions).swapaxes(1, 2)
    kv = kv.astype(state.kv.dtype)

    held = ring.positions(context.length, c.window)
    segments = [
        _both(state.kv, context.visible_past(held, c.window)),
        _both(kv, context.visible_chunk(c.window), causal=True)]
    changes = {'kv': ring.write(state.kv, kv, context.base, context.start,
                                context.n_valid)}
    if c.ratio is not None:
      more, new = self._entries(x, low, q, state, context)
      segments, changes = segments + more, changes | new
    sink = weights.weight(self, 'sink', ('heads',), (c.heads,), weights.zeros)
    y, _ = attend.attend(q, segments, scale=c.width ** -0.5, sink=sink)
    # What is summed are keys: turned back, they are values.
    y = turn(y, -context.positions)
    return self._output(x, y), dataclasses.replace(state, **changes)

  def _entries(self, x, low, q, state, context):
    """Returns the segments of the entries, and the new leaves."""
    c = self.config
    plan = context.blocks(c.ratio)
    past, new, changes = self._compress(
        x, plan, state, context, '', c.width, ('entries', 'pool'))
    seen = [blocks.visible_old(plan, past.shape[1]), blocks.visible_new(plan)]
    if c.index is None:
      return [_both(e[:, None], s) for e, s in zip((past, new), seen)], changes
    scores, more = self._scores(*jax.lax.stop_gradient((x, low)), plan, state,
                                context)
    seen, slots = jnp.concatenate(seen, axis=-1), past.shape[1]
    chosen = seen if c.stage == 'warmup' else select.choose(
        scores, seen, c.index.k)
    if c.index_loss and chosen.dtype == bool:
      # Ids are of a single token, which nobody trains on.
      entries = jnp.concatenate([past, new], axis=1)
      def heads(begin, size):
        part = jax.lax.dynamic_slice_in_dim(q, begin, size, axis=1)
        return einsum('bthk,bnk->bthn', part, entries) * c.width ** -0.5
      common.add_loss(self, 'index', c.index_loss * index.loss(
          scores, heads, chosen, context.valid))
    mask = (chosen if chosen.dtype == bool else
            select.to_mask(chosen, seen.shape[-1])[:, None])
    old, mine = mask[..., :slots], mask[..., slots:]
    if chosen.dtype != bool:
      # Of a long store only what was chosen is read.
      found, past = select.take(chosen, past)
      old = found[:, None]
    return [_both(past[:, None], old), _both(new[:, None], mine)], (
        changes | more)

  def _scores(self, x, low, plan, state, context):
    """Returns index scores [B, T, E + W] float32, and the new leaves."""
    c = self.config
    assert c.index is not None
    old, new, more = self._compress(
        x, plan, state, context, 'index_', c.index.width,
        ('index', 'index_pool'))
    q = Proj((c.index.heads, c.index.width), ('rank', 'heads', 'index'),
             name='index_q')(low)
    q = rotary.rotation(self._index_rope(c.index.width), c.index.width)(
        q, context.positions)
    w = Proj((c.index.heads,), ('embed', 'heads'), name='index_w')(
        x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return jnp.concatenate(
        [gather.index_scores(q, w, old, count=context.length // c.ratio),
         index.scores(q, w, new)], axis=-1), more

  def _index_rope(self, width):
    """As many channels turn, of a narrower head."""
    c = self.config
    turning = int(c.rope.fraction * c.width)
    # Half a channel more: a fraction may not round below a whole number.
    return dataclasses.replace(
        c.rope, fraction=min(1.0, (turning + 0.5) / width))

  def _compress(self, x, plan, state, context, prefix, width, names):
    """Returns entries of the store, of this step, and the new leaves."""
    c = self.config
    channels = 2 * width if c.overlap else width
    axis = 'index' if prefix else 'key'
    values = Proj((channels,), ('embed', axis), name=f'{prefix}values')(x)
    gates = Proj((channels,), ('embed', axis), name=f'{prefix}gates')(x)
    bias = weights.weight(self, f'{prefix}bias', ('taps', axis),
                          (c.ratio, channels), weights.normal(0.02))
    gates = compress.add_position_bias(gates, bias, context.positions)
    growing, fixed = (getattr(state, name) for name in names)
    pools = [compress.Pool(*(fixed[:, 3 * i + j] for j in range(3)))
             for i in range(fixed.shape[1] // 3)]
    if c.overlap:
      made, pools = compress.gated_overlap(
          values, gates, compress.Overlap(*pools), plan)
    else:
      made, pool = compress.gated(values, gates, pools[0], plan)
      pools = [pool]
    made = RMSNorm(c.eps, axis=axis, name=f'{prefix}norm')(made)
    rope = self._index_rope(width) if prefix else c.rope
    made = rotary.rotation(rope, width)(
        made[:, :, None], plan.block * c.ratio)[:, :, 0]
    made = made.astype(growing.data.dtype)
    past, kept = context.append(growing, made, plan)
    return past, made, {
        names[0]: kept,
        names[1]: jnp.concatenate(
            [compress.stored(p, context.n_valid) for p in pools], axis=1)}

  def _output(self, x, y):
    c = self.config
    batch, length = y.shape[:2]
    groups, each = c.out_groups, c.heads // c.out_groups * c.width
    first = weights.weight(
        self, 'out_a', ('heads', 'value', 'rank'), (groups, each, c.out_rank),
        weights.truncated_normal(each ** -0.5))
    y = y.reshape(batch, length, groups, each)
    # One product for each group: a batched one would round otherwise in a
    # batch of another size.
    y = jnp.stack([common.project(y[:, :, g], first[g])
                   for g in range(groups)], axis=2)
    return Proj(x.shape[-1:], ('heads', 'rank', 'embed'), contract=2,
                name='out_b')(y)


def _both(x, visible, causal=False):
  """A segment whose keys are its values, [B, 1, N, K]."""
  return attend.Segment(x, x, visible, causal)
