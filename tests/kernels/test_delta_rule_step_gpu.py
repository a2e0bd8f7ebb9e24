"""The GPU's decode kernel: lowered, and interpreted against the equation.

It ran on a GPU in `experiments/gpu_check.py`; nothing here needs one.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_delta_rule_step_tpu import SCALE, error, make, oracle

from pallas_kernels import DECLINES, KERNELS, delta_rule_step_gpu, plain
from statejax.ops import delta_chunk, dispatch
from statejax.ops.delta_rule import delta_rule

OLD = jax.__version_info__ < delta_rule_step_gpu.OLDEST_JAX
needs_new = pytest.mark.skipif(OLD, reason='the kernel needs a newer jax')
SHAPE = dict(heads=2, width=32, values=64)


def run(inputs, state, n_valid=None):
  n_valid = None if n_valid is None else np.asarray(n_valid, np.int32)
  return delta_rule_step_gpu.delta_rule_step(
      **inputs, state=jnp.array(state), n_valid=n_valid, scale=SCALE,
      interpret=True)


@needs_new
@pytest.mark.parametrize('decay, erase, write, key_heads', [
    ('head', 'head', 'head', 1), ('channel', 'channel', 'channel', 2),
    (None, None, None, 1), ('channel', None, 'head', 2)])
def test_gates(decay, erase, write, key_heads):
  inputs, state = make(decay, erase, write, key_heads=key_heads, **SHAPE)
  for got, want in zip(run(inputs, state), oracle(inputs, state), strict=True):
    assert error(got, want) < 3e-7
    assert got.shape == want.shape


@needs_new
def test_rows_without_a_token():
  inputs, state = make('head', 'head', 'head', batch=3, **SHAPE)
  real = np.array([False, True, False])
  for x in inputs.values():
    x[~real] = np.nan
  state[~real] = -0.0
  state[2, 0] = np.nan
  y, after = run(inputs, state, real)
  want = oracle(inputs, state)
  assert not np.asarray(y)[~real].any()
  np.testing.assert_array_equal(
      np.asarray(after)[~real].view(np.int32), state[~real].view(np.int32))
  assert error(y[real], want[0][real]) < 3e-7
  assert error(after[real], want[1][real]) < 3e-7


@needs_new
def test_decay_of_zero_forgets_and_bfloat16_loses_nothing_more():
  inputs, state = make('channel', 'head', 'head', dtype=jnp.bfloat16, **SHAPE)
  inputs['log_decay'][:, :, 1] = -np.inf
  y, after = run(inputs, state)
  want = oracle(inputs, state)
  assert y.dtype == jnp.bfloat16 and after.dtype == jnp.float32
  assert error(y, want[0]) < 4e-3
  assert error(after, want[1]) < 3e-7


@needs_new
@pytest.mark.parametrize('decay, gates, n_valid', [
    ('head', 'head', None), ('channel', 'channel', np.ones(2, np.int32))])
def test_lowers_in_place(decay, gates, n_valid):
  """For a GPU that is not there, down to what its compiler is given."""
  inputs, state = make(decay, gates, gates, dtype=jnp.bfloat16, heads=4,
                       key_heads=2, width=128, values=128)
  step = functools.partial(delta_rule_step_gpu.delta_rule_step, scale=SCALE)
  text = jax.jit(step, donate_argnames='state').trace(
      **inputs, state=state, n_valid=n_valid).lower(
          lowering_platforms=('cuda',)).as_text()
  assert text.count('custom_call @mosaic_gpu') == 1
  assert 'output_tuple_indices = [1]' in text  # the state, where it lies


@needs_new
def test_gradient():
  inputs, state = make('channel', 'head', 'head', **SHAPE)
  n_valid = np.array([1, 0], np.int32)

  def loss(kernel, inputs, state):
    y, after = kernel(**inputs, state=state, n_valid=n_valid, scale=SCALE)
    return jnp.sum(y ** 2) + jnp.sum(after ** 3)

  kernel = functools.partial(
      delta_rule_step_gpu.delta_rule_step, interpret=True)
  got, want = (jax.grad(functools.partial(loss, f), argnums=(0, 1))(
      inputs, state) for f in (kernel, plain.delta_rule))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5),
               got, want)


@needs_new
def test_the_table_has_it():
  inputs, state = make('head', 'head', 'head', **SHAPE)
  got = KERNELS['delta_rule']['pallas_gpu'](
      delta_chunk.Inputs(**inputs), state, None, None, SCALE, interpret=True)
  for a, b in zip(got, oracle(inputs, state), strict=True):
    assert error(a, b) < 3e-7


@pytest.mark.parametrize('shape, length, reason', [
    (dict(width=24, values=64), 1, 'multiple of 16'),
    (dict(width=32, values=48), 1, 'of 32'),
    (dict(width=512, values=32), 1, 'at most 256'),
    (dict(width=32, values=64), 2, 'one token, not 2'),
    (dict(width=32, values=64, batch=0), 1, 'no work')], ids=str)
def test_declines(shape, length, reason, monkeypatch):
  monkeypatch.setattr(delta_rule_step_gpu, 'OLDEST_JAX', (0, 7))
  inputs, _ = make('head', 'head', 'head', **shape)
  inputs = {n: np.repeat(x, length, axis=1) for n, x in inputs.items()}
  assert reason in DECLINES['delta_rule']['pallas_gpu'](**inputs)


def test_declines_an_older_jax(monkeypatch):
  monkeypatch.setattr(delta_rule_step_gpu, 'OLDEST_JAX', (99, 0))
  inputs, _ = make('head', 'head', 'head', **SHAPE)
  assert 'jax 99.0 or later' in delta_rule_step_gpu.declines(
      inputs['q'], inputs['v'])
  with pytest.raises(ValueError, match='take another implementation'):
    run(*make('head', 'head', 'head', **SHAPE))


@pytest.mark.parametrize('capability, batch, asked, reason', [
    ('8.0', 200, 'pallas_gpu', '9.0 or more, this one is 8.0'),
    ('gfx942', 200, None, 'needs an NVIDIA GPU'),
    ('10.0', 200, None, 'never run at compute capability 10.0'),
    ('9.0', 100, None, 'below 24 MiB of states, these are 12 MiB')])
def test_what_the_op_makes_of_it(capability, batch, asked, reason, monkeypatch):
  monkeypatch.setattr(delta_rule_step_gpu, 'OLDEST_JAX', (0, 7))
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(jax, 'devices', lambda: [
      types.SimpleNamespace(compute_capability=capability)])
  inputs, state = make('head', 'head', 'head', heads=2, key_heads=1, width=128,
                       values=128, batch=1)
  wide = lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
  seen = {}

  def choose(op, implementation, candidates):
    seen.update(candidates)
    return candidates['xla']

  monkeypatch.setattr(dispatch, 'choose', choose)
  jax.eval_shape(functools.partial(delta_rule, implementation=asked),
                 *(wide(x) for x in (*inputs.values(), state)))
  assert reason in seen['pallas_gpu']


def test_without_a_gpu_it_cannot_run():
  inputs, state = make('head', 'head', 'head', **SHAPE)
  with pytest.raises(ValueError, match='needs a GPU'):
    delta_rule(**inputs, state=state, implementation='pallas_gpu')
