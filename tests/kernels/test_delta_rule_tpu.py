"""The TPU kernels of the delta rule, interpreted, against the recurrence."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'ops'))

from delta_rule_cases import (  # noqa: E402
  DECAYS,
  cast,
  check,
  error,
  jit,
  make,
  oracle,
  random_weights,
)

from pallas_kernels import KERNELS  # noqa: E402
from pallas_kernels.delta_rule_tpu import delta_rule  # noqa: E402
from pallas_kernels.workloads import DeltaRule  # noqa: E402
from statejax.ops import delta_rule as op  # noqa: E402

LENGTH = 70
CASE = dict(length=LENGTH, batch=2, key_heads=2, heads=4, width=8, values=6)
CHUNK = dict(chunk_size=32, heads_per_step=2, backward_heads_per_step=2)


def interpret(arrays, n_valid, resets, **options):
  gates = {'log_decay': None, 'erase': None, 'write': None}
  return delta_rule(
      **{**gates, **arrays}, n_valid=n_valid, resets=resets,
      scale=arrays['q'].shape[-1] ** -0.5, interpret=True, **options,
  )


@functools.partial(jit, static_argnames='options')
def compiled(arrays, weights, n_valid, resets, *, options):
  def loss(arrays):
    out = interpret(arrays, n_valid, resets, **dict(options))
    dots = [jnp.vdot(w, x.astype(w.dtype)) for w, x in zip(weights, out)]
    return sum(dots), out

  (_, out), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
  return out, grads


def both(args, n_valid=None, segment_ids=None, weights=None, **options):
  """The kernels' (y, state) and gradients; one compilation per shapes."""
  arrays = {n: x for n, x in args.items() if not isinstance(x, int)}
  batch, length = args['v'].shape[:2]
  if n_valid is None:
    n_valid = np.full([batch], length, np.int32)
  if segment_ids is None:
    segment_ids = np.zeros([batch, length], np.int32)
  resets = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
  return compiled(
      arrays, weights or random_weights(args), n_valid, resets,
      options=tuple({**CHUNK, **options}.items()),
  )


# Values and gradients.


@pytest.mark.parametrize('decay', [
    pytest.param('head', marks=pytest.mark.slow), 'channel'])
def test_agrees_with_the_recurrence(decay):
  args = make(decay, **CASE)
  check(both(args), oracle(args), 1e-6, 2e-6)


@pytest.mark.parametrize('decay', DECAYS)
def test_ragged_rows_and_packed_documents(decay):
  args = make(decay, **CASE, seed=1)
  n_valid = np.array([LENGTH - 9, 33], np.int32)
  starts = [[1, 31, 32, 33, 50], [15, 16, 17, 30, 60]]
  segment_ids = np.zeros([2, LENGTH], np.int32)
  for row, at in enumerate(starts):
    segment_ids[row, at] = 1
  segment_ids = segment_ids.cumsum(axis=1).astype(np.int32)
  want = oracle(args, n_valid, segment_ids)
  check(both(args, n_valid, segment_ids), want, 1e-6, 2e-6)


@pytest.mark.parametrize('decay', DECAYS)
def test_documents_are_isolated_exactly(decay):
  args = make(decay, **CASE, seed=2)
  segment_ids = np.zeros([2, LENGTH], np.int32)
  segment_ids[:, 40:] = 1
  y, state = random_weights(args)
  y[:, :40] = 0
  _, grads = both(args, segment_ids=segment_ids, weights=[y, state])
  for name, grad in grads.items():
    before = grad if name == 'state' else grad[:, :40]
    assert not np.any(before), name
    assert name == 'state' or np.any(grad[:, 40:]), name


@pytest.mark.parametrize('decay', DECAYS)
def test_padding_touches_nothing(decay):
  args = make(decay, **CASE, seed=3)
  args['state'][1, 0, 0, :2] = -0.0, 0.0
  n_valid = np.array([40, 0], np.int32)
  want = both(args, n_valid)
  assert np.asarray(want[0][1][1]).tobytes() == args['state'][1].tobytes()
  assert not np.any(want[0][0][0, 40:]) and not np.any(want[0][0][1])
  spoiled = {n: x.copy() for n, x in args.items()}
  for name, x in spoiled.items():
    if name != 'state':
      x[0, 40:] = np.nan
      x[1] = 1e9
  got = both(spoiled, n_valid)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('decay', DECAYS)
def test_extreme_gates(decay):
  args = make(decay, **CASE, seed=4)
  spikes = np.random.default_rng(4)
  g = 30 * args['log_decay']
  pick = lambda share: spikes.random(g.shape) < share
  for value in (-300.0, -1000.0, -np.inf, 0.0):
    g[pick(0.1)] = value
  args['log_decay'] = g
  got = both(args)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))
  check(got, oracle(args), 2e-6, 1e-5)


@pytest.mark.parametrize('decay', DECAYS)
def test_correlated_keys(decay):
  args = make(decay, **CASE, seed=5)
  args['k'] = args['k'][:, :1] + 0.02 * args['k']
  args['k'] /= np.linalg.norm(args['k'], axis=-1, keepdims=True)
  args['k'] = args['k'].astype('float32')
  args['log_decay'] = np.zeros_like(args['log_decay'])
  args['erase'] = args['write'] = np.ones_like(args['erase'])
  check(both(args), oracle(args), 2e-6, 1e-5)


# The family, other shapes and types.


@pytest.mark.parametrize('gates, options', [
    pytest.param(('channel', 'channel', 'channel'),
                 dict(backward_heads_per_step=1), marks=pytest.mark.slow),
    pytest.param(('channel', 0, 'head'), dict(heads_per_step=4),
                 marks=pytest.mark.slow),
    (('head', 0, 1), dict(heads_per_step=1)),
    pytest.param(('head', 'channel', 'head'), {}, marks=pytest.mark.slow),
], ids=str)
def test_members(gates, options):
  args = make(*gates, **{**CASE, 'length': 21})
  check(both(args, chunk_size=16, **options), oracle(args), 1e-6, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize('decay, size', [
    ('head', 64), ('channel', 64), ('head', 128)])
def test_longer_chunks(decay, size):
  args = make(decay, **{**CASE, 'batch': 1, 'heads': 2})
  got = jit(functools.partial(interpret, chunk_size=size))(args, None, None)
  check((got, {}), (oracle(args)[0], {}), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('erase, limit', [
    pytest.param(1, 1e-2, marks=pytest.mark.slow), (2, 2e-2)])
def test_bfloat16_with_correlated_keys(erase, limit):
  args = make('channel', **{**CASE, 'batch': 1, 'width': 64}, seed=6)
  args['k'] = args['k'][:, :1] + 0.3 * args['k']
  args['k'] /= np.linalg.norm(args['k'], axis=-1, keepdims=True)
  args['log_decay'] = 0.01 * args['log_decay']
  args['erase'] = args['write'] = np.full_like(args['erase'], erase)
  low = {n: jnp.asarray(args[n], jnp.bfloat16) for n in 'qkv'}
  args = cast({**args, **low}, 'float32')
  got, grads = both({**args, **low})
  want = oracle(args)
  assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
  check((got, grads), want, limit, 2 * limit)


# The way to the kernel.


def test_the_op_declines_without_a_tpu():
  args = make('head', **CASE)
  with pytest.raises(ValueError, match='needs a TPU, the backend is cpu'):
    op(**args, implementation='pallas_tpu')


@pytest.mark.parametrize('change, reason', [
    (dict(chunk_size=8), 'chunks have 16, 32, 64 or 128'),
    (dict(dtype='float16'), 'float16'),
])
def test_the_op_says_why_on_a_tpu(change, reason, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  args = make('head', **{**CASE, 'length': change.pop('length', LENGTH)})
  dtype = change.pop('dtype', 'float32')
  for name in 'qkv':
    args[name] = args[name].astype(dtype)
  with pytest.raises(ValueError, match=reason):
    op(**args, implementation='pallas_tpu', **change)


def test_the_op_says_why_another_form_runs(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  specs = DeltaRule(1, 1, 1024, 1024, 'channel').specs()
  with pytest.warns(UserWarning, match='MiB of VMEM going.*xla'):
    jax.eval_shape(lambda specs: op(**specs), specs)
  with pytest.raises(ValueError, match='MiB of VMEM going'):
    jax.eval_shape(
        lambda specs: op(**specs, implementation='pallas_tpu'), specs)


def test_the_op_prefers_the_kernel_on_a_tpu(monkeypatch):
  args = make('channel', 0, 1, **{**CASE, 'length': 16, 'batch': 1})
  arrays = {n: x for n, x in args.items() if not isinstance(x, int)}
  want = op(**args)
  kernel = KERNELS['delta_rule']['pallas_tpu']
  calls = []

  def spy(*args, chunk_size):
    calls.append(chunk_size)
    return kernel(*args, chunk_size=16, interpret=True)

  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  monkeypatch.setitem(KERNELS['delta_rule'], 'pallas_tpu', spy)
  # Where there are several, XLA has to partition what runs.
  with pytest.warns(UserWarning, match='partition it over several devices'):
    op(**args)
  assert not calls
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  got = jit(functools.partial(op, erase=0, write=1))(**arrays)
  assert calls == [None]
  assert max(error(a, b) for a, b in zip(got, want)) < 1e-6
