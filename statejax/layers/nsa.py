"""Native sparse attention: compressed, selected and recent tokens, gated."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import NSAConfig
from statejax.layers import attention, rotary, weights
from statejax.layers.common import Proj
from statejax.ops import (
    attend,
    blocks,
    gather,
    select,
    stream,
    strided,
    window,
)
from statejax.ops.merge import merge
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NSAState:
  """Keys and values of three branches, all in store dtype.

  Attributes:
    select_k: of every token, after rope, [B, G, N, K]; growing.
    select_v: [B, G, N, V]; growing.
    entry_k: compressed, [B, G, N / s, K]; the entry of tokens i s to
      i s + l - 1 in slot i + l / s - 1, with whose last token it is complete;
      growing.
    entry_v: [B, G, N / s, V]; growing.
    raw_k: to be compressed, of the last l - 1 tokens, position p in slot
      p mod (l - 1), [B, G, l - 1, K]; fixed.
    raw_v: [B, G, l - 1, V]; fixed.
    window_k: of the last W tokens, after rope, position p in slot p mod W,
      [B, G, W, K]; fixed.
    window_v: [B, G, W, V]; fixed.
  """

  select_k: Array = leaf('batch kv_heads capacity key', 'growing')
  select_v: Array = leaf('batch kv_heads capacity value', 'growing')
  entry_k: Array = leaf('batch kv_heads capacity key', 'growing')
  entry_v: Array = leaf('batch kv_heads capacity value', 'growing')
  raw_k: Array = leaf('batch kv_heads taps key')
  raw_v: Array = leaf('batch kv_heads taps value')
  window_k: Array = leaf('batch kv_heads window key')
  window_v: Array = leaf('batch kv_heads window value')


class NSA(nn.Module):
  """Three attentions of the same queries, each with keys and values of its own.

    y = out(sum_c sigmoid(gate_c x)_h * o_c), c in compress, select, window

  compress: entries of l tokens, one for every s, seen from their last token
  on. Keys are not rotated, nor queries here: an entry knows the place of a
  token inside it alone, e_i = W_2 silu(W_1 concat_j (k_{i s + j} + p_j)), for
  values the same with other weights.
  select: tokens of the blocks that weigh most with the group's queries among
  the entries, by `strided.importance`; no gradient runs through the choice. A
  step of one token over a long store gathers what it selects.
  window: the last tokens.

  Reference: arXiv 2502.11089 (NSA). It leaves rope and network open; unrotated
  compression as in lucidrains/native-sparse-attention-pytorch.
  """

  config: NSAConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns an `NSAState` of `Spec`."""
    c = config
    def pair(slots, stride=1):
      return [Spec((rows, c.kv_heads, slots, width), dtype, stride)
              for width in (c.key, c.value)]
    return NSAState(*pair(capacity), *pair(-(-capacity // c.stride), c.stride),
                    *pair(c.compress_block - 1), *pair(c.window))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    q = Proj((c.heads, c.key), ('embed', 'heads', 'key'), name='q')(x)
    turn = rotary.rotation(c.rope, c.key)
    turned = turn(q, context.positions)

    def pair(name, rotate=True):
      k = Proj((c.kv_heads, c.key), ('embed', 'kv_heads', 'key'),
               name=f'{name}_k')(x)
      v = Proj((c.kv_heads, c.value), ('embed', 'kv_heads', 'value'),
               name=f'{name}_v')(x)
      k = turn(k, context.positions) if rotate else k
      # As they enter the state, see `Attention`.
      return [a.swapaxes(1, 2).astype(state.window_k.dtype) for a in (k, v)]

    compressed, importance, entries = self._compress(
        q, pair('compress', rotate=False), state, context)
    selected, stores = _select(
        c, turned, pair('select'), importance, state, context)
    recent, rings = _window(c, turned, pair('window'), state, context)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros((*q.shape[:3], c.value), wide)
    for name, out in (('compress', compressed), ('select', selected),
                      ('window', recent)):
      gate = Proj((c.heads,), ('embed', 'heads'), name=f'gate_{name}')(x)
      y += jax.nn.sigmoid(gate.astype(wide))[..., None] * out.astype(wide)
    y = Proj(x.shape[-1:], ('heads', 'value', 'embed'), contract=2,
             name='out')(y.astype(x.dtype))
    return y, NSAState(**stores, **entries, **rings)

  def _compress(self, q, pair, state, context):
    """Returns the branch's output, the importance of blocks [B, G, T, J], and
    new leaves."""
    c = self.config
    plan = context.blocks(c.stride)
    leaves, past, new = {}, [], []
    for name, raw in zip('kv', pair):
      ring, held = getattr(state, f'raw_{name}'), getattr(state,
                                                          f'entry_{name}')
      tokens, exists = strided.windows(raw, ring, plan, c.compress_block)
      made = self._network(tokens.astype(q.dtype), name)
      made = jnp.where(exists[:, None, :, None], made, jnp.zeros((), q.dtype))
      made = made.astype(held.data.dtype)
      old, leaves[f'entry_{name}'] = context.append(held, made, plan)
      leaves[f'raw_{name}'] = window.write(
          ring, raw, context.base, context.start, context.n_valid)
      past.append(old)
      new.append(made)
    seen = strided.visible(plan, past[0].shape[2], c.compress_block)
    scale = c.key ** -0.5
    y, lse = attend.attend(q, [
        attend.Segment.of(past, seen[0]), attend.Segment.of(new, seen[1])],
        scale=scale)
    old, mine = (strided.mass(q, k, s, lse, scale=scale)
                 for k, s in zip((past[0], new[0]), seen))
    slots = state.select_k.data.shape[-2]
    count = -(-(slots + q.shape[1]) // c.select_block)
    return y, strided.importance(
        old, mine, plan, c.compress_block, c.select_block, count), leaves

  def _network(self, tokens, name):
    """From the tokens [B, G, W, l, K] of entries to entries [B, G, W, K]."""
    c = self.config
    axis, width = {'k': ('key', c.key), 'v': ('value', c.value)}[name]
    place = weights.weight(
        self, f'place_{name}', ('kv_heads', 'taps', axis),
        (c.kv_heads, c.compress_block, width), weights.normal(0.02))
    tokens += place.astype(tokens.dtype)[None, :, None]
    flat = tokens.reshape(*tokens.shape[:3], -1)
    hidden = Proj((c.compress_hidden,), ('block', 'hidden'),
                  name=f'hidden_{name}')(flat)
    return Proj((width,), ('hidden', 'entry'), name=f'entry_{name}')(
        jax.nn.silu(hidden))


def _select(config, q, pair, importance, state, context):
  """Attends to the blocks of most importance [B, G, T, J].

  Returns:
    [B, T, H, V], and the new stores.
  """
  c = config
  (old_k, new_k), (old_v, new_v) = (
      context.append(held, a)
      for held, a in zip((state.select_k, state.select_v), pair))
  past, new = [old_k, old_v], {'select_k': new_k, 'select_v': new_v}
  number = jnp.arange(importance.shape[-1], dtype=jnp.int32)[None, None, None]
  own = (context.positions // c.select_block)[:, None, :, None]
  wide = lambda x: jnp.broadcast_to(x, importance.shape)
  seen = (number <= own) & context.valid[:, None, :, None]
  forced = (number < c.initial) | (number > own - c.local)
  chosen = select.choose(importance, wide(seen), c.select_count, wide(forced))

  chunk, scale = context.visible_chunk()[:, None], c.key ** -0.5
  if chosen.dtype == bool:
    slots = jnp.arange(past[0].shape[2], dtype=jnp.int32)[None]
    slots = jnp.broadcast_to(slots, (q.shape[0], slots.shape[1]))
    column = blocks.block_of_column(
        context.blocks(c.select_block), slots.shape[1])
    mask = blocks.spread(chosen, column)
    old = mask[..., :slots.shape[1]] & context.visible_past(slots)[:, None]
    chunk &= mask[..., slots.shape[1]:]
    y, _ = stream.attend(q, attend.Segment.of(past, old), [
        attend.Segment.of(pair, chunk, causal=True)], scale=scale)
    return y, new
  # One token, whose own block is always chosen: rows are gathered.
  y, _ = merge([
      gather.gather_attend(q, old_k, old_v, chosen[:, None], context.last,
                           block=c.select_block, scale=scale),
      attend.attend(q, [attend.Segment.of(pair, chunk)], scale=scale)])
  return y, new


def _window(config, q, pair, state, context):
  """Attends to the last tokens; returns [B, T, H, V] and the new rings."""
  k, v = pair
  ring = attention.RingState(state.window_k, state.window_v)
  segments, new = attention.recent(ring, k, v, context)
  y, _ = attend.attend(q, segments, scale=config.key ** -0.5)
  return y, {'window_k': new.k, 'window_v': new.v}
