"""Members of the family, static gates, long runs, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import (
  DECAYS,
  both,
  cast,
  check,
  error,
  jit,
  make,
  oracle,
  tokens,
  x64,
)

from statejax.ops.delta_rule import delta_rule, delta_rule_recurrent


@pytest.mark.parametrize('gates', [
    (0, 'head', 'head'), (0, 2, 'channel')], ids=str)
def test_no_decay(gates):
  args = make(*gates, length=13)
  check(both(args, chunk_size=8), oracle(args), 2e-6, 1e-5)
  one = tokens(args, 0, 1)
  for a, b in zip(
      delta_rule(**one), delta_rule(**one, implementation='reference')
  ):
    assert error(a, b) < 1e-6
  segments = np.array([[0] * 5 + [1] * 8] * 2, np.int32)
  got = delta_rule(**args, segment_ids=segments, chunk_size=8)
  want = delta_rule_recurrent(**args, segment_ids=segments)
  assert max(error(a, b) for a, b in zip(got, want)) < 2e-6


def test_static_gates_are_left_out():
  """No exponential without decay, no inverse without erase."""
  def cost(**gates):
    args = {**make(length=64, width=16, values=16), **gates}
    names = tuple(n for n, x in args.items() if not isinstance(x, int))
    run = lambda *xs: jax.vjp(
        lambda *xs: delta_rule(**args | dict(zip(names, xs)), chunk_size=32),
        *xs,
    )[1]((args['v'], args['state']))
    lowered = jax.jit(run).lower(*(args[n] for n in names))
    text = lowered.as_text()
    return text.count('stablehlo.exponential'), text.count('dot_general')

  full, bare = cost(), cost(log_decay=0)
  assert full[0] and not bare[0] and bare[1] < full[1]
  # Two products for each level of the inverse but the first.
  assert cost(erase=0)[1] <= full[1] - 8


def test_every_argument_by_keyword():
  args = make(length=2)
  got = delta_rule(
      **args, n_valid=None, segment_ids=None, scale=None, chunk_size=None,
      implementation=None,
  )
  want = delta_rule(*args.values(), None, None)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('decay', DECAYS)
def test_several_writes_per_token(decay):
  """DeltaProduct: time is expanded, the last micro-step of a token reads."""
  writes, length = 3, 7
  args = make(decay, length=writes * length, dtype='float64')
  first = np.arange(writes * length) % writes == 0
  shape = (-1,) + (1,) * (args['log_decay'].ndim - 2)
  args['log_decay'] = np.where(first.reshape(shape), args['log_decay'], 0)
  group = lambda x: x.reshape(2, length, writes, *x.shape[2:])
  repeat = lambda x: np.repeat(x, 2, axis=-2)
  q, k = repeat(args['q']), group(repeat(args['k']))
  v, erase, write = (group(args[n]) for n in ('v', 'erase', 'write'))
  decays = np.exp(args['log_decay'][:, ::writes])
  decays = decays[..., None] if decays.ndim == 3 else decays
  state, want = args['state'].copy(), []
  for t in range(length):
    state = decays[:, t, :, :, None] * state
    for i in range(writes):
      one = k[:, t, i]
      recalled = np.einsum('bhk,bhkv->bhv', one, state)
      residual = (write[:, t, i, :, None] * v[:, t, i]
                  - erase[:, t, i, :, None] * recalled)
      state = state + one[..., None] * residual[..., None, :]
    read = q[:, writes * t + writes - 1]
    want.append(np.einsum('bhk,bhkv->bhv', read, state) / np.sqrt(8))
  with x64():
    y, final = delta_rule(**args, chunk_size=8)
    assert error(y[:, writes - 1::writes], np.stack(want, 1)) < 1e-13
    assert error(final, state) < 1e-13


def test_negative_eigenvalues():
  """Erasing twice reflects the memory along the key; two times are one."""
  args = make(0, 2, 1, length=2, key_heads=4)
  args['v'] = np.zeros_like(args['v'])
  k = args['k'] = np.repeat(args['k'][:, :1], 2, axis=1)
  _, once = delta_rule(**args, n_valid=np.ones(2, np.int32))
  recall = lambda s: np.einsum('bhk,bhkv->bhv', k[:, 0], s)
  assert error(recall(once), -recall(args['state'])) < 2e-6
  assert error(delta_rule(**args)[1], args['state']) < 2e-6


def test_one_hot_keys_are_slots():
  """Erase and write of 1: a slot holds what was written last."""
  args = make(0, 1, 1, length=21, key_heads=4)
  slot = np.random.default_rng(0).integers(0, 8, (2, 21, 4))
  args['k'] = args['q'] = np.eye(8, dtype=np.float32)[slot]
  y, state = delta_rule(**args, scale=1, chunk_size=16)
  assert error(y, args['v']) < 1e-6
  want = args['state'].copy()
  for b, t, h in np.ndindex(2, 21, 4):
    want[b, h, slot[b, t, h]] = args['v'][b, t, h]
  assert error(state, want) < 1e-6


@pytest.mark.parametrize('decay', DECAYS)
def test_float64_everywhere(decay, float64):
  args = cast(make(decay), 'float64')
  grad = jax.grad(
      lambda args: sum(map(jnp.sum, delta_rule(**args, chunk_size=8)))
  )
  assert 'f32' not in str(jax.make_jaxpr(grad)(args))


@pytest.mark.parametrize('decay', DECAYS)
def test_split_everywhere(decay):
  args = make(decay, length=19)
  run = jit(functools.partial(delta_rule, chunk_size=8))
  full = np.full(2, 19, np.int32)
  y, state = run(**args, n_valid=full)
  for at in range(20):
    first, middle = run(**args, n_valid=full * 0 + at)
    rest = {n: np.roll(x, -at, axis=1) for n, x in args.items()
            if n != 'state'}
    second, last = run(**rest, state=middle, n_valid=full - at)
    joined = np.concatenate([first[:, :at], second[:, :19 - at]], axis=1)
    assert error(joined, y) < 1e-6 and error(last, state) < 1e-6, at


# Length.


def drift(decay, length, pieces):
  """Relative error of float32 by piece of the sequence, and of the state."""
  args = make(
      decay, length=length, batch=1, key_heads=1, heads=1, width=8, values=8
  )
  static = {'log_decay': args.pop('log_decay')} if decay == 0 else {}
  run = lambda **options: jit(functools.partial(delta_rule, **options))
  y, state = run(**static)(**args)
  with x64():
    want, last = run(**static, implementation='reference')(
        **cast(args, 'float64')
    )
  at = length // pieces
  return [error(y[:, i * at:(i + 1) * at], want[:, i * at:(i + 1) * at])
          for i in range(pieces)] + [error(state, last)]


@pytest.mark.parametrize('decay', [0, 'head', 'channel'])
@pytest.mark.parametrize('length', [
    4096, pytest.param(131_072, marks=pytest.mark.slow)])
def test_error_does_not_grow_with_length(decay, length):
  errors = drift(decay, length, 8)
  assert max(errors) < 2e-6
  assert errors[-2] < 3 * errors[0], errors


def test_memory_of_the_gradient():
  """At T=4096, H=4, K=V=128; mostly the states between chunks, 32 MiB."""
  args = make(
      'channel', length=4096, batch=1, key_heads=4, width=128, values=128
  )
  loss = lambda args: sum(
      jnp.vdot(x, x) for x in delta_rule(**args, chunk_size=32)
  )
  compiled = jit(jax.grad(loss)).lower(args).compile()
  assert compiled.memory_analysis().temp_size_in_bytes <= 80 * 2 ** 20
