"""Scores of the indexer's kernel, interpreted, and what they choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KERNELS, index_scores_tpu
from statejax.ops import index, select

jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})
KERNEL = functools.partial(KERNELS['index_topk']['pallas_tpu'], interpret=True)


def make(length=1, heads=8, slots=300, width=16, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return (normal(2, length, heads, width).astype(dtype),
          normal(2, length, heads), normal(2, slots, width).astype(dtype))


@pytest.mark.parametrize('shape, relu, tolerance', [
    (dict(), True, 1e-6),
    (dict(length=3, slots=130), False, 1e-6),  # fewer queries than rows of one
    (dict(length=70, heads=16, slots=40), True, 1e-6),  # three blocks of them
    (dict(heads=3, length=9), True, 1e-6),
    (dict(dtype=jnp.bfloat16), True, 1e-6),
], ids=str)
def test_scores(shape, relu, tolerance):
  args = make(**shape)
  got = jit(functools.partial(KERNEL, relu=relu))(*args)
  want = jit(functools.partial(index.scores, relu=relu))(*args)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, tolerance, 4 * tolerance)


def test_without_weights():
  q, _, k = make()
  np.testing.assert_allclose(
      jit(KERNEL)(q, None, k), jit(index.scores)(q, None, k), 1e-6, 4e-6)


def test_tiles_past_the_count_are_not_read(monkeypatch):
  monkeypatch.setattr(index_scores_tpu, '_TILE', 128)
  q, w, k = make()
  want = jit(index.scores)(q, w, k)
  k[0, 128:] = np.nan
  k[1] = np.nan
  got = np.asarray(jit(KERNEL)(q, w, k, np.array([100, 0], np.int32)))
  np.testing.assert_allclose(got[0, :, :100], want[0, :, :100], 1e-6, 4e-6)
  assert not got[0, :, 128:].any() and not got[1].any()


@pytest.mark.parametrize('zero', [False, True])
def test_ties_are_chosen_alike(zero):
  q, w, k = make(length=3)
  # Small whole numbers: every sum is exact, in any order, and many are equal.
  q, k = np.round(q), np.round(k[:, :, :])
  w = np.round(2 * w) * 8 ** 0.5
  if zero:
    q, k = -np.abs(q), np.abs(k)
  visible = np.random.default_rng(1).random((2, 3, 300)) < 0.5
  visible[0, 0, 4:] = False

  def ids(scores):
    top = select.top(scores, visible, 40)
    staged = select.top_two_stage(scores, visible, 40, 4)
    return top, staged, select.top_mask(scores, visible, 40)

  of = lambda f: jit(lambda *x: ids(jnp.round(f(*x) * 4096) / 4096))(q, w, k)
  got, want = of(KERNEL), of(index.scores)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(got[0], got[1])
  np.testing.assert_array_equal(
      got[2], jit(lambda x: select.to_mask(x, 300))(got[0]))
  if zero:
    np.testing.assert_array_equal(
        got[0][1, 0], np.flatnonzero(visible[1, 0])[:40])


def test_gradient():
  args = make(length=2, slots=40)
  loss = lambda args, form: jnp.sum(jnp.sin(form(*args)))
  got, want = (jit(jax.grad(functools.partial(loss, form=f)))(args)
               for f in (KERNEL, index.scores))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5),
               got, want)


def test_it_declines():
  q, w, k = make()
  with pytest.raises(ValueError, match='no work'):
    index_scores_tpu.index_scores(q, w, k[:, :0])
