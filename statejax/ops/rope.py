"""Rotary position embedding: frequencies, their scalings, the rotation."""

import math

import jax.numpy as jnp
import numpy as np

LAYOUTS, SIDES = ('half', 'interleaved'), ('leading', 'trailing')


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


def magnitude(factor: float, mscale: float = 1.0) -> float:
  """YaRN's `0.1 mscale ln(factor) + 1`, and 1 where factor <= 1.

  Multiplies cos and sin; its square, with mscale_all_dim, the softmax scale of
  DeepSeek's latent attention.
  """
  return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn(width, *, theta, fraction=1.0, factor, original, beta_fast=32.0,
         beta_slow=1.0, mscale=None, mscale_all_dim=None,
         attention_factor=None, truncate=True):
  """Slows the slow channels, keeps the fast ones (YaRN).

  Channels that turn more than `beta_fast` times over `original` positions keep
  their frequency, those below `beta_slow` have it divided by `factor`, and in
  between it is interpolated linearly by channel.

  Args:
    width: channels K of a head.
    theta: base.
    fraction: share of the channels that rotate.
    factor: of the context's extension.
    original: positions of the pre-training.
    beta_fast: turns, see above.
    beta_slow: turns, see above.
    mscale: numerator of the attention factor, where `mscale_all_dim` is set.
    mscale_all_dim: its denominator.
    attention_factor: given outright; DeepSeek-V4 says 1.
    truncate: whether the two limits are rounded to whole channels.

  Returns:
    inverse frequencies [int(K * fraction) // 2] float32 numpy, and the factor
    on cos and sin, a float.

  Reference: arXiv 2309.00071; mscale as in DeepSeek-V2.
  """
  inverse = frequencies(width, theta=theta, fraction=fraction)
  channels = 2 * len(inverse)
  def channel(turns):
    return channels * math.log(original / (turns * 2 * math.pi)) / (
        2 * math.log(theta))
  low, high = channel(beta_fast), channel(beta_slow)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, channels - 1)
  if low == high:  # a step, not a division by zero
    high += 0.001
  slowed = np.clip((np.arange(len(inverse)) - low) / (high - low), 0, 1)
  scaled = inverse / factor * slowed + inverse * (1 - slowed)
  if attention_factor is None:
    attention_factor = magnitude(factor)
    if mscale and mscale_all_dim:
      attention_factor = (magnitude(factor, mscale)
                          / magnitude(factor, mscale_all_dim))
  return scaled.astype(np.float32), float(attention_factor)


def longrope(width, *, theta, fraction=1.0, short, long, original, maximum,
             factor=None, attention_factor=None):
  """Divides each channel's frequency by a searched factor (LongRoPE).

  `long` where `maximum > original`, else `short`: once and for all, since keys
  in a store keep the rotation they came with. The published code changes over
  as soon as a sequence has outgrown `original`.

  Args:
    width: channels K of a head.
    theta: base.
    fraction: share of the channels that rotate.
    short: a factor for each pair of rotating channels.
    long: the same.
    original: positions of the pre-training.
    maximum: positions that are to be served.
    factor: of the extension; None means `maximum / original`.
    attention_factor: None means `sqrt(1 + ln(factor) / ln(original))`.

  Returns:
    inverse frequencies [int(K * fraction) // 2] float32 numpy, and the factor
    on cos and sin, a float.

  Raises:
    ValueError: the factors are not one for each pair of channels.

  Reference: arXiv 2402.13753; the attention factor as in Phi-3.
  """
  inverse = frequencies(width, theta=theta, fraction=fraction)
  chosen = long if maximum > original else short
  if len(chosen) != len(inverse):
    raise ValueError(f'longrope: expected {len(inverse)} factors, one for each '
                     f'pair of rotating channels, got {len(chosen)}.')
  factor = maximum / original if factor is None else factor
  if attention_factor is None:
    attention_factor = 1.0 if factor <= 1 else math.sqrt(
        1 + math.log(factor) / math.log(original))
  scaled = inverse / np.asarray(chosen, np.float64)
  return scaled.astype(np.float32), float(attention_factor)


def llama3(width, *, theta, fraction=1.0, factor, original, low=1.0, high=4.0):
  """Slows channels that turn less than `high` times over `original` positions.

  Those below `low` turns have their frequency divided by `factor`, in between
  it is interpolated linearly by turns.

  Args:
    width: channels K of a head.
    theta: base.
    fraction: share of the channels that rotate.
    factor: of the slow channels.
    original: positions of the pre-training.
    low: turns, see above.
    high: turns, see above.

  Returns:
    inverse frequencies [int(K * fraction) // 2] float32 numpy, and the factor
    on cos and sin, which is 1.

  Reference: Llama 3.1.
  """
  inverse = frequencies(width, theta=theta, fraction=fraction)
  turns = original * inverse.astype(np.float64) / (2 * math.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  scaled = inverse / factor * (1 - kept) + inverse * kept
  return scaled.astype(np.float32), 1.0


def rotate(x, positions, inverse, *, layout='half', side='leading',
           factor=1.0):
  """Rotates `2 * len(inverse)` channels of each head by position.

    (a_i, b_i) <- factor * R(position * inverse_i) (a_i, b_i)

  where a_i, b_i are channels i and i + len(inverse) of those that rotate, or
  channels 2i and 2i + 1 (interleaved). The rest passes. The inverse rotation
  is that by `-positions`.

  Args:
    x: [B, T, heads, K].
    positions: [B, T] int32.
    inverse: inverse frequencies [K_rot // 2] float32.
    layout: 'half' or 'interleaved'.
    side: the 'leading' or the 'trailing' channels rotate.
    factor: on cos and sin; of the scalings above.

  Returns:
    [B, T, heads, K] in x.dtype, in the channel order of x.

  Raises:
    ValueError: an unknown layout or side, or too few channels.

  Reference: arXiv 2104.09864.
  """
  if layout not in LAYOUTS or side not in SIDES:
    raise ValueError(f'rope: expected a layout of {LAYOUTS} and a side of '
                     f'{SIDES}, got {layout!r} and {side!r}.')
  half, width = inverse.shape[0], x.shape[-1]
  if 2 * half > width:
    raise ValueError(f'rope: expected at least {2 * half} channels for {half} '
                     f'frequencies, got {width}.')
  wide = (jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  angle = positions[:, :, None, None].astype(wide) * (
      jnp.asarray(inverse, wide)[None, None, None, :])
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if factor != 1.0:
    cos, sin = (a * jnp.asarray(factor, wide) for a in (cos, sin))
  cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
  first = 0 if side == 'leading' else width - 2 * half
  before, turning, after = jnp.split(x, [first, first + 2 * half], axis=-1)
  if layout == 'half':
    left, right = jnp.split(turning, 2, axis=-1)
  else:
    pairs = turning.reshape(*x.shape[:-1], half, 2)
    left, right = pairs[..., 0], pairs[..., 1]
  turned = left * cos - right * sin, right * cos + left * sin
  middle = (turned if layout == 'half' else
            [jnp.stack(turned, axis=-1).reshape(turning.shape)])
  return jnp.concatenate([before, *middle, after], axis=-1)
