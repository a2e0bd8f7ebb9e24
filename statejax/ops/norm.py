"""RMS, layer and L2 normalisation, in float32 whatever the input."""

import jax
import jax.numpy as jnp


def _wide(x):
  return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _row(weight, x):
  return jnp.reshape(_wide(weight), (1,) * (x.ndim - weight.ndim)
                     + weight.shape)


def rms_norm(x, weight, *, eps, offset=0.0):
  """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last axis.

  Args:
    x: [..., D], any float dtype.
    weight: [D] float32, or None for no weight.
    eps: added to the mean square.
    offset: 0.0 for the plain form, 1.0 for the (1+w) form.

  Returns:
    [..., D] in x.dtype.
  """
  y = _wide(x)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  if weight is not None:
    y = y * (offset + _row(weight, y))
  return y.astype(x.dtype)


def layer_norm(x, weight, bias, *, eps):
  """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis.

  Args:
    x: [..., D], any float dtype.
    weight: [D] float32.
    bias: [D] float32.
    eps: added to the variance.

  Returns:
    [..., D] in x.dtype.
  """
  y = _wide(x)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * _row(weight, y) + _row(bias, y)).astype(x.dtype)


def gated_rms_norm(x, gate, weight, *, eps, activation):
  """`rms_norm(x) * weight * activation(gate)`: norm first, then the gate.

  Args:
    x: [..., V].
    gate: [..., V].
    weight: [V] float32.
    eps: added to the mean square.
    activation: jax.nn.silu (Gated DeltaNet) or jax.nn.sigmoid (KDA).

  Returns:
    [..., V] in x.dtype.
  """
  y = _wide(x)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * _row(weight, y) * activation(_wide(gate))).astype(x.dtype)


def norm_of_gated(x, gate, weight, *, eps, activation):
  """`rms_norm(x * activation(gate)) * weight`: the gate, then the norm.

  Args:
    x: [..., V].
    gate: [..., V].
    weight: [V] float32.
    eps: added to the mean square.
    activation: jax.nn.silu in Mamba-2.

  Returns:
    [..., V] in x.dtype.
  """
  y = _wide(x) * activation(_wide(gate))
  return rms_norm(y, weight, eps=eps).astype(x.dtype)


def l2_norm(x, *, eps=1e-6):
  """`x / sqrt(sum(x^2) + eps)` over the last axis, float32 out."""
  y = _wide(x)
  return y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + eps)
