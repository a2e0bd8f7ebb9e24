"""Short convolution: golden vectors, splits, documents, padding."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from statejax.layers import common
from statejax.ops.conv import short_conv

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


@functools.partial(jax.jit, static_argnames='activation')
def conv(x, tail, weight, n_valid=None, document=None, start=None, bias=None,
         activation=jax.nn.silu):
  if n_valid is None:
    n_valid = jnp.full((x.shape[0],), x.shape[1], jnp.int32)
  return short_conv(x, tail, weight, n_valid, document=document, start=start,
                    bias=bias, activation=activation)


def identity(x):
  return x


def make(seed, taps=4, steps=9, rows=3, width=16, dtype='float32', tail=None):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return (normal(rows, steps, width).astype(dtype),
          normal(rows, taps - 1, width).astype(tail or dtype),
          normal(taps, width), normal(width))


def test_golden():
  g = dict(np.load(GOLDEN / 'causal_conv1d.npz'))
  turn = lambda name: g[name].swapaxes(1, 2)
  weight, bias = g['w'].T, g['bias']
  y, tail = conv(turn('x'), np.zeros((2, 3, 10), np.float32), weight, bias=bias)
  np.testing.assert_allclose(y, turn('y'), rtol=10 * EPS, atol=10 * EPS)
  np.testing.assert_array_equal(tail, turn('state')[:, 1:])
  y, tail = conv(turn('x_next'), tail, weight, bias=bias)
  np.testing.assert_allclose(y, turn('y_next'), rtol=10 * EPS, atol=10 * EPS)
  np.testing.assert_array_equal(tail, turn('state_next')[:, 1:])


@pytest.mark.parametrize('taps', [1, 2, 4])
def test_oracle(taps):
  x, tail, weight, bias = make(taps, taps)
  full = np.concatenate([tail, x], 1).astype(np.float64)
  total = np.asarray(bias, np.float64) + sum(
      full[:, w:w + x.shape[1]] * np.asarray(weight[w]) for w in range(taps))
  y, new = conv(x, tail, weight, bias=bias)
  np.testing.assert_allclose(
      y, total / (1 + np.exp(-total)), rtol=10 * EPS, atol=10 * EPS)
  np.testing.assert_array_equal(new, full[:, x.shape[1]:])


def pieces(x, tail, weight, bias, sizes, activation):
  out, x = [], np.asarray(x)
  for part in np.split(np.arange(x.shape[1]), np.cumsum(sizes)):
    y, tail = conv(x[:, part], tail, weight, bias=bias, activation=activation)
    out.append(np.asarray(y))
  return np.concatenate(out, 1), tail


# Since jax 0.12 XLA on CPU ends loops over sizes that do not fill its vectors
# with another exponential, so SiLU meets full vectors only.
@pytest.mark.parametrize('dtype, tail, width, activation', [
    ('float32', 'float32', 16, jax.nn.silu),
    ('float32', 'bfloat16', 16, jax.nn.silu),
    ('bfloat16', 'bfloat16', 16, jax.nn.silu),
    ('float32', 'float32', 5, identity)])
def test_splits(dtype, tail, width, activation):
  args = make(1, dtype=dtype, tail=tail, width=width)
  want = conv(*args[:3], bias=args[3], activation=activation)
  cuts = [[i] for i in range(1, 9)] + [
      [1] * 8, [2, 2, 2, 2], [1, 2, 3], [3, 1, 1], [2, 1, 5]]
  for sizes in cuts:
    for a, b in zip(pieces(*args, sizes, activation), want):
      np.testing.assert_array_equal(a, b, err_msg=str(sizes))


def test_ragged_stream():
  """Rows advance by their own n_valid in 0..3, with loud or NaN padding."""
  x, tail, weight, bias = make(2, steps=14)
  want, _ = map(np.asarray, conv(x, tail, weight, bias=bias))
  x, tail = np.asarray(x), np.asarray(tail)
  full = np.concatenate([tail, x], 1)
  rng = np.random.default_rng(3)
  done = np.zeros((3,), np.int32)
  for step in range(12):
    n_valid = np.minimum(rng.integers(0, 4, 3), 14 - done).astype(np.int32)
    chunk = np.full((3, 3, 16), np.nan if step % 2 else 1e9, np.float32)
    for b, n in enumerate(n_valid):
      chunk[b, :n] = x[b, done[b]:done[b] + n]
    y, new = map(np.asarray, conv(chunk, tail, weight, n_valid, bias=bias))
    for b, n in enumerate(n_valid):
      np.testing.assert_array_equal(y[b, :n], want[b, done[b]:done[b] + n])
      if n == 0:
        assert new[b].tobytes() == tail[b].tobytes()
      done[b] += n
      np.testing.assert_array_equal(new[b], full[b, done[b]:done[b] + 3])
    tail = new


def test_no_token_keeps_every_bit():
  raw = np.random.default_rng(4).integers(0, 2**32 - 1, (2, 3, 16), np.uint32)
  raw[0, 0], raw[0, 1] = 0x80000000, 0x7F800001  # -0.0, a signalling NaN
  to = lambda x: jax.lax.bitcast_convert_type(x, jnp.float32)
  x, _, weight, _ = make(4, rows=2)
  zero = jnp.zeros((2,), jnp.int32)
  for document in (None, jnp.zeros((2, 9), jnp.int32)):
    _, tail = conv(x, to(jnp.asarray(raw)), weight, zero, document,
                   None if document is None else zero)
    np.testing.assert_array_equal(
        jax.lax.bitcast_convert_type(tail, jnp.uint32), raw)


@pytest.mark.parametrize('taps', [2, 4])
def test_documents_equal_separate_runs(taps):
  rng = np.random.default_rng(5)
  contexts = jax.jit(functools.partial(common.context, steps=9))
  one = jax.jit(lambda x, b, start: jnp.roll(x[b][None], -start, axis=1))
  for seed in range(5):
    x, tail, weight, bias = make(seed, taps, rows=4)
    document = np.cumsum(rng.random((4, 9)) < 0.4, 1).astype(np.int32)
    n_valid = rng.integers(0, 10, 4).astype(np.int32)
    n_valid[0], document[1] = 9, 7
    zero = jnp.zeros((4,), jnp.int32)
    context = contexts(zero, n_valid, document)
    y, new = map(np.asarray, conv(x, tail, weight, n_valid, context.document,
                                  context.start, bias))
    for b, n in enumerate(n_valid):
      borders = [t for t in range(1, n) if document[b, t] != document[b, t - 1]]
      before = np.asarray(tail)[b:b + 1]
      for start, end in zip([0, *borders], [*borders, n]):
        # One length for all: the separate run is padded with other tokens.
        alone = one(x, b, start)
        count = np.full((1,), end - start, np.int32)
        part, after = conv(alone, before, weight, count, bias=bias)
        np.testing.assert_array_equal(y[b, start:end], part[0, :end - start])
        before = np.zeros_like(before)
      np.testing.assert_array_equal(new[b], after[0])


def test_no_gradient_across_a_border():
  x, tail, weight, bias = make(6, rows=1)
  document = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 2, 2]], jnp.int32)
  n_valid, start = (jnp.asarray([n], jnp.int32) for n in (9, 7))

  @jax.jit
  @functools.partial(jax.jacrev, argnums=(0, 1))
  def jacobian(x, tail):
    y, new = short_conv(x, tail, weight, n_valid, document=document,
                        start=start, bias=bias)
    return y.sum((0, 2)), new.sum((0, 2))

  (y_x, y_tail), (new_x, new_tail) = jax.tree.map(
      lambda d: np.asarray((d != 0).any((1, 3))), jacobian(x, tail))
  t = np.arange(9)
  age = t[:, None] - t[None]
  same = np.asarray(document[0][:, None] == document[0][None])
  np.testing.assert_array_equal(y_x, (age >= 0) & (age < 4) & same)
  reach = t[:, None] - (np.arange(3)[None] - 3) < 4
  np.testing.assert_array_equal(y_tail, reach & (t < 3)[:, None])
  np.testing.assert_array_equal(
      new_x, (t[None] == np.arange(6, 9)[:, None]) & (t >= 7)[None])
  assert not new_tail.any()


@pytest.mark.parametrize('packed', [False, True])
def test_gradient(float64, packed):
  args = [jnp.asarray(a, jnp.float64)
          for a in make(7, rows=2, steps=5, width=3)]
  n_valid, start = (jnp.asarray(n, jnp.int32) for n in ([5, 2], [3, 0]))
  document = jnp.asarray([[0, 1, 1, 2, 2], [0] * 5], jnp.int32)
  more = dict(document=document, start=start) if packed else {}
  f = jax.jit(lambda x, tail, weight, bias: short_conv(
      x, tail, weight, n_valid, bias=bias, **more))
  assert f(*args)[0].dtype == jnp.float64
  check_grads(f, args, order=1, modes=['rev'], atol=1e-7, rtol=1e-7)
