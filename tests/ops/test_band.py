"""Attention in blocks of the window is attention under the window's mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax.layers import attention, common
from statejax.ops import attend, band


@pytest.mark.parametrize('borders', [False, True])
@pytest.mark.parametrize('steps, window', [
    pytest.param(13, 4, marks=pytest.mark.slow), (12, 4)])
def test_band(steps, window, borders):
  """With a past, documents, padding and a sink; gradients too."""
  rows, heads, groups, width = 3, 4, 2, 8
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  q, sink = draw(rows, steps, heads, width), draw(heads)
  k, v = draw(2, rows, groups, steps, width)
  ring = attention.RingState(*draw(2, rows, groups, window, width))
  document = jnp.asarray([
      [0] * 5 + [1] * (steps - 5), [0] * steps, [0, 1] + [2] * (steps - 2)],
                         jnp.int32) if borders else None
  context = common.context(jnp.array([2, 9, 0], jnp.int32),
                           jnp.array([steps, steps - 2, 6], jnp.int32),
                           document, steps)
  segments, _ = attention.recent(ring, k, v, context)

  def masked(q, k, v, sink):
    own = attend.Segment(k, v, segments[1].visible)
    return attend.attend(q, [segments[0], own], scale=0.3, sink=sink)[0]

  def in_blocks(q, k, v, sink):
    return band.attend_band(q, segments[0], k, v, context.visible_band(window),
                            scale=0.3, sink=sink)

  @functools.partial(jax.jit, static_argnums=0)
  def both(f, toward):
    y, back = jax.vjp(f, q, k, v, sink)
    return y, back(toward)

  toward = draw(rows, steps, heads, width)
  (expected, back), (got, back_got) = (
      both(f, toward) for f in (masked, in_blocks))
  np.testing.assert_allclose(got, expected, atol=2e-6)
  for a, b in zip(back, back_got):
    np.testing.assert_allclose(b, a, atol=2e-5)


def test_band_is_small():
  """No product or mask grows with the square of the length."""
  steps, window = 512, 8
  context = common.context(jnp.zeros(1, jnp.int32),
                           jnp.full(1, steps, jnp.int32), None, steps)
  q = jnp.ones((1, steps, 2, 4))
  k = jnp.ones((1, 2, steps, 4))
  ring = jnp.zeros((1, 2, window, 4))
  def run(q, k):
    held = attention.RingState(ring, ring)
    segments, _ = attention.recent(held, k, k, context)
    return band.attend_band(q, segments[0], k, k, context.visible_band(window),
                            scale=1.)
  used = jax.jit(run).lower(q, k).compile().memory_analysis()
  assert used.temp_size_in_bytes < 4 * steps * steps
