"""Softmax attention of queries over several segments of keys at once."""

import dataclasses

import jax
import jax.numpy as jnp

from statejax.ops.product import einsum

# Below every score and above -inf: a masked row gives zeros, not NaN.
MASKED = -1e30
# Queries per block where later keys can be left out, and the most blocks.
_BLOCK, _BLOCKS = 128, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segment:
  """Keys and values with what each query sees of them.

  Attributes:
    k: [B, G, N, K]; or a tuple of such arrays, one for each part of the query.
    v: [B, G, N, V]. G may differ from part to part, and from that of v.
    visible: [B, T, N] bool; or [B, S, T, N], where every H / S neighbouring
      heads see something of their own.
    causal: promises that query t sees no key after key t, so that `attend`
      may leave those out of its products.
  """

  k: jax.Array | tuple[jax.Array, ...]
  v: jax.Array
  visible: jax.Array
  causal: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @classmethod
  def of(cls, pair, visible, causal=False):
    """The segment of keys and values that come as a pair."""
    k, v = pair
    return cls(k, v, visible, causal)


def attend(q, segments, *, scale, sink=None):
  """One softmax over the keys of all segments and an optional sink logit.

    p_j = exp(scale q.k_j) / (exp(sink) + sum_i exp(scale q.k_i)), visible j, i
    out = sum_j p_j v_j;   lse = log(exp(sink) + sum_i exp(scale q.k_i))

  Query head h reads key/value head h // (H / G). Scores, softmax and sums are
  float32. A query that sees nothing gets out = 0 and finite gradients.

  Where q and k are tuples, the scores of their parts add, as those of their
  concatenations would: keys kept in two stores need not be copied together.

  Args:
    q: [B, T, H, K]; or a tuple of such arrays, each with its own K.
    segments: a list of `Segment`; empty ones (N = 0) are fine.
    scale: factor on the scores.
    sink: learned logit per head, [H] float32, or None.

  Returns:
    out: [B, T, H, V] in q.dtype.
    lse: [B, T, H] float32; -1e30 where nothing is visible and there is no sink,
      or one of -inf.

  Raises:
    ValueError: keys are in more or fewer parts than queries.

  Reference: arXiv 2309.17453 and gpt-oss for the sink logit.
  """
  q = _parts(q)
  counts = [len(_parts(s.k)) for s in segments]
  if set(counts) - {len(q)}:
    raise ValueError(f'attend: expected keys in {len(q)} parts, as the '
                     f'queries are, got {counts}.')
  length = q[0].shape[1]
  if length < 2 * _BLOCK or not any(s.causal for s in segments):
    return _attend(q, segments, scale, sink)
  size = max(_BLOCK, -(-length // _BLOCKS))
  blocks = [_attend(tuple(a[:, i:i + size] for a in q),
                    [_seen(s, i, size) for s in segments], scale, sink)
            for i in range(0, length, size)]
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *blocks)


def _parts(x):
  return x if isinstance(x, tuple) else (x,)


def _seen(segment, first, size):
  """What the queries from `first` on may see of a segment."""
  visible = segment.visible[..., first:first + size, :]
  if not segment.causal:
    return dataclasses.replace(segment, visible=visible)
  end = first + size
  return Segment(tuple(k[:, :, :end] for k in _parts(segment.k)),
                 segment.v[:, :, :end], visible[..., :end])


def _per_head(visible, heads):
  """Returns it as [B, H or 1, T, N]."""
  if visible.ndim == 3:
    return visible[:, None]
  each = heads // visible.shape[1]
  return visible if each == heads else jnp.repeat(visible, each, axis=1)


def _attend(q, segments, scale, sink):
  batch, length, heads, _ = q[0].shape
  dtype = q[0].dtype
  wide = (jnp.float64 if dtype == jnp.float64 else jnp.float32)

  def product(equation, a, b):
    """a [B, H, T, X] with b [B, G, ...]: heads of a group are rows of one
    matrix, [B, G, (H/G) T, X]."""
    groups = b.shape[1]
    rows = a.reshape(batch, groups, heads // groups * length, a.shape[-1])
    y = einsum(equation, rows, b)
    return y.reshape(batch, heads, length, y.shape[-1])

  q = [(a * jnp.asarray(scale, dtype)).swapaxes(1, 2) for a in q]
  value = segments[0].v.shape[-1]
  segments = [s for s in segments if s.v.shape[2]]

  def score(segment):
    # Adding the mask costs one pass less than selecting; -1e30 swallows any
    # finite score exactly.
    bias = jnp.where(_per_head(segment.visible, heads), jnp.zeros((), wide),
                     jnp.asarray(MASKED, wide))
    first, *more = (product('bgrk,bgnk->bgrn', a, k)
                    for a, k in zip(q, _parts(segment.k)))
    return sum(more, start=first) + bias

  scores = [score(segment) for segment in segments]
  top = jnp.full((batch, heads, length), MASKED, wide)
  for s in scores:
    top = jnp.maximum(top, jnp.max(s, axis=-1))
  sees = ~(top <= 0.5 * MASKED)
  some, zero = sees, jnp.zeros((), wide)
  total = jnp.zeros(top.shape, wide)
  if sink is not None:
    logit = sink.astype(wide).reshape(1, heads, 1)
    # One of -inf is none.
    has_sink = ~(logit <= 0.5 * MASKED)
    logit = jnp.where(has_sink, logit, jnp.asarray(MASKED, wide))
    top, some = jnp.maximum(top, logit), sees | has_sink
    total = jnp.where(
        has_sink, jnp.exp(logit - jax.lax.stop_gradient(top)), zero)
  # The maximum only conditions the exponentials; no gradient runs through it.
  top = jax.lax.stop_gradient(top)
  out = jnp.zeros((batch, heads, length, value), wide)
  for segment, s in zip(segments, scores):
    p = jnp.exp(s - top[..., None])
    total = total + jnp.sum(p, axis=-1)
    out = out + product('bgrn,bgnv->bgrv', p.astype(dtype), segment.v)
  total = jnp.where(some, total, jnp.ones((), wide))
  out = jnp.where(sees[..., None], out / total[..., None], zero)
  lse = jnp.where(some, top + jnp.log(total), jnp.asarray(MASKED, wide))
  return out.swapaxes(1, 2).astype(dtype), lse.swapaxes(1, 2)
