"""The ring of a window against a deque per row."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax.layers import common
from statejax.ops import window


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


ROWS, WIDTH = 4, 2


@jax.jit
def step(ring, new, length, n_valid, document):
  context = common.context(length, n_valid, document, new.shape[2])
  held = window.positions(length, ring.shape[2])
  ring = window.write(ring, new, context.base, context.start, context.n_valid)
  return ring, context.new_length, context.visible_past(held, ring.shape[2])


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('steps', [1, 3, 8])
@pytest.mark.parametrize('size', [1, 2, 5, 8])
def test_stream(size, steps, packed):
  rng = np.random.default_rng(100 * size + steps)
  past = [collections.deque(maxlen=size) for _ in range(ROWS)]
  ring = np.zeros((ROWS, 2, size, WIDTH), np.float32)
  length = np.zeros((ROWS,), np.int32)
  for _ in range(20):
    n_valid = rng.integers(0, steps + 1, ROWS).astype(np.int32)
    new = rng.normal(size=(ROWS, 2, steps, WIDTH)).astype(np.float32)
    document = np.cumsum(
        rng.random((ROWS, steps)) < 0.25, axis=1).astype(np.int32)
    before = ring[:, 0, :, 0]
    ring, length, visible = map(np.asarray, step(
        ring, new, length, n_valid, document if packed else None))
    for b, row in enumerate(past):
      position = row[-1][0] + 1 if row else 0
      old, border = list(row), False
      for t in range(n_valid[b]):
        if packed and t and document[b, t] != document[b, t - 1]:
          row.clear()
          position, border = 0, True
        # Queries see of the old ring what is near, nothing of it past a border.
        seen = [x[0, 0] for p, x in old if p > position - size and not border]
        assert sorted(before[b, visible[b, t]]) == sorted(seen)
        row.append((position, new[b, :, t]))
        position += 1
    check(ring, length, past)


def check(ring, length, past):
  size = ring.shape[2]
  held = np.asarray(window.positions(length, size))
  for b, row in enumerate(past):
    assert length[b] == (row[-1][0] + 1 if row else 0)
    assert sorted(held[b][held[b] >= 0]) == [p for p, _ in row]
    want = np.zeros_like(ring[b])
    for p, value in row:
      assert held[b, p % size] == p
      want[:, p % size] = value
    np.testing.assert_array_equal(ring[b], want)


@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
def test_no_token_keeps_every_bit(kind):
  bits = np.uint32 if kind == 'float32' else np.uint16
  rng = np.random.default_rng(0)
  raw = rng.integers(0, np.iinfo(bits).max, (3, 2, 5, 4), bits)
  high = bits(1) << bits(raw.itemsize * 8 - 1)
  raw[:, 0, 1] = high  # -0.0
  # Signalling NaNs with a payload; XLA on CPU before jax 0.12 selects bfloat16
  # by way of float32, which leaves of a NaN its sign.
  raw[:, 0, 2:4] = 0x7F800001 if kind == 'float32' else 0x7FC0
  if kind == 'bfloat16':
    raw = np.where(raw & 0x7FFF > 0x7F80, bits(0xFFC0), raw)
  to = jax.jit(lambda x: jax.lax.bitcast_convert_type(x, jnp.dtype(kind)))
  back = jax.jit(lambda x: jax.lax.bitcast_convert_type(x, jnp.dtype(bits)))
  zero = jnp.zeros((3,), jnp.int32)
  new = jnp.full((3, 2, 3, 4), 1e9, jnp.float32)
  write = jax.jit(window.write)
  for base in (0, 3, 70):
    after = write(to(raw), new, zero + base, zero, zero)
    np.testing.assert_array_equal(back(after), raw)
  # Two tokens at positions 6, 7 leave the three other slots alone.
  after = back(write(to(raw), new, zero + 6, zero, zero + 2))
  np.testing.assert_array_equal(after[:, :, [0, 3, 4]], raw[:, :, [0, 3, 4]])


def test_a_new_document_removes_garbage():
  ring = jnp.full((2, 1, 5, 3), jnp.nan)
  new = jnp.ones((2, 1, 4, 3))
  first = jnp.asarray([2, 0], jnp.int32)
  count = jnp.asarray([4, 3], jnp.int32)
  base = jnp.zeros((2,), jnp.int32)
  after = np.asarray(jax.jit(window.write)(ring, new, base, first, count))
  np.testing.assert_array_equal(
      after[:, 0, :, 0], [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
