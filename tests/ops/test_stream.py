"""Attention piece by piece against attention at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit

from statejax.ops import attend, stream


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(stream, '_SIZE', 8)
  with jax.numpy_dtype_promotion('strict'):
    yield


def make(dtype, slots=21, sets=None):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
  q = normal(2, 3, 4, 5), normal(2, 3, 4, 2)
  k = normal(2, 2, slots, 5), normal(2, 1, slots, 2)
  shape = (2, 3, slots) if sets is None else (2, sets, 3, slots)
  visible = rng.random(shape) < 0.5
  visible[0] = False  # nothing
  visible[1, ..., 0, :8] = False  # nothing in the first piece
  visible[1, ..., 1, 8:] = False  # nothing after it
  return q, k, normal(2, 2, slots, 3), visible


def run(form, q, k, v, visible):
  segment = attend.Segment(k, v, visible)
  if form == 'stream':
    return stream.attend(q, segment, scale=0.5)
  return attend.attend(q, [segment], scale=0.5)


@pytest.mark.parametrize('slots, sets', [(21, None), (24, 2), (16, None)])
def test_values(slots, sets, float64):
  args = make(np.float64, slots, sets)
  got, want = (jit(functools.partial(run, form))(*args)
               for form in ('stream', 'at once'))
  for a, b in zip(got, want, strict=True):
    assert a.dtype == np.float64
    np.testing.assert_allclose(a, b, 1e-13, 1e-13)


def test_bfloat16_is_rounded_once():
  args = make(jnp.bfloat16)
  got, lse = jit(functools.partial(run, 'stream'))(*args)
  want, _ = jit(functools.partial(run, 'at once'))(*args)
  assert got.dtype == jnp.bfloat16 and lse.dtype == np.float32
  np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32),
                             2e-2, 2e-2)


def test_gradients():
  q, k, v, visible = make(np.float32)

  def loss(floats, form):
    out, lse = run(form, *floats, visible)
    return jnp.sum(out ** 2) + jnp.sum(jnp.sin(lse))

  got, want = (jit(jax.grad(functools.partial(loss, form=form)))((q, k, v))
               for form in ('stream', 'at once'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5),
               got, want)
