"""Attention to chosen blocks and rows, interpreted, against the equation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    KERNELS,
    gather_attend_tpu,
    gather_rows_tpu,
    plain_gather,
)
from statejax.ops import attend, gather, stream

SCALE = 0.3
jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})
KERNEL = KERNELS['gather_attend']['pallas_tpu']


def make(batch=2, length=2, heads=4, groups=2, keys=(16,), value=8, slots=44,
         block=8, count=3, sets=None, sink=True, dtype=np.float32):
  """Random arguments; a query without a block, one that sees no slot."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
  blocks, sets = -(-slots // block), sets or groups
  ids = np.stack([rng.permutation(blocks)[:count]
                  for _ in range(batch * length * sets)])
  ids = ids.reshape(batch, length, sets, count).astype(np.int32)
  ids[0, 0, :1] = -1
  ids[-1, -1, :, ::2] = -1
  last = rng.integers(slots // 2, slots, (batch, length)).astype(np.int32)
  last[0, -1] = -1
  store = batch, groups, slots
  return (tuple(normal(batch, length, heads, x) for x in keys),
          tuple(normal(*store, x) for x in keys),
          None if value is None else normal(*store, value), ids, last,
          normal(heads).astype(np.float32) if sink else None)


def forms(block):
  """The kernel, its plain form, and both of the op."""
  call = lambda f, **more: lambda q, k, v, ids, last, sink: f(
      q, k, v, ids, last, block=block, scale=SCALE, sink=sink, **more)
  return (call(KERNEL, interpret=True), call(plain_gather.gather_attend),
          call(gather.gather_attend, implementation='xla'),
          call(gather.gather_attend, implementation='reference'))


def error(got, want):
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  assert got.shape == want.shape and np.isfinite(got).all()
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def check(args, block, tolerance=2e-6, others=False):
  kernel, *rest = forms(block)
  got = jit(kernel)(*args)
  for form in rest if others else rest[:1]:
    for a, b in zip(got, jit(form)(*args), strict=True):
      assert a.dtype == b.dtype
      # A query that sees nothing has an lse of -1e30, which is exact.
      nothing = np.asarray(b, np.float32) == np.float32(-1e30)
      np.testing.assert_array_equal(a == np.float32(-1e30), nothing)
      assert error(np.where(nothing, 0, a), np.where(nothing, 0, b)) < tolerance
  return got


@pytest.mark.parametrize('shape', [
    # 44 slots are no whole number of blocks: the interpreter pads with NaN.
    dict(heads=6, groups=1, keys=(128,), value=128),
    dict(keys=(128, 8), value=None, slots=200),  # both, latents are values
    dict(keys=(8,), value=128, block=64, slots=150, count=2),
    dict(keys=(8,), value=8, block=128, slots=300, count=2),
    dict(heads=8, sets=4),  # heads of a group choose for themselves
], ids=str)
def test_blocks(shape):
  check(make(**shape), shape.get('block', 8))


def test_every_route_is_the_same():
  out, lse = check(make(), 8, others=True)
  # Nothing named, by one group; and by nobody, as nothing may be seen.
  assert not np.asarray(out)[0, 0, :2].any() and np.asarray(out)[0, 0, 2:].any()
  assert not np.asarray(out)[0, -1].any()
  assert np.isfinite(lse).all()


def test_a_sink_of_minus_infinity_is_none():
  *args, sink = make()
  none = check((*args, None), 8)
  gone = check((*args, np.full_like(sink, -np.inf)), 8)
  assert (np.asarray(none[1])[0, -1] == np.float32(-1e30)).all()
  for a, b in zip(none, gone, strict=True):
    np.testing.assert_array_equal(a, b)


def test_bfloat16():
  check(make(dtype=jnp.bfloat16), 8, 2e-2)


def test_all_blocks_are_dense_attention(monkeypatch):
  monkeypatch.setattr(stream, '_BLOCK', 16)
  q, k, v, _, last, _ = make(length=1)
  last[:, 0] = 20, -1
  ids = np.asarray(stream.blocks(last, 2, 44))
  assert ids[0, 0].tolist() == [[0, 1, -1]] * 2 and (ids[1] == -1).all()
  seen = np.arange(44)[None, None] <= last[..., None]
  got = jit(forms(16)[0])(q, k, v, ids, last, None)
  want = jit(lambda q, k, v: attend.attend(
      q, [attend.Segment(k, v, seen)], scale=SCALE))(q, k, v)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, 2e-6, 2e-6)


def gradients(args, block):
  q, k, v, ids, last, sink = args

  def loss(floats, form):
    q, k, v, sink = floats
    out, lse = form(q, k, v, ids, last, sink)
    return jnp.sum(out ** 2) + jnp.sum(jnp.sin(lse))

  got, want = (jit(jax.grad(functools.partial(loss, form=f)))((q, k, v, sink))
               for f in forms(block)[:3:2])
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert error(a, b) < 1e-5


def test_gradients_of_blocks():
  gradients(make(), 8)


def test_queries_in_pieces(monkeypatch):
  # Two queries of two rows and groups, with three ids each.
  monkeypatch.setattr(gather_attend_tpu, 'MOST_IDS', 2 * 2 * 2 * 3)
  check(make(length=3), 8)


# Rows of latents.


def rows(**shape):
  return make(groups=1, value=None, block=1, **dict(
      dict(keys=(128, 16), slots=256, count=70), **shape))


@pytest.mark.parametrize('shape', [
    dict(),  # two grid steps, the last one padded
    dict(keys=(128, 128), slots=72, count=9, sink=False),
    dict(keys=(256, 16), slots=128, count=65, dtype=jnp.bfloat16),
    dict(keys=(128,), slots=72, count=9),  # latents alone
], ids=str)
def test_rows(shape):
  check(rows(**shape), 1, 2e-2 if 'dtype' in shape else 2e-6,
        others=not shape)


def test_gradients_of_rows():
  gradients(rows(count=9), 1)


@pytest.mark.slow
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_no_number_is_passed_on(bad):
  """Not taken for nothing, which a merge would leave out."""
  for args, block in ((make(), 8), (rows(), 1)):
    q, k, v, ids, last, sink = args
    k = (np.full_like(k[0], bad), *k[1:])
    for form in forms(block)[:2]:
      out, lse = form(q, k, v, ids, last, sink)
      seen = np.asarray(forms(block)[2](
          q, args[1], v, ids, last, None)[1]) > -1e29
      assert seen.any() and np.isnan(np.asarray(lse)[seen]).all()
      assert np.isnan(np.asarray(out)[seen]).all()


def test_rows_of_which_most_are_none():
  q, k, v, ids, last, sink = rows()
  sink[:] = -np.inf
  ids[:] = -1
  ids[1, 0, 0, 66] = 3
  last[:] = 255
  out, _ = check((q, k, v, ids, last, sink), 1)
  np.testing.assert_allclose(
      out[1, 0], np.broadcast_to(k[0][1, :, 3], (4, 128)), 1e-6)


def test_the_kernels_decline():
  q, k, v, ids, last, _ = make(block=4)
  with pytest.raises(ValueError, match='multiples of 8 rows, not 4'):
    gather_attend_tpu.gather_attend(
        q, k, v, ids, last, block=4, scale=1, interpret=True)
  wants = functools.partial(gather_attend_tpu.declines, k=k, v=v, block=8)
  assert 'SMEM' in wants(q, ids=np.zeros((2, 2, 2, 2 ** 16), np.int32))
  assert 'no work' in wants(q, ids=ids[:, :0])
  assert 'divide 128' in wants(q, ids=ids, block=24)
  q, k, _, ids, _, _ = rows()
  one = [x[:, 0] for x in k]
  wants = lambda *stores: gather_rows_tpu.declines(q, stores, ids[:, :, 0])
  assert wants(*one) is None and wants(one[0]) is None
  assert '128 channels' in wants(one[1], one[1])
  assert '128 slots' in wants(one[0][:, :200], one[1][:, :200])
  assert 'float16' in wants(one[0].astype(np.float16), one[1])
  assert '16 channels' in wants(one[0], one[1][..., :8])
