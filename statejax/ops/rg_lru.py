"""The real-gated linear recurrent unit of Griffin and RecurrentGemma."""

import jax
import jax.numpy as jnp

from statejax.ops import scan


def rg_lru(x, input_gate, recurrent_gate, rate, state, n_valid=None,
           resets=None):
  """Fades each channel by its gate and adds input of matching variance.

  In float32:
    log a_t = -8 softplus(rate) * recurrent_gate_t
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) * (input_gate_t * x_t)

  and `h_t = input_gate_t * x_t` at the first token of a document.

  Laws: split (L1), padding (L3), packed documents (L4), no overflow (L10).

  Args:
    x: [B, T, D], any float dtype.
    input_gate: in [0, 1], [B, T, D].
    recurrent_gate: in [0, 1], [B, T, D].
    rate: [D] float32.
    state: h_0, [B, D] float32.
    n_valid: real tokens of each row, [B] int32; None means T.
    resets: [B, T] bool, True where a token has position 0, also in a fresh
      row; None for never.

  Returns:
    y: h of every token, [B, T, D] in x.dtype, zero past n_valid.
    state: [B, D] after n_valid tokens; where n_valid is 0, bit-equal.

  Reference: arXiv 2402.19427.
  """
  speed = -8.0 * jax.nn.softplus(rate)
  first = jnp.zeros(x.shape[:2], bool) if resets is None else resets

  def step(h, x, input_gate, recurrent_gate, first):
    x, input_gate, recurrent_gate = (
        t.astype(h.dtype) for t in (x, input_gate, recurrent_gate))
    log_a = speed[None] * recurrent_gate
    # 1 - a^2 would cancel for slow channels.
    kept = -jnp.expm1(2.0 * log_a)
    root = jnp.sqrt(jnp.where(kept > 0, kept, jnp.ones((), h.dtype)))
    root = jnp.where(kept > 0, root, jnp.zeros((), h.dtype))
    root = jnp.where(first[:, None], jnp.ones((), h.dtype), root)
    h = jnp.exp(log_a) * h + root * (input_gate * x)
    return h, h

  y, state = scan.fold(step, (x, input_gate, recurrent_gate, first), state,
                       n_valid, resets)
  return y.astype(x.dtype), state
