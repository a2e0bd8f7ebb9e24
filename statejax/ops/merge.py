"""Attention over parts, put together as if it were one softmax."""

import jax
import jax.numpy as jnp

from statejax.ops.attend import MASKED


def merge(parts):
  """Joins the results of `attend` over disjoint sets of keys.

    m = max_i lse_i;   w_i = exp(lse_i - m)
    out = sum_i w_i out_i / sum_i w_i;   lse = m + log sum_i w_i

  Equals one softmax over all keys. A sink logit is one more key, so it belongs
  to exactly one part. Sums are float32. Where a part sees nothing (out = 0,
  lse = -1e30 or -inf) it adds nothing; where all of them do, out = 0,
  lse = -1e30, and gradients are zero.

  Args:
    parts: a list of (out, lse), [B, T, H, V] and [B, T, H] float32.

  Returns:
    out: [B, T, H, V] in the dtype of the first part.
    lse: [B, T, H] float32.

  Raises:
    ValueError: no part, or parts of different shapes.

  Reference: arXiv 2205.14135 (FlashAttention), the blockwise softmax.
  """
  shapes = {(out.shape, lse.shape) for out, lse in parts}
  if len(shapes) != 1 or any(out[:-1] != lse for out, lse in shapes):
    raise ValueError(
        f'merge: expected parts (out [B, T, H, V], lse [B, T, H]) of one '
        f'shape, got {sorted(shapes)}; attend to the same queries in each.')
  dtype = parts[0][0].dtype
  wide = jnp.float64 if parts[0][1].dtype == jnp.float64 else jnp.float32
  lses = [lse.astype(wide) for _, lse in parts]
  sees = [lse > 0.5 * MASKED for lse in lses]
  top = jnp.full(lses[0].shape, MASKED, wide)
  for lse in lses:
    top = jnp.maximum(top, lse)
  # The maximum only conditions the exponentials; no gradient runs through it.
  top = jax.lax.stop_gradient(top)
  zero = jnp.zeros((), wide)
  total = jnp.zeros(top.shape, wide)
  joined = jnp.zeros(parts[0][0].shape, wide)
  for (out, _), lse, some in zip(parts, lses, sees):
    weight = jnp.where(some, jnp.exp(lse - top), zero)
    total = total + weight
    joined = joined + weight[..., None] * jnp.where(
        some[..., None], out.astype(wide), zero)
  # Not a number is no "nothing", so that it is passed on.
  some = ~(top <= 0.5 * MASKED)
  safe = jnp.where(some, total, jnp.ones((), wide))
  return ((joined / safe[..., None]).astype(dtype),
          jnp.where(some, top + jnp.log(safe), jnp.asarray(MASKED, wide)))
