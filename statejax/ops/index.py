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
    w: weights of the heads, [B, T, HI]; None sums the heads as they are,
      without HI^-1/2.
    k: index keys, one for all heads, [B, N, dI].
    relu: whether a head's score below 0 counts as 0.

  Returns:
    [B, T, N] float32 (float64 of float64 queries).

  Reference: DeepSeek-V3.2, equation 1; Qwen's QSA has no weights.
  """
  if q.shape[1] == 1:
    # With the few queries first XLA transposes all keys before the product.
    dots = jnp.moveaxis(
        einsum('bnd,bthd->bnth', k.astype(q.dtype), q), 1, -1)
  else:
    dots = einsum('bthd,bnd->bthn', q, k)
  dots = dots * q.shape[-1] ** -0.5
  if relu:
    dots = jax.nn.relu(dots)
  if w is None:
    return jnp.sum(dots, axis=2)
  return einsum('bth,bthn->btn', w.astype(dots.dtype) * q.shape[2] ** -0.5,
                dots)


def loss(scores, heads, allowed, valid, reduce=None):
  """`sum_t KL(p_t || softmax I_t)` over the allowed columns A.

    p_t = sum_h softmax_A(s_th) / H

  p is what attention itself gives to each column, without gradient: the loss
  moves the indexer alone.

  Args:
    scores: I, [B, T, J] float32.
    heads: function of (begin, size) to attention scores s of the queries from
      `begin` on, [B, size, H, N] float32.
    allowed: A, tokens of the columns that count, [B, T, N] bool.
    valid: queries that count, [B, T] bool.
    reduce: where columns are no tokens but sets of them: from an array
      [B, T, N] over tokens, zero where not allowed, to the sums [B, T, J] of
      the columns.

  Returns:
    float32 scalar; queries that see nothing add 0.

  Reference: DeepSeek-V3.2, equations 3 and 4.
  """
  target = mass(heads, allowed)
  if reduce is not None:
    # A column counts with its first token, however little that weighs.
    target, allowed = reduce(target), reduce(allowed.astype(target.dtype)) > 0
  return jnp.sum(jnp.where(valid, divergence(scores, target, allowed), 0.0))


def mass(heads, allowed):
  """p of `loss`, [B, T, N] float32, without gradient; a block of queries at a
  time, for those of all heads are not held together."""
  length = allowed.shape[1]
  size = min(_BLOCK, length)
  # The last block reaches back over what is already there.
  begins = sorted({min(i, length - size) for i in range(0, length, size)})

  def block(begin):
    mask = jax.lax.dynamic_slice_in_dim(allowed, begin, size, axis=1)
    total = jnp.sum(_softmax(heads(begin, size), mask[:, :, None]), axis=2)
    whole = jnp.sum(total, axis=-1, keepdims=True)
    return total / jnp.maximum(whole, 1e-10)

  parts = jax.lax.map(block, jnp.asarray(begins, jnp.int32))
  skip = len(begins) * size - length
  parts = [p if i + 1 < len(begins) else p[:, skip:]
           for i, p in enumerate(parts)]
  return jax.lax.stop_gradient(jnp.concatenate(parts, axis=1))


def divergence(scores, target, allowed):
  """KL(target || softmax of the scores) over the allowed columns, [B, T].

  Args:
    scores: [B, T, J] float32.
    target: [B, T, J], summing to 1 over the allowed columns.
    allowed: [B, T, J] bool; 0 where there are none.
  """
  own = jnp.where(allowed, scores, -jnp.inf)
  # Rows without a column are taken out before the logarithm.
  some = jnp.any(allowed, axis=-1, keepdims=True)
  own = jax.nn.log_softmax(jnp.where(some, own, 0.0), axis=-1)
  gap = jnp.log(jnp.maximum(target, 1e-30)) - jnp.where(allowed, own, 0.0)
  return jnp.sum(jnp.where(target > 0, target * gap, 0.0), axis=-1)


def _softmax(x, mask):
  """Over the last axis where mask; zeros where it is empty."""
  x = jnp.where(mask, x, -jnp.inf)
  top = jnp.max(x, axis=-1, keepdims=True)
  weight = jnp.exp(x - jnp.where(top > -jnp.inf, top, 0.0))
  return weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-30)
