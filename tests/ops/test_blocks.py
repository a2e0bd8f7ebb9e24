"""Blocks of a step against a list of tokens, one by one."""

import functools

import jax
import numpy as np
import pytest

from statejax.layers import common
from statejax.ops import blocks as bk

SLOTS, ENTRIES = 30, 12


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


@functools.partial(jax.jit, static_argnames=('size', 'steps'))
def run(length, n_valid, document, *, size, steps):
  c = common.context(length, n_valid, document, steps)
  b = bk.plan(c.length, c.n_valid, c.positions, c.document, c.start, c.base,
              size)
  column = bk.entry_of_column(b, SLOTS, ENTRIES)
  return b, dict(
      exists=b.exists, spans=b.spans, continues=b.continues,
      members=bk.members(b), opened=bk.open_members(b),
      new=bk.visible_new(b), old=bk.visible_old(b, ENTRIES), column=column,
      number=bk.block_of_column(b, SLOTS), own=bk.own_block(b, SLOTS),
      new_length=c.new_length,
      spread=bk.spread(jax.numpy.concatenate(
          [bk.visible_old(b, ENTRIES), bk.visible_new(b)], axis=2), column))


def tokens_of(length, n, document):
  """(document, position, column) of every token: the store's, the step's."""
  old = [(0, p, p) for p in range(length)]
  new, current, position = [], 0, length
  for t in range(n):
    if document is not None and t and document[t] != document[t - 1]:
      current, position = current + 1, 0
    new.append((current, position, SLOTS + t))
    position += 1
  return old, new


def check_row(got, b, length, n, document, size, steps):
  blocks, g = got
  old, new = tokens_of(length, n, document)
  held = {}
  for d, p, column in old + new:
    held.setdefault((d, p // size), []).append(column)
  full = [key for key, columns in held.items()
          if len(columns) == size and columns[-1] >= SLOTS]
  last = new[-1][0] if new else 0
  width = -(-steps // size)
  assert blocks.end.shape[1] == width and len(full) <= width

  # What there is, and where it goes in a store.
  assert g['exists'][b].tolist() == [w < len(full) for w in range(width)]
  assert blocks.count[b] == len(full)
  assert blocks.first[b] == sum(d < last for d, _ in full)
  assert blocks.slot[b] == (length // size if last == 0 else 0)
  index, mask = (x[b] for x in g['members'])
  for w in range(width):
    if w >= len(full):
      assert not mask[w].any() and blocks.end[b, w] == steps
      continue
    columns = held[full[w]]
    assert blocks.end[b, w] == columns[-1] - SLOTS
    assert blocks.block[b, w] == full[w][1]
    if document is not None:
      assert blocks.document[b, w] == full[w][0]
    inside = [c - SLOTS for c in columns if c >= SLOTS]
    assert index[w][mask[w]].tolist() == inside
    assert (w == 0 and g['spans'][b]) == (len(inside) < size)
  assert not (g['spans'][b] and not full)

  # What is left open.
  rest = g['new_length'][b] % size
  columns = held.get((last, g['new_length'][b] // size), [])
  assert blocks.phase[b] == rest == len(columns)
  index, mask = (x[b] for x in g['opened'])
  assert index[mask].tolist() == [c - SLOTS for c in columns if c >= SLOTS]
  assert g['continues'][b] == any(c < SLOTS for c in columns)

  # Which entry, which block.
  entry = [-1] * (SLOTS + steps)
  number = [-1] * (SLOTS + steps)
  for d, p, column in old + new:
    number[column] = p // size
    if (d, p // size) in full:
      entry[column] = ENTRIES + full.index((d, p // size))
    elif d == 0 and p // size < length // size:
      entry[column] = p // size
  assert g['column'][b].tolist() == entry
  assert g['number'][b].tolist() == number

  # Who sees what.
  for t in range(steps):
    if t >= n:
      assert not (g['new'][b, t].any() or g['old'][b, t].any()
                  or g['own'][b, t].any())
      continue
    d, p, column = new[t]
    want = [key[0] == d and held[key][-1] <= column for key in full]
    assert g['new'][b, t].tolist() == want + [False] * (width - len(full))
    done = length // size if d == 0 else 0
    assert g['old'][b, t].tolist() == [w < done for w in range(ENTRIES)]
    # Rule 3 of visibility: all complete entries of the query's document.
    assert done + sum(want) == (p + 1) // size
    own = held[(d, p // size)]
    assert np.flatnonzero(g['own'][b, t]).tolist() == own
    seen = [c for dd, pp, c in old + new
            if dd == d and pp // size < (p + 1) // size]
    # Entries stand for tokens; of the store only document 0's were visible.
    assert np.flatnonzero(g['spread'][b, t]).tolist() == seen


def check(length, n_valid, document, size, steps):
  got = run(length, n_valid, document, size=size, steps=steps)
  for x in jax.tree.leaves(got):
    assert x.dtype in (np.int32, bool) and not x.weak_type
  got = jax.tree.map(np.asarray, got)
  for b, n in enumerate(n_valid):
    check_row(got, b, int(length[b]), int(n),
              None if document is None else document[b], size, steps)


@pytest.mark.parametrize('size, steps', [
    (3, 1), (1, 7), (2, 7), (3, 7), (9, 7)])
def test_every_phase(size, steps):
  length, n_valid = (x.ravel().astype(np.int32) for x in np.meshgrid(
      np.arange(12), np.arange(steps + 1)))
  check(length, n_valid, None, size, steps)


@pytest.mark.parametrize('size, steps', [(3, 1), (1, 7), (2, 7), (3, 7),
                                         (9, 7)])
def test_documents(size, steps):
  rng = np.random.default_rng(size)
  rows = 64
  for density in (0.0, 0.2, 0.5, 1.0):
    border = rng.random((rows, steps)) < density
    check(rng.integers(0, 12, rows).astype(np.int32),
          rng.integers(0, steps + 1, rows).astype(np.int32),
          np.cumsum(border, axis=1).astype(np.int32), size, steps)


@pytest.mark.parametrize('size, steps', [(0, 3), (2, 0)])
def test_nothing_to_plan(size, steps):
  zero = np.zeros((2,), np.int32)
  with pytest.raises(ValueError, match=f'size={size}, T={steps}'):
    bk.plan(zero, zero, np.zeros((2, steps), np.int32), None, zero, zero, size)


def test_spread_over_heads():
  chosen = np.random.default_rng(0).random((2, 3, 4, 5)) < 0.5
  column = np.array([[0, -1, 4, 4], [3, 2, -1, 1]], np.int32)
  got = jax.jit(bk.spread)(chosen, column)
  for b, i in np.ndindex(2, 4):
    want = chosen[b, ..., column[b, i]] & (column[b, i] >= 0)
    np.testing.assert_array_equal(got[b, ..., i], want)
