"""Parameters are drawn as said, each from numbers of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax.layers import weights

MANY = 1 << 19  # more than shares a draw


def draw(*declared, stacked=None, seed=0):
  abstract = [weights.Weight(jax.ShapeDtypeStruct(shape, jnp.float32),
                             ('a',) * len(shape), init=init)
              for init, shape in declared]
  return weights.draw(jax.random.key(seed), abstract,
                      stacked or [()] * len(declared))


@pytest.mark.parametrize('size', (1 << 17, MANY))
@pytest.mark.parametrize('init, deviation, most', [
    (weights.normal(0.5), 0.5, 3.0),
    (weights.truncated_normal(0.5), 0.5, 2 * 0.5 / 0.8796),
    (weights.symmetric(0.6), 0.6 / 3 ** 0.5, 0.6),
], ids=('normal', 'truncated', 'symmetric'))
def test_distributions(init, deviation, most, size):
  x = np.asarray(draw((init, (size,)))[0], np.float64)
  assert np.isfinite(x).all() and np.abs(x).max() <= most
  np.testing.assert_allclose(x.std(), deviation, rtol=0.01)
  np.testing.assert_allclose(x.mean(), 0, atol=0.01 * deviation * 3)
  np.testing.assert_allclose((x > 0).mean(), 0.5, atol=0.01)


def test_constants():
  zero, one, two = draw((weights.zeros, (3,)), (weights.ones, (2, 2)),
                        (weights.constant(2.0), (4,)))
  assert not zero.any() and (one == 1).all() and (two == 2).all()


def test_no_number_is_used_twice():
  init = weights.symmetric(1.0)
  drawn = draw((init, (64,)), (init, (64,)), (init, (MANY,)), (init, (MANY,)),
               (init, (32,)), stacked=[(), (), (), (), (2,)])
  assert drawn[4].shape == (2, 32)
  rows = [np.asarray(x) for x in (*drawn[:4], *drawn[4])]
  for i, a in enumerate(rows):
    for b in rows[:i]:
      n = min(a.size, b.size)
      assert (a[:n] == b[:n]).mean() < 0.1


def test_same_key_same_values():
  shape = weights.normal(1.0), (100,)
  (a,), (b,), (c,) = draw(shape), draw(shape), draw(shape, seed=1)
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()
