"""The rotation that a `RopeConfig` describes."""

import functools

from statejax import config as cfg
from statejax.ops import rope

_SCALINGS = {
    cfg.YarnConfig: rope.yarn,
    cfg.LongRopeConfig: rope.longrope,
    cfg.Llama3RopeConfig: rope.llama3,
}


def rotation(config, width):
  """Returns `turn(x, positions)` for heads of the given width.

  `turn(x, -positions)` undoes it, but for a factor on cos and sin.

  Args:
    config: `RopeConfig`; or None, and nothing turns (NoPE).
    width: channels K of a head.

  Returns:
    A function from [B, T, heads, K] and [B, T] int32 to [B, T, heads, K]; see
    `statejax.ops.rope.rotate`.
  """
  if config is None:
    return lambda x, positions: x
  base = {'theta': config.theta, 'fraction': config.fraction}
  if config.scaling is None:
    inverse, factor = rope.frequencies(width, **base), 1.0
  else:
    inverse, factor = _SCALINGS[type(config.scaling)](
        width, **base, **vars(config.scaling))
  return functools.partial(
      rope.rotate, inverse=inverse, factor=factor, layout=config.layout,
      side=config.side)
