"""Multi-head latent attention: one code path for training and serving."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import MLAConfig, YarnConfig
from statejax.layers import common, rotary, weights
from statejax.layers.common import Proj, RMSNorm
from statejax.ops import attend, rope, stream
from statejax.ops.merge import merge
from statejax.ops.product import einsum
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentState:
  """Latents of every token of the row's document; R + dr numbers a token.

  Attributes:
    latent: after norm and scale, [B, N, R], store dtype; growing.
    key_rope: the heads' shared key, after rope, [B, N, dr], store dtype;
      growing.
  """

  latent: Array = leaf('batch capacity latent', 'growing')
  key_rope: Array = leaf('batch capacity rope', 'growing')


class MLA(nn.Module):
  """Attention over keys and values that are linear maps of one latent c.

    [q_n | q_r]_h = q_b^h RMS(q_a x),   [c | k_r] = kv_a x,   c <- RMS(c)
    k_h = [k_b^h c | rope k_r],   v_h = v_b^h c
    y = out(concat_h softmax(scale (q_n k_n + rope(q_r) k_r)) v_h)

  A step's own tokens are attended in that expanded form, what is in the store
  in the absorbed one, and the two are merged: from a fresh state without a
  store this is the form for training, with one token that for decoding.

  Reference: arXiv 2405.04434 (DeepSeek-V2).
  """

  config: MLAConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `LatentState` of `Spec`."""
    return LatentState(
        latent=Spec((rows, capacity, config.rank), dtype),
        key_rope=Spec((rows, capacity, config.rope_width), dtype))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    q, _ = queries(c, x, context.positions)
    latent, key = latents(c, x, context.positions)
    maps = up_maps(self, c)
    scale = score_scale(c, x.shape[-1])

    # Latents enter this step as they enter the store, so that a token is the
    # same whether a query meets it now or later.
    latent = latent.astype(state.latent.data.dtype)
    key = key.astype(state.key_rope.data.dtype)
    y, lse = expanded(q, latent, key, *maps, context.visible_chunk(),
                      scale=scale, causal=True)
    past, state = remember(state, latent, key, context)
    if past is not None:
      store = segment(*past)
      y, _ = merge([(y, lse), absorbed(q, *maps, lambda q: stream.attend(
          q, store, scale=scale, last=context.last))])
    return output(c, x, y), state


# Parts of mixers. Called from a compact method, they declare the parameters in
# the module that calls.


def queries(config, x, positions):
  """Projects x to queries.

  Returns:
    ((q_n [B, T, H, dn], q_r [B, T, H, dr]), and what they come from: the
    normalised latent [B, T, Rq], or x itself where there is none.
  """
  c, low = config, x
  shape, axes = (c.heads, c.nope + c.rope_width), ('heads', 'key')
  if c.q_rank is None:
    q = Proj(shape, ('embed', *axes), name='q')(x)
  else:
    low = Proj((c.q_rank,), ('embed', 'rank'), name='q_a')(x)
    low = RMSNorm(c.eps, axis='rank', name='norm_q')(low)
    q = Proj(shape, ('rank', *axes), name='q_b')(low)
  plain, turning = jnp.split(q, [c.nope], axis=-1)
  turn = rotary.rotation(c.rope, c.rope_width)
  return (plain, turn(turning, positions)), low


def latents(config, x, positions):
  """Returns latents [B, T, R] and shared keys [B, T, dr], in x.dtype."""
  c = config
  both = Proj((c.rank + c.rope_width,), ('embed', 'latent'), name='kv_a')(x)
  latent, key = jnp.split(both, [c.rank], axis=-1)
  latent = RMSNorm(c.eps, axis='latent', name='norm_kv')(latent)
  if c.lora_scale:
    wide = (jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    factor = jnp.asarray((x.shape[-1] / c.rank) ** 0.5, wide)
    latent = (latent.astype(wide) * factor).astype(x.dtype)
  turn = rotary.rotation(c.rope, c.rope_width)
  return latent, turn(key[:, :, None], positions)[:, :, 0]


def up_maps(module, config):
  """Returns k_b [R, H, dn] and v_b [R, H, V], from latents to heads."""
  init = weights.truncated_normal(config.rank ** -0.5)
  def one(name, axis, width):
    return weights.weight(module, name, ('latent', 'heads', axis),
                          (config.rank, config.heads, width), init)
  return one('k_b', 'key', config.nope), one('v_b', 'value', config.value)


def output(config, x, y):
  """Gate and output projection of [B, T, H, V], back to x's width."""
  if config.output_gate:
    gate = Proj((config.heads, config.value), ('embed', 'heads', 'value'),
                name='gate')(x)
    y = y * jax.nn.sigmoid(gate)
  return Proj(x.shape[-1:], ('heads', 'value', 'embed'), contract=2,
              name='out')(y)


# Functions of arrays.


def score_scale(config, width):
  """Returns the factor on the scores in a model of the given width D.

  (dn + dr)^-1/2, with YaRN's mscale_all_dim times its magnitude squared, with
  lora_scale times (D / Rq)^1/2.
  """
  c = config
  scale = (c.nope + c.rope_width) ** -0.5
  yarn = c.rope.scaling if c.rope is not None else None
  if isinstance(yarn, YarnConfig) and yarn.mscale_all_dim:
    scale *= rope.magnitude(yarn.factor, yarn.mscale_all_dim) ** 2
  if c.lora_scale:
    scale *= (width / c.q_rank) ** 0.5
  return scale


def remember(state, latent, key, context):
  """Appends a step's latents to the store.

  Returns:
    what was in it, as (latents [B, N, R], keys [B, N, dr], visible
    [B, T, N]), or None where there is no store; and the new state.
  """
  old, latents = context.append(state.latent, latent)
  old_key, keys = context.append(state.key_rope, key)
  new = LatentState(latents, keys)
  if not old.shape[1]:
    return None, new
  return (old, old_key, context.visible_store(old.shape[1])), new


def segment(latent, key, visible):
  """Latents [B, N, R] and keys [B, N, dr] as they are in the absorbed form."""
  latent = latent[:, None]
  return attend.Segment((latent, key[:, None]), latent, visible)


def expanded(q, latent, key, k_b, v_b, visible, *, scale, causal=False):
  """Attends to keys and values of every head, made from the latents.

  Few operations per query: the form for many queries of few tokens.

  Args:
    q: (q_n [B, T, H, dn], q_r [B, T, H, dr]).
    latent: [B, N, R].
    key: [B, N, dr].
    k_b: [R, H, dn].
    v_b: [R, H, V].
    visible: [B, T, N] bool.
    scale: factor on the scores.
    causal: see `statejax.ops.attend.Segment`.

  Returns:
    out [B, T, H, V] and lse [B, T, H], as `statejax.ops.attend.attend`.
  """
  latent = latent.astype(q[0].dtype)
  k, v = (common.project(latent, w).swapaxes(1, 2) for w in (k_b, v_b))
  own = attend.Segment((k, key[:, None]), v, visible, causal)
  return attend.attend(q, [own], scale=scale)


def absorbed(q, k_b, v_b, attend):
  """`expanded` without any key or value of a head: queries go to the latents.

    q_n . (k_b c) = (k_b^T q_n) . c,   sum_j p_j v_b c_j = v_b sum_j p_j c_j

  R + dr numbers are read per token for all heads: the form for few queries of
  many tokens. Algebraically equal, in bfloat16 not to the bit.

  Args:
    q: (q_n [B, T, H, dn], q_r [B, T, H, dr]).
    k_b: [R, H, dn].
    v_b: [R, H, V].
    attend: function of (q_c [B, T, H, R], q_r) to the weighted sums of latents
      [B, T, H, R] and lse [B, T, H].

  Returns:
    out [B, T, H, V] and lse [B, T, H], as `statejax.ops.attend.attend`.
  """
  q_n, q_r = q
  q_c = einsum('bthk,rhk->bthr', q_n, k_b).astype(q_n.dtype)
  out, lse = attend((q_c, q_r))
  return einsum('bthr,rhv->bthv', out, v_b).astype(out.dtype), lse
