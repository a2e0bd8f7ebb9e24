"""Norms, gates and rotary embedding against golden vectors and float64."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit
from jax.test_util import check_grads

from statejax.layers.delta import log_decay
from statejax.ops import norm, rope

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
ABOUT = json.loads((GOLDEN / 'ops.json').read_text())
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


def close(got, want, tolerance):
  np.testing.assert_allclose(np.asarray(got, np.float64), want,
                             rtol=tolerance, atol=tolerance)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Norms and gates.


@pytest.mark.parametrize('gate', ['silu', 'sigmoid'])
def test_golden_gated_rms_norm(gate):
  name = f'gated_rmsnorm_{gate}'
  g = dict(np.load(GOLDEN / f'{name}.npz'))
  y = norm.gated_rms_norm(g['x'], g['z'], g['p/weight'], eps=ABOUT[name]['eps'],
                          activation=getattr(jax.nn, gate))
  close(y, g['y'], 10 * EPS)


def test_golden_log_decay():
  g = {k: x.astype(np.float64)
       for k, x in np.load(GOLDEN / 'kda_forget_gate.npz').items()}
  x = g['x'] @ g['p/f_a_proj.weight'].T @ g['p/f_b_proj.weight'].T
  wide = x.reshape(g['g'].shape).astype(np.float32)
  rate, bias = (jnp.asarray(g[f'p/{name}'].reshape(shape), jnp.float32)
                for name, shape in (('A_log', 3), ('dt_bias', (3, 12))))
  y = log_decay(wide, rate, bias)
  assert y.dtype == jnp.float32
  close(y, g['g'], 10 * EPS)
  # One decay per head is the same with all channels alike.
  head = log_decay(wide[..., 0], rate, bias[:, 0])
  np.testing.assert_array_equal(head, y[..., 0])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_log_decay_at_extremes(dtype):
  x = jnp.asarray([-1e4, -90, 0, 90, 1e4], dtype).reshape(1, 5, 1)
  rate, bias = jnp.full((1,), 2.0), jnp.zeros((1,))
  d = jit(jax.grad(lambda x: log_decay(x, rate, bias).sum()))(x)
  assert d.dtype == dtype and np.isfinite(np.asarray(d, np.float32)).all()
  y = log_decay(x, rate, bias)[0, :, 0]
  assert y.dtype == jnp.float32 and (y <= 0).all()
  close(y, -np.exp(2.0) * np.array([0, np.exp(-90), np.log(2), 90, 1e4]),
        1e-2 if dtype == 'bfloat16' else 10 * EPS)


@pytest.mark.parametrize('dtype, tolerance', [
    ('float32', 10 * EPS), ('bfloat16', 2 ** -8)])
@pytest.mark.parametrize('offset', [0.0, 1.0])
def test_rms_norm(offset, dtype, tolerance):
  x, w = jnp.asarray(normal(1, 3, 4, 8), dtype), normal(2, 8)
  wide = np.asarray(x, np.float64)
  unit = wide / np.sqrt((wide ** 2).mean(-1, keepdims=True) + 1e-3)
  y = norm.rms_norm(x, w, eps=1e-3, offset=offset)
  assert y.dtype == dtype
  close(y, unit * (offset + w.astype(np.float64)), tolerance)
  close(norm.rms_norm(x, None, eps=1e-3), unit, tolerance)


def test_gated_rms_norm_is_norm_then_gate():
  x, z, w = normal(3, 5, 8), normal(4, 5, 8), normal(5, 8)
  got = norm.gated_rms_norm(x, z, w, eps=1e-5, activation=jax.nn.silu)
  np.testing.assert_allclose(
      got, norm.rms_norm(x, w, eps=1e-5) * jax.nn.silu(z), rtol=4 * EPS)


def test_l2_norm():
  x = np.concatenate([normal(6, 3, 8), np.zeros((1, 8), np.float32)])
  y = norm.l2_norm(x)
  close(y, x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True)
                       + 1e-6), 10 * EPS)
  assert (y[3] == 0).all()
  grad = jax.jacrev(norm.l2_norm)(jnp.zeros((8,)))
  np.testing.assert_allclose(grad, 1e3 * np.eye(8), rtol=10 * EPS)
  out = norm.l2_norm(jnp.asarray(x, jnp.bfloat16))
  assert out.dtype == jnp.float32


@pytest.mark.parametrize('f', [
    lambda x, z, w: norm.rms_norm(x, w, eps=1e-3, offset=1.0),
    lambda x, z, w: norm.gated_rms_norm(x, z, w, eps=1e-3,
                                        activation=jax.nn.silu),
    lambda x, z, w: norm.l2_norm(x)], ids=['rms', 'gated', 'l2'])
def test_gradient(float64, f):
  args = [jnp.asarray(normal(7 + i, *shape), jnp.float64)
          for i, shape in enumerate([(2, 6), (2, 6), (6,)])]
  assert f(*args).dtype == jnp.float64
  check_grads(jax.jit(f), args, order=1, modes=['rev'], atol=1e-7, rtol=1e-7)


# Rotary embedding.

rotate = jit(rope.rotate)


def complex_oracle(x, positions, theta, rotating):
  """Channel i and i + rotating / 2 are the parts of one complex number."""
  x = np.asarray(x, np.float64)
  half = rotating // 2
  speed = theta ** (-np.arange(half) / half)
  turn = np.exp(1j * np.asarray(positions)[:, :, None, None] * speed)
  z = (x[..., :half] + 1j * x[..., half:rotating]) * turn
  return np.concatenate([z.real, z.imag, x[..., rotating:]], axis=-1)


@pytest.mark.parametrize('theta', [1e4, 1e6])
@pytest.mark.parametrize('fraction', [1.0, 0.5, 0.25])
def test_rotate(fraction, theta):
  inverse = rope.frequencies(16, theta=theta, fraction=fraction)
  rotating = int(16 * fraction)
  assert inverse.shape == (rotating // 2,) and inverse.dtype == np.float32
  positions = jnp.asarray([[0, 1, 2, 3], [7, 50, 100, 1000]], jnp.int32)
  x = normal(10, 2, 4, 3, 16)
  y = rotate(x, positions, inverse)
  want = complex_oracle(x, positions, theta, rotating)
  # An angle of p radians is off by up to p roundings.
  close(y[0], want[0], 20 * EPS)
  close(y[1], want[1], 1000 * 4 * EPS)
  np.testing.assert_array_equal(y[..., rotating:], x[..., rotating:])
  np.testing.assert_array_equal(y[0, 0], x[0, 0])
  close(np.square(y).sum(-1), np.square(x, dtype=np.float64).sum(-1), 40 * EPS)


def test_scores_depend_on_the_distance():
  inverse = rope.frequencies(8, theta=1e4)
  q, k = (jnp.asarray(normal(s, 1, 1, 2, 8)) for s in (11, 12))
  at = lambda x, p: rotate(x, jnp.full((1, 1), p, jnp.int32), inverse)
  score = lambda m, n: np.vdot(at(q, m), at(k, n))
  for distance in (0, 1, 9):
    base = score(distance, 0)
    for shift in (1, 17, 200):
      close(score(distance + shift, shift), base, 200 * 20 * EPS)
  assert abs(score(5, 0) - score(0, 5)) > 1e-2


def test_chunk_at_its_offset():
  inverse = rope.frequencies(8, theta=1e4)
  x = normal(13, 2, 9, 1, 8)
  positions = np.arange(9, dtype=np.int32)[None] + np.array(
      [[0], [40]], np.int32)
  whole = rotate(x, positions, inverse)
  for cut in (1, 4):
    np.testing.assert_array_equal(
        rotate(x[:, cut:], positions[:, cut:], inverse), whole[:, cut:])


@pytest.mark.parametrize('width, fraction', [(7, 1.0), (6, 0.5), (10, 0.3)])
def test_odd_rotating_width(width, fraction):
  with pytest.raises(ValueError, match='even number of rotating'):
    rope.frequencies(width, theta=1e4, fraction=fraction)


def test_rotate_bfloat16():
  x = jnp.asarray(normal(14, 1, 4, 2, 8), jnp.bfloat16)
  positions = jnp.arange(4, dtype=jnp.int32)[None]
  y = rotate(x, positions, rope.frequencies(8, theta=1e4))
  assert y.dtype == jnp.bfloat16
  close(y, complex_oracle(x, positions, 1e4, 8), 2 ** -6)
