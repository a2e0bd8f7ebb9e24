"""The delta rule against its recurrence in float64, and the laws it keeps."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax.ops import delta_rule as module
from statejax.ops.delta_rule import delta_rule, delta_rule_step

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
ABOUT = json.loads((GOLDEN / 'ops.json').read_text())
NAMES = ('q', 'k', 'v', 'log_decay', 'erase', 'write', 'state')
DECAYS = ('head', 'channel')


def make(
    decay='head', erase='head', write='head', *, length=21, batch=2,
    key_heads=2, heads=4, width=8, values=6, dtype='float32', seed=0,
):
  """Random arguments; K, V, HK and HV all differ."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.standard_normal(shape)

  def unit(*shape):
    x = normal(*shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  def gate(kind, channels):
    if isinstance(kind, int):
      return kind
    shape = (batch, length, heads)
    return normal(*shape if kind == 'head' else (*shape, channels))

  squash = lambda x: x if isinstance(x, int) else 1 / (1 + np.exp(-x))
  log_decay = gate(decay, width)
  args = dict(
      q=unit(batch, length, key_heads, width),
      k=unit(batch, length, key_heads, width),
      v=normal(batch, length, heads, values),
      log_decay=log_decay if log_decay is decay else -np.log1p(np.exp(log_decay)),
      erase=squash(gate(erase, width)),
      write=squash(gate(write, values)),
      state=normal(batch, heads, width, values),
  )
  return cast(args, dtype)


def cast(args, dtype):
  return {
      name: x if isinstance(x, int) else np.asarray(x, dtype)
      for name, x in args.items()
  }


def both(args, n_valid=None, segment_ids=None, seed=1, **options):
  """Returns (y, state) and the gradients of a random weighting of both."""
  arrays = {n: x for n, x in args.items() if not isinstance(x, int)}
  static = tuple((n, x) for n, x in args.items() if isinstance(x, int))
  rng = np.random.default_rng(seed)
  v, state = args['v'], args['state']
  weights = [
      np.asarray(rng.standard_normal(x.shape), state.dtype) for x in (v, state)
  ]
  return _both(
      arrays, weights, n_valid, segment_ids, static=static,
      options=tuple(options.items()),
  )


@functools.partial(jax.jit, static_argnames=('static', 'options'))
def _both(arrays, weights, n_valid, segment_ids, *, static, options):
  def loss(arrays):
    out = delta_rule(
        **arrays, **dict(static), n_valid=n_valid, segment_ids=segment_ids,
        **dict(options),
    )
    return sum(jnp.vdot(w, x.astype(w.dtype)) for w, x in zip(weights, out)), out

  (_, out), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
  return out, grads


def oracle(args, *rest, **options):
  """`both` of the recurrence in float64."""
  with module_x64():
    return jax.tree.map(np.asarray, both(
        cast(args, 'float64'), *rest, implementation='reference', **options
    ))


def module_x64():
  if hasattr(jax, 'enable_x64'):
    return jax.enable_x64(True)
  return jax.experimental.enable_x64()


def error(got, want):
  """Relative RMS; an exact zero must be met exactly."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  size = np.sqrt(np.mean(want ** 2)) if want.size else 0.0
  off = np.sqrt(np.mean((got - want) ** 2)) if want.size else 0.0
  return off / size if size else off


def check(got, want, values, gradients=None):
  """Compares outputs and gradients, naming the one that is off."""
  for name, a, b in zip(('y', 'state'), got[0], want[0], strict=True):
    assert error(a, b) <= values, (name, error(a, b))
  for name in want[1]:
    e = error(got[1][name], want[1][name])
    assert e <= (gradients or 5 * values), (f'd_{name}', e)


def cut(tree, length):
  """The first tokens of everything that has a time axis."""
  (y, state), grads = tree
  grads = {n: x if n == 'state' else x[:, :length] for n, x in grads.items()}
  return (y[:, :length], state), grads


# Golden vectors.


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize(
    'name', [n for n, about in ABOUT.items() if about['op'] in ('gdn', 'kda')]
)
def test_golden(name, implementation):
  arrays = np.load(GOLDEN / f'{name}.npz')
  about = ABOUT[name]
  limits = [10 * e for e in about['float32_error']['chunk']]

  @jax.jit
  def run(x):
    norm = lambda x: x
    if about['use_qk_l2norm']:
      norm = lambda x: x * jax.lax.rsqrt(
          jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6
      )
    y, state = delta_rule(
        norm(x['q']), norm(x['k']), x['v'], x['g'], x['beta'], x['beta'],
        x['initial_state'], implementation=implementation,
    )
    loss = 0.0
    if 'loss_w_out' in arrays:
      loss = jnp.sum(y * arrays['loss_w_out'])
      loss += jnp.sum(state * arrays['loss_w_state'])
    return loss, (y, state)

  names = ('q', 'k', 'v', 'g', 'beta', 'initial_state')
  x = {n: arrays[n] for n in names if n in arrays}
  if 'initial_state' not in x:
    x['initial_state'] = np.zeros_like(arrays['final_state'])
  if 'loss_w_out' in arrays:
    (_, out), grads = jax.value_and_grad(run, has_aux=True)(x)
    for n, grad in grads.items():
      np.testing.assert_allclose(
          grad, arrays[f'd_{n}'], atol=1e-5 * np.abs(arrays[f'd_{n}']).max(),
          rtol=0, err_msg=n,
      )
  else:
    _, out = run(x)
  for got, want, limit in zip(out, ('out', 'final_state'), limits):
    assert np.abs(got - arrays[want]).max() <= limit, want


# Against the recurrence.


@pytest.mark.parametrize('decay', DECAYS)
def test_lengths_float64(decay, float64):
  args = make(decay, length=37, dtype='float64')
  for length in (1, 7, 8, 9, 21, 37):
    n_valid = np.full([2], length, np.int32)
    want = both(args, n_valid, implementation='reference')
    short = {
        n: x if n == 'state' else x[:, :length] for n, x in args.items()
    }
    weights = both(short, chunk_size=8)
    want = cut(want, length)
    # The weights of y differ in shape, so values only; gradients below.
    assert error(weights[0][0], want[0][0]) < 1e-13
    assert error(weights[0][1], want[0][1]) < 1e-13
    check(both(short, chunk_size=8), oracle(short), 1e-13, 1e-12)


@pytest.mark.parametrize('decay', DECAYS)
def test_no_tokens(decay):
  args = make(decay, length=0)
  args['state'][0, 0, 0, 0] = -0.0
  for implementation in ('reference', 'xla'):
    y, state = delta_rule(**args, implementation=implementation)
    assert y.shape == args['v'].shape
    assert np.asarray(state).tobytes() == args['state'].tobytes()


@pytest.mark.parametrize('decay', DECAYS)
def test_chunk_sizes_agree(decay):
  args = make(decay, length=130, batch=1, key_heads=1, heads=1, width=4)
  want = delta_rule(**args, implementation='reference')
  for size in (2, 8, 16, 32, 64, 128):
    got = jax.jit(functools.partial(delta_rule, chunk_size=size))(**args)
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
  run = lambda *x: delta_rule(*x, chunk_size=4)
  jax.test_util.check_grads(
      run, [args[n] for n in NAMES], order=1, modes=['rev'], rtol=1e-6
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
  check(both(args), oracle(args), 5e-5 if beta == 2 else 2e-6, 1e-4)


@pytest.mark.parametrize('decay', DECAYS)
def test_small_residual(decay):
  """L11: v within 1e-3 of what the key recalls; the difference is kept."""
  args = make(decay, 1, 1, length=16, key_heads=4, width=16)
  args['log_decay'] = np.zeros_like(args['log_decay'])
  # Orthogonal keys: each recall is of the first state alone.
  basis = np.linalg.qr(np.random.default_rng(5).standard_normal((16, 16)))[0]
  args['k'] = np.ascontiguousarray(np.broadcast_to(
      basis[None, :, None], args['k'].shape
  ), np.float32)
  recalled = np.einsum('bthk,bhkv->bthv', args['k'], args['state'])
  args['v'] = (recalled + 1e-3 * args['v']).astype(np.float32)
  got, want = both(args, chunk_size=8), oracle(args)
  change = got[0][1] - args['state']
  assert error(change, want[0][1] - args['state']) < 1e-3


# Documents and padding.


@pytest.mark.parametrize('decay', DECAYS)
@pytest.mark.parametrize('border', [1, 7, 8, 9])
def test_packed_is_separate(decay, border):
  args = make(decay, length=19, batch=1)
  segments = np.where(np.arange(19) < border, 5, 3)[None].astype(np.int32)
  got = both(args, None, segments, chunk_size=8)
  want = oracle(args, None, segments)
  check(got, want, 2e-6)
  second = {n: x if n == 'state' else x[:, border:] for n, x in args.items()}
  second['state'] = np.zeros_like(args['state'])
  y, state = delta_rule(**second, chunk_size=8)
  assert error(got[0][0][:, border:], y) < 2e-6
  assert error(got[0][1], state) < 2e-6


@pytest.mark.parametrize('decay', DECAYS)
def test_no_gradient_crosses_a_border(decay):
  args = make(decay, length=40, batch=1)
  segments = (np.arange(40)[None] >= np.array([[13]])).astype(np.int32)
  segments += np.arange(40)[None] >= 30
  for implementation in ('xla', 'reference'):
    for low, high in ((0, 13), (13, 30), (30, 40)):

      @jax.jit
      def loss(args, low=low, high=high, implementation=implementation):
        y, state = delta_rule(
            **args, segment_ids=segments, chunk_size=8,
            implementation=implementation,
        )
        return jnp.sum(y[:, low:high] ** 2) + (high == 40) * jnp.sum(state ** 2)

      for name, grad in jax.grad(loss)(args).items():
        if name == 'state':
          assert (np.abs(grad).max() > 0) == (low == 0)
        else:
          assert np.abs(grad[:, low:high]).max() > 0, name
          outside = np.delete(np.asarray(grad), np.s_[low:high], axis=1)
          np.testing.assert_array_equal(outside, 0, err_msg=name)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@pytest.mark.parametrize('decay', DECAYS)
@pytest.mark.parametrize('length', [1, 21])
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
  """Values and gradients of two calls equal those of one."""
  args = make(decay, length=21)

  def loss(args, borders):
    x = dict(args)
    state, ys = x.pop('state'), []
    for low, high in zip(borders[:-1], borders[1:]):
      part = {n: a[:, low:high] for n, a in x.items()}
      y, state = delta_rule(**part, state=state, chunk_size=8)
      ys.append(y)
    y = jnp.concatenate(ys, axis=1)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(state)), (y, state)

  run = jax.jit(
      jax.value_and_grad(loss, has_aux=True), static_argnums=1
  )
  whole = run(args, (0, 21))
  for borders in ((0, 1, 9, 21), (0, 8, 16, 21)):
    (_, out), grads = run(args, borders)
    check((out, grads), (whole[0][1], whole[1]), 2e-6, 1e-5)


def test_transformations_compose():
  args = make('channel', length=12, batch=2)
  run = functools.partial(delta_rule, chunk_size=8)
  want = jax.jit(run)(**args)
  rows = jax.tree.map(lambda x: x[:, None], args)
  mapped = jax.jit(jax.vmap(lambda x: run(**x)))(rows)
  for a, b in zip(mapped, want):
    np.testing.assert_array_equal(a[:, 0], b)
  loss = lambda args: sum(jnp.sum(jnp.sin(x)) for x in run(**args))
  plain = jax.jit(jax.grad(loss))(args)
  remat = jax.jit(jax.grad(jax.checkpoint(loss)))(args)
  by_row = jax.jit(jax.vmap(jax.grad(loss)))(rows)
  for name in args:
    assert error(remat[name], plain[name]) < 1e-6
    assert error(by_row[name][:, 0], plain[name]) < 1e-6


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
    (dict(chunk_size=24), 'power of two'),
    (dict(implementation='cuda'), 'available: xla, reference'),
])
def test_errors(change, message):
  with pytest.raises(ValueError, match=message):
    delta_rule(**{**make(), **change})
