"""Sparse latent attention: a lightning indexer chooses what is seen."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import DSAConfig
from statejax.layers import common, mla, rotary, weights
from statejax.layers.common import Proj
from statejax.ops import gather, index, norm, select, stream
from statejax.ops.merge import merge
from statejax.ops.product import einsum
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexedState(mla.LatentState):
  """Latents, and the indexer's key of every token.

  Attributes:
    index_key: after norm and rope, [B, N, dI], store dtype; growing.
  """

  index_key: Array = leaf('batch capacity index', 'growing')


class DSA(nn.Module):
  """`MLA` over the k tokens of the highest index score.

    I_tj = sum_h w_h(x_t) relu(q^I_h(c_t) . k^I(x_j) dI^-1/2), j <= t
    chosen(t) = the k largest, ties to the lower position; all if fewer

  One choice for all heads. The indexer reads its inputs without gradient and
  learns from `statejax.ops.index.loss` alone, which gives none to the rest.
  The columns of a choice are the slots of the store, then the step's tokens;
  it is lent as `chosen`, see `statejax.ops.select.choose`: of a long store a
  step of one token gathers what it attends to.

  Reference: DeepSeek-V3.2; arXiv 2603.12201 for `owner` (IndexShare).
  """

  config: DSAConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns an `IndexedState`, or for a reader a `LatentState`, of `Spec`."""
    latent = mla.MLA.state(config.mla, rows, capacity, dtype)
    if config.owner is not None:
      return latent
    return IndexedState(
        latent.latent, latent.key_rope,
        index_key=Spec((rows, capacity, config.index_width), dtype))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    q, low = mla.queries(c.mla, x, context.positions)
    latent, key = mla.latents(c.mla, x, context.positions)
    maps = mla.up_maps(self, c.mla)
    scale = mla.score_scale(c.mla, x.shape[-1])
    latent = latent.astype(state.latent.data.dtype)
    key = key.astype(state.key_rope.data.dtype)
    past, new = mla.remember(state, latent, key, context)
    seen = context.visible_chunk()
    if past is not None:
      seen = jnp.concatenate([past[2], seen], axis=-1)
    scores = None
    if c.owner is None:
      scores, new_key = _scores(self, jax.lax.stop_gradient(x),
                                jax.lax.stop_gradient(low), state, context)
      new = IndexedState(new.latent, new.key_rope, new_key)
      chosen = seen if c.stage == 'warmup' else select.choose(scores, seen, c.k)
      common.lend(self, chosen=chosen)
    else:
      chosen = context.borrow(c.owner, 'chosen')
    y = attend(q, latent, key, maps, past, chosen, seen, scale, context)
    if scores is not None and c.index_loss:
      allowed = chosen if chosen.dtype == bool else select.to_mask(
          chosen, seen.shape[-1])[:, None]
      heads = head_scores(q, latent, key, maps, past, scale)
      common.add_loss(self, 'index', c.index_loss * index.loss(
          scores, heads, allowed & seen, context.valid))
    return mla.output(c.mla, x, y), new


def _scores(module, x, low, state, context):
  """Returns index scores [B, T, N + T] float32 and the new index keys."""
  c = module.config
  turn = rotary.rotation(c.index_rope, c.index_width)
  axis = 'embed' if c.mla.q_rank is None else 'rank'
  q = Proj((c.index_heads, c.index_width), (axis, 'heads', 'index'),
           name='index_q')(low)
  k = Proj((c.index_width,), ('embed', 'index'), name='index_k')(x)
  weight, bias = (
      weights.weight(module, f'index_{name}', ('index',), (c.index_width,),
                     init)
      for name, init in (('norm', weights.ones), ('bias', weights.zeros)))
  k = norm.layer_norm(k, weight, bias, eps=c.index_eps)
  q = turn(q, context.positions)
  k = turn(k[:, :, None], context.positions)[:, :, 0]
  w = Proj((c.index_heads,), ('embed', 'heads'), name='index_w')(
      x.astype(jnp.promote_types(x.dtype, jnp.float32)))
  k = k.astype(state.index_key.data.dtype)
  # An empty store gives no columns.
  past, kept = context.append(state.index_key, k)
  scores = [gather.index_scores(q, w, past, count=context.length,
                                relu=c.index_relu),
            index.scores(q, w, k, relu=c.index_relu)]
  return jnp.concatenate(scores, axis=-1), kept


def attend(q, latent, key, maps, past, chosen, seen, scale, context):
  """Attention to the chosen columns, [B, T, H, V]."""
  k_b, v_b = maps
  slots = 0 if past is None else past[0].shape[1]
  if chosen.dtype == bool:
    own = chosen & seen
  else:  # one token, itself the last column
    own = jnp.any(chosen == slots, axis=-1)[:, None, None] & seen
  y = mla.expanded(q, latent, key, k_b, v_b, own[..., slots:], scale=scale,
                   causal=True)
  if past is None:
    return y[0]
  store = mla.segment(past[0], past[1], own[..., :slots])

  def stored(q):
    if chosen.dtype == bool:
      return stream.attend(q, store, scale=scale)
    ids = jnp.where(chosen < slots, chosen, -1)[:, None, None]
    return gather.gather_attend(q, store.k, None, ids, context.last, block=1,
                                scale=scale)

  return merge([y, mla.absorbed(q, k_b, v_b, stored)])[0]


def head_scores(q, latent, key, maps, past, scale):
  """Returns a function from a slice of queries to the scores of every head,
  [B, T', H, N + T] float32, in the absorbed form."""
  k_b, _ = maps
  q = (einsum('bthk,rhk->bthr', q[0], k_b).astype(q[0].dtype), q[1])
  columns = [(latent, key)] if past is None else [past[:2], (latent, key)]

  def score(begin, size):
    part = [jax.lax.dynamic_slice_in_dim(a, begin, size, axis=1) for a in q]
    return scale * jnp.concatenate([
        sum(einsum('bthx,bnx->bthn', a, b) for a, b in zip(part, pair))
        for pair in columns], axis=-1)

  return score
