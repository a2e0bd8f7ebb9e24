"""The selective scan of Mamba-1: a decay per channel and state."""

import jax
import jax.numpy as jnp

from statejax.ops import scan


def selective_scan(x, dt, a, b, c, skip, state, n_valid=None, resets=None):
  """Fades every cell at its own rate, writes dt B x, reads with C.

  Per row, in float32:
    h_t = exp(dt_t a) * h_{t-1} + (dt_t x_t) b_t^T
    y_t = h_t c_t + skip * x_t

  The gate of the layer, `y * silu(z)`, and `dt = softplus(.)` are the
  caller's. This is not a delta rule: the decay depends on both axes of h.

  Laws: split (L1), padding (L3), packed documents (L4), no overflow (L10).

  Args:
    x: [B, T, D], any float dtype.
    dt: time steps >= 0, [B, T, D] float32.
    a: rates <= 0, [D, N] float32.
    b: [B, T, N].
    c: [B, T, N].
    skip: [D] float32.
    state: h_0, [B, D, N] float32.
    n_valid: real tokens of each row, [B] int32; None means T.
    resets: [B, T] bool, True at the first token of a document that begins
      here; None for never.

  Returns:
    y: [B, T, D] in x.dtype, zero past n_valid.
    state: [B, D, N] after n_valid tokens; where n_valid is 0, bit-equal.

  Reference: arXiv 2312.00752.
  """
  def step(h, x, dt, b, c):
    x, dt, b, c = (t.astype(h.dtype) for t in (x, dt, b, c))
    h = jnp.exp(dt[..., None] * a[None]) * h + (
        (dt * x)[..., None] * b[:, None])
    y = jnp.einsum('bdn,bn->bd', h, c, precision=jax.lax.Precision.HIGHEST)
    return h, y + skip[None] * x

  y, state = scan.fold(step, (x, dt, b, c), state, n_valid, resets)
  return y.astype(x.dtype), state
