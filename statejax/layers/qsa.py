"""Qwen's sparse attention: index keys are pooled, the open block is seen."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import QSAConfig
from statejax.layers import attention, block_sparse, common, rotary
from statejax.layers.common import Proj, RMSNorm
from statejax.ops import candidates, compress, gather, index
from statejax.ops.attend import MASKED
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PooledIndexState(attention.StoreState):
  """Keys and values, and one index key for every complete block.

  Attributes:
    pooled: after norm and rope, [B, N / block, dI], store dtype; growing.
    open: sum of the raw index keys of the open block, [B, dI] float32; fixed.
  """

  pooled: Array = leaf('batch capacity index', 'growing')
  open: Array = leaf('batch index')


class QSA(nn.Module):
  """Grouped-query attention of all heads to the k best complete blocks.

    k^I_w = rope(RMS(mean of index_k x_j over block w), first position of w)
    I_tw = sum_h relu(q^I_h(x_t) . k^I_w) dI^-1/2
    chosen(t) = the k best complete blocks, and every token of the open one

  The indexer reads its inputs without gradient and learns from the attention's
  own weight on each block, `block_sparse.loss`; the published code does not
  train it.

  Reference: Qwen4, as in its published code.
  """

  config: QSAConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `PooledIndexState` of `Spec`."""
    held = attention.Attention.state(config.attention, rows, capacity, dtype)
    slots = candidates.count(capacity, config.block)
    return PooledIndexState(
        held.k, held.v,
        pooled=Spec((rows, slots, config.index_width), dtype,
                    stride=config.block),
        open=Spec((rows, config.index_width), 'float32'))

  @nn.compact
  def __call__(self, x, state, context):
    c, a = self.config, self.config.attention
    q, k, v = attention.project(a, x, context.positions)
    k, v = (y.astype(state.k.data.dtype) for y in (k, v))
    past, held = attention.remember(state, k, v, context)
    plan = context.blocks(c.block)
    scores, kept, left = self._scores(
        jax.lax.stop_gradient(x), state, plan, context)
    # The open block is no candidate; it is taken beside the k.
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 1)),
                     constant_values=MASKED)[:, None]
    seen = candidates.visible(plan, state.pooled.data.shape[2])
    if c.stage == 'warmup':
      chosen = candidates.all_of(seen, 1)
    else:
      chosen = candidates.choose(scores, seen, c.k, tail=True)
    at = (q, past, (k, v))
    scale = a.key ** -0.5
    y = block_sparse.attend_to(*at, chosen, plan, context, scale=scale,
                               sink=attention.sink(self, a))
    if c.index_loss and chosen.dtype == bool:
      # Ids are of a single token, which nobody trains on; the open block is
      # not scored.
      common.add_loss(self, 'index', c.index_loss * block_sparse.loss(
          scores, *at, chosen.at[..., -1].set(False), plan, context,
          scale=scale))
    return attention.output(a, x, y), PooledIndexState(
        held.k, held.v, kept, left)

  def _scores(self, x, state, plan, context):
    """Returns scores [B, T, E + W], the pooled keys' store and the sum."""
    c = self.config
    turn = rotary.rotation(c.index_rope, c.index_width)
    q = Proj((c.index_heads, c.index_width), ('embed', 'heads', 'index'),
             name='index_q')(x)
    q = RMSNorm(c.eps, axis='index', name='norm_index_q')(q)
    q = turn(q, context.positions)
    raw = Proj((c.index_width,), ('embed', 'index'), name='index_k')(x)
    made, left = compress.mean(raw, state.open, plan)
    made = RMSNorm(c.eps, axis='index', name='norm_index_k')(
        made.astype(x.dtype))
    made = turn(made[:, :, None], plan.block * c.block)[:, :, 0]
    made = made.astype(state.pooled.data.dtype)
    old, kept = context.append(state.pooled, made, plan)
    full = context.length // c.block
    scores = [gather.index_scores(q, None, old, count=full),
              index.scores(q, None, made)]
    return jnp.concatenate(scores, axis=-1), kept, left
