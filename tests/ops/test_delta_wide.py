"""Groups of chunks give what one chunk after the other gives."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import FAST, error, make, random_weights

from statejax.ops import delta_chunk, delta_wide
from statejax.ops.delta_rule import delta_rule

LENGTH, SIZE = 39, 8  # five chunks, the last one cut
N_VALID = np.array([37, 0], np.int32)
SEGMENTS = np.array([[0] * 6 + [1] * 15 + [2] * 18] * 2, np.int32)


def arguments(decay, erase, write):
  """Inputs in the layout of the op, with gates that forget at once."""
  args = make(decay, erase, write, length=LENGTH)
  if not isinstance(decay, int):
    spikes = np.random.default_rng(1).random(args['log_decay'].shape)
    args['log_decay'] -= 300 * (spikes < 0.1).astype(np.float32)
  state = args.pop('state')
  gates = {n: None if isinstance(args[n], int) else args[n]
           for n in ('log_decay', 'erase', 'write')}
  if gates['log_decay'] is None:  # documents need one
    gates['log_decay'] = np.zeros((2, LENGTH, 4), np.float32)
  return delta_chunk.Inputs(args['q'], args['k'], args['v'], **gates), state


def run(form, inputs, state, packed, gradient):
  """Returns y, the final state and the gradients of all."""
  weights = random_weights({'v': inputs.v, 'state': state})
  changes = SEGMENTS[:, 1:] != SEGMENTS[:, :-1]
  resets = np.pad(changes, [(0, 0), (1, 0)])

  def loss(inputs, state):
    out = form(inputs, state, N_VALID if packed else None,
               resets if packed else None, scale=0.7, chunk_size=SIZE)
    return sum(jnp.vdot(w, x) for w, x in zip(weights, out)), out

  function = loss
  if gradient:
    function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  out, *grads = jax.jit(function, compiler_options=FAST)(inputs, state)
  return (out[1], *grads) if gradient else (grads[0],)


def compare(kinds, packed, chunks, gradient):
  """Holds one form against the other; the oracle is held against that one."""
  inputs, state = arguments(*kinds)
  group = chunks * SIZE * state.shape[0] * state.shape[1]
  wide = functools.partial(delta_wide.chunked, group=group)
  got, want = (run(f, inputs, state, packed, gradient)
               for f in (wide, delta_chunk.chunked))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.isfinite(a).all()
    assert error(a, b) < 2e-6 or not np.any(b)
    np.testing.assert_array_equal(a == 0, b == 0)
  if packed:
    np.testing.assert_array_equal(got[0][1][1], state[1])


@pytest.mark.parametrize('kinds, packed, chunks, gradient', [
    pytest.param(('channel', 'head', 'head'), True, 2, True,
                 marks=pytest.mark.slow),
    (('head', 'head', 'head'), True, 2, False),
    (('head', 0, 1), False, 9, False)])
def test_as_chunk_by_chunk(kinds, packed, chunks, gradient):
  compare(kinds, packed, chunks, gradient)


@pytest.mark.slow
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('chunks', [1, 2, 9])
@pytest.mark.parametrize('kinds', [
    ('head', 'head', 'head'), ('channel', 'channel', 'channel'),
    ('channel', 0, 1), ('head', 0, 'head'), (0, 'head', 1)], ids=str)
def test_every_kind(kinds, packed, chunks):
  compare(kinds, packed, chunks, True)


def test_a_gpu_takes_it(monkeypatch):
  """And no other backend; what runs is seen by the shapes it multiplies."""
  args = make('head', 'head', 'head', length=64)
  module = sys.modules[delta_rule.__module__]

  def program():
    jax.clear_caches()
    return str(jax.make_jaxpr(functools.partial(
        delta_rule, implementation='xla', chunk_size=16))(*args.values()))

  assert 'f32[8,2,2,8,8]' not in program()  # no group of four chunks
  monkeypatch.setattr(module.jax, 'default_backend', lambda: 'gpu')
  assert 'f32[8,2,2,8,8]' in program()
