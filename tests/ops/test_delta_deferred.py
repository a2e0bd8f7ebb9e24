"""Deferred writes: against the recurrence, and to the bit where promised."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import FAST, error, make

from statejax.ops import delta_deferred as dd
from statejax.ops.delta_rule import delta_rule

pytestmark = pytest.mark.optimized
ROWS, LENGTH, CHUNK, DRAFT = 3, 21, 4, 5
KINDS = {'gdn': ('head', 'head'), 'kda': ('channel', 'head'),
         'gdn2': ('channel', 'channel')}
PARITY = (None, 'bitwise')


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


@functools.cache
def case(kind):
  """Tokens with resets, strong and no decay among them, and a first matrix."""
  decay, erase = KINDS[kind]
  args = make(decay, erase, batch=ROWS, length=LENGTH, seed=3)
  args['log_decay'][0, 4] = args['log_decay'][1, 9] = -np.inf
  args['log_decay'][2, 3] = args['log_decay'][2, 6] = -300.0
  args['log_decay'][1, 2] = 0.0
  return args, args.pop('state')


@functools.cache
def program(parity, drafted=False):
  # For bits, optimised as users have it: what the compiler merges is the point.
  return jax.jit(
      functools.partial(dd.delta_rule_deferred, chunk_size=CHUNK,
                        parity=parity, drafted=drafted),
      compiler_options=None if parity else FAST)


truncate = jax.jit(functools.partial(dd.truncate, chunk_size=CHUNK))


def recurrence(args, matrix, resets=None):
  """Outputs of the equations of `delta_rule`, token by token in float64."""
  wide = lambda x: np.asarray(x, np.float64)
  per = args['v'].shape[2] // args['q'].shape[2]
  q, k = (np.repeat(wide(args[n]), per, axis=2) for n in 'qk')
  gate = lambda x: wide(x)[..., None] if np.ndim(x) == 3 else wide(x)
  v = wide(args['v'])
  log_decay, erase, write = (
      gate(args[n]) if np.ndim(args[n]) else
      args[n] * np.ones((*v.shape[:3], 1))
      for n in ('log_decay', 'erase', 'write'))
  state, out = wide(matrix), []
  for t in range(q.shape[1]):
    if resets is not None:
      state = np.where(resets[:, t, None, None, None], 0, state)
    state = np.exp(log_decay[:, t])[..., None] * state
    erased = np.einsum('bhk,bhkv->bhv', erase[:, t] * k[:, t], state)
    state = state + np.einsum(
        'bhk,bhv->bhkv', k[:, t], write[:, t] * v[:, t] - erased)
    out.append(np.einsum('bhk,bhkv->bhv', q[:, t], state))
  return np.stack(out, axis=1) * q.shape[-1] ** -0.5


def start(kind, parity, matrix=None):
  decay, erase = KINDS[kind]
  state = dd.empty(ROWS, 2, 4, 8, 6, chunk_size=CHUNK, draft=DRAFT,
                   decay=decay, erase=erase, parity=parity)
  return state if matrix is None else dataclasses.replace(
      state, matrix=jnp.asarray(matrix))


def take(args, at, length):
  """Tokens at[b].. of each row, `length` of them, NaN past the end."""
  def one(x):
    x = np.concatenate([x, np.full_like(x, np.nan)], axis=1)
    return np.stack([row[a:a + length] for row, a in zip(x, at)])
  return {name: one(x) for name, x in args.items()}


def run(parity, args, state, lengths, size):
  """Calls of `size` tokens, of which lengths[i][b] are real."""
  at = np.zeros(ROWS, int)
  out = np.zeros(args['v'].shape, np.float32)
  for count in lengths:
    y, state = program(parity)(
        **take(args, at, size), state=state, n_valid=np.int32(count))
    for b, n in enumerate(count):
      out[b, at[b]:at[b] + n] = y[b, :n]
      assert not np.any(y[b, n:])
    at += count
  return out, state


def steps(totals):
  """Single tokens; rows pause at different times."""
  left, call = np.array(totals), 0
  while left.any():
    n = ((np.arange(ROWS) + call) % 3 > 0) & (left > 0)
    left, call = left - n, call + 1
    yield n.astype(int)


UNEVEN = [[5, 0, 3], [1, 5, 5], [0, 4, 5], [5, 1, 0], [5, 5, 1], [5, 5, 5],
          [0, 1, 2]]


def same(got, want):
  """Compares the raw bits of two trees."""
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(
      np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32)), got, want)


def near(got, want, tolerance=2e-6):
  finite = lambda x: np.maximum(np.asarray(x), -1000)  # -inf among the decays
  jax.tree.map(lambda a, b: np.testing.assert_array_less(
      error(finite(a), finite(b)), tolerance), got, want)


@pytest.mark.parametrize('parity', PARITY)
@pytest.mark.parametrize('kind', [
    'gdn', 'kda', pytest.param('gdn2', marks=pytest.mark.slow)])
def test_recurrence(kind, parity):
  """One pass, uneven chunks and single steps give the oracle's outputs."""
  args, matrix = case(kind)
  want = recurrence(args, matrix)
  totals = [LENGTH] * ROWS
  origin = start(kind, parity, matrix)
  whole, final = run(parity, args, origin, [totals], LENGTH)
  near(whole, want)
  assert final.count.tolist() == [LENGTH % CHUNK] * ROWS
  # Uneven chunks in programs of one length, and for bits of another one.
  other = 5 if (kind, parity) == ('kda', 'bitwise') else LENGTH
  for lengths, size in ((UNEVEN, other), (steps(totals), 1)):
    y, state = run(parity, args, origin, lengths, size)
    near(y, want)
    near(state, final)
    if parity:
      same(y, whole)
      same(state, final)


@pytest.mark.parametrize('kind', [
    'kda', pytest.param('gdn', marks=pytest.mark.slow)])
def test_bitwise_packed(kind):
  """Every document of a packed row equals its own run, steps included."""
  args, _ = case(kind)
  lengths = np.array([[5, 1, 9, 6], [4, 8, 8, 1], [1, 2, 3, 15]])
  ids = np.stack([np.repeat([4, 2, 4, 0], row) for row in lengths])
  origin = start(kind, 'bitwise')
  packed, state = program('bitwise')(
      **args, state=origin, segment_ids=np.int32(ids))
  at = np.zeros(ROWS, int)
  for count in lengths.T:
    alone = take(args, at, LENGTH)
    for calls, size in (([count], LENGTH), (steps(count), 1)):
      y, final = run('bitwise', alone, origin, calls, size)
      for b, n in enumerate(count):
        same(y[b, :n], np.asarray(packed)[b, at[b]:at[b] + n])
    at += count
  same(state, final)


@pytest.mark.slow
def test_packed():
  args, matrix = case('kda')
  ids = np.stack([np.repeat([1, 2, 3], n) for n in (
      [3, 1, 17], [4, 8, 9], [12, 2, 7])])
  origin = start('kda', None, matrix)
  y, _ = program(None)(**args, state=origin, segment_ids=np.int32(ids))
  resets = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
  want = recurrence(args, matrix, resets)
  near(y, want)


@pytest.mark.parametrize('kind, parity, cut', [
    ('gdn', 'bitwise', None),
    *(pytest.param(kind, parity, 12, marks=pytest.mark.slow)
      for kind in ('gdn', 'kda') for parity in PARITY)])
def test_gradient(kind, parity, cut):
  """That of `delta_rule`, also through two calls and the tail between."""
  args, matrix = case(kind)
  args = {name: x[:, :13] for name, x in args.items()}
  weight = np.random.default_rng(0).standard_normal(args['v'].shape)
  part = lambda args, low, high: {n: x[:, low:high] for n, x in args.items()}

  def loss(args, matrix):
    state = dataclasses.replace(start(kind, parity), matrix=matrix)
    out = []
    for low, high in [(0, 13)] if cut is None else [(0, cut), (cut, 13)]:
      y, state = dd.delta_rule_deferred(
          **part(args, low, high), state=state, chunk_size=CHUNK,
          parity=parity)
      out.append(y)
    return jnp.vdot(weight.astype(np.float32), jnp.concatenate(out, axis=1))

  def plain(args, matrix):
    return jnp.vdot(weight.astype(np.float32),
                    delta_rule(**args, state=matrix)[0])

  got, want = (
      jax.jit(jax.grad(f, (0, 1)), compiler_options=FAST)(args, matrix)
      for f in (loss, plain))
  near(got, want, 1e-5)


@pytest.mark.parametrize('parity', [
    None, pytest.param('bitwise', marks=pytest.mark.slow)])
def test_draft(parity):
  """Rejected tokens leave no trace, whatever chunk ends they crossed."""
  args, matrix = case('kda')
  origin = start('kda', parity, matrix)
  _, before = run(parity, args, origin, [[5, 1, 3]], LENGTH)
  draft = take(args, [5, 1, 3], DRAFT)
  drafted = program(parity, drafted=True)
  y, ahead = drafted(**draft, state=before)
  same(ahead.matrix, before.matrix)
  for accepted in range(DRAFT + 1):
    n = np.full(ROWS, accepted, np.int32)
    kept = truncate(ahead, before.count + n)
    _, never = drafted(**draft, state=before, n_valid=n)
    same(kept, truncate(never, before.count + n))
    if not accepted:
      same(kept, before)
      continue
    stepped, state = run(parity, draft, before, [[1] * ROWS] * accepted, 1)
    (same if parity else near)(
        np.asarray(y)[:, :accepted], stepped[:, :accepted])
    (same if parity else near)(kept, state)


@pytest.mark.parametrize('parity', PARITY)
@pytest.mark.parametrize('size', (1, LENGTH))
def test_empty_rows_and_lost_rows(size, parity):
  """n_valid = 0 keeps every bit; a wrong count harms its row alone."""
  args, matrix = case('kda')
  origin = start('kda', parity, matrix)
  _, state = run(parity, args, origin, [[5, 1, 3]], LENGTH)
  state = jax.tree.map(
      lambda x: jnp.where(x == 0, -x, x) if x.ndim > 1 else x, state)
  tokens = take(args, [LENGTH] * ROWS, size)  # all NaN
  y, same_state = program(parity)(
      **tokens, state=state, n_valid=np.zeros(ROWS, np.int32))
  assert not np.any(y)
  same(same_state, state)
  tokens = take(args, [5, 1, 3], size)
  n = np.full(ROWS, min(size, 6), np.int32)
  want, final = program(parity)(**tokens, state=state, n_valid=n)
  spoilt = dataclasses.replace(state, count=state.count.at[1].set(77))
  got, after = program(parity)(**tokens, state=spoilt, n_valid=n)
  assert np.isnan(got[1, :n[1]]).all()
  others = lambda tree: jax.tree.map(lambda x: x[np.array([0, 2])], tree)
  same(others(got), others(want))
  same(others(after), others(final))


@pytest.mark.parametrize('parity', [
    'bitwise', pytest.param(None, marks=pytest.mark.slow)])
def test_without_erase(parity):
  """Erase 0 as in GLA."""
  args, matrix = case('kda')
  args = {**args, 'erase': 0, 'write': 1, 'log_decay': args['log_decay'][:1]}
  args = {n: x if isinstance(x, int) else x[:1] for n, x in args.items()}
  matrix = matrix[:1]
  want = recurrence(args, matrix)
  state = dd.empty(1, 2, 4, 8, 6, chunk_size=8, decay='channel', erase=None,
                   parity=parity)
  run = functools.partial(dd.delta_rule_deferred, chunk_size=8, parity=parity)
  y, _ = jax.jit(
      lambda matrix: run(**args, state=dataclasses.replace(
          state, matrix=matrix)), compiler_options=FAST)(matrix)
  near(y, want)


def test_step_in_place():
  """The step copies neither the matrix nor the tail."""
  wide = dd.empty(8, 1, 1, 128, 128, chunk_size=4, decay='channel')
  x = jnp.zeros((8, 1, 1, 128))
  gate = jnp.zeros((8, 1, 1))
  step = jax.jit(functools.partial(dd.delta_rule_deferred, chunk_size=4),
                 donate_argnames='state', compiler_options=FAST)
  memory = step.lower(x, x, x, x, gate, gate, state=wide).compile()
  memory = memory.memory_analysis()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(wide))
  assert memory.alias_size_in_bytes == size
  assert memory.temp_size_in_bytes < wide.matrix.nbytes / 2


@pytest.mark.parametrize('change, message', [
    (dict(chunk_size=3), 'power of two'),
    (dict(v=np.zeros((ROWS, LENGTH, 4, 5), np.float32)),
     r'state: expected \[3, 4, 8, 5\]'),
    (dict(chunk_size=16), 'room for chunk_size=16'),
    (dict(parity='bits'), 'parity'),
    (dict(parity='bitwise'), 'erase gates'),
    (dict(drafted=True), 'at most 6 tokens'),
])
def test_errors(change, message):
  args, _ = case('gdn')
  options = {**args, 'chunk_size': CHUNK, **change}
  with pytest.raises(ValueError, match=message):
    dd.delta_rule_deferred(state=start('gdn', None), **options)


def call(changes=(), **kwargs):
  """A call of 5 tokens with some arguments changed."""
  args = make('channel', 'head', batch=2, length=5)
  heads, key, value = args['state'].shape[1:]
  args['state'] = dd.empty(2, args['q'].shape[2], heads, key, value,
                           chunk_size=CHUNK, decay='channel')
  args |= {n: f(args[n]) for n, f in dict(changes).items()}
  return dd.delta_rule_deferred(**args, **{'chunk_size': CHUNK, **kwargs})


@pytest.mark.parametrize('changes,kwargs,text', [
    ({'k': lambda x: x[:, :3]}, {}, r'k: expected \[2, 5'),
    ({'log_decay': lambda x: 1}, {}, 'log_decay: expected at most 0'),
    ({'log_decay': lambda x: float('nan')}, {}, 'log_decay: expected at most'),
    ({'log_decay': lambda x: x[..., 0]}, {}, "expected decay='head'"),
    ({'erase': lambda x: None}, {}, 'erase: expected an array'),
    ({'q': lambda x: x.astype(int)}, {}, 'q: expected .* floating'),
    ({'state': lambda x: x.matrix}, {}, 'expected a Deferred'),
    ({}, {'n_valid': np.ones(1, int)}, r'n_valid: expected \[2\]'),
    ({}, {'n_valid': 3}, 'n_valid: expected an array'),
    ({}, {'segment_ids': np.ones((2, 5), bool)}, 'segment_ids: .* integer'),
    ({}, {'chunk_size': None}, 'chunk_size: .* got None'),
    ({}, {'chunk_size': '4'}, "chunk_size: .* got '4'"),
    ({}, {'scale': 'x'}, 'scale: expected a number'),
])
def test_mistakes(changes, kwargs, text):
  with pytest.raises(ValueError, match=text):
    call(changes, **kwargs)


def test_empty_mistake():
  with pytest.raises(ValueError, match="decay, erase: .* got 'chan'"):
    dd.empty(1, 1, 1, 4, 4, chunk_size=4, decay='chan')


@pytest.mark.slow
def test_more_valid_tokens_than_there_are():
  want, got = call(), call(n_valid=np.array([5, 9]))
  jax.tree.map(np.testing.assert_array_equal, want, got)


@pytest.mark.slow
def test_truncate_takes_an_int():
  _, state = call(n_valid=np.array([3, 3]))
  one = dd.truncate(state, 1, chunk_size=CHUNK)
  jax.tree.map(np.testing.assert_array_equal, one, dd.truncate(
      state, jnp.array([1, 1]), chunk_size=CHUNK))
