"""Attention over segments against a naive oracle in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit
from jax.test_util import check_grads

from statejax.layers import common
from statejax.ops import window as ring
from statejax.ops.attend import Segment, attend

MASKED = -1e30
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


@functools.partial(jit, static_argnames='scale')
def run(q, segments, sink=None, *, scale):
  return attend(q, segments, scale=scale, sink=sink)


def oracle(q, segments, sink=None, *, scale):
  """One query, one head at a time, over all keys in float64."""
  k, v = (np.concatenate([np.asarray(getattr(s, name), np.float64)
                          for s in segments], axis=2) for name in 'kv')
  visible = np.concatenate([np.asarray(s.visible) for s in segments], axis=2)
  q = np.asarray(q, np.float64)
  batch, length, heads, _ = q.shape
  out = np.zeros((batch, length, heads, v.shape[-1]))
  lse = np.full((batch, length, heads), MASKED)
  for b, t, h in np.ndindex(batch, length, heads):
    g = h // (heads // k.shape[1])
    seen = visible[b, t]
    s = scale * k[b, g, seen] @ q[b, t, h]
    if sink is not None:
      s = np.append(s, float(sink[h]))
    if s.size:
      p = np.exp(s - s.max())
      lse[b, t, h] = s.max() + np.log(p.sum())
      out[b, t, h] = (p / p.sum())[:seen.sum()] @ v[b, g, seen]
  return out, lse


def make(seed=0, sizes=(0, 5, 3), groups=2, heads=4, dtype=np.float32):
  """B = 2, T = 4, K = 6, V = 3; query 1 of row 0 and row 1's last see nothing,
  and the last key of row 0 is seen by nobody."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  total = sum(sizes)
  visible = rng.random((2, 4, total)) < 0.6
  visible[0, :, 0] = True
  visible[:, :, -1] = False
  visible[0, 1] = visible[1, 3] = False
  parts = np.split(visible, np.cumsum(sizes)[:-1], axis=2)
  segments = [Segment(normal(2, groups, n, 6), normal(2, groups, n, 3),
                      jnp.asarray(part)) for n, part in zip(sizes, parts)]
  return normal(2, 4, heads, 6), segments, 2 * normal(heads)


def close(got, want, tolerance):
  for x, y in zip(got, want):
    np.testing.assert_allclose(
        np.asarray(x, np.float64), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('with_sink', [False, True])
@pytest.mark.parametrize('groups', [4, 2, 1])
@pytest.mark.parametrize('sizes', [(7,), (0, 5, 3)])
def test_oracle(sizes, groups, with_sink):
  q, segments, sink = make(1, sizes, groups)
  sink = sink if with_sink else None
  out, lse = run(q, segments, sink, scale=0.4)
  close((out, lse), oracle(q, segments, sink, scale=0.4), 20 * EPS)
  assert out.shape == (2, 4, 4, 3) and lse.shape == (2, 4, 4)
  assert out.dtype == lse.dtype == jnp.float32
  for blind in ((0, 1), (1, 3)):
    assert (out[blind] == 0).all()
    assert (lse[blind] == (MASKED if sink is None else sink)).all()


@pytest.mark.parametrize('sizes', [(7,), (0, 5, 3), (0,)])
def test_a_sink_of_minus_infinity_is_none(sizes):
  q, segments, _ = make(2, sizes) if sum(sizes) else (
      make(2, (1,))[0], [jax.tree.map(lambda x: x[:, :, :0] if x.ndim == 4 else
                                      x[..., :0], make(2, (1,))[1][0])], None)
  none = jnp.full((4,), -jnp.inf)
  close(run(q, segments, none, scale=0.4), run(q, segments, scale=0.4), 0)
  def total(q, segments, sink):
    out, lse = attend(q, segments, scale=0.4, sink=sink)
    return jnp.sum(out ** 2) + jnp.sum(jnp.where(lse > MASKED, lse, 0.))
  grads = jit(jax.grad(total, (0, 2)))(q, segments, none)
  assert all(np.isfinite(g).all() for g in grads) and not grads[1].any()


def test_a_sink_is_a_key_of_value_zero():
  """q . k = 1 with one more channel, whose scale is the sink's logit."""
  q, segments, sink = make(3)
  wide = lambda x, fill: jnp.concatenate(
      [x, jnp.broadcast_to(fill, (*x.shape[:3], 1)).astype(x.dtype)], axis=3)
  old = [dataclasses.replace(s, k=wide(s.k, jnp.zeros(()))) for s in segments]
  more = Segment(jnp.zeros((2, 2, 1, 7)).at[..., 6].set(1),
                 jnp.zeros((2, 2, 1, 3)), jnp.ones((2, 4, 1), bool))
  close(run(wide(q, sink[None, None, :, None] / 0.4), [*old, more], scale=0.4),
        run(q, segments, sink, scale=0.4), 20 * EPS)


@pytest.mark.parametrize('with_sink', [False, True])
def test_no_gradient_to_the_unseen(with_sink):
  q, segments, sink = make(2)

  def loss(q, segments, sink):
    out, lse = attend(q, segments, scale=0.4, sink=sink if with_sink else None)
    return jnp.sum(out ** 2) + jnp.sum(lse)

  grad = jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True))
  dq, ds, dsink = grad(q, segments, sink)
  for b, t in ((0, 1), (1, 3)):
    assert (dq[b, t] == 0).all()
  for d, segment in zip(ds, segments):
    hidden = ~np.asarray(segment.visible).any(1)
    for x in (np.asarray(d.k), np.asarray(d.v)):
      assert np.isfinite(x).all()
      assert (x.swapaxes(1, 2)[hidden] == 0).all()
      assert (x != 0).any() or hidden.all()
  assert np.isfinite(dq).all() and np.isfinite(dsink).all()

  none = [Segment(s.k, s.v, jnp.zeros_like(s.visible)) for s in segments]
  dq, ds, _ = grad(q, none, sink)
  for x in [dq, *(d.k for d in ds), *(d.v for d in ds)]:
    assert (x == 0).all()


def test_hidden_keys_leave_no_bit():
  q, segments, sink = make(3)
  want = run(q, segments, sink, scale=0.4)
  loud = [Segment(jnp.where(s.visible.any(1)[:, None, :, None], s.k, 1e9),
                  jnp.where(s.visible.any(1)[:, None, :, None], s.v, 1e9),
                  s.visible) for s in segments]
  for x, y in zip(run(q, loud, sink, scale=0.4), want):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('name', ['k', 'v'])
def test_nan_is_passed_on(name):
  """A query that sees a NaN answers NaN, never a finite number."""
  q, segments, _ = make(8, (0, 5, 3))
  x = getattr(segments[1], name).at[0, 0, 0].set(jnp.nan)
  segments[1] = dataclasses.replace(segments[1], **{name: x})
  out, _ = run(q, segments, scale=0.4)
  # Key 0 of row 0 is visible to all but query 1; group 0 serves heads 0, 1.
  assert np.isnan(out[0, [0, 2, 3], :2]).all()
  assert not np.isnan(out[1]).any() and not np.isnan(out[0, :, 2:]).any()


@pytest.mark.parametrize('sink', [None, 1.0])
def test_nothing_at_all(sink):
  """Empty segments only, and no query."""
  q, (empty, *_), _ = make(10, (0, 4))
  logits = None if sink is None else jnp.full((4,), sink)
  out, lse = run(q, [empty], logits, scale=0.4)
  assert out.shape == (2, 4, 4, 3) and (out == 0).all()
  assert (lse == (MASKED if sink is None else sink)).all()
  _, (_, full), _ = make(10, (0, 4))
  full = dataclasses.replace(full, visible=full.visible[:, :0])
  out, lse = run(q[:, :0], [full], logits, scale=0.4)
  assert out.shape == (2, 0, 4, 3) and lse.shape == (2, 0, 4)


@pytest.mark.parametrize('sink', [None, 2e4, -2e4])
def test_large_scores(sink):
  # Integers, so that scores of 1e4 are exact in float32.
  rng = np.random.default_rng(4)
  integers = lambda *shape: jnp.asarray(
      rng.integers(-60, 61, shape), jnp.float32)
  _, segments, _ = make(4)
  segments = [Segment(integers(*s.k.shape), s.v, s.visible) for s in segments]
  q = integers(2, 4, 4, 6)
  sink = None if sink is None else jnp.full((4,), sink)
  assert np.abs(oracle(q, segments, scale=1.0)[1][0, 0]).max() > 2e3
  close(run(q, segments, sink, scale=1.0),
        oracle(q, segments, sink, scale=1.0), 20 * EPS)
  total = lambda q: jnp.sum(attend(q, segments, scale=1.0, sink=sink)[0])
  grads = jit(jax.grad(total))(q)
  assert np.isfinite(grads).all()


@pytest.mark.parametrize('query, store, tolerance', [
    ('bfloat16', 'bfloat16', 2 ** -6), ('float32', 'bfloat16', 20 * EPS),
    ('bfloat16', 'float32', 2 ** -6)])
def test_bfloat16(query, store, tolerance):
  q, segments, sink = make(5)
  q = q.astype(query)
  segments = [Segment(s.k.astype(store), s.v.astype(store), s.visible)
              for s in segments]
  out, lse = run(q, segments, sink, scale=0.4)
  assert out.dtype == query and lse.dtype == jnp.float32
  close((out, lse), oracle(q, segments, sink, scale=0.4), tolerance)


@pytest.mark.parametrize('with_sink', [False, True])
def test_segments_share_one_softmax(with_sink):
  q, segments, sink = make(6, (4, 0, 5))
  sink = sink if with_sink else None
  whole = Segment(*(jnp.concatenate([getattr(s, name) for s in segments], 2)
                    for name in ('k', 'v', 'visible')))
  close(run(q, segments, sink, scale=0.4), run(q, [whole], sink, scale=0.4),
        4 * EPS)


@pytest.mark.parametrize('with_sink', [False, True])
def test_gradient(float64, with_sink):
  q, segments, sink = make(7, (3, 2), dtype=np.float64)

  @jax.jit
  def f(q, keys, values, sink):
    parts = [Segment(k, v, s.visible)
             for k, v, s in zip(keys, values, segments)]
    out, lse = attend(q, parts, scale=0.4, sink=sink if with_sink else None)
    return out, jnp.where(lse > 0.5 * MASKED, lse, 0.0)

  args = q, [s.k for s in segments], [s.v for s in segments], sink
  out, lse = run(q, segments, sink if with_sink else None, scale=0.4)
  assert out.dtype == lse.dtype == jnp.float64
  close((out, lse), oracle(q, segments, sink if with_sink else None,
                           scale=0.4), 1e-14)
  check_grads(f, args, order=1, modes=['rev'], atol=1e-7, rtol=1e-7)


# What a query sees.


def steps(seed, packed):
  """Rows of random length, n_valid and documents, with every edge among them;
  returns the `Context` and, token by token, (document, position)."""
  rng = np.random.default_rng(seed)
  rows, size = 6, 6
  length = rng.integers(0, 9, rows).astype(np.int32)
  n_valid = rng.integers(0, size + 1, rows).astype(np.int32)
  length[0], n_valid[:3] = 0, (size, 0, 1)
  document = np.cumsum(rng.random((rows, size)) < 0.3, 1).astype(np.int32)
  tokens = []
  for b in range(rows):
    current, position, row = 0, int(length[b]), []
    for t in range(int(n_valid[b])):
      if packed and t and document[b, t] != document[b, t - 1]:
        current, position = current + 1, 0
      row.append((current, position))
      position += 1
    tokens.append(row)
  return make_context(length, n_valid, document if packed else None), tokens


make_context = jit(functools.partial(common.context, steps=6))


@jit
def visible(context, held, window):
  real = context.valid[..., None]
  return (context.visible_past(held, window) & real,
          context.visible_chunk(window) & real)


def sees(query, key, window):
  """Whether (document, position) sees (document, position)."""
  age = query[1] - key[1]
  return query[0] == key[0] and 0 <= age and (window is None or age < window)


def expected(context, tokens, held, window):
  """[B, T, N] and [B, T, T] by brute force; false for padded queries."""
  rows, size = context.positions.shape
  length = np.asarray(context.length)
  past = np.zeros((rows, size, held.shape[1]), bool)
  chunk = np.zeros((rows, size, size), bool)
  for b, row in enumerate(tokens):
    for t, query in enumerate(row):
      for i, p in enumerate(held[b]):
        past[b, t, i] = 0 <= p < length[b] and sees(
            query, (0, p), window)
      for s, key in enumerate(row):
        chunk[b, t, s] = sees(query, key, window)
  return past, chunk


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('window', [None, 1, 2, 5, 20])
def test_visible(window, packed):
  for seed in range(4):
    context, tokens = steps(seed, packed)
    held = np.tile(np.arange(20, dtype=np.int32), (6, 1))
    if window is not None:  # The slots of the ring, then empty ones.
      held[:] = -1
      held[:, :window] = ring.positions(context.length, window)
    got = visible(context, held, None if window is None else np.int32(window))
    for x, y in zip(got, expected(context, tokens, held, window)):
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('window', [None, 3])
def test_causal_gradient(window):
  """Output t depends on exactly the keys and values that it may see."""
  context, tokens = steps(11, True)
  held = (jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (6, 9))
          if window is None else ring.positions(context.length, window))
  sizes = held.shape[1], context.positions.shape[1]
  rng = np.random.default_rng(12)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, sink = normal(6, 6, 1, 4), jnp.zeros((1,))
  masks = context.visible_past(held, window), context.visible_chunk(window)

  @jit
  @jax.jacrev
  def jacobian(kv):
    segments = [Segment(*x, m) for x, m in zip(kv, masks)]
    return attend(q, segments, scale=0.5, sink=sink)[0][:, :, 0, 0]

  got = jacobian([(normal(6, 1, n, 4), normal(6, 1, n, 1)) for n in sizes])
  want = expected(context, tokens, np.asarray(held), window)
  real = np.asarray(context.valid)[..., None, None]
  for (dk, dv), seen in zip(got, want):
    seen = seen[:, :, None] & np.eye(6, dtype=bool)[:, None, :, None]
    for d in (dk, dv):  # [B, T, B, 1, N, width]
      d = np.asarray(d)[:, :, :, 0]
      np.testing.assert_array_equal((d != 0).any(-1) & real, seen)


@pytest.mark.parametrize('length', [255, 256, 293, 1100])
def test_leaving_out_later_keys(length):
  """The promise `causal` changes no value, only what is computed."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), np.float32)
  q, sink = normal(1, length, 2, 4), normal(2)
  past = Segment(normal(1, 1, 3, 4), normal(1, 1, 3, 4),
                 jnp.ones((1, length, 3), bool))
  chunk = Segment(normal(1, 1, length, 4), normal(1, 1, length, 4),
                  jnp.tril(jnp.ones((1, length, length), bool)))
  weights = normal(1, length, 2, 4)

  def loss(q, k, v, causal):
    segment = dataclasses.replace(chunk, k=k, v=v, causal=causal)
    out, lse = attend(q, [past, segment], scale=0.5, sink=sink)
    return jnp.sum(weights * out), (out, lse)

  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True),
                static_argnums=3)
  (_, want), want_grads = run(q, chunk.k, chunk.v, False)
  (_, got), grads = run(q, chunk.k, chunk.v, True)
  close((*got, *grads), [np.asarray(x, np.float64)
                         for x in (*want, *want_grads)], 2e-5)
  flops = [run.lower(q, chunk.k, chunk.v, causal).compile().cost_analysis()[
      'flops'] for causal in (True, False)]
  assert flops[0] < 0.8 * flops[1] if length > 255 else flops[0] == flops[1]
