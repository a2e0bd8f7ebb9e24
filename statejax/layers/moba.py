"""Mixture of block attention: heads see the blocks of the nearest mean key."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import MoBAConfig
from statejax.layers import attention, block_sparse
from statejax.ops import candidates, compress
from statejax.ops.product import einsum
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoBAState(attention.StoreState):
  """Keys and values, and the mean key of every complete block.

  Attributes:
    mean: of keys after norm and rope, [B, N / block, G K] float32; growing.
    open: sum of the keys of the open block, [B, G K] float32; fixed.
  """

  mean: Array = leaf('batch capacity channels', 'growing')
  open: Array = leaf('batch channels')


class MoBA(nn.Module):
  """Grouped-query attention of each head to its k best blocks.

    score_hw = q_h . mean of the keys of block w, complete blocks only
    chosen(t, h) = the query's own block, and the k - 1 best before it

  The choice has no gradient and no parameters. Values are attended to token by
  token, the query's own block causally.

  Reference: arXiv 2502.13189.
  """

  config: MoBAConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `MoBAState` of `Spec`."""
    c = config.attention
    held = attention.Attention.state(c, rows, capacity, dtype)
    channels = c.kv_heads * c.key
    slots = candidates.count(capacity, config.block)
    return MoBAState(
        held.k, held.v,
        mean=Spec((rows, slots, channels), 'float32', stride=config.block),
        open=Spec((rows, channels), 'float32'))

  @nn.compact
  def __call__(self, x, state, context):
    c, a = self.config, self.config.attention
    q, k, v = attention.project(a, x, context.positions)
    k, v = (y.astype(state.k.data.dtype) for y in (k, v))
    past, held = attention.remember(state, k, v, context)
    plan = context.blocks(c.block)
    rows, groups, length, width = k.shape
    flat = jax.lax.stop_gradient(k).swapaxes(1, 2).reshape(rows, length, -1)
    made, left = compress.mean(flat, state.open, plan)
    old, kept = context.append(state.mean, made, plan)
    means = jnp.concatenate([old, made], axis=1)
    means = means.reshape(rows, -1, groups, width).swapaxes(1, 2)

    wide = jax.lax.stop_gradient(q).astype(means.dtype).swapaxes(1, 2)
    scores = einsum('bgrk,bgnk->bgrn', wide.reshape(rows, groups, -1, width),
                    means).reshape(rows, a.heads, length, -1)
    # The open block has no mean yet: it is taken anyway.
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, 1)))
    entries = old.shape[1]
    chosen = candidates.choose(
        scores, candidates.visible(plan, entries), c.k,
        forced=candidates.newest(plan, entries, 1))
    y = block_sparse.attend_to(
        q, past, (k, v), chosen, plan, context, scale=a.key ** -0.5,
        sink=attention.sink(self, a))
    return attention.output(a, x, y), MoBAState(held.k, held.v, kept, left)
