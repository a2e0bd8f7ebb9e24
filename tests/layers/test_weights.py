"""Parameters are drawn as said, each from numbers of its own."""

from statistics import NormalDist

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


@pytest.mark.parametrize('init, distribution', [
    (weights.normal(0.5), lambda u: NormalDist(0, 0.5).inv_cdf(u)),
    # Within two of its own deviations, scaled to one of 0.5.
    (weights.truncated_normal(0.5), lambda u: NormalDist(
        0, 0.5 / 0.8796256610).inv_cdf(
            NormalDist().cdf(-2) + u * (1 - 2 * NormalDist().cdf(-2)))),
    (weights.symmetric(0.6), lambda u: 1.2 * u - 0.6),
], ids=('normal', 'truncated', 'symmetric'))
def test_quantiles(init, distribution):
  u = np.array([1, 3, 999, 2**22 + 1, 2**23 - 1, 2**24 - 1]) * 2.0 ** -24
  want = [distribution(x) for x in u]
  # XLA's erf_inv in float32 is good to 4e-6.
  np.testing.assert_allclose(
      init(jnp.asarray(u, jnp.float32)), want, rtol=5e-6, atol=1e-8)


@pytest.mark.parametrize('size', (1 << 17, MANY))
def test_numbers_are_uniform(size):
  (u,) = draw((lambda u: u, (size,)))
  odd = np.asarray(u, np.float64) * 2.0 ** 24
  assert (odd % 2 == 1).all() and odd.min() > 0 and odd.max() < 2**24
  # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed once in a thousand keys.
  expected = (np.arange(size) + 0.5) / size
  off = np.abs(np.sort(odd * 2.0 ** -24) - expected).max()
  assert off < 1.95 / size ** 0.5


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
