"""Rotary position embedding, half-split layout."""

import jax.numpy as jnp
import numpy as np


def frequencies(width: int, *, theta: float, fraction: float = 1.0):
  """Returns the inverse frequencies of the rotating half channels.

  Args:
    width: channels K of a head.
    theta: base.
    fraction: share of the channels that rotate; int(K * fraction) of them.

  Returns:
    [int(K * fraction) // 2] float32 numpy array.
  """
  rotating = int(width * fraction)
  if rotating % 2:
    raise ValueError(f'rope: expected an even number of rotating channels, got '
                     f'{rotating} = int({width} * {fraction}).')
  exponent = np.arange(0, rotating, 2, dtype=np.float32) / rotating
  return (1.0 / theta ** exponent).astype(np.float32)


def rotate(x, positions, inverse):
  """Rotates the first `2 * len(inverse)` channels of each head by position.

  Channel i is paired with channel i + len(inverse) (arXiv 2104.09864 in the
  half-split layout); the rest passes.

  Args:
    x: [B, T, heads, K].
    positions: [B, T] int32.
    inverse: inverse frequencies [K_rot // 2] float32.

  Returns:
    [B, T, heads, K] in x.dtype.
  """
  half = inverse.shape[0]
  angle = positions[:, :, None, None].astype(jnp.float32) * (
      jnp.asarray(inverse)[None, None, None, :])
  cos = jnp.cos(angle).astype(x.dtype)
  sin = jnp.sin(angle).astype(x.dtype)
  left, right, rest = jnp.split(x, [half, 2 * half], axis=-1)
  return jnp.concatenate(
      [left * cos - right * sin, right * cos + left * sin, rest], axis=-1)
