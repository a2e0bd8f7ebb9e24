"""Candidate blocks against a list of tokens, one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax.layers import common
from statejax.ops import blocks as bk
from statejax.ops import candidates

N, T, SIZE, EMPTY = 22, 9, 4, -1e30
E = candidates.count(N, SIZE)


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


@functools.partial(jax.jit, static_argnames='local')
def run(length, n_valid, document, scores, chosen, local):
  c = common.context(length, n_valid, document, T)
  plan = bk.plan(c.length, c.n_valid, c.positions, c.document, c.start, c.base,
                 SIZE)
  slots = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (2, N))
  seen = jnp.concatenate([c.visible_past(slots), c.visible_chunk()], axis=-1)
  masked = lambda e: jnp.where(seen[:, None], scores, e)
  return dict(
      seen=seen, visible=candidates.visible(plan, E), end=plan.end,
      newest=candidates.newest(plan, E, local),
      max=candidates.reduce(masked(EMPTY), plan, N, 'max', EMPTY),
      sum=candidates.reduce(masked(0.0), plan, N, 'sum', 0.0),
      tokens=candidates.tokens_of(
          chosen & candidates.visible(plan, E)[:, None], plan, N)
      & seen[:, None])


def tokens_of(length, n, document):
  """(document, position) of every column, None where there is no token."""
  columns = [(0, p) if p < length else None for p in range(N)]
  current, position = 0, length
  for t in range(T):
    if document is not None and t and document[t] != document[t - 1]:
      current, position = current + 1, 0
    columns.append((current, position) if t < n else None)
    position += 1
  return columns


@pytest.mark.parametrize('local', [1, 2])
@pytest.mark.parametrize('borders', [False, True])
@pytest.mark.parametrize('length, n_valid', [
    ((0, 3), (9, 8)), ((4, 7), (9, 1)), ((22, 13), (0, 9)), ((10, 1), (5, 9))])
def test_one_by_one(length, n_valid, borders, local):
  rng = np.random.default_rng(sum(length))
  document = None
  if borders:
    document = np.cumsum(rng.random((2, T)) < 0.25, axis=1, dtype=np.int32)
    document -= document[:, :1]
  scores = rng.normal(size=(2, 3, T, N + T)).astype(np.float32)
  columns = E + -(-T // SIZE) + 1
  chosen = rng.random((2, 3, T, columns)) < 0.5
  got = run(np.int32(length), np.int32(n_valid), document, scores, chosen,
            local)
  got = jax.tree.map(np.asarray, got)
  chosen = chosen & got['visible'][:, None]
  for b in range(2):
    where = tokens_of(length[b], n_valid[b],
                      None if document is None else document[b])
    for t in range(n_valid[b]):
      mine, at = where[N + t]
      seen = {}  # number of a block to its columns that the query sees
      for column, token in enumerate(where):
        if token is not None and token[0] == mine and token[1] <= at:
          seen.setdefault(token[1] // SIZE, []).append(column)
      assert sorted(sum(seen.values(), [])) == list(
          np.flatnonzero(got['seen'][b, t]))
      place = {}
      for number, held in seen.items():
        if len(held) < SIZE:
          place[number] = columns - 1
        elif held[-1] < N:
          place[number] = number
        else:
          place[number] = E + int(np.flatnonzero(
              got['end'][b] == held[-1] - N)[0])
      assert sorted(place.values()) == list(
          np.flatnonzero(got['visible'][b, t]))
      assert {place[n] for n in seen if n > at // SIZE - local} == set(
          np.flatnonzero(got['newest'][b, t]))
      for number, held in seen.items():
        parts = scores[b, :, t, held]
        j = place[number]
        np.testing.assert_array_equal(got['max'][b, :, t, j], parts.max(0))
        np.testing.assert_allclose(got['sum'][b, :, t, j], parts.sum(0),
                                   rtol=1e-5, atol=1e-6)
      for how, empty in (('max', EMPTY), ('sum', 0.0)):
        rest = np.delete(got[how][b, :, t], sorted(place.values()), axis=-1)
        assert (rest == np.float32(empty)).all(), how
      for s in range(3):
        taken = [c for n, held in seen.items()
                 if chosen[b, s, t, place[n]] for c in held]
        assert sorted(taken) == list(np.flatnonzero(got['tokens'][b, s, t]
                                                    & got['seen'][b, t])
                                     ), (b, s, t)
