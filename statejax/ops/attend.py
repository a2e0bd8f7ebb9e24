"""Softmax attention of queries over several segments of keys at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Below every score and above -inf: a masked row gives zeros, not NaN.
_MASKED = -1e30
# Queries per block where later keys can be left out, and the most blocks.
_BLOCK, _BLOCKS = 128, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
  """Keys and values with what each query sees of them.

  Attributes:
    k: [B, G, N, K].
    v: [B, G, N, V].
    visible: [B, T, N] bool.
    causal: promises that query t sees no key after key t, so that `attend`
      may leave those out of its products.
  """

  k: jax.Array
  v: jax.Array
  visible: jax.Array
  causal: bool = dataclasses.field(default=False, metadata=dict(static=True))


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
  length = q.shape[1]
  if length < 2 * _BLOCK or not any(s.causal for s in segments):
    return _attend(q, segments, scale, sink)
  size = max(_BLOCK, -(-length // _BLOCKS))
  parts = [_attend(q[:, i:i + size], [_seen(s, i, size) for s in segments],
                   scale, sink) for i in range(0, length, size)]
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def _seen(segment, first, size):
  """What the queries from `first` on may see of a segment."""
  visible = segment.visible[:, first:first + size]
  if not segment.causal:
    return dataclasses.replace(segment, visible=visible)
  end = first + size
  return Segment(segment.k[:, :, :end], segment.v[:, :, :end],
                 visible[:, :, :end])


def _attend(q, segments, scale, sink):
  batch, length, heads, width = q.shape
  groups = segments[0].k.shape[1]
  per = heads // groups
  wide = (jnp.float64 if q.dtype == jnp.float64 else jnp.float32)
  product = functools.partial(
      jnp.matmul, preferred_element_type=wide,
      precision=jax.lax.Precision.HIGHEST if q.dtype == wide else None)
  # Heads of a group are rows of one product: [B, G, (H/G) T, K] x [B, G, K, N].
  grouped = (q * jnp.asarray(scale, q.dtype)).reshape(
      batch, length, groups, per, width).transpose(0, 2, 3, 1, 4).reshape(
          batch, groups, per * length, width)
  value = segments[0].v.shape[-1]
  segments = [s for s in segments if s.k.shape[2]]

  def score(segment):
    # Adding the mask costs one pass less than selecting; -1e30 swallows any
    # finite score exactly.
    bias = jnp.where(segment.visible, jnp.zeros((), wide),
                     jnp.asarray(_MASKED, wide))[:, None, None]
    s = product(grouped, segment.k.astype(q.dtype).swapaxes(2, 3))
    return s.reshape(batch, groups, per, length, segment.k.shape[2]) + bias

  scores = [score(segment) for segment in segments]
  top = jnp.full((batch, groups, per, length), _MASKED, wide)
  for s in scores:
    top = jnp.maximum(top, jnp.max(s, axis=-1))
  sees = ~(top <= 0.5 * _MASKED)
  logit = None
  if sink is not None:
    logit = sink.astype(wide).reshape(1, groups, per, 1)
    top = jnp.maximum(top, logit)
  # The maximum only conditions the exponentials; no gradient runs through it.
  top = jax.lax.stop_gradient(top)
  total = (jnp.zeros(top.shape, wide) if logit is None
           else jnp.exp(logit - top))
  out = jnp.zeros((batch, groups, per, length, value), wide)
  for segment, s in zip(segments, scores):
    p = jnp.exp(s - top[..., None])
    total = total + jnp.sum(p, axis=-1)
    out = out + product(
        p.astype(q.dtype).reshape(batch, groups, per * length, s.shape[-1]),
        segment.v.astype(q.dtype)).reshape(out.shape)
  out = jnp.where(sees[..., None], out / total[..., None],
                  jnp.zeros((), wide))
  some = sees if sink is None else jnp.ones_like(sees)
  lse = jnp.where(some, top + jnp.log(total), jnp.asarray(_MASKED, wide))
  return (out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, value)
          .astype(q.dtype),
          lse.transpose(0, 3, 1, 2).reshape(batch, length, heads))
