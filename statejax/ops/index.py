"""The lightning indexer's score, and the loss by which it learns."""

import jax
import jax.numpy as jnp

from statejax.ops.product import einsum

# Queries whose attention is held at once for the loss.
_BLOCK = 128


def scores(q, w, k, *, relu=True):
  """`I_tj = HI^-1/2 sum_h w_th relu(q_th . k_j dI^-1/2)`, float32.

  Args:
    q: index queries, [B, T, HI, dI].
    w: weights of the heads, [B, T, HI].
    k: index keys, one for all heads, [B, N, dI].
    relu: whether a head's score below 0 counts as 0.

  Returns:
    [B, T, N] float32 (float64 of float64 queries).

  Reference: DeepSeek-V3.2, equation 1.
  """
  dots = einsum('bthd,bnd->bthn', q, k) * q.shape[-1] ** -0.5
  if relu:
    dots = jax.nn.relu(dots)
  return einsum('bth,bthn->btn', w.astype(dots.dtype) * q.shape[2] ** -0.5,
                dots)


def loss(scores, heads, allowed, valid):
  """`sum_t KL(p_t || softmax I_t)` over the allowed columns A.

    p_t = sum_h softmax_A(s_th) / H

  p is what attention itself gives to each column, without gradient: the loss
  moves the indexer alone.

  Args:
    scores: I, [B, T, N] float32.
    heads: function of (begin, size) to attention scores s of the queries from
      `begin` on, [B, size, H, N] float32.
    allowed: A, [B, T, N] bool.
    valid: queries that count, [B, T] bool.

  Returns:
    float32 scalar; queries that see nothing add 0.

  Reference: DeepSeek-V3.2, equations 3 and 4.
  """
  length = scores.shape[1]
  size = min(_BLOCK, length)
  # The last block reaches back; what it repeats does not count again.
  begins = [min(i, length - size) for i in range(0, length, size)]

  @jax.checkpoint
  def block(begin, new):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)
    mask = cut(allowed)
    target = jax.lax.stop_gradient(jnp.sum(
        _softmax(heads(begin, size), mask[:, :, None]), axis=2))
    total = jnp.sum(target, axis=-1, keepdims=True)
    target = target / jnp.maximum(total, 1e-10)
    own = jnp.where(mask, cut(scores), -jnp.inf)
    # Rows without a column are taken out before the logarithm.
    some = jnp.any(mask, axis=-1, keepdims=True)
    own = jax.nn.log_softmax(jnp.where(some, own, 0.0), axis=-1)
    gap = jnp.log(jnp.maximum(target, 1e-30)) - jnp.where(mask, own, 0.0)
    each = jnp.sum(jnp.where(target > 0, target * gap, 0.0), axis=-1)
    counts = cut(valid) & (jnp.arange(size) >= new)[None]
    return jnp.sum(jnp.where(counts, each, 0.0))

  ends = [0] + [b + size for b in begins[:-1]]
  starts = jnp.asarray(begins, jnp.int32)
  fresh = jnp.asarray([e - b for b, e in zip(begins, ends)], jnp.int32)
  return jnp.sum(jax.lax.map(lambda x: block(*x), (starts, fresh)))


def _softmax(x, mask):
  """Over the last axis where mask; zeros where it is empty."""
  x = jnp.where(mask, x, -jnp.inf)
  top = jnp.max(x, axis=-1, keepdims=True)
  weight = jnp.exp(x - jnp.where(top > -jnp.inf, top, 0.0))
  return weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-30)
