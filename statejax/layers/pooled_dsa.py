"""Sparse latent attention whose indexer chooses among pools of tokens."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import PooledDSAConfig
from statejax.layers import common, dsa, mla, weights
from statejax.layers.common import Proj
from statejax.ops import candidates, compress, gather, index, norm
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PooledState(mla.LatentState):
  """Latents, and one index key for every complete pool.

  Attributes:
    pooled: [B, N / block, dI], store dtype; growing.
    pool: of the open pool the maximum, sum and weighted sum of
      `statejax.ops.compress.Pool`, [B, 3, dI] float32; fixed.
  """

  pooled: Array = leaf('batch capacity index', 'growing')
  pool: Array = leaf('batch pool index')


class PooledDSA(nn.Module):
  """`MLA` over the tokens of the k best complete pools, and of the open one.

    k^I_w = sum_j softmax_j(gate x_j + bias_j) layer_norm(index_k x_j), j in w
    I_tw = sum_h w_h(x_t) relu(q^I_h(c_t) . k^I_w dI^-1/2)

  Nothing of the indexer turns. It reads its inputs without gradient and learns
  from the attention's own weight on each pool (`statejax.ops.index.loss`); the
  published code does not train it. What is lent as `chosen` is that of a `DSA`,
  so that one with an owner reads it.

  Reference: GLM-5.3-Flash, as in its published code (`index_kpool`).
  """

  config: PooledDSAConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `PooledState` of `Spec`."""
    held = mla.MLA.state(config.mla, rows, capacity, dtype)
    slots = candidates.count(capacity, config.block)
    return PooledState(
        held.latent, held.key_rope,
        pooled=Spec((rows, slots, config.index_width), dtype,
                    stride=config.block),
        pool=Spec((rows, 3, config.index_width), 'float32'))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    q, low = mla.queries(c.mla, x, context.positions)
    latent, key = mla.latents(c.mla, x, context.positions)
    maps = mla.up_maps(self, c.mla)
    scale = mla.score_scale(c.mla, x.shape[-1])
    latent = latent.astype(state.latent.data.dtype)
    key = key.astype(state.key_rope.data.dtype)
    past, held = mla.remember(state, latent, key, context)
    seen, tokens = context.visible_chunk(), 0
    if past is not None:
      seen, tokens = jnp.concatenate([past[2], seen], axis=-1), past[2].shape[2]
    plan = context.blocks(c.block)
    scores, kept, pool = self._scores(
        jax.lax.stop_gradient(x), jax.lax.stop_gradient(low), state, plan,
        context)
    pools = candidates.visible(plan, state.pooled.data.shape[2])
    if c.stage == 'warmup':
      chosen = candidates.all_of(pools, 1)
    else:
      chosen = candidates.choose(scores[:, None], pools, c.k, tail=True)

    if chosen.dtype == bool:
      columns = candidates.tokens_of(chosen, plan, tokens)[:, 0] & seen
      if c.index_loss:
        complete = candidates.tokens_of(
            chosen.at[..., -1].set(False), plan, tokens)[:, 0] & seen
        common.add_loss(self, 'index', c.index_loss * index.loss(
            scores, dsa.head_scores(q, latent, key, maps, past, scale),
            complete, context.valid, lambda p: candidates.reduce(
                p[:, None], plan, tokens, 'sum', 0.0)[:, 0]))
    else:
      ids, itself = candidates.blocks_of(
          chosen, plan, candidates.count(tokens, c.block))
      slots = gather.slots(ids[:, 0], context.last, c.block)
      columns = jnp.concatenate(
          [slots, jnp.where(itself, tokens, -1)], axis=-1)
    common.lend(self, chosen=columns)
    y = dsa.attend(q, latent, key, maps, past, columns, seen, scale, context)
    return mla.output(c.mla, x, y), PooledState(
        held.latent, held.key_rope, kept, pool)

  def _scores(self, x, low, state, plan, context):
    """Returns scores [B, T, E + W + 1], the pooled keys' store, the pool."""
    c = self.config
    axis = 'embed' if c.mla.q_rank is None else 'rank'
    q = Proj((c.index_heads, c.index_width), (axis, 'heads', 'index'),
             name='index_q')(low)
    k = Proj((c.index_width,), ('embed', 'index'), name='index_k')(x)
    weight, shift = (
        weights.weight(self, f'index_{name}', ('index',), (c.index_width,),
                       init)
        for name, init in (('norm', weights.ones), ('shift', weights.zeros)))
    k = norm.layer_norm(k, weight, shift, eps=c.index_eps)
    gates = Proj((c.index_width,), ('embed', 'index'), name='index_gates')(x)
    bias = weights.weight(self, 'index_bias', ('taps', 'index'),
                          (c.block, c.index_width), weights.zeros)
    gates = compress.add_position_bias(gates, bias, context.positions)
    made, pool = compress.gated(
        k, gates, compress.Pool(*state.pool.swapaxes(0, 1)), plan)
    made = made.astype(state.pooled.data.dtype)
    old, kept = context.append(state.pooled, made, plan)
    w = Proj((c.index_heads,), ('embed', 'heads'), name='index_w')(
        x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    scores = jnp.concatenate(
        [gather.index_scores(q, w, old, count=context.length // c.block),
         index.scores(q, w, made)], axis=-1)
    # The open pool is no candidate; it is taken beside the k.
    return jnp.pad(scores, ((0, 0), (0, 0), (0, 1))), kept, (
        compress.stored(pool, context.n_valid))
