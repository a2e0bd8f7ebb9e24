"""Depthwise causal short convolution that carries its tail."""

import jax
import jax.numpy as jnp


def short_conv(x, tail, weight, n_valid, *, document=None, start=None,
               bias=None, activation=jax.nn.silu):
  """`y_t = act(bias + sum_w weight[w] x'_{t+w})` over `x' = [tail; x]`.

  Taps are added oldest first, always in that order, in float32, so any split
  of the sequence gives the same bits. A tap reaches back only inside its own
  document.

  Laws: split (L1), padding (L3), packed (L4), tail travels (L15).

  Args:
    x: [B, T, D].
    tail: the W-1 inputs before x, oldest first, [B, W-1, D].
    weight: [W, D] float32; weight[W-1] meets the current token.
    n_valid: [B] int32.
    document: number of document borders up to each token, [B, T] int32, or
      None; the tail belongs to document 0.
    start: index of the first token of the row's last document, [B] int32, or
      None; inputs before it do not enter the new tail.
    bias: [D] float32 or None.
    activation: applied to the float32 sum.

  Returns:
    y: [B, T, D] in x.dtype; finite garbage past n_valid if x is finite there.
    tail: [B, W-1, D] in tail.dtype; bit-equal where n_valid is 0.

  Reference: causal-conv1d as used by Mamba and Gated DeltaNet layers.
  """
  taps, length = weight.shape[0], x.shape[1]
  wide = (jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  # The tail is kept in its own dtype; appended inputs are rounded to it, so
  # that a token convolves with the same bits whether it arrives in this call
  # or in a later one.
  full = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
  owner = None
  if document is not None:
    before = jnp.zeros((x.shape[0], taps - 1), document.dtype)
    owner = jnp.concatenate([before, document], axis=1)
  total = jnp.zeros(x.shape, wide)
  if bias is not None:
    total = total + bias.astype(wide)[None, None]
  for w in range(taps):
    seen = full[:, w:w + length].astype(wide)
    if owner is not None and document is not None:
      same = owner[:, w:w + length] == document
      seen = jnp.where(same[..., None], seen, jnp.zeros((), wide))
    total = total + seen * weight[w].astype(wide)[None, None]
  index = n_valid[:, None] + jnp.arange(taps - 1, dtype=jnp.int32)[None]
  new_tail = jnp.take_along_axis(full, index[..., None], axis=1)
  if start is not None:
    # Row i of the new tail is x'[n + i], token n + i - (W - 1).
    old = index - (taps - 1) < start[:, None]
    new_tail = jnp.where((old & (start[:, None] > 0))[..., None],
                         jnp.zeros((), tail.dtype), new_tail)
  return activation(total).astype(x.dtype), new_tail
