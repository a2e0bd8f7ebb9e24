"""Values of the decode kernel, interpreted, against the equation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import KERNELS, delta_rule_step_tpu, plain
from statejax.ops import delta_chunk
from statejax.ops.delta_rule import delta_rule

SCALE = 0.7


@functools.partial(
    jax.jit, static_argnames=('interpret',), donate_argnames=('state',),
    compiler_options={'xla_backend_optimization_level': 0})
def step(inputs, state, n_valid=None, *, interpret):
  return delta_rule_step_tpu.delta_rule_step(
      **inputs, state=state, n_valid=n_valid, scale=SCALE, interpret=interpret)


def make(decay, erase, write, *, batch=2, key_heads=1, heads=2, width=8,
         values=6, dtype=np.float32):
  """Random inputs of one token, and a state."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)

  def gate(kind, channels):
    if kind is None:
      return None
    shape = (batch, 1, heads) + (channels,) * (kind == 'channel')
    return 1 / (1 + np.exp(-normal(*shape)))

  inputs = dict(
      q=normal(batch, 1, key_heads, width),
      k=normal(batch, 1, key_heads, width),
      v=normal(batch, 1, heads, values), log_decay=gate(decay, width),
      erase=gate(erase, width), write=gate(write, values))
  if decay is not None:
    inputs['log_decay'] *= -1
  for name in 'qkv':
    inputs[name] = inputs[name].astype(dtype)
  return inputs, normal(batch, heads, width, values)


def oracle(inputs, state):
  """The equation of one token, in float64."""
  wide = {n: None if x is None else np.asarray(x, np.float64)[:, 0]
          for n, x in inputs.items()}
  groups = state.shape[1] // wide['q'].shape[1]
  q, k = (np.repeat(wide[n], groups, axis=1) for n in 'qk')
  decay, erase, write = (
      x if x is None or x.ndim == 3 else x[..., None]
      for x in (wide['log_decay'], wide['erase'], wide['write']))
  decayed = state.astype(np.float64)
  if decay is not None:
    decayed = np.exp(decay)[..., None] * decayed
  residual = wide['v'] if write is None else write * wide['v']
  if erase is not None:
    residual = residual - np.einsum('bhk,bhkv->bhv', erase * k, decayed)
  after = decayed + k[..., None] * residual[..., None, :]
  return SCALE * np.einsum('bhk,bhkv->bhv', q, after)[:, None], after


def error(got, want):
  got = np.asarray(got, np.float64)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def run(inputs, state, n_valid=None, interpret=True):
  """A copy is donated: the caller's state is compared afterwards."""
  n_valid = None if n_valid is None else np.asarray(n_valid, np.int32)
  return step(inputs, jnp.array(state), n_valid, interpret=interpret)


def check(inputs, state, tolerance=3e-7):
  for got, want in zip(run(inputs, state), oracle(inputs, state), strict=True):
    assert error(got, want) < tolerance
    assert got.shape == want.shape


@pytest.mark.parametrize('decay', ['head', 'channel', None])
@pytest.mark.parametrize('erase, write', [
    ('head', 'head'), ('channel', 'channel'), (None, None),
    ('channel', 'head')])
def test_gates(decay, erase, write):
  check(*make(decay, erase, write))


@pytest.mark.parametrize('shape', [
    dict(heads=16, key_heads=16),  # two blocks of eight
    dict(heads=16, key_heads=1),  # a block is half a group
    dict(heads=6, key_heads=3),  # one block, not whole tiles
    dict(width=24, values=130),
    dict(width=130, values=8),
    dict(heads=16, key_heads=8, width=130),  # rows taken one by one
], ids=str)
def test_shapes(shape):
  check(*make('channel', 'head', 'head', **shape))


@pytest.mark.parametrize('n_valid', [
    [1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0]], ids=str)
def test_rows_without_a_token(n_valid):
  # Two blocks of heads; memory that nobody wrote reads as NaN.
  inputs, state = make(
      'head', 'head', 'head', batch=3, heads=16, key_heads=2, values=2)
  real = np.asarray(n_valid) > 0
  for x in inputs.values():
    x[~real] = np.nan
  state[~real] = -0.0
  state[~real, 0] = np.nan
  y, after = run(inputs, state, n_valid, interpret=pltpu.InterpretParams())
  want = oracle(inputs, state)
  assert not np.asarray(y)[~real].any()
  np.testing.assert_array_equal(
      np.asarray(after)[~real].view(np.int32), state[~real].view(np.int32))
  if real.any():
    assert error(y[real], want[0][real]) < 3e-7
    assert error(after[real], want[1][real]) < 3e-7


def test_decay_of_zero_forgets():
  inputs, state = make('channel', 'head', 'head')
  inputs['log_decay'][:, :, 1] = -np.inf
  check(inputs, state)


def test_bfloat16_inputs_lose_nothing_more():
  inputs, state = make('head', 'head', 'head', dtype=jnp.bfloat16)
  y, after = run(inputs, state)
  want = oracle(inputs, state)
  assert y.dtype == jnp.bfloat16 and after.dtype == jnp.float32
  assert error(y, want[0]) < 4e-3
  assert error(after, want[1]) < 3e-7


@pytest.mark.parametrize('shape, size', [
    ((1, 32, 16, 128, 128), 8), ((8, 32, 16, 128, 128), 16),
    ((8, 32, 32, 128, 128), 16), ((8, 12, 12, 128, 128), 12),
    ((8, 24, 8, 128, 128), 24), ((8, 64, 1, 256, 512), 8)])
def test_head_block(shape, size):
  assert delta_rule_step_tpu.head_block(*shape) == size


def test_gradient():
  inputs, state = make('channel', 'head', 'head')
  n_valid = np.array([1, 0], np.int32)
  names = ('q', 'k', 'v', 'log_decay', 'erase', 'write')

  def loss(kernel, inputs, state):
    y, after = kernel(*[inputs[n] for n in names], state, n_valid, scale=SCALE)
    return jnp.sum(y ** 2) + jnp.sum(after ** 3)

  kernel = functools.partial(
      delta_rule_step_tpu.delta_rule_step, interpret=True)
  got, want = (jax.jit(jax.grad(functools.partial(loss, f), argnums=(0, 1)))(
      inputs, state) for f in (kernel, plain.delta_rule))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5),
               got, want)
  assert all(np.any(x) for x in jax.tree.leaves(got))


def test_the_op_uses_it_for_one_token():
  inputs, state = make('channel', 'head', 'head')
  y, after = KERNELS['delta_rule']['pallas_tpu'](
      delta_chunk.Inputs(**inputs), state, None, None, SCALE, interpret=True)
  want = oracle(inputs, state)
  assert error(y, want[0]) < 3e-7 and error(after, want[1]) < 3e-7
  with pytest.raises(ValueError, match='needs a TPU'):
    delta_rule(
        **inputs, state=state, implementation='pallas_tpu')
