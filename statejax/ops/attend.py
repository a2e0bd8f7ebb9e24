"""Softmax attention of queries over several segments of keys at once."""

import dataclasses

import jax
import jax.numpy as jnp

# Below every score and above -inf: a masked row gives zeros, not NaN.
_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
  """Keys and values with what each query sees of them.

  Attributes:
    k: [B, G, N, K].
    v: [B, G, N, V].
    visible: [B, T, N] bool.
  """

  k: jax.Array
  v: jax.Array
  visible: jax.Array


def attend(q, segments, *, scale, sink=None):
  """One softmax over the keys of all segments and an optional sink logit.

    p_j = exp(scale q.k_j) / (exp(sink) + sum_i exp(scale q.k_i)), visible j, i
    out = sum_j p_j v_j;   lse = log(exp(sink) + sum_i exp(scale q.k_i))

  Query head h reads key/value head h // (H / G). Scores, softmax and sums are
  float32. A query that sees nothing gets out = 0 and finite gradients.

  Args:
    q: [B, T, H, K].
    segments: a list of `Segment`; empty ones (N = 0) are fine.
    scale: factor on the scores.
    sink: learned logit per head, [H] float32, or None.

  Returns:
    out: [B, T, H, V] in q.dtype.
    lse: [B, T, H] float32; -1e30 where nothing is visible.

  Reference: arXiv 2309.17453 and gpt-oss for the sink logit.
  """
  batch, length, heads, width = q.shape
  groups = segments[0].k.shape[1]
  grouped = q.reshape(batch, length, groups, heads // groups, width)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  precise = dict(precision=jax.lax.Precision.HIGHEST,
                 preferred_element_type=wide)
  scores, masks = [], []
  for segment in segments:
    if segment.k.shape[2] == 0:
      continue
    s = scale * jnp.einsum('btgrk,bgnk->bgrtn', grouped,
                           segment.k.astype(q.dtype), **precise)
    mask = segment.visible[:, None, None]
    scores.append(jnp.where(mask, s, jnp.asarray(_MASKED, wide)))
    masks.append(mask)
  top = jnp.full((batch, groups, heads // groups, length), _MASKED, wide)
  if sink is not None:
    logit = sink.astype(wide).reshape(1, groups, heads // groups, 1)
    top = jnp.maximum(top, logit)
  for s in scores:
    top = jnp.maximum(top, jnp.max(s, axis=-1))
  # The maximum only conditions the exponentials; no gradient runs through it.
  top = jax.lax.stop_gradient(top)
  total = jnp.zeros(top.shape, wide) if sink is None else (
      jnp.exp(logit - top))
  out = jnp.zeros((batch, length, groups, heads // groups,
                   segments[0].v.shape[-1]), wide)
  filled = [s for s in segments if s.k.shape[2]]
  for segment, s, mask in zip(filled, scores, masks):
    p = jnp.where(mask, jnp.exp(s - top[..., None]), jnp.zeros((), wide))
    total = total + jnp.sum(p, axis=-1)
    out = out + jnp.einsum('bgrtn,bgnv->btgrv', p.astype(q.dtype),
                           segment.v.astype(q.dtype), **precise)
  some = total > 0
  safe = jnp.where(some, total, jnp.ones((), wide))
  lse = jnp.where(some, top + jnp.log(safe), jnp.asarray(_MASKED, wide))
  to_rows = lambda a: a.transpose(0, 3, 1, 2)
  out = out / to_rows(safe)[..., None]
  return (out.reshape(batch, length, heads, -1).astype(q.dtype),
          to_rows(lse).reshape(batch, length, heads))
