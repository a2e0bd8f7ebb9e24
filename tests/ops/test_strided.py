"""Overlapping entries against lists of tokens, one by one."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax.layers import common
from statejax.ops import attend, strided, window
from statejax.ops import blocks as bk


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


ROWS, SLOTS, EACH, COUNT = 4, 30, 2, 25


@functools.partial(jax.jit, static_argnames=('stride', 'size'))
def step(tokens, ring, old, new, length, n_valid, document, *, stride, size):
  c = common.context(length, n_valid, document, tokens.shape[2])
  plan = bk.plan(c.length, c.n_valid, c.positions, c.document, c.start, c.base,
                 stride)
  taken, exists = strided.windows(tokens, ring, plan, size)
  seen = strided.visible(plan, SLOTS, size)
  old, new = (jnp.where(s[:, None], p, 0) for s, p in zip(seen, (old, new)))
  weight = strided.importance(old, new, plan, size, EACH * stride, COUNT)
  ring = window.write(ring, tokens, c.base, c.start, c.n_valid)
  return ring, c.new_length, taken, exists, seen, plan, (old, new), weight


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('stride, size, steps', [
    (2, 6, 7), (2, 2, 1), (3, 6, 1), (1, 3, 5)])
def test_stream(stride, size, steps, packed):
  rng = np.random.default_rng(10 * size + steps)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  ring = np.zeros((ROWS, 2, size - 1, 3), np.float32)
  length, past = np.zeros((ROWS,), np.int32), [[] for _ in range(ROWS)]
  number = -(-steps // stride)
  for _ in range(8):
    n_valid = rng.integers(0, steps + 1, ROWS).astype(np.int32)
    tokens = normal(ROWS, 2, steps, 3)
    document = np.cumsum(
        rng.random((ROWS, steps)) < 0.1, axis=1).astype(np.int32)
    before, old_length = past, length
    ring, length, *rest = jax.tree.map(np.asarray, step(
        tokens, ring, np.abs(normal(ROWS, 2, steps, SLOTS)),
        np.abs(normal(ROWS, 2, steps, number)), length, n_valid,
        document if packed else None, stride=stride, size=size))
    past = []
    for b in range(ROWS):
      row = jax.tree.map(lambda a, b=b: a[b], rest)
      past.append(check(before[b], tokens[b], n_valid[b], document[b] * packed,
                        old_length[b], row, stride, size))
      assert length[b] == len(past[b])


def check(past, tokens, n_valid, document, length, row, stride, size):
  taken, exists, seen, plan, mass, weight = row
  each, at, done = size // stride, [], []
  for t in range(n_valid):  # documents begin anew
    if t and document[t] != document[t - 1]:
      past = []
    past = [*past, tokens[:, t]]
    at.append((document[t], len(past)))
    if len(past) % stride == 0:
      done.append((t, past, len(past) // stride - each))
  assert plan.count == len(done)
  for w in range(len(exists)):
    there = w < len(done) and done[w][2] >= 0
    assert exists[w] == there
    want = (np.stack(done[w][1][-size:], axis=1) if there
            else np.zeros_like(taken[:, w]))
    np.testing.assert_array_equal(taken[:, w], want)
  for t, (owner, count) in enumerate(at):
    entries = {}  # of the query's document: number -> probability
    for w in np.flatnonzero(seen[0][t]):
      assert owner == document[0]
      entries[w - (each - 1)] = mass[0][:, t, w]
    for w in np.flatnonzero(seen[1][t]):
      end, _, entry = done[w]
      assert document[end] == owner and entry not in entries
      entries[entry] = mass[1][:, t, w]
    # Those whose last token is the query or before it.
    assert sorted(entries) == [i for i in range(count)
                               if i * stride + size - 1 < count]
    for j in range(COUNT):
      want = sum(entries.get(j * EACH + m - u, np.zeros(2))
                 for m in range(EACH) for u in range(each))
      np.testing.assert_allclose(weight[:, t, j], want, rtol=1e-6, atol=1e-7)
  for t in range(n_valid, len(tokens[0])):
    assert not seen[0][t].any() and not seen[1][t].any()
  return past


def test_mass():
  """Against the softmax itself; a query that sees nothing gives 0."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, k, v = normal(2, 3, 4, 5), normal(2, 2, 7, 5), normal(2, 2, 7, 6)
  seen = rng.random((2, 3, 7)) < 0.6
  seen[0, 1] = False

  @jax.jit
  def run(q, k):
    _, lse = attend.attend(q, [attend.Segment(k, jnp.asarray(v), seen)],
                           scale=0.4)
    return strided.mass(q, k, jnp.asarray(seen), lse, scale=0.4)

  got, want = run(q, k), np.zeros((2, 2, 3, 7))
  for b, t, h in np.ndindex(2, 3, 4):
    p = np.where(seen[b, t], np.exp(0.4 * k[b, h // 2] @ q[b, t, h]), 0)
    want[b, h // 2, t] += p / max(p.sum(), 1e-30)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  assert (got[0, :, 1] == 0).all()
  for gradient in jax.grad(lambda *a: jnp.sum(run(*a) ** 2), (0, 1))(q, k):
    assert (gradient == 0).all()


def test_bad_length():
  plan = types.SimpleNamespace(size=2)
  for size in (0, 1, 5):
    with pytest.raises(ValueError, match='multiple of the stride 2'):
      strided.windows(None, None, plan, size)
