"""Attention merged from parts against one softmax over all keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit

from statejax.ops.attend import Segment, attend
from statejax.ops.merge import merge

MASKED = -1e30
EPS = float(np.finfo(np.float32).eps)
B, T, H, K, V, N = 2, 5, 4, 6, 3, 9


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


def make(dtype=np.float32):
  """Query 1 of row 0 sees nothing; others nothing of some parts."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(dtype)
  visible = rng.random((B, T, N)) < 0.5
  visible[0, 1] = False
  visible[0, 2] = visible[1, 0] = np.arange(N) < 2
  visible[1, 3] = np.arange(N) == 8
  return (normal(B, T, H, K), normal(B, 2, N, K), normal(B, 2, N, V),
          2 * normal(H)), visible


def joint(arrays, visible, with_sink):
  q, k, v, sink = arrays
  return attend(q, [Segment(k, v, visible)], scale=0.5,
                sink=sink if with_sink else None)


def split(arrays, visible, cuts, with_sink):
  """One `attend` per part; the sink is in the second."""
  q, k, v, sink = arrays
  parts = []
  for i, (a, b) in enumerate(zip((0, *cuts), (*cuts, N))):
    segment = Segment(k[:, :, a:b], v[:, :, a:b], visible[:, :, a:b])
    parts.append(attend(q, [segment], scale=0.5,
                        sink=sink if with_sink and i == 1 else None))
  return merge(parts)


def loss(arrays, visible, how, *args):
  out, lse = how(arrays, visible, *args)
  weights = jnp.asarray(
      np.random.default_rng(1).normal(size=out.shape), out.dtype)
  return jnp.sum(out * weights) + jnp.sum(jnp.sin(lse)), (out, lse)


run = jit(merge)
both = jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(2, 3, 4))


def near(got, want, tolerance):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('cuts, with_sink', [
    ((2, 2, 8), False), ((2, 2, 8), True)])
def test_joint_softmax(float64, cuts, with_sink):
  """Values and gradients; one of the parts may be empty."""
  arrays, visible = make(np.float64)
  want = both(arrays, visible, joint, with_sink)
  got = both(arrays, visible, split, cuts, with_sink)
  near(got, want, 1e-13)
  out, lse = got[0][1]
  assert (out[0, 1] == 0).all()
  assert (lse[0, 1] == (arrays[3] if with_sink else MASKED)).all()


def test_float32():
  """Of lse far apart, against numpy in float64."""
  rng = np.random.default_rng(4)
  out = rng.normal(size=(3, B, T, H, V)).astype(np.float32)
  lse = (30 * rng.normal(size=(3, B, T, H))).astype(np.float32)
  weight = np.exp(np.float64(lse) - lse.max(0))
  want = ((weight[..., None] * out).sum(0) / weight.sum(0)[..., None],
          lse.max(0) + np.log(weight.sum(0)))
  got = run(list(zip(out, lse)))
  assert got[0].dtype == got[1].dtype == np.float32
  near(got, want, 20 * EPS)
  half, whole = run([(jnp.asarray(x, jnp.bfloat16), y)
                     for x, y in zip(out, lse)])
  assert half.dtype == jnp.bfloat16 and whole.dtype == np.float32
  near(half.astype(np.float32), want[0], 2 ** -6)


def test_one_part_is_itself():
  rng = np.random.default_rng(2)
  out = rng.normal(size=(B, T, H, V)).astype(np.float32)
  lse = rng.normal(size=(B, T, H)).astype(np.float32)
  for x, y in zip(run([(out, lse)]), (out, lse)):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('nothing', [MASKED, -np.inf])
def test_parts_that_see_nothing(nothing):
  """Add nothing, whatever they hold; finite gradients, zero to them."""
  rng = np.random.default_rng(3)
  out = rng.normal(size=(3, B, T, H, V)).astype(np.float32)
  lse = (100 * rng.normal(size=(3, B, T, H))).astype(np.float32)
  lse[0, 0] = lse[1, 0, 0] = lse[:, 1, 2] = nothing
  dead = lse == nothing
  out[dead] = 0
  arrays = [(out[i], lse[i]) for i in range(3)]

  @jit
  @jax.value_and_grad
  def total(arrays):
    out, lse = merge(arrays)
    return jnp.sum(jnp.cos(out)) + jnp.sum(jnp.sin(lse))

  value, grads = total(arrays)
  assert np.isfinite(value)
  for (d_out, d_lse), gone in zip(grads, dead):
    for x in (d_out, d_lse):
      assert np.isfinite(x).all() and (np.asarray(x)[gone] == 0).all()
  merged, whole = run(arrays)
  assert (merged[1, 2] == 0).all() and (whole[1, 2] == MASKED).all()
  alone = run([arrays[2]])
  for x, y in zip((merged, whole), alone):
    np.testing.assert_array_equal(x[0, 0], y[0, 0])
  # Nor does what a dead part holds show, were it NaN.
  loud = [(np.where(gone[..., None], np.float32(np.nan), o), x)
          for (o, x), gone in zip(arrays, dead)]
  np.testing.assert_array_equal(run(loud)[0], merged)


def test_nan_is_passed_on():
  out, lse = np.ones((1, 1, 2, 3), np.float32), np.zeros((1, 1, 2), np.float32)
  bad = np.float32([[[np.nan, 0]]])
  merged, whole = run([(out, lse), (out, bad)])
  assert np.isnan(merged[..., 0, :]).all() and np.isnan(whole[..., 0]).all()
  assert (merged[..., 1, :] == 1).all()


def test_bad_input():
  out, lse = np.zeros((B, T, H, V)), np.zeros((B, T, H))
  for parts in ([], [(out, lse[:, :2])], [(out, lse), (out[:1], lse[:1])]):
    with pytest.raises(ValueError, match='of one shape'):
      merge(parts)
