"""Operations on rows of a state, their errors, and any sequence of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from configs import tiny_compressed
from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.artifact import serving
from statejax.ops import witness

MODEL = lm.LanguageModel(c.ModelConfig(
    vocab=16, width=8,
    layers=(
        c.LayerConfig('delta', c.GatedDeltaNetConfig(
            heads=1, value_heads=1, key=4, value=4), c.SwiGLUConfig(8)),
        c.LayerConfig('full', c.AttentionConfig(
            heads=1, kv_heads=1, key=4, value=4), c.SwiGLUConfig(8)),
        c.LayerConfig('ring', c.AttentionConfig(
            heads=1, kv_heads=1, key=4, value=4, window=3), c.SwiGLUConfig(8))),
    groups=(c.GroupConfig(('delta', 'full', 'ring')),)))


FULL = lm.LanguageModel(dataclasses.replace(
    MODEL.config, groups=(c.GroupConfig(('full',)),)))
NO_TOKENS = np.zeros((3, 4), np.uint32)


def numbered(rows=3, capacity=5, *, logits=False, model=MODEL):
  """A state in which every number differs, of rows with 2, 3, .. tokens."""
  state = model.init_state(rows, capacity, logits=logits)
  count = iter(range(100))
  def one(path, axes, kind, x):
    if path == 'length':
      return jnp.arange(2, 2 + rows, dtype=jnp.int32)
    values = np.arange(x.size).reshape(x.shape) + 1000 * next(count) + 1
    return jnp.asarray(values.astype(x.dtype))
  return st.map_leaves(one, state)


def row_of(state, row):
  return jax.tree.map(np.asarray, st.take(state, row))


def same(left, right):
  return all(np.array_equal(a, b) for a, b in zip(
      jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


# Rows.


def test_take_keeps_order_and_repeats():
  state = numbered()
  taken = st.take(state, [2, 0, 2])
  assert taken.length.tolist() == [4, 2, 4]
  assert same(row_of(taken, 0), row_of(state, 2))
  assert same(row_of(taken, 1), row_of(state, 0))
  assert st.rows(st.take(state, 1)) == 1


def test_put_replaces_these_rows_alone():
  state, other = numbered(), MODEL.init_state(2, 5)
  new = st.put(state, [2, 0], st.take(other, [1, 0]))
  assert same(row_of(new, 1), row_of(state, 1))
  assert same(row_of(new, 2), row_of(other, 1))
  assert same(row_of(new, 0), row_of(other, 0))


def test_fork_of_several_rows_is_refused():
  with pytest.raises(ValueError, match=r'expected one row .* row=\[0, 1\]'):
    st.fork(numbered(), [0, 1], 2)


def test_a_snapshot_of_other_rows_is_refused():
  with pytest.raises(ValueError, match='a snapshot of 3 rows, got 2'):
    st.restore_fixed(numbered(), st.snapshot(numbered(2)))


def test_fork_copies_one_row():
  forks = st.fork(numbered(), 1, 4)
  assert st.rows(forks) == 4
  for i in range(4):
    assert same(row_of(forks, i), row_of(numbered(), 1))


def test_concat_undoes_take():
  state = numbered(4, logits=True)
  parts = [st.take(state, [0]), st.take(state, [1, 2]), st.take(state, 3)]
  assert same(st.concat(parts), state)


def test_clear_leaves_key_and_neighbours():
  state = numbered(logits=True)
  spoilt = st.map_leaves(
      lambda p, a, k, x: jnp.full_like(
          x, jnp.nan) if x.dtype == jnp.float32 else x, state)
  new = st.clear(spoilt, [0, 2])
  fresh = MODEL.init_state(3, 5, logits=True)
  for row in (0, 2):
    want = dataclasses.replace(st.take(fresh, row), key=state.key[row][None])
    assert same(row_of(new, row), want)
  assert new.pending.tolist()[0] == -1
  assert np.isnan(row_of(new, 1).layers['full'].k).all()
  assert int(new.length[1]) == 3


@pytest.mark.parametrize('operation, match', [
    (lambda s: st.take(s, 3), r'rows: \[3\] not among the 3 rows'),
    (lambda s: st.take(s, [0, -1]), r'rows: \[-1\] not among'),
    (lambda s: st.live(s, 3), r'rows: \[3\] not among'),
    (lambda s: st.live(s, -1), r'rows: \[-1\] not among'),
    (lambda s: st.take(s, 0.5), 'rows: expected integers, got float64'),
    (lambda s: st.clear(s, [True]), 'rows: expected integers, got bool'),
    (lambda s: st.fork(s, 0, 0), 'fork: expected one row and copies >= 1'),
    (lambda s: st.fork(s, 7, 2), r'rows: \[7, 7\] not among'),
    (lambda s: st.put(s, [1, 1], st.take(s, [0, 2])),
     r'put: expected 2 distinct rows, got \[1, 1\]'),
    (lambda s: st.put(s, [1], st.take(s, [0, 2])),
     r'put: expected 2 distinct rows, got \[1\]'),
    (lambda s: st.put(s, [5], st.take(s, 0)), r'rows: \[5\] not among'),
    (lambda s: st.put(s, [0], numbered(1, 6)),
     r'put: layers/full/k: expected .*capacity=5.*got .*capacity=6.*grow'),
    (lambda s: st.concat([s, numbered(1, 6)]), 'concat: layers/full/k'),
    (lambda s: st.concat([s, numbered(1, logits=True)]),
     r'concat: logits: expected nothing, got \[vocab=16\] float32'),
])
def test_row_errors(operation, match):
  with pytest.raises(ValueError, match=match):
    operation(numbered())


def other_model(**changes):
  config = MODEL.config
  layers = tuple(
      dataclasses.replace(layer, mixer=dataclasses.replace(
          layer.mixer, **changes.get(layer.name, {})))
      for layer in config.layers)
  return lm.LanguageModel(dataclasses.replace(config, layers=layers))


def test_put_of_another_config_names_the_leaf():
  other = other_model(delta=dict(value=6)).init_state(1, 5)
  with pytest.raises(ValueError, match=(
      r'put: layers/delta/matrix: expected \[layers=1, heads=1, key=4, '
      r'value=4\] float32, got \[layers=1, heads=1, key=4, value=6\] float32; '
      'both states must come from one config')):
    st.put(numbered(), [0], other)


# Length and capacity.


def test_grow_keeps_slots():
  state = numbered()
  grown = st.grow(state, 9)
  assert st.capacity(grown) == 9
  k = np.asarray(grown.layers['full'].k)
  assert np.array_equal(k[..., :5, :], state.layers['full'].k)
  assert not k[..., 5:, :].any()
  assert same(grown.layers['delta'], state.layers['delta'])
  assert st.diff(grown, state) is None


def test_grow_never_shrinks():
  with pytest.raises(ValueError, match=(
      'grow: layers/full/k has capacity 5, asked for 4; a store never')):
    st.grow(numbered(), 4)


def test_grow_counts_tokens_by_stride():
  model = lm.LanguageModel(tiny_compressed.get_config().model)
  state = model.init_state(1, 6)
  assert dict(state.strides)['layers/csa/entries'] == 4
  grown = st.grow(state, 11)
  st.validate(grown, model.state_schema(1, 11))
  assert grown.layers['csa'].entries.shape[2] == 3


@pytest.mark.slow
def test_what_a_state_means_counts_tokens_by_stride():
  """Of a store with a slot per several tokens, too, only the live prefix."""
  config = tiny_compressed.get_config().model
  model = lm.LanguageModel(dataclasses.replace(
      config, groups=(c.GroupConfig(('csa',)),)))
  params, tokens = model.init(jax.random.key(0)), jnp.arange(14)[None] % 8
  _, state = model.step(params, model.init_state(1, 20), tokens[:, :9])
  kept = st.snapshot(state)
  _, after = model.step(params, state, tokens[:, 9:])
  back = st.restore_fixed(after, kept)
  assert st.live(back, 0).layers['csa'].entries.shape[1] == 2
  assert st.diff(back, state) is None and st.diff(after, state) is not None
  assert serving.state_digest(back) == serving.state_digest(state)
  assert serving.state_digest(st.grow(state, 40)) == serving.state_digest(state)


def test_capacity_of_a_state_without_stores():
  layer = c.LayerConfig('delta', MODEL.config.layers[0].mixer)
  model = lm.LanguageModel(dataclasses.replace(
      MODEL.config, layers=(layer,), groups=(c.GroupConfig(('delta',)),)))
  assert st.capacity(model.init_state(1, 7)) is None
  assert st.capacity(MODEL.init_state(1, 7)) == 7


def test_rewind_sets_lengths_and_what_follows_from_them():
  old = numbered(model=FULL, logits=True)
  new = st.rewind(old, [0, 3, 1], NO_TOKENS)
  assert new.length.tolist() == [0, 3, 1]
  assert new.pending.tolist() == [-1, int(old.pending[1]), -1]
  assert np.isnan(new.logits).all(axis=1).tolist() == [True, False, True]
  np.testing.assert_array_equal(new.witness[1], old.witness[1])
  assert not new.witness[0].any() and not new.witness[2].any()
  assert st.rewind(old, 2, NO_TOKENS).length.tolist() == [2, 2, 2]


def test_rewound_row_goes_on_as_if_never_advanced():
  tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, 16)
  params = FULL.init(jax.random.key(0))
  _, early = FULL.step(params, FULL.init_state(1, 12), tokens[:, :4])
  _, late = FULL.step(params, early, tokens[:, 4:])
  back = st.rewind(late, 4, early.witness)
  want, want_state = FULL.step(params, early, tokens[:, 5:7])
  got, got_state = FULL.step(params, back, tokens[:, 5:7])
  np.testing.assert_array_equal(got, want)
  assert st.diff(got_state, want_state) is None


def test_rewind_refuses_fixed_leaves():
  with pytest.raises(ValueError, match='layers/delta/matrix is fixed'):
    st.rewind(numbered(), 1, NO_TOKENS)


def test_grow_refuses_a_row_that_has_lost_tokens():
  params = FULL.init(jax.random.key(0))
  tokens = jnp.ones((1, 3), jnp.int32)
  _, state = FULL.step(params, FULL.init_state(1, 0), tokens)
  with pytest.raises(ValueError, match='what did not fit is lost'):
    st.grow(state, 8)
  with pytest.raises(ValueError, match='keeps no store'):
    FULL.step(params, state, tokens)


def test_snapshot_outlives_donation():
  params = MODEL.init(jax.random.key(0))
  state = MODEL.init_state(1, 8)
  tokens = jnp.ones((1, 2), jnp.int32)
  kept = st.snapshot(state)
  _, after = jax.jit(MODEL.step, donate_argnums=1)(params, state, tokens)
  assert st.diff(st.restore_fixed(after, kept), MODEL.init_state(1, 8)) is None


def test_rekeyed_copies_have_keys_of_their_own():
  state = st.fork(MODEL.init_state(1, 4), 0, 3)
  assert len({tuple(k) for k in np.asarray(state.key).tolist()}) == 1
  state = st.rekey(state, jax.random.key(5))
  assert len({tuple(k) for k in np.asarray(state.key).tolist()}) == 3
  with pytest.raises(ValueError, match='threefry'):
    st.rekey(state, jax.random.key(0, impl='rbg'))


@pytest.mark.parametrize('length', ([3, 3, 4], [0, -1, 0]))
def test_rewind_errors(length):
  with pytest.raises(ValueError, match=r'expected lengths in 0..\[2, 3, 4\]'):
    st.rewind(numbered(model=FULL), length, NO_TOKENS)


def test_snapshot_holds_no_store():
  state = numbered()
  kept = st.snapshot(state)
  assert st.nbytes(kept) == {**st.nbytes(state), 'growing': 0}
  ahead = st.map_leaves(lambda p, a, k, x: x + 1, state)
  back = st.restore_fixed(ahead, kept)
  assert same(back.layers['delta'], state.layers['delta'])
  assert back.length.tolist() == state.length.tolist()
  assert same(back.layers['full'], ahead.layers['full'])


# Looking at states.


def test_nbytes_counts_the_same_everywhere():
  state, schema = numbered(), MODEL.state_schema(3, 5)
  counted = st.nbytes(state)
  assert counted == st.nbytes(schema) == st.nbytes(st.abstract(schema))
  assert sum(counted.values()) == sum(x.nbytes for x in jax.tree.leaves(state))
  assert counted['growing'] == 2 * 3 * 5 * 4 * 4


def test_live_is_the_prefix():
  live = st.live(numbered(), 1)
  assert live.layers['full'].k.shape == (1, 1, 3, 4)
  assert live.layers['ring'].k.shape == (1, 1, 3, 4)
  assert live.length == 3


def test_diff_names_row_leaf_and_index():
  state = numbered()
  store = state.layers['full']
  bent = lambda slot, by: dataclasses.replace(state, layers={
      **state.layers, 'full': dataclasses.replace(
          store, v=store.v.at[0, 1, 0, slot, 2].add(by))})
  found = st.diff(bent(2, 1.0), state)
  assert (found.row, found.path, found.index) == (
      1, 'layers/full/v', (0, 0, 2, 2))
  assert found.left == found.right + 1
  assert 'row 1: layers/full/v[0, 0, 2, 2] is' in str(found)
  # Past the row's three tokens slots mean nothing.
  assert st.diff(bent(3, 1.0), state) is None
  assert st.diff(bent(2, 1e-3), state, tolerance=1e-5) is None
  assert st.diff(bent(2, jnp.nan), state, tolerance=1.0).path == 'layers/full/v'


def test_diff_of_lengths():
  state = numbered()
  found = st.diff(dataclasses.replace(
      state, length=jnp.array([2, 1, 4], jnp.int32)), state)
  assert (found.row, found.path, found.left, found.right) == (1, 'length', 1, 3)


def test_diff_compares_bits():
  state = MODEL.init_state(1, 2)
  minus = dataclasses.replace(state, layers={
      **state.layers, 'delta': jax.tree.map(
          jnp.negative, state.layers['delta'])})
  assert st.diff(minus, state).path == 'layers/delta/matrix'
  assert st.diff(minus, state, tolerance=1e-9) is None


@pytest.mark.parametrize('other, match', [
    (lambda: numbered(2), 'diff: 3 rows against 2'),
    (lambda: numbered(model=other_model(delta=dict(value=6))),
     r'diff: \(1, 1, 4, 4\) float32 against \(1, 1, 4, 6\) float32'),
])
def test_diff_errors(other, match):
  with pytest.raises(ValueError, match=match):
    st.diff(numbered(), other())


# Schemas.


@pytest.mark.parametrize('arguments, match', [
    (('batch key', 'moving'), "expected a batch axis and a kind of"),
    (('heads key',), 'expected a batch axis'),
    (('batch key', 'growing'), 'growing leaves have a capacity axis'),
    (('batch capacity key',), 'fixed ones have none'),
])
def test_leaf_errors(arguments, match):
  with pytest.raises(ValueError, match=match):
    st.leaf(*arguments)


def test_describe_wants_a_name_per_axis():
  specs = st.ServingState(
      layers={}, length=st.Spec((2,), 'int32'), pending=st.Spec((2,), 'int32'),
      witness=st.Spec((2, 4), 'uint32'), key=st.Spec((2,), 'uint32'),
      logits=None)
  with pytest.raises(ValueError, match=r"key: axes \('batch', 'words'\) do"):
    st.describe(specs)


@pytest.mark.parametrize('state, match', [
    (lambda: {}, 'state: expected a ServingState, got dict; make one with'),
    (lambda: numbered(2),
     r'key: expected \[batch=3, words=2\] uint32, got batch=2; allocate the '
     'state from this config, or load it with its own'),
    (lambda: numbered(3, 6), 'layers/full/k: expected .*, got capacity=6'),
    (lambda: numbered(logits=True), 'logits: expected no such leaf, got a'),
    (lambda: dataclasses.replace(numbered(), layers={}),
     r'layers/delta/matrix: expected \[.*\] float32, got none'),
    (lambda: dataclasses.replace(
        numbered(), length=jnp.zeros((3,), jnp.uint32)),
     r'length: expected \[batch=3\] int32, got uint32 \(3,\)'),
])
def test_validate_errors(state, match):
  with pytest.raises(ValueError, match=match):
    st.validate(state(), MODEL.state_schema(3, 5))


def test_donated_state_says_so():
  state = numbered()
  survivor = st.fork(state, 1, 2)
  jax.block_until_ready(
      jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(
          state))
  with pytest.raises(ValueError, match='state: already consumed by an earlier'):
    st.validate(state, MODEL.state_schema(3, 5))
  assert same(row_of(survivor, 0), row_of(numbered(), 1))


# Any sequence of operations (law L14).

ROWS, STEPS, CAPACITY = 3, 4, 24
_apply = jax.jit(functools.partial(lm.apply, MODEL))


@functools.cache
def params():
  return MODEL.init(jax.random.key(0))


def absorb(state, tokens, n):
  padded = np.zeros((st.rows(state), STEPS), np.int32)
  for row, ids in enumerate(tokens):
    padded[row, :len(ids)] = ids
  return _apply(params(), state, jnp.asarray(padded), jnp.asarray(n, jnp.int32))


class Rows:
  """A batch of rows, each shadowed by a state of its own and a token log."""

  def __init__(self):
    self.state = MODEL.init_state(ROWS, CAPACITY, logits=True)
    self.alone = [st.take(self.state, row) for row in range(ROWS)]
    self.logs = [[] for _ in range(ROWS)]

  def step(self, tokens):
    # A step that would not fit is left out, as an engine would.
    tokens = [ids if len(ids) + len(log) <= CAPACITY else []
              for ids, log in zip(tokens, self.logs)]
    logits, self.state = absorb(self.state, tokens, list(map(len, tokens)))
    for row, ids in enumerate(tokens):
      want, self.alone[row] = absorb(self.alone[row], [ids], [len(ids)])
      self.logs[row] = self.logs[row] + ids
      np.testing.assert_allclose(
          logits[row, :len(ids)], want[0, :len(ids)], rtol=0, atol=1e-5)

  def clear(self, row):
    self.state = st.clear(self.state, row)
    self.alone[row] = st.clear(self.alone[row], 0)
    self.logs[row] = []

  def copy(self, source, target):
    self.state = st.put(self.state, target, st.fork(self.state, source, 1))
    self.alone[target] = self.alone[source]
    self.logs[target] = self.logs[source]

  def permute(self, order):
    self.state = st.take(self.state, order)
    self.alone = [self.alone[i] for i in order]
    self.logs = [self.logs[i] for i in order]

  def draft(self, tokens):
    kept = st.snapshot(self.state)
    _, ahead = absorb(self.state, tokens, list(map(len, tokens)))
    self.state = st.restore_fixed(ahead, kept)

  def check(self):
    found = st.diff(self.state, st.concat(self.alone), tolerance=1e-5)
    assert found is None, found
    for row, log in enumerate(self.logs):
      assert witness.text(self.state.witness[row]) == witness.host(log)


row = hs.integers(0, ROWS - 1)
chunks = hs.lists(
    hs.lists(hs.integers(0, 15), max_size=STEPS), min_size=ROWS, max_size=ROWS)
operations = hs.one_of(
    hs.tuples(hs.just('step'), chunks), hs.tuples(hs.just('step'), chunks),
    hs.tuples(hs.just('clear'), row), hs.tuples(hs.just('copy'), row, row),
    hs.tuples(hs.just('permute'), hs.permutations(range(ROWS))),
    hs.tuples(hs.just('draft'), chunks))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(hs.lists(operations, max_size=12))
def test_any_sequence_equals_independent_rows(sequence):
  rows = Rows()
  for name, *arguments in sequence:
    getattr(rows, name)(*arguments)
    rows.check()
