"""Attention to chosen blocks of a store: what several mixers share."""

import jax
import jax.numpy as jnp

from statejax.layers import common
from statejax.ops import attend, blocks, candidates, index
from statejax.ops.attend import MASKED
from statejax.ops.product import einsum


def plan(context, size):
  """The `blocks.Blocks` of a step."""
  c = context
  return blocks.plan(c.length, c.n_valid, c.positions, c.document, c.start,
                     c.base, size)


def token_scores(q, past, new, context):
  """Scores over the tokens of store and step, per group of queries' heads.

  Args:
    q: [B, T, H, K].
    past: (keys [B, G, N, K], visible [B, T, N]).
    new: keys of the step, [B, G, T, K].
    context: `Context`.

  Returns:
    [B, H, T, N + T] float32, -1e30 where not seen; unscaled.
  """
  batch, length, heads, _ = q.shape
  keys, seen = past
  groups = keys.shape[1]
  q = q.swapaxes(1, 2).reshape(batch, groups, heads // groups * length, -1)
  dots = jnp.concatenate(
      [einsum('bgrk,bgnk->bgrn', q, k) for k in (keys, new)], axis=-1)
  dots = dots.reshape(batch, heads, length, -1)
  seen = jnp.concatenate([seen, context.visible_chunk()], axis=-1)
  return jnp.where(seen[:, None], dots, jnp.asarray(MASKED, dots.dtype))


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
  else:
    slots, itself = candidates.slots_of(
        chosen, plan, candidates.count(tokens, plan.size))
    old = (slots >= 0)[:, :, None]
    mine = itself[..., None, None] & chunk
    k, v = (_rows(slots, x) for x in (k, v))
  return attend.attend(
      q, [attend.Segment(k, v, old),
          attend.Segment.of(new, mine, causal=True)], scale=scale, sink=sink)[0]


def _rows(slots, x):
  """Slots [B, S, R] of a store [B, G, N, D], [B, max(S, G), R, D]; S is 1 or a
  multiple of G."""
  batch, groups, _, width = x.shape
  sets = max(slots.shape[1], groups)
  at = jnp.broadcast_to(jnp.maximum(slots, 0), (batch, sets, slots.shape[2]))
  rows = jnp.take_along_axis(
      x, at.reshape(batch, groups, -1)[..., None], axis=2)
  return rows.reshape(batch, sets, -1, width)


def learn(module, factor, scores, q, past, new, chosen, plan, context, scale):
  """Adds the loss of an indexer that scores blocks.

  Its target is the attention's own weight on each block, of the heads for
  which the block is chosen, see `statejax.ops.index.loss`.

  Args:
    module: the mixer.
    factor: on the loss; 0 adds none.
    scores: [B, S, T, J] over candidates, with gradient to the indexer.
    q, past, new, plan, context, scale: as for `attend_to`.
    chosen: candidates that count; ids or [B, S, T, J] bool.
  """
  if not factor or chosen.dtype != bool:
    # Ids are of a single token, which nobody trains on.
    return
  tokens, sets = past[0].shape[2], scores.shape[1]
  batch, length, heads, _ = q.shape
  seen = jnp.concatenate([past[2], context.visible_chunk()], axis=-1)
  allowed = candidates.tokens_of(chosen, plan, tokens) & seen[:, None]
  dots = scale * token_scores(
      jax.lax.stop_gradient(q),
      (jax.lax.stop_gradient(past[0]), past[2]),
      jax.lax.stop_gradient(new[0]), context)
  # Sets stand beside rows: each has a target and a prediction of its own.
  rows = batch * sets
  dots = dots.reshape(rows, heads // sets, length, -1).swapaxes(1, 2)

  def reduce(x):
    x = x.reshape(batch, sets, length, -1)
    x = candidates.reduce(x, plan, tokens, 'sum', 0.0)
    return x.reshape(rows, length, -1)

  common.add_loss(module, 'index', factor / sets * index.loss(
      scores.reshape(rows, length, -1),
      lambda begin, size: jax.lax.dynamic_slice_in_dim(
          dots, begin, size, axis=1),
      allowed.reshape(rows, length, -1),
      jnp.repeat(context.valid, sets, axis=0), reduce))
