"""Attention to chosen blocks of a store: what several mixers share."""

import jax
import jax.numpy as jnp

from statejax.ops import attend, candidates, gather, index, stream
from statejax.ops.attend import MASKED
from statejax.ops.merge import merge
from statejax.ops.product import einsum

# Tokens of a store whose scores are held at once, about.
_PIECE = 4096


def best_scores(q, past, new, plan, context):
  """The best score of a token of each block, per group of queries' heads.

  Args:
    q: [B, T, H, K].
    past: (keys [B, G, N, K], visible [B, T, N]).
    new: keys of the step, [B, G, T, K].
    plan: `Blocks` of the step.
    context: `Context`.

  Returns:
    [B, H, T, E + W + 1] float32, see `candidates`; -1e30 where nothing is
    seen; unscaled.
  """
  keys, seen = past
  tokens, size = keys.shape[2], plan.size
  step = max(1, _PIECE // size) * size
  pieces = tokens // step if tokens > 2 * step else 0

  def store(begin, step):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, step, axis=2)
    dots = _masked(_products(q, cut(keys)), cut(seen))
    return candidates.reduce_store(dots, size, 'max', MASKED)

  rest = store(pieces * step, tokens - pieces * step)
  if pieces:
    # Of a long store a piece at a time.
    first = jax.lax.map(lambda i: store(i * step, step),
                        jnp.arange(pieces, dtype=jnp.int32))
    first = jnp.moveaxis(first, 0, 3).reshape(*rest.shape[:3], -1)
    rest = jnp.concatenate([first, rest], axis=-1)
  mine = _masked(_products(q, new), context.visible_chunk())
  return candidates.reduce_step(rest, mine, plan, 'max', MASKED)


def _masked(dots, seen):
  return jnp.where(seen[:, None], dots, jnp.asarray(MASKED, dots.dtype))


def _products(q, *keys):
  """q [B, T, H, K] with keys [B, G, N, K] of several parts, [B, H, T, N]."""
  batch, length, heads, _ = q.shape
  groups = keys[0].shape[1]
  q = q.swapaxes(1, 2).reshape(batch, groups, heads // groups * length, -1)
  dots = jnp.concatenate(
      [einsum('bgrk,bgnk->bgrn', q, k) for k in keys], axis=-1)
  return dots.reshape(batch, heads, length, -1)


def attend_to(q, past, new, chosen, plan, context, *, scale, sink=None):
  """Attention to the tokens of the chosen blocks that a query sees.

  Args:
    q: [B, T, H, K].
    past: (k [B, G, N, K], v [B, G, N, V], visible [B, T, N]).
    new: (k [B, G, T, K], v [B, G, T, V]) of the step.
    chosen: as `candidates.choose` returns it, for S sets of heads.
    plan: `Blocks` of the step.
    context: `Context`.
    scale: factor on the scores.
    sink: as for `statejax.ops.attend.attend`.

  Returns:
    [B, T, H, V].
  """
  k, v, seen = past
  tokens = k.shape[2]
  chunk = context.visible_chunk()[:, None]
  if chosen.dtype == bool:
    mask = candidates.tokens_of(chosen, plan, tokens)
    old, mine = mask[..., :tokens] & seen[:, None], mask[..., tokens:] & chunk
    return stream.attend(
        q, attend.Segment(k, v, old),
        [attend.Segment.of(new, mine, causal=True)], scale=scale, sink=sink)[0]
  ids, itself = candidates.blocks_of(
      chosen, plan, candidates.count(tokens, plan.size))
  if ids.shape[1] == 1:
    ids = jnp.repeat(ids, k.shape[1], axis=1)
  itself = attend.Segment.of(new, itself[..., None, None] & chunk)
  return merge([
      gather.gather_attend(q, k, v, ids[:, None], context.last,
                           block=plan.size, scale=scale),
      attend.attend(q, [itself], scale=scale, sink=sink)])[0]


def loss(scores, q, past, new, chosen, plan, context, *, scale):
  """The loss of an indexer that scores blocks.

  Its target is the attention's own weight on each block, of the heads for
  which the block is chosen, see `statejax.ops.index.loss`.

  Args:
    scores: [B, S, T, J] over candidates, with gradient to the indexer.
    q, past, new, plan, context, scale: as for `attend_to`.
    chosen: candidates that count, [B, S, T, J] bool.

  Returns:
    float32 scalar, summed over real tokens, the mean of the sets.
  """
  tokens, sets = past[0].shape[2], scores.shape[1]
  batch, length, heads, _ = q.shape
  seen = jnp.concatenate([past[2], context.visible_chunk()], axis=-1)
  allowed = candidates.tokens_of(chosen, plan, tokens) & seen[:, None]
  q, *keys = (jax.lax.stop_gradient(a) for a in (q, past[0], new[0]))
  # Sets stand beside rows: each has a target and a prediction of its own.
  rows = batch * sets

  def scores_of_heads(begin, size):
    part = jax.lax.dynamic_slice_in_dim(q, begin, size, axis=1)
    dots = scale * _products(part, *keys)
    return dots.reshape(rows, heads // sets, size, -1).swapaxes(1, 2)

  def reduce(x):
    x = x.reshape(batch, sets, length, -1)
    x = candidates.reduce(x, plan, tokens, 'sum', 0.0)
    return x.reshape(rows, length, -1)

  return index.loss(
      scores.reshape(rows, length, -1), scores_of_heads,
      allowed.reshape(rows, length, -1),
      jnp.repeat(context.valid, sets, axis=0), reduce) / sets
