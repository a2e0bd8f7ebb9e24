"""Batches of which one half has labels."""

import numpy as np
import pytest

from experiments import labels


class Numbers:
  """Items that say where they come from."""

  def __init__(self, size, sign):
    self._size, self._sign = size, sign

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    if index >= self._size:
      raise IndexError(index)
    return {'x': np.int32(self._sign * (index + 1))}


def test_halves():
  """Each fresh item once and in order, those of the pool again and again."""
  found = list(labels.batches(Numbers(12, 1), Numbers(3, -1), 4, seed=0))
  assert len(found) == 6
  x = np.stack([b['x'] for b in found])
  assert x[:, :2].reshape(-1).tolist() == list(range(1, 13))
  assert set(x[:, 2:].reshape(-1).tolist()) == {-1, -2, -3}
  for b in found:
    assert b['known'].tolist() == [False, False, True, True]


def test_without_labels_no_item_comes_twice():
  fresh, pool = labels.sources(
      lambda which, size: Numbers(size, (1, -1)[which]), 3, 4, 0.)
  found = list(labels.batches(fresh, pool, 4, seed=0))
  x = np.concatenate([b['x'] for b in found])
  assert x.tolist() == list(range(1, 13))
  assert not any(b['known'].any() for b in found)


@pytest.mark.parametrize('share', [0.1, 0.5])
def test_sources(share):
  fresh, pool = labels.sources(
      lambda which, size: Numbers(size, (1, -1)[which]), 1000, 16, share)
  assert len(fresh) == 8000
  assert len(pool) / 8000 == pytest.approx(share / (1 - share), abs=1e-3)
  assert fresh[0]['x'] == 1 and pool[0]['x'] == -1
