"""Attention to gathered keys and index scores in plain JAX.

What the kernels must equal, and what their gradients are computed by.
"""

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30


def parts(x):
  """Keys and queries in one part are a part each."""
  return x if isinstance(x, tuple) else (x,)


def gather_attend(q, k, v, ids, last, sink=None, *, block, scale):
  """Gathers every block, then one softmax; float32, float64 of float64 q.

  Args, Returns: see `pallas_kernels.gather_attend_tpu.gather_attend`.
  """
  q, k = parts(q), parts(k)
  batch, steps, sets = ids.shape[:3]
  groups, size = k[0].shape[1:3]
  wide = jnp.float64 if q[0].dtype == jnp.float64 else jnp.float32
  at = ids[..., None] * block + jnp.arange(block, dtype=ids.dtype).reshape(
      1, 1, 1, 1, block)
  seen = ((ids >= 0)[..., None] & (at <= last[:, :, None, None, None])
          & (at < size)).reshape(batch, steps, sets, 1, -1)
  at = jnp.clip(at, 0, size - 1).reshape(batch, steps, sets, -1)

  def rows(x):
    """[B, T, S, columns, D]."""
    found = jnp.take_along_axis(
        x, jnp.moveaxis(at, 2, 1).reshape(batch, groups, -1, 1), axis=2)
    found = found.reshape(batch, sets, steps, -1, x.shape[-1])
    return jnp.moveaxis(found, 1, 2)

  k = [rows(x) for x in k]
  v = k[0] if v is None else rows(v)
  heads = lambda x: x.reshape(batch, steps, sets, -1, x.shape[-1])
  scores = scale * sum(_product('btgrk,btgnk->btgrn', heads(a), b)
                       for a, b in zip(q, k, strict=True))
  scores = jnp.where(seen, scores, jnp.asarray(MASKED, wide))
  top = jnp.max(scores, axis=-1, keepdims=True, initial=MASKED)
  if sink is not None:
    sink = sink.astype(wide).reshape(1, 1, sets, -1, 1)
    top = jnp.maximum(top, sink)
  top = lax.stop_gradient(top)
  p = jnp.where(seen, jnp.exp(scores - top), jnp.zeros((), wide))
  total = jnp.sum(p, axis=-1, keepdims=True)
  if sink is not None:
    total = total + jnp.exp(sink - top)
  # What is no number has been seen too, and has to be passed on.
  some = ~(total <= 0)
  safe = jnp.where(some, total, jnp.ones((), wide))
  # What is not seen may hold anything.
  v = jnp.where(jnp.swapaxes(seen, 3, 4), v, jnp.zeros((), v.dtype))
  out = _product('btgrn,btgnv->btgrv', p.astype(q[0].dtype), v) / safe
  lse = jnp.where(some, top + jnp.log(safe), jnp.asarray(MASKED, wide))
  flat = (batch, steps, -1)
  return (out.astype(q[0].dtype).reshape(*flat, out.shape[-1]),
          lse.reshape(flat))


def index_scores(q, w, k, relu=True):
  """Args, Returns: see `pallas_kernels.index_scores_tpu.index_scores`."""
  dots = _product('bthd,bnd->bthn', q, k) * q.shape[-1] ** -0.5
  if relu:
    dots = jax.nn.relu(dots)
  w = w.astype(dots.dtype) * q.shape[2] ** -0.5
  return jnp.einsum('bth,bthn->btn', w, dots,
                    precision=lax.Precision.HIGHEST)


def _product(equation, x, w):
  """Operands as x, sums in float32."""
  wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
  return jnp.einsum(
      equation, x, w.astype(x.dtype), preferred_element_type=wide,
      precision=lax.Precision.HIGHEST if x.dtype == wide else None)
