"""The laws of the delta rule: documents, padding, splits, composition."""

import functools

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
  random_weights,
  tokens,
)

from statejax.ops.delta_rule import delta_rule, delta_rule_step

# Documents and padding.


@pytest.mark.parametrize('decay', DECAYS)
@pytest.mark.parametrize('border', [
    8, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7, 9))])
def test_packed_is_separate(decay, border):
  args = make(decay, length=19, batch=1)
  segments = np.where(np.arange(19) < border, 5, 3)[None].astype(np.int32)
  weights = random_weights(args)
  got = both(args, None, segments, weights, chunk_size=8)
  # The second document moved to the front and alone; the rest is padding.
  order = np.roll(np.arange(19), -border)
  alone = {n: x if n == 'state' else x[:, order] for n, x in args.items()}
  alone['state'] = np.zeros_like(args['state'])
  count = np.array([19 - border], np.int32)
  moved = [weights[0][:, order], weights[1]]
  (y, state), grads = oracle(alone, count, segments * 0, moved)
  second = tokens(got[1], border, 19)
  del second['state'], grads['state']
  check(
      ((got[0][0][:, border:], got[0][1]), second),
      ((y[:, :19 - border], state), tokens(grads, 0, 19 - border)), 2e-6,
  )
  # The first document, whose final state nobody sees.
  count = np.array([border], np.int32)
  first = [weights[0], np.zeros_like(weights[1])]
  (y, _), grads = oracle(args, count, segments * 0, first)
  assert error(got[0][0][:, :border], y[:, :border]) < 2e-6
  for name, grad in tokens(grads, 0, border).items():
    assert error(tokens(got[1], 0, border)[name], grad) < 1e-5, name


@pytest.mark.parametrize('decay', DECAYS)
def test_no_gradient_crosses_a_border(decay):
  args = make(decay, length=19, batch=1)
  at = np.arange(19)
  segments = ((at >= 5).astype(np.int32) + (at >= 13))[None]
  for low, high in ((0, 5), (5, 13), (13, 19)):
    y, state = random_weights(args)
    y = np.where(((at >= low) & (at < high))[None, :, None, None], y, 0)
    state = state * (high == 19)
    _, grads = both(args, None, segments, [y, state], chunk_size=8)
    assert (np.abs(grads.pop('state')).max() > 0) == (low == 0)
    for name, grad in grads.items():
      assert np.abs(grad[:, low:high]).max() > 0, name
      outside = np.delete(np.asarray(grad), np.s_[low:high], axis=1)
      np.testing.assert_array_equal(outside, 0, err_msg=name)


@pytest.mark.parametrize('decay, length, implementation', [
    ('head', 21, 'xla'), ('channel', 21, 'xla'), ('channel', 1, 'xla'),
    ('head', 21, 'reference'),
])
def test_padding(decay, length, implementation):
  clean = make(decay, length=length, batch=3)
  clean['state'][1, 0, :2] = -0.0
  n_valid = np.array([length, 0, (length + 1) // 2], np.int32)
  padded = np.arange(length)[None] >= n_valid[:, None]
  segments = np.where(padded, np.arange(length)[None], 0).astype(np.int32)
  options = dict(implementation=implementation, chunk_size=8)
  want = both(clean, n_valid, segments * 0, **options)
  for filler in (np.nan, 1e9):
    dirty = {
        n: x if n == 'state' else np.where(
            padded.reshape(padded.shape + (1,) * (x.ndim - 2)),
            np.float32(filler), x,
        ) for n, x in clean.items()
    }
    got = both(dirty, n_valid, segments, **options)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    y, state = map(np.asarray, got[0])
    np.testing.assert_array_equal(y[padded], 0)
    assert state[1].tobytes() == clean['state'][1].tobytes()
    for name, grad in got[1].items():
      if name != 'state':
        np.testing.assert_array_equal(np.asarray(grad)[padded], 0)


# Composition.


@pytest.mark.parametrize('decay', DECAYS)
def test_split(decay):
  """Values and gradients of several calls equal those of one."""
  args = make(decay, length=14)

  def pieces(args, step, run):
    state, ys = args['state'], []
    for low in range(0, 14, step):
      part = tokens(args, low, low + step) | {'state': state}
      y, state = run(**part)
      ys.append(y)
    return jnp.concatenate(ys, axis=1), state

  def loss(args, step):
    out = pieces(args, step, functools.partial(delta_rule, chunk_size=8))
    return sum(jnp.sum(jnp.sin(x)) for x in out), out

  grad = jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  (_, out), grads = grad(args, 14)
  (_, split), split_grads = grad(args, 7)
  check((split, split_grads), (out, grads), 2e-6, 1e-5)
  check((pieces(args, 1, jit(delta_rule)), {}), (out, {}), 2e-6)


def test_transformations_compose():
  args = make(length=12)
  run = functools.partial(delta_rule, chunk_size=8)

  def loss(args):
    out = run(**args)
    return sum(jnp.sum(jnp.sin(x)) for x in out), out

  grad = jax.value_and_grad(loss, has_aux=True)
  (_, out), plain = jit(grad)(args)
  _, remat = jit(jax.value_and_grad(jax.checkpoint(loss), has_aux=True))(args)
  rows = {n: x[:, None] for n, x in args.items()}
  (_, by_row), mapped = jit(jax.vmap(grad))(rows)
  # Another batch shape is another program: some versions round differently.
  for a, b in zip(by_row, out):
    assert error(a[:, 0], b) < 1e-6
  for name in args:
    assert error(remat[name], plain[name]) < 1e-6
    assert error(mapped[name][:, 0], plain[name]) < 1e-6


@pytest.mark.parametrize('decay', DECAYS)
def test_rows_are_independent(decay):
  args = make(decay, length=12, batch=3)
  run = jit(functools.partial(delta_rule, chunk_size=8))
  order = np.array([2, 0, 1])
  permuted = run(**{n: x[order] for n, x in args.items()})
  for a, b in zip(permuted, run(**args)):
    np.testing.assert_array_equal(a, b[order])


@pytest.mark.parametrize('length', [1, 5])
def test_state_is_a_fixed_point_and_donates(length):
  args = jax.tree.map(jnp.asarray, make(length=length))
  state = args.pop('state')
  step = jax.jit(
      lambda state, args: delta_rule(**args, state=state), donate_argnums=0
  )
  compiled = step.lower(state, args).compile()
  assert compiled.memory_analysis().alias_size_in_bytes == state.nbytes
  with jax.numpy_dtype_promotion('strict'):
    y, after = jax.eval_shape(step, state, args)
  assert (after.shape, after.dtype) == (state.shape, state.dtype)
  assert not y.weak_type and not after.weak_type


def test_step_is_the_op():
  args = make('channel', length=1)
  want = delta_rule(**args)
  got = jax.jit(delta_rule_step)(**args)
  assert max(error(a, b) for a, b in zip(got, want)) < 1e-6
  with pytest.raises(ValueError, match='T=1'):
    delta_rule_step(**make(length=2))


@pytest.mark.parametrize('change, message', [
    (dict(k=np.zeros((2, 21, 2, 7), np.float32)), '^k: expected'),
    (dict(v=np.zeros((2, 21, 3, 6), np.float32)), 'multiple of HK=2'),
    (dict(log_decay=np.zeros((2, 21, 4, 7), np.float32)), '^log_decay: exp'),
    (dict(write=np.zeros((2, 21, 4, 8), np.float32)), '^write: expected'),
    (dict(state=np.zeros((2, 4, 6, 8), np.float32)), '^state: expected'),
    (dict(state=np.zeros((2, 4, 8, 6), np.float16)), 'never rounded'),
    (dict(n_valid=np.zeros((2,), np.float32)), '^n_valid: expected'),
    (dict(segment_ids=np.zeros((2, 20), np.int32)), '^segment_ids: expected'),
    (dict(q=np.zeros((2, 21, 2, 8), np.int32)), '^q: expected'),
    (dict(q=[[1.0]]), '^q: expected an array, got list'),
    (dict(log_decay=1), '^log_decay: expected at most 0'),
    (dict(erase=None), '^erase: expected an array'),
    (dict(erase=np.float32(0)), '^erase: .* Python scalar, got an array'),
    (dict(chunk_size=24), 'power of two'),
    (dict(chunk_size='16'), 'power of two'),
    (dict(implementation='cuda'), 'available: xla, reference'),
])
def test_errors(change, message):
  with pytest.raises(ValueError, match=message):
    delta_rule(**{**make(), **change})
