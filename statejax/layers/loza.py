"""Streaming latent attention: the first and the latest blocks are seen."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import LoZAConfig
from statejax.layers import mla
from statejax.ops import attend, sink, window
from statejax.ops.merge import merge
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamingState:
  """Latents of S + W tokens, whatever the length: 1,179,648 bytes a layer for
  S = 128, W = 896, R = 512, dr = 64 in bfloat16.

  Attributes:
    sink: of the document's first S tokens, after norm and scale; position p
      is in slot p, [B, S, R], store dtype; fixed.
    sink_rope: their shared keys, after rope, [B, S, dr], store dtype; fixed.
    ring: of the last W tokens, position p in slot p mod W, [B, W, R], store
      dtype; fixed.
    ring_rope: [B, W, dr], store dtype; fixed.
  """

  sink: Array = leaf('batch window latent')
  sink_rope: Array = leaf('batch window rope')
  ring: Array = leaf('batch window latent')
  ring_rope: Array = leaf('batch window rope')


class LoZA(nn.Module):
  """`MLA` over the first blocks and the latest ones, in a state of fixed size.

    p sees k <= p iff k < S or k >= block (floor(p / block) - (recent - 1))

  So between (recent - 1) block + 1 and recent block latest tokens are seen,
  and none in between: with recent = 1 the query's own block alone.

  Reference: arXiv 2512.23966 (LongCat-Flash-Thinking, ZigZag attention).
  """

  config: LoZAConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `StreamingState` of `Spec`."""
    c = config
    of = lambda slots, width: Spec((rows, slots, width), dtype)
    return StreamingState(
        of(c.sink, c.mla.rank), of(c.sink, c.mla.rope_width),
        of(c.window, c.mla.rank), of(c.window, c.mla.rope_width))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    q, _ = mla.queries(c.mla, x, context.positions)
    latent, key = mla.latents(c.mla, x, context.positions)
    maps = mla.up_maps(self, c.mla)
    scale = mla.score_scale(c.mla, x.shape[-1])
    # Latents enter this step as they enter the state, see `MLA`.
    latent = latent.astype(state.ring.dtype)
    key = key.astype(state.ring_rope.dtype)
    seen = context.visible_chunk() & sees(
        c, context.positions, context.positions)
    new = mla.expanded(q, latent, key, *maps, seen, scale=scale, causal=True)

    first = jnp.arange(c.sink, dtype=jnp.int32)[None]
    first = jnp.broadcast_to(first, (x.shape[0], c.sink))
    latest = window.positions(context.length, c.window)
    # A token that both hold counts once.
    held = jnp.concatenate(
        [first, jnp.where(latest >= c.sink, latest, -1)], axis=1)
    seen = context.visible_past(held) & sees(c, context.positions, held)
    both = lambda *parts: jnp.concatenate(parts, axis=1)
    old = mla.segment(both(state.sink, state.ring),
                      both(state.sink_rope, state.ring_rope), seen)
    y, _ = merge([new, mla.absorbed(
        q, *maps, lambda q: attend.attend(q, [old], scale=scale))])
    return mla.output(c.mla, x, y), _written(state, latent, key, context)


def sees(config, query, key):
  """Which positions [B, N] queries at positions [B, T] see of the blocks,
  [B, T, N] bool; later ones too."""
  block = query // config.block - (config.recent_blocks - 1)
  key = key[:, None, :]
  return (key < config.sink) | (key >= (block * config.block)[..., None])


def _written(state, latent, key, context):
  where = (context.base, context.start, context.n_valid)
  def one(write, held, new):
    return write(held[:, None], new[:, None], *where)[:, 0]
  return StreamingState(
      one(sink.write, state.sink, latent),
      one(sink.write, state.sink_rope, key),
      one(window.write, state.ring, latent),
      one(window.write, state.ring_rope, key))
