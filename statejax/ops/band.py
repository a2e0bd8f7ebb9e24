"""Attention within a window, at a cost that grows with the window alone."""

import jax
import jax.numpy as jnp

from statejax.ops import attend


def pairs(x, window, axis):
  """Cuts an axis into blocks of W, each with the block before it in front.

  Args:
    x: any array; the axis is padded with zeros to a multiple of W.
    window: W.
    axis: of x, not negative.

  Returns:
    x with [blocks, 2 W] in place of the axis.
  """
  count = -(-x.shape[axis] // window)
  pad = [(0, 0)] * x.ndim
  pad[axis] = (window, count * window - x.shape[axis])
  x = jnp.pad(x, pad)
  cut = lambda begin: jax.lax.slice_in_dim(
      x, begin, begin + count * window, axis=axis).reshape(
          *x.shape[:axis], count, window, *x.shape[axis + 1:])
  return jnp.concatenate([cut(0), cut(window)], axis=axis + 1)


def attend_band(q, past, k, v, seen, *, scale, sink=None):
  """`attend.attend` of queries that see less than W tokens back.

  Args:
    q: [B, T, H, K].
    past: `attend.Segment` of what came before the step; only the first W
      queries see any of it.
    k: keys of the step, [B, G, T, K].
    v: [B, G, T, V].
    seen: which keys of its own block of W and of the block before each query
      sees, [B, blocks, W, 2 W] bool; see `pairs`.
    scale, sink: as of `attend.attend`.

  Returns:
    [B, T, H, V] in q.dtype.
  """
  rows, length, heads, _ = q.shape
  count, window = seen.shape[1:3]
  blocks = lambda x: jnp.pad(
      x, [(0, 0), (0, count * window - length), (0, 0), (0, 0)]).reshape(
          rows * count, window, *x.shape[2:])
  near = lambda x: pairs(x, window, 2).swapaxes(1, 2).reshape(
      rows * count, x.shape[1], 2 * window, x.shape[-1])
  own = attend.Segment(near(k), near(v), seen.reshape(
      rows * count, window, 2 * window))
  y, _ = attend.attend(blocks(q), [own], scale=scale, sink=sink)
  y = y.reshape(rows, count * window, heads, -1)[:, :length]
  first = attend.Segment(
      k[:, :, :window], v[:, :, :window], seen[:, 0, :, window:])
  past = attend.Segment(past.k, past.v, past.visible[:, :window])
  begin, _ = attend.attend(q[:, :window], [past, first], scale=scale, sink=sink)
  return jnp.concatenate([begin, y[:, window:]], axis=1)
