"""Mamba-2, Mamba-1 and RG-LRU against golden vectors, splits, documents."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit
from jax.test_util import check_grads

from statejax.ops import norm
from statejax.ops.delta_rule import delta_rule
from statejax.ops.rg_lru import rg_lru
from statejax.ops.selective_scan import selective_scan

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


def load(name):
  return dict(np.load(GOLDEN / f'{name}.npz'))


def close(got, want):
  limit = 1e-5 * max(1.0, np.abs(want).max())
  assert np.abs(np.asarray(got) - want).max() <= limit


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('name', ['ssd', 'ssd_state'])
def test_golden_ssd(name, implementation):
  """q = C, k = B, v = x, write = dt, no scale; the state is transposed."""
  g = load(name)
  turn = lambda s: np.swapaxes(s, 2, 3)
  start = g.get('initial_state', np.zeros_like(g['final_state']))
  dt = jax.nn.softplus(g['dt'] + g['dt_bias'][None, None])

  @jit
  def run(state):
    return delta_rule(
        g['C'], g['B'], g['x'], dt * g['A'][None, None], 0, dt, state,
        scale=1.0, chunk_size=16, implementation=implementation)

  y, state = run(turn(start))
  close(y + g['D'][None, None, :, None] * g['x'], g['y'])
  close(turn(state), g['final_state'])


def test_golden_norm_of_gated():
  g = load('gated_rmsnorm_mamba2')
  groups = lambda x: x.reshape(*x.shape[:-1], 2, 12)
  y = norm.norm_of_gated(groups(g['x']), groups(g['z']), groups(g['p/weight']),
                         eps=1e-3, activation=jax.nn.silu)
  close(y.reshape(g['y'].shape), g['y'])
  other = norm.gated_rms_norm(
      groups(g['x']), groups(g['z']), groups(g['p/weight']), eps=1e-3,
      activation=jax.nn.silu)
  assert np.abs(other.reshape(g['y'].shape) - g['y']).max() > 0.1


def test_golden_selective_scan():
  g = load('selective_scan')
  turn = lambda x: np.swapaxes(x, 1, 2)
  u, z = turn(g['u']), turn(g['z'])
  dt = jax.nn.softplus(turn(g['delta']) + g['delta_bias'][None, None])
  y, state = jit(selective_scan)(
      u, dt, g['A'], turn(g['B']), turn(g['C']), g['D'],
      np.zeros_like(g['final_state']))
  close(y * jax.nn.silu(z), turn(g['y']))
  close(state, g['final_state'])


def rg_lru_gates(g):
  x = g['x']
  heads = x.reshape(*x.shape[:2], 4, 6)
  gate = lambda name: jax.nn.sigmoid(jnp.asarray(
      np.einsum('bthi,hij->bthj', heads, g[f'p/{name}_weight'])
      + g[f'p/{name}_bias'])).reshape(x.shape)
  return gate('input_gate'), gate('recurrent_gate')


def test_golden_rg_lru():
  g = load('rg_lru')
  gates = rg_lru_gates(g)
  resets = g['position_ids'] == 0
  assert resets[0, 0] and resets[1, 12]
  y, state = jit(rg_lru)(g['x'], *gates, g['p/recurrent_param'],
                         g['initial_state'], None, resets)
  close(y, g['y'])
  close(state, g['final_state'])


# What both scans promise.


def scan_case(name, dtype='float32', length=9, rows=3):
  """The op over (tokens, state, n_valid, resets), and random arguments."""
  rng = np.random.default_rng(3)
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  squash = lambda x: 1 / (1 + np.exp(-x))
  wide, size = 4, 3
  if name == 'rg_lru':
    rate = draw(wide)
    tokens = (draw(rows, length, wide), squash(draw(rows, length, wide)),
              squash(draw(rows, length, wide)))
    op = lambda t, s, n=None, r=None: rg_lru(*t, rate, s, n, r)
    return op, tokens, draw(rows, wide)
  a, skip = -np.exp(draw(wide, size)), draw(wide)
  tokens = (draw(rows, length, wide), np.exp(draw(rows, length, wide)),
            draw(rows, length, size), draw(rows, length, size))
  op = lambda t, s, n=None, r=None: selective_scan(
      t[0], t[1], a, t[2], t[3], skip, s, n, r)
  return op, tokens, draw(rows, wide, size)


SCANS = ('selective_scan', 'rg_lru')


@pytest.mark.parametrize('name', SCANS)
def test_splits(name):
  op, tokens, state = scan_case(name)
  want, final = jit(op)(tokens, state)
  for cut in (1, 4):
    one, middle = jit(op)(tuple(t[:, :cut] for t in tokens), state)
    two, end = jit(op)(tuple(t[:, cut:] for t in tokens), middle)
    np.testing.assert_array_equal(np.concatenate([one, two], 1), want)
    np.testing.assert_array_equal(end, final)


@pytest.mark.parametrize('name', SCANS)
def test_padding(name):
  op, tokens, state = scan_case(name)
  state[2, 0] = -0.0
  n_valid = np.array([9, 5, 0], np.int32)
  real = np.arange(9)[None] < n_valid[:, None]
  spoilt = tuple(np.where(real[..., None], t, np.float32(np.nan))
                 for t in tokens)
  y, end = map(np.asarray, jit(op)(spoilt, state, n_valid))
  _, five = jit(op)(tuple(t[:, :5] for t in tokens), state)
  assert (y[~real] == 0).all() and np.isfinite(y).all()
  np.testing.assert_array_equal(end[1], five[1])
  assert end[2].tobytes() == state[2].tobytes()
  loss = lambda t, s: sum(jnp.sum(x) for x in op(t, s, n_valid))
  grads = jit(jax.grad(loss, (0, 1)))(spoilt, state)
  for g in jax.tree.leaves(grads):
    assert np.isfinite(g).all()
  for g in grads[0]:
    assert (np.asarray(g)[~real] == 0).all()


@pytest.mark.parametrize('name', SCANS)
def test_documents(name):
  op, tokens, state = scan_case(name)
  state[0] = np.nan
  resets = np.zeros((3, 9), bool)
  resets[0, 0] = resets[:, 4] = True
  y, end = jit(op)(tokens, state, None, resets)
  begin = np.zeros((3, 5), bool)
  begin[:, 0] = True
  alone, last = jit(op)(tuple(t[:, 4:] for t in tokens), np.zeros_like(state),
                        None, begin)
  np.testing.assert_array_equal(y[:, 4:], alone)
  np.testing.assert_array_equal(end, last)
  assert np.isfinite(y).all()
  grad = jit(jax.grad(lambda t, s: jnp.sum(op(t, s, None, resets)[0][:, 4:]),
                      (0, 1)))(tokens, np.nan_to_num(state))
  assert all((np.asarray(g)[:, :4] == 0).all() for g in grad[0])
  assert (grad[1] == 0).all()


@pytest.mark.parametrize('name', SCANS)
def test_gradient(float64, name):
  op, tokens, state = scan_case(name, 'float64', length=4, rows=1)
  resets = np.array([[False, False, True, False]])
  check_grads(jax.jit(lambda t, s: op(t, s, None, resets)), (tokens, state),
              order=1, modes=['rev'], atol=1e-6, rtol=1e-6)


def test_rg_lru_at_extreme_gates():
  """Channels that never fade or always do, with finite gradients."""
  x = np.ones((1, 3, 2), np.float32)
  gate = np.stack([np.zeros((1, 3)), np.ones((1, 3))], -1).astype(np.float32)
  state = np.full((1, 2), 2.0, np.float32)
  rate = np.full((2,), 1e3, np.float32)
  run = lambda x, r, s: rg_lru(x, x, r, rate, s)[0]
  y = jit(run)(x, gate, state)
  np.testing.assert_array_equal(y[0], [[2, 1]] * 3)
  grads = jit(jax.grad(lambda *a: run(*a).sum(), (0, 1, 2)))(x, gate, state)
  assert all(np.isfinite(g).all() for g in grads)
