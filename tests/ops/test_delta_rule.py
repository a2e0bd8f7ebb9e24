"""The delta rule against golden vectors and its recurrence in float64."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import (
  DECAYS,
  both,
  check,
  error,
  jit,
  make,
  oracle,
  tokens,
)
from jax.test_util import check_grads

from statejax.ops.delta_rule import delta_rule

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
ABOUT = json.loads((GOLDEN / 'ops.json').read_text())


# Golden vectors.


@functools.partial(jit, static_argnames=('norm', 'implementation'))
def golden(x, weights, *, norm, implementation):
  def loss(x):
    unit = lambda x: x
    if norm:
      unit = lambda x: x * jax.lax.rsqrt(
          jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6
      )
    out = delta_rule(
        unit(x['q']), unit(x['k']), x['v'], x['g'], x['beta'], x['beta'],
        x['initial_state'], implementation=implementation,
    )
    return sum(jnp.vdot(w, x) for w, x in zip(weights, out)), out

  if not weights:
    return loss(x)[1], {}
  (_, out), grads = jax.value_and_grad(loss, has_aux=True)(x)
  return out, grads


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize(
    'name', [n for n, about in ABOUT.items() if about['op'] in ('gdn', 'kda')]
)
def test_golden(name, implementation):
  arrays, about = dict(np.load(GOLDEN / f'{name}.npz')), ABOUT[name]
  arrays.setdefault('initial_state', np.zeros_like(arrays['final_state']))
  inputs = ('q', 'k', 'v', 'g', 'beta', 'initial_state')
  weights = [
      arrays[n] for n in ('loss_w_out', 'loss_w_state') if n in arrays
  ]
  out, grads = golden(
      {n: arrays[n] for n in inputs}, weights,
      norm=about['use_qk_l2norm'], implementation=implementation,
  )
  limits = about['float32_error']['chunk']
  for got, want, limit in zip(out, ('out', 'final_state'), limits):
    assert np.abs(got - arrays[want]).max() <= 10 * limit, want
  for n, grad in grads.items():
    want = arrays[f'd_{n}']
    assert np.abs(grad - want).max() <= 5e-6 * np.abs(want).max(), n


# Against the recurrence.


@pytest.mark.slow
@pytest.mark.parametrize('decay', [
    pytest.param('head', marks=pytest.mark.slow), 'channel'])
def test_lengths(decay, float64):
  args = make(decay, length=37, dtype='float64')
  forward = jit(functools.partial(delta_rule, chunk_size=8))
  for length in (1, 7, 8, 9, 21, 37):
    n_valid = np.full([2], length, np.int32)
    short = tokens(args, 0, length)
    (y, state), grads = both(args, n_valid, implementation='reference')
    want = (y[:, :length], state), tokens(grads, 0, length)
    if length in (7, 9, 21):
      check(both(short, chunk_size=8), want, 1e-13, 1e-12)
    else:
      check((forward(**short), {}), (want[0], {}), 1e-13)


@pytest.mark.parametrize('decay', DECAYS)
def test_no_tokens(decay):
  args = make(decay, length=0)
  args['state'][0, 0, 0, 0] = -0.0
  for implementation in ('reference', 'xla'):
    y, state = delta_rule(**args, implementation=implementation)
    assert y.shape == args['v'].shape
    assert np.asarray(state).tobytes() == args['state'].tobytes()


@pytest.mark.parametrize('decay', [
    'head', pytest.param('channel', marks=pytest.mark.slow)])
def test_chunk_sizes_agree(decay):
  args = make(decay, length=130, batch=1, key_heads=1, heads=1, width=4)
  want = delta_rule(**args, implementation='reference')
  for size in (8, 16, 32, 64, 128):
    got = jit(functools.partial(delta_rule, chunk_size=size))(**args)
    assert max(error(a, b) for a, b in zip(got, want)) < 2e-6, size


@pytest.mark.parametrize('gates', [
    ('head', 0, 1), (0, 0, 1), (0, 1, 1), ('channel', 0, 'head'),
    ('channel', 'channel', 'channel'), ('head', 'channel', 'head'),
], ids=str)
def test_members(gates, float64):
  args = make(*gates, length=19, dtype='float64')
  want = both(args, implementation='reference')
  check(both(args, chunk_size=8), want, 1e-13, 1e-12)


def test_finite_differences(float64):
  args = make('channel', length=5, batch=1, dtype='float64')
  run = jax.jit(lambda *x: delta_rule(*x, chunk_size=4))
  check_grads(
      run, [args[n] for n in args], order=1, modes=['rev'], rtol=1e-6
  )


@pytest.mark.parametrize('decay', DECAYS)
def test_bfloat16(decay):
  args = make(decay, length=37)
  for name in ('q', 'k', 'v'):
    args[name] = args[name].astype(jnp.bfloat16)
  got = both(args)
  assert got[0][0].dtype == jnp.bfloat16 and got[0][1].dtype == jnp.float32
  assert got[1]['q'].dtype == jnp.bfloat16
  check(got, oracle(args), 1e-2, 2e-2)


# Numerics: extreme gates, dependent keys, small residuals.


@pytest.mark.parametrize('decay', DECAYS)
@pytest.mark.parametrize('gate', ['x30', -300.0, -1000.0, -np.inf, 0.0, -4.0])
def test_extreme_gates(decay, gate):
  args = make(decay, length=37)
  if gate == 'x30':
    args['log_decay'] *= 30
  elif gate in (0.0, -4.0):
    args['log_decay'] = np.full_like(args['log_decay'], gate)
  else:
    spikes = np.random.default_rng(3).random(args['log_decay'].shape) < 0.2
    args['log_decay'] = np.where(
        spikes, np.float32(gate), args['log_decay'] / 10
    )
  check(both(args, chunk_size=16), oracle(args), 2e-6, 1e-5)


@pytest.mark.parametrize('keys', ['identical', 'correlated', 'zero'])
@pytest.mark.parametrize('beta', [0.0, 1.0, 2.0])
def test_dependent_keys(keys, beta):
  args = make('head', length=64, batch=1, width=16)
  if keys == 'zero':
    args['k'] = np.zeros_like(args['k'])
  else:
    k = args['k'][:, :1] + (0.1 * args['k'] if keys == 'correlated' else 0)
    args['k'] = k / np.linalg.norm(k, axis=-1, keepdims=True)
    args['k'] = np.broadcast_to(args['k'], args['q'].shape)
  args['log_decay'] = np.zeros_like(args['log_decay'])
  args['erase'] = args['write'] = np.full_like(args['erase'], beta)
  # Each step with beta = 2 is a reflection: errors are kept, never damped.
  check(both(args), oracle(args), *((2e-5, 3e-5) if beta == 2 else
                                    (2e-6, 1e-5)))


@pytest.mark.parametrize('decay', DECAYS)
def test_small_residual(decay):
  """L11: v within 1e-3 of what the key recalls; the difference is kept."""
  args = make(decay, 1, 1, length=16, key_heads=4, width=16)
  args['log_decay'] = np.zeros_like(args['log_decay'])
  # Orthogonal keys: each recalls from the first state alone.
  basis = np.linalg.qr(np.random.default_rng(5).standard_normal((16, 16)))[0]
  k = np.broadcast_to(basis[None, :, None], args['k'].shape)
  args['k'] = k.astype(np.float32)
  recalled = np.einsum('bthk,bhkv->bthv', k, args['state'])
  args['v'] = (recalled + 1e-3 * args['v']).astype(np.float32)
  (_, state), _ = both(args, chunk_size=8)
  want = np.einsum('bthk,bthv->bhkv', k, args['v'] - recalled)
  assert error(state - args['state'], want) < 1e-3
