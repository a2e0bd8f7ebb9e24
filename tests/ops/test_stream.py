"""Attention piece by piece against attention at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit

from pallas_kernels import KERNELS
from statejax.ops import attend, gather, stream


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


@pytest.mark.parametrize('slots', [7, 21])
@pytest.mark.parametrize('sink, beside', [
    (False, True), (True, True), (True, False), (False, False)])
def test_a_store_and_segments_are_one_softmax(slots, sink, beside, float64):
  (q, _), (k, _), v, _ = make(np.float64, slots)
  last = np.array([[-1, 2, slots - 1], [3, 3, 6]], np.int32)
  seen = np.arange(slots)[None, None] <= last[..., None]
  rng = np.random.default_rng(1)
  chunk = [attend.Segment(
      rng.standard_normal((2, 2, 3, 5)), rng.standard_normal((2, 2, 3, 3)),
      np.tril(np.ones((2, 3, 3), bool)))] if beside else []
  how = dict(scale=0.5, sink=np.arange(4.0) if sink else None)
  got = jit(lambda *x: stream.attend(
      q, attend.Segment(*x), chunk, last=last, **how))(k, v, seen)
  want = jit(lambda *x: attend.attend(
      q, [attend.Segment(*x), *chunk], **how))(k, v, seen)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, 1e-12, 1e-12)


@pytest.mark.parametrize('latent', [False, True])
def test_one_query_may_read_blocks(latent, monkeypatch):
  """On a TPU the kernel stands in for the mask; here, interpreted."""
  monkeypatch.setattr(stream, '_BLOCK', 8)
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  q, k = normal(2, 1, 4, 16), normal(2, 2, 40, 16)
  last = np.array([[20], [-1]], np.int32)
  seen = np.arange(40)[None, None] <= last[..., None]
  if latent:  # keys are values, and those of no channel are left out
    q, k = (q, normal(2, 1, 4, 0)), (k, normal(2, 2, 40, 0))
    v = k[0]
  else:
    v = normal(2, 2, 40, 8)
  run = lambda: jit(lambda: stream.attend(
      q, attend.Segment(k, v, seen), scale=0.5, last=last))()
  want = run()
  used = []

  def kernel(op, implementation, *_, **__):
    assert (op, implementation) == ('gather_attend', 'pallas_tpu')
    used.append(op)
    return functools.partial(KERNELS[op][implementation], interpret=True)

  monkeypatch.setattr(gather.dispatch, 'kernel', kernel)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  for a, b in zip(run(), want, strict=True):
    np.testing.assert_allclose(a, b, 2e-6, 2e-6)
  assert used
