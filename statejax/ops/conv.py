"""Depthwise causal short convolution that carries its tail."""

import functools

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
  taps = weight.shape[0]
  wide = (jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  # The tail is kept in its own dtype; appended inputs are rounded to it, so
  # that a token convolves with the same bits whether it arrives in this call
  # or in a later one.
  full = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
  owner = None
  if document is not None:
    before = jnp.zeros((x.shape[0], taps - 1), document.dtype)
    owner = jnp.concatenate([before, document], axis=1)
  total = _sum_taps(wide, full, weight.astype(wide), owner)
  if bias is not None:
    total = total + bias.astype(wide)[None, None]
  index = n_valid[:, None] + jnp.arange(taps - 1, dtype=jnp.int32)[None]
  new_tail = jnp.take_along_axis(full, index[..., None], axis=1)
  if start is not None:
    # Row i of the new tail is x'[n + i], token n + i - (W - 1).
    old = index - (taps - 1) < start[:, None]
    new_tail = jnp.where((old & (start[:, None] > 0))[..., None],
                         jnp.zeros((), tail.dtype), new_tail)
  return activation(total).astype(x.dtype), new_tail


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_taps(wide, full, weight, owner):
  """`sum_w weight[w] full_{t+w}` inside a document, oldest tap first.

  Own gradient: autodiff keeps the W shifted inputs, three times the time.
  """
  taps, length = _sizes(full, weight)
  total = jnp.zeros((full.shape[0], length, full.shape[2]), wide)
  for w in range(taps):
    seen = full[:, w:w + length].astype(wide)
    if owner is not None:
      seen = _where_equal(owner[:, w:w + length], owner[:, taps - 1:], seen)
    total = total + seen * weight[w][None, None]
  return total


def _sum_taps_forward(wide, full, weight, owner):
  return _sum_taps(wide, full, weight, owner), (full, weight, owner)


def _sum_taps_backward(wide, residuals, d_total):
  full, weight, owner = residuals
  taps, length = _sizes(full, weight)
  margin = (taps - 1, taps - 1)
  padded = jnp.pad(d_total, ((0, 0), margin, (0, 0)))
  readers = None if owner is None else jnp.pad(
      owner[:, taps - 1:], ((0, 0), margin), constant_values=-1)
  d_full, d_weight = jnp.zeros(full.shape, wide), []
  for w in range(taps):
    # What the reader w places back of each input passes on to it.
    at = slice(taps - 1 - w, taps - 1 - w + full.shape[1])
    d_seen = padded[:, at]
    if readers is not None:
      d_seen = _where_equal(readers[:, at], owner, d_seen)
    d_full = d_full + d_seen * weight[w][None, None]
    d_weight.append(jnp.sum(
        full[:, w:w + length].astype(wide) * d_seen[:, w:w + length],
        axis=(0, 1)))
  return d_full.astype(full.dtype), jnp.stack(d_weight), None


_sum_taps.defvjp(_sum_taps_forward, _sum_taps_backward)


def _sizes(full, weight):
  return weight.shape[0], full.shape[1] - weight.shape[0] + 1


def _where_equal(a, b, x):
  return jnp.where((a == b)[..., None], x, jnp.zeros((), x.dtype))
