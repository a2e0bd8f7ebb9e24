"""`common.context` against tokens counted one by one."""

import functools

import jax
import numpy as np
import pytest

from statejax.layers import common


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


context = functools.partial(jax.jit, static_argnames='steps')(common.context)


def count(length, n_valid, document):
  """Documents and positions of the real tokens of one row, start, base."""
  owners, positions, start, base = [], [], 0, length
  current, position = 0, length
  for t in range(n_valid):
    if document is not None and t and document[t] != document[t - 1]:
      current, position, start, base = current + 1, 0, t, 0
    owners.append(current)
    positions.append(position)
    position += 1
  return owners, positions, start, base, position


def check(length, n_valid, document, steps):
  c = context(length, n_valid, document, steps=steps)
  assert (c.document is None) == (document is None)
  for x in jax.tree.leaves(c) + [c.new_length]:
    assert x.dtype == np.int32 and not x.weak_type
  valid = np.asarray(c.valid)
  np.testing.assert_array_equal(
      np.arange(6) <= np.asarray(c.last)[..., None], c.visible_store(6))
  c = jax.tree.map(np.asarray, c)
  for b, n in enumerate(n_valid):
    owners, positions, start, base, after = count(
        int(length[b]), n, None if document is None else document[b])
    assert c.positions[b, :n].tolist() == positions
    assert (c.start[b], c.base[b]) == (start, base)
    assert c.new_length[b] == after
    assert valid[b].tolist() == [t < n for t in range(steps)]
    if document is not None:
      assert c.document[b, :n].tolist() == owners
  return c


@pytest.mark.parametrize('steps', [1, 2, 7])
@pytest.mark.parametrize('packed', [False, True])
def test_random(packed, steps):
  rng = np.random.default_rng(steps)
  for density in (0.0, 0.3, 0.6, 1.0):
    for _ in range(6):
      length = rng.integers(0, 5, 5).astype(np.int32)
      n_valid = rng.integers(0, steps + 1, 5).astype(np.int32)
      # Identifiers need not grow: only a change counts.
      change = rng.random((5, steps)) < density
      document = (np.cumsum(change * rng.integers(1, 3, (5, steps)), axis=1)
                  % 3 + 4).astype(np.int32)
      check(length, n_valid, document if packed else None, steps)


def test_by_hand():
  length = np.array([5, 5, 5, 0], np.int32)
  n_valid = np.array([6, 3, 0, 6], np.int32)
  document = np.array([[7, 7, 2, 2, 2, 9], [1, 1, 1, 4, 5, 6],
                       [1, 2, 3, 4, 5, 6], [3, 3, 3, 3, 3, 3]], np.int32)
  c = check(length, n_valid, document, 6)
  assert c.positions[0].tolist() == [5, 6, 0, 1, 2, 0]
  assert c.document[0].tolist() == [0, 0, 1, 1, 1, 2]
  # Borders in the padding of row 1 do not count, nor do those of row 2.
  assert c.start.tolist() == [5, 0, 0, 0]
  assert c.base.tolist() == [0, 5, 5, 0]
  assert c.new_length.tolist() == [1, 8, 5, 6]


def test_one_document_is_none():
  """Documents without a border give what no documents give."""
  length, n_valid = np.array([3, 0], np.int32), np.array([2, 4], np.int32)
  with_one = check(length, n_valid, np.zeros((2, 4), np.int32), 4)
  without = check(length, n_valid, None, 4)
  for name in ('positions', 'start', 'base', 'new_length'):
    np.testing.assert_array_equal(
        getattr(with_one, name), getattr(without, name))
  seen = jax.jit(common.Context.visible_chunk)
  np.testing.assert_array_equal(seen(with_one, 3), seen(without, 3))
