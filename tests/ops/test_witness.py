"""The absorption witness: vectors of its specification, chunking, resets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax.ops import witness


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


VECTORS = [
    ([0], 'c09089686c89f7a4073dff6147a64f7f'),
    ([1, 2, 3], '7f039eef7742577a1688b6d10a27da3a'),
    ([3, 2, 1], '7fc190522748e69656472f8b0a6e2c01'),
    (list(range(256)), '93d5b445b8859cf75022bfb65827ade9'),
]
absorb = jax.jit(witness.absorb)


def zeros(rows):
  return jnp.zeros((rows, 4), jnp.uint32)


def tokens(seed, *shape):
  return np.random.default_rng(seed).integers(0, 2 ** 30, shape, np.int32)


def check(got, *rows):
  assert got.dtype == jnp.uint32
  assert [witness.text(w) for w in got] == [
      witness.host(list(row)) for row in rows]


@pytest.mark.parametrize('row, text', VECTORS, ids=['0', '123', '321', '256'])
def test_vectors(row, text):
  assert witness.host(row) == text
  batch = np.array([row], np.int32)
  got = absorb(zeros(1), batch, np.array([len(row)], np.int32))
  assert witness.text(got[0]) == text


@pytest.mark.parametrize('size', [1, 5, 16])
def test_chunks_and_padding(size):
  """Rows advance by their own counts; the padding holds anything."""
  rng = np.random.default_rng(size)
  want, state = [[], [], []], zeros(3)
  for _ in range(12):
    chunk = tokens(rng.integers(99), 3, size)
    count = rng.integers(0, size + 1, 3).astype(np.int32)
    for b, n in enumerate(count):
      want[b] += chunk[b, :n].tolist()
      chunk[b, n:] = rng.choice([-1, -2**31, 2**31 - 1, 0], size - n)
    new = absorb(state, chunk, count)
    for b in np.flatnonzero(count == 0):
      np.testing.assert_array_equal(new[b], state[b])
    state = new
  check(state, *want)


def test_host_continues():
  row = tokens(1, 9).tolist()
  half = np.frombuffer(bytes.fromhex(witness.host(row[:4])), '<u4')
  assert witness.host(row[4:], half) == witness.host(row)
  assert witness.host([], half) == witness.host(row[:4])


def test_largest_token():
  row = np.full((1, 3), 2 ** 30 - 1, np.int32)
  check(absorb(zeros(1), row, np.array([3], np.int32)), row[0])


def test_a_document_starts_afresh():
  chunk = tokens(2, 5, 7)
  old = absorb(zeros(5), tokens(3, 5, 7), np.full((5,), 7, np.int32))
  count = np.array([7, 7, 6, 4, 0], np.int32)
  start = np.array([0, 1, 5, 2, 0], np.int32)
  got = absorb(old, chunk, count, start)
  check(got[:4], [*tokens(3, 5, 7)[0], *chunk[0]], chunk[1, 1:],
        chunk[2, 5:6], chunk[3, 2:4])
  np.testing.assert_array_equal(got[4], old[4])
  np.testing.assert_array_equal(
      absorb(old, chunk, count, np.zeros_like(start)),
      absorb(old, chunk, count))


def test_order_and_content_matter():
  """Every swap, loss, doubling and change of one token is another witness."""
  row = tokens(4, 24)
  rows = [row.copy()]
  for i in range(24):
    for j in range(i + 1, 24):
      rows.append(row.copy())
      rows[-1][[i, j]] = row[[j, i]]
    rows.append(row.copy())
    rows[-1][i] ^= 1
  full = absorb(zeros(len(rows)), np.stack(rows),
                np.full((len(rows),), 24, np.int32))
  lost = np.stack([np.delete(row, i) for i in range(24)])
  lost = absorb(zeros(24), lost, np.full((24,), 23, np.int32))
  twice = np.stack([np.insert(row, i, row[i]) for i in range(24)])
  twice = absorb(zeros(24), twice, np.full((24,), 25, np.int32))
  every = [witness.text(w) for x in (full, lost, twice) for w in np.asarray(x)]
  assert len(set(every)) == len(every)
  # Each lane by itself tells them apart as well.
  for lane in np.asarray(full).T:
    assert len(set(lane.tolist())) == len(rows)
