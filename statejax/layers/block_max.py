"""MiniMax-M3's sparse attention: the best key of a block speaks for it."""

import dataclasses

import flax.linen as nn
import jax

from statejax.config import BlockMaxConfig
from statejax.layers import attention, block_sparse, common, rotary
from statejax.layers.common import Proj, RMSNorm
from statejax.ops import candidates
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMaxState(attention.StoreState):
  """Keys and values, and the indexer's key of every token.

  Attributes:
    index_key: after norm and rope, [B, N, dI], store dtype; growing.
  """

  index_key: Array = leaf('batch capacity index', 'growing')


class BlockMax(nn.Module):
  """Grouped-query attention of each group of heads to its k best blocks.

    I_gw = max over tokens j <= t of block w of q^I_g(x_t) . k^I(x_j)
    chosen(t, g) = the newest `local` blocks, and the best up to k in all

  The indexer reads its inputs without gradient and learns from the attention's
  own weight on each block, `block_sparse.loss`.

  Reference: arXiv 2606.13392 (MiniMax-M3).
  """

  config: BlockMaxConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `BlockMaxState` of `Spec`."""
    held = attention.Attention.state(config.attention, rows, capacity, dtype)
    return BlockMaxState(
        held.k, held.v,
        index_key=Spec((rows, capacity, config.index_width), dtype))

  @nn.compact
  def __call__(self, x, state, context):
    c, a = self.config, self.config.attention
    q, k, v = attention.project(a, x, context.positions)
    k, v = (y.astype(state.k.data.dtype) for y in (k, v))
    past, held = attention.remember(state, k, v, context)
    tokens = past[0].shape[2]
    plan = context.blocks(c.block)

    own_q, own_k = self._index(jax.lax.stop_gradient(x), context)
    own_k = own_k.astype(state.index_key.data.dtype)
    old, kept = context.append(state.index_key, own_k)
    scores = block_sparse.best_scores(
        own_q, (old[:, None], past[2]), own_k[:, None], plan, context)

    entries = candidates.count(tokens, c.block)
    seen = candidates.visible(plan, entries)
    if c.stage == 'warmup':
      chosen = candidates.all_of(seen, a.kv_heads)
    else:
      chosen = candidates.choose(
          scores, seen, c.k, forced=candidates.newest(plan, entries, c.local))
    at = (q, past, (k, v))
    scale = a.key ** -0.5
    y = block_sparse.attend_to(*at, chosen, plan, context, scale=scale,
                               sink=attention.sink(self, a))
    if c.index_loss and chosen.dtype == bool:
      # Ids are of a single token, which nobody trains on.
      common.add_loss(self, 'index', c.index_loss * block_sparse.loss(
          scores, *at, chosen, plan, context, scale=scale))
    return attention.output(a, x, y), BlockMaxState(held.k, held.v, kept)

  def _index(self, x, context):
    """Returns index queries [B, T, G, dI] and keys [B, T, dI]."""
    c, turn = self.config, rotary.rotation(
        self.config.index_rope, self.config.index_width)
    q = Proj((c.attention.kv_heads, c.index_width),
             ('embed', 'kv_heads', 'index'), name='index_q')(x)
    q = RMSNorm(c.eps, axis='index', name='norm_index_q')(q)
    k = Proj((c.index_width,), ('embed', 'index'), name='index_k')(x)
    k = RMSNorm(c.eps, axis='index', name='norm_index_k')(k)
    return (turn(q, context.positions),
            turn(k[:, :, None], context.positions)[:, :, 0])
