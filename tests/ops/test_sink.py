"""The first tokens of a document against a list per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax.layers import common
from statejax.ops import sink


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


ROWS = 4


@jax.jit
def step(kept, new, length, n_valid, document):
  context = common.context(length, n_valid, document, new.shape[2])
  return sink.write(kept, new, context.base, context.start,
                    context.n_valid), context.new_length


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('size, steps', [(1, 1), (5, 1), (5, 3), (3, 8)])
def test_stream(size, steps, packed):
  rng = np.random.default_rng(10 * size + steps)
  past = [[] for _ in range(ROWS)]
  kept = np.zeros((ROWS, 2, size, 2), np.float32)
  length = np.zeros((ROWS,), np.int32)
  for _ in range(12):
    n_valid = rng.integers(0, steps + 1, ROWS).astype(np.int32)
    new = rng.normal(size=(ROWS, 2, steps, 2)).astype(np.float32)
    document = np.cumsum(
        rng.random((ROWS, steps)) < 0.25, axis=1).astype(np.int32)
    kept, length = map(np.asarray, step(
        kept, new, length, n_valid, document if packed else None))
    for b, row in enumerate(past):
      for t in range(n_valid[b]):
        if packed and t and document[b, t] != document[b, t - 1]:
          row.clear()
        row.append(new[b, :, t])
      want = np.zeros_like(kept[b])
      for p, value in enumerate(row[:size]):
        want[:, p] = value
      assert length[b] == len(row)
      np.testing.assert_array_equal(kept[b], want)


def test_no_token_keeps_every_bit():
  kept = jnp.full((2, 1, 5, 3), -0.0).at[:, :, 1].set(jnp.nan)
  new = jnp.ones((2, 1, 4, 3))
  zero = jnp.zeros((2,), jnp.int32)
  write = jax.jit(sink.write)
  bits = lambda x: np.asarray(x).view(np.uint32)
  for base in (0, 3, 70):
    np.testing.assert_array_equal(
        bits(write(kept, new, zero + base, zero, zero)), bits(kept))
  # A document that begins anew leaves nothing of the last one.
  after = np.asarray(write(jnp.full_like(kept, jnp.nan), new, zero,
                           jnp.asarray([2, 0], jnp.int32), zero + 4))
  np.testing.assert_array_equal(
      after[:, 0, :, 0], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
