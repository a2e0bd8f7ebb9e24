"""Queries and keys in parts whose scores add, against their concatenation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit
from jax.test_util import check_grads

from statejax.ops.attend import Segment, attend

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


run = jit(functools.partial(attend, scale=0.4))


def make(sizes=(3, 0, 4), dtype=np.float32, length=4):
  """Per size one segment of keys 5 + 3 wide; the first part has a key for each
  of two groups, the second one for all four heads."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  q = normal(2, length, 4, 5), normal(2, length, 4, 3)
  segments = []
  for n in sizes:
    visible = jnp.asarray(rng.random((2, length, n)) < 0.6)
    segments.append(Segment((normal(2, 2, n, 5), normal(2, 1, n, 3)),
                            normal(2, 4, n, 6), visible))
  return q, segments, normal(4)


def joined(segment):
  """The same keys side by side, one group for each head."""
  k = [jnp.repeat(a, 4 // a.shape[1], axis=1) for a in segment.k]
  return Segment(jnp.concatenate(k, -1), segment.v, segment.visible)


def close(got, want, tolerance):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_parts_add():
  q, segments, sink = make()
  got = run(q, segments, sink=sink)
  want = run(jnp.concatenate(q, -1), [joined(s) for s in segments], sink=sink)
  close(got, want, 20 * EPS)
  assert got[0].shape == (2, 4, 4, 6) and got[1].shape == (2, 4, 4)


def test_one_part_is_a_plain_array():
  q, segments, sink = make()
  plain = [Segment(s.k[0], s.v[:, ::2], s.visible) for s in segments]
  tuples = [Segment((s.k,), s.v, s.visible) for s in plain]
  for x, y in zip(run(q[0], plain, sink=sink), run(q[:1], tuples, sink=sink)):
    np.testing.assert_array_equal(x, y)


def test_leaving_out_later_keys():
  q, (chunk,), _ = make((293,), length=293)
  visible = jnp.tril(jnp.ones((2, 293, 293), bool))
  close(run(q, [Segment(chunk.k, chunk.v, visible, causal=True)]),
        run(q, [Segment(chunk.k, chunk.v, visible)]), 20 * EPS)


def test_gradient(float64):
  q, segments, sink = make((3, 2), np.float64)

  def f(q, keys, values, sink):
    parts = [Segment(k, v, s.visible)
             for k, v, s in zip(keys, values, segments)]
    return attend(q, parts, scale=0.4, sink=sink)

  check_grads(jax.jit(f), (q, [s.k for s in segments],
                           [s.v for s in segments], sink),
              order=1, modes=['rev'], atol=1e-7, rtol=1e-7)


def test_as_many_parts_as_the_query():
  q, segments, _ = make((3,))
  with pytest.raises(ValueError, match=r'in 2 parts.*got \[1\]'):
    attend(q, [Segment(segments[0].k[:1], segments[0].v, segments[0].visible)],
           scale=0.4)
