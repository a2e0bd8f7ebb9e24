"""Appending to stores against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax.ops import store
from statejax.state import Store

LAYERS, ROWS, WIDTH = 3, 5, 2


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


@functools.partial(jax.jit, donate_argnames='data')
def append(data, layer, new, slot, first, count):
  return store.append(Store(data, layer), new, slot, first, count).data


def oracle(data, layer, new, slot, first, count):
  data = np.array(data)
  for b in range(data.shape[1]):
    for t in range(first[b], count[b]):
      at = slot[b] + t - first[b]
      if at < data.shape[-2]:
        data[layer, b, ..., at, :] = new[b, ..., t, :]
  return data


def make(rng, slots, steps, middle):
  data = rng.normal(size=(LAYERS, ROWS, *middle, slots, WIDTH))
  new = rng.normal(size=(ROWS, *middle, steps, WIDTH))
  slot = rng.integers(0, slots + 3, ROWS)
  count = rng.integers(0, steps + 1, ROWS)
  first = rng.integers(0, count + 1)
  return (data.astype(np.float32), np.int32(rng.integers(LAYERS)),
          new.astype(np.float32), *(x.astype(np.int32)
                                    for x in (slot, first, count)))


@pytest.mark.parametrize('middle', [(), (2,)])
@pytest.mark.parametrize('slots, steps', [(7, 3), (4, 4), (3, 7), (5, 1)])
def test_oracle(slots, steps, middle):
  rng = np.random.default_rng(slots)
  for _ in range(30):
    args = make(rng, slots, steps, middle)
    data = jnp.asarray(args[0])
    after = append(data, *args[1:])
    assert data.is_deleted()
    np.testing.assert_array_equal(after, oracle(*args))


@pytest.mark.parametrize('slots, steps', [(0, 3), (4, 0)])
def test_nothing_to_write(slots, steps):
  data, layer, new, *where = make(
      np.random.default_rng(0), slots, steps, ())
  np.testing.assert_array_equal(
      store.append(Store(jnp.asarray(data), layer), new, *where).data, data)


def test_overflow_is_dropped():
  data = np.zeros((1, 3, 4, 1), np.float32)
  new = np.arange(1, 10, dtype=np.float32).reshape(3, 3, 1)
  slot = np.array([2, 4, 2**31 - 8], np.int32)
  zero, count = np.zeros((3,), np.int32), np.full((3,), 3, np.int32)
  after = append(jnp.asarray(data), np.int32(0), new, slot, zero, count)
  np.testing.assert_array_equal(
      after[0, ..., 0], [[0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
def test_other_bits_stay(kind):
  """Also -0.0 and NaN, next to the new tokens."""
  bits = np.uint32 if kind == 'float32' else np.uint16
  raw = np.random.default_rng(1).integers(
      0, np.iinfo(bits).max, (2, 2, 6, 3), bits)
  if kind == 'bfloat16':  # See test_window.py on payloads.
    raw = np.where(raw & 0x7FFF > 0x7F80, bits(0xFFC0), raw)
  raw[:, :, ::2] = 0x7F800001 if kind == 'float32' else 0x7FC0
  raw[:, :, 1] = bits(1) << bits(raw.itemsize * 8 - 1)
  to = jax.jit(lambda x: jax.lax.bitcast_convert_type(x, jnp.dtype(kind)))
  back = jax.jit(lambda x: jax.lax.bitcast_convert_type(x, jnp.dtype(bits)))
  new = np.ones((2, 4, 3), np.float32)
  where = (np.array(x, np.int32) for x in ([2, 1], [1, 0], [3, 0]))
  after = append(to(raw), np.int32(1), new, *where)
  want = raw.copy()
  want[1, 0, 2:4] = back(jnp.ones((), kind))
  np.testing.assert_array_equal(back(after), want)


@pytest.mark.parametrize('middle', [(), (2,)])
def test_scan_over_layers(middle):
  rng = np.random.default_rng(2)
  data, _, _, *where = make(rng, 6, 4, middle)
  new = rng.normal(size=(LAYERS, ROWS, *middle, 4, WIDTH)).astype(np.float32)

  @functools.partial(jax.jit, donate_argnums=0)
  def run(data, new):
    def body(data, x):
      layer, new = x
      return store.append(Store(data, layer), new, *where).data, None
    order = jnp.arange(LAYERS, dtype=jnp.int32)
    return jax.lax.scan(body, data, (order, new))[0]

  want = data
  for i in range(LAYERS):
    want = oracle(want, i, new[i], *where)
  np.testing.assert_array_equal(run(jnp.asarray(data), new), want)


@jax.jit
def pullback(data, layer, new, slot, first, count, weight):
  f = lambda data, new: store.append(
      Store(data, layer), new, slot, first, count).data
  return jax.vjp(f, data, new)[1](weight)


@pytest.mark.parametrize('slots, steps', [(7, 3), (3, 7)])
@pytest.mark.parametrize('middle', [(), (2,)])
def test_gradient(slots, steps, middle):
  rng = np.random.default_rng(3)
  written = 0
  for _ in range(5):
    data, layer, new, *where = make(rng, slots, steps, middle)
    weight = rng.normal(size=data.shape).astype(np.float32)
    d_data, d_new = pullback(data, layer, new, *where, weight)
    # Numbering the new tokens tells which of them each slot holds.
    number = np.arange(1, ROWS * steps + 1).reshape(
        ROWS, *(1 for _ in middle), steps, 1)
    held = oracle(np.zeros(data.shape, int), layer,
                  np.broadcast_to(number, new.shape), *where)
    np.testing.assert_array_equal(d_data, np.where(held == 0, weight, 0))
    want = np.zeros_like(new)
    for b, t in np.ndindex(ROWS, steps):
      own = held[layer, b] == 1 + b * steps + t
      want[b, ..., t, :] = np.where(own, weight[layer, b], 0).sum(-2)
    np.testing.assert_array_equal(d_new, want)
    written += (held > 0).sum()
  assert written > 0


@pytest.mark.parametrize('slots, steps', [(50, 3), (40, 20)])
@pytest.mark.parametrize('middle', [(), (2,)])
def test_all_ways_of_writing_agree(slots, steps, middle):
  rng = np.random.default_rng(4)
  paths = [jax.jit(f) for f in (store._row_by_row, store._at_once,
                                store._tile_by_tile)]
  for _ in range(10):
    args = make(rng, slots, steps, middle)
    want = oracle(*args)
    for write in paths:
      np.testing.assert_array_equal(write(*args), want)
