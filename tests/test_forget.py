"""Deletes do what they say, and say what they leave."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import forget
from statejax import memory as mem
from statejax import model as lm
from statejax import state as st
from statejax.artifact import journal as jn
from statejax.artifact import serving

MLP, GRID, VOCAB = c.SwiGLUConfig(16), 8, 32


def model(*mixers, repeats=1):
  layers = tuple(c.LayerConfig(f'l{i}', m, MLP) for i, m in enumerate(mixers))
  return lm.LanguageModel(c.ModelConfig(
      vocab=VOCAB, width=16, layers=layers,
      groups=(c.GroupConfig(tuple(x.name for x in layers), repeats),)))


# Two layers that mix no tokens but in their matrix.
DELTA = model(c.GLAConfig(heads=2, key=8, value=8, chunk=4), repeats=2)
RULES = c.SlotRules(slots=4, key=8, value=6, span=3, key_span=2, aliases=2)
HYBRID = model(
    c.SlotsConfig(RULES, segment=8, events=2, statement=4, confidence=0.9),
    c.AttentionConfig(heads=2, kv_heads=1, key=8, value=8),
    c.KDAConfig(heads=2, key=4, value=4, chunk=4))


@functools.cache
def params(model):
  found = model.init(jax.random.key(0))
  if model is HYBRID:
    # It asks as it writes, and writes nothing of its own accord.
    mixer = found['group_0']['layer_0']['mixer']
    mixer['query'] = mixer['key']
    for name in ('want', 'version'):
      mixer[name] = jax.tree.map(jnp.zeros_like, mixer[name])
  return found


def feed(model, state, tokens):
  """Absorbs tokens [2, T] on one grid."""
  at = int(state.length.max())
  while tokens.shape[1]:
    count = min(GRID - at % GRID, tokens.shape[1])
    piece = np.zeros((2, GRID), np.int32)
    piece[:, :count] = tokens[:, :count]
    _, state = model.step(params(model), state, piece, [count] * 2,
                          keep='last')
    tokens, at = tokens[:, count:], at + count
  return state


def text(length, seed=0):
  return np.random.default_rng(seed).integers(
      1, VOCAB, (2, length)).astype(np.int32)


@functools.cache
def streams():
  """Of DELTA: before a span of 4 tokens, after it, later, and never seen."""
  tokens = text(30)
  before = feed(DELTA, DELTA.init_state(2, 0, logits=True), tokens[:, :10])
  seen = feed(DELTA, before, tokens[:, 10:14])
  return tokens, before, seen, feed(DELTA, seen, tokens[:, 14:]), feed(
      DELTA, before, tokens[:, 14:])


def matrix(state, layer, row=0):
  return np.asarray(state.layers['l0'].matrix[layer, row])


def far(a, b):
  return float(np.abs(a - b).max())


def test_a_span_is_subtracted_from_the_first_layer(tmp_path):
  tokens, before, seen, later, never = streams()
  followed, spot = forget.track(DELTA, before, seen, tokens[0, 10:14])
  followed = feed(DELTA, followed, tokens[:, 14:])
  # Following changes no bit.
  assert st.diff(forget.untracked(followed), later) is None
  book = jn.Journal(tmp_path / 'edits')
  state, receipt = forget.revoke(DELTA, followed, spot, journal=book)
  assert far(matrix(state, 0), matrix(never, 0)) < 1e-5
  assert far(matrix(later, 0), matrix(never, 0)) > 1e-2
  # The second layer has read what the first had answered.
  assert far(matrix(state, 1), matrix(never, 1)) > 1e-3
  assert st.diff(st.take(forget.untracked(state), 1),
                 st.take(later, 1)) is None
  assert np.isnan(state.logits[0]).all() and int(state.pending[0]) == -1
  assert not state.layers['l0'].shadow[:, 0].any()
  assert (state.witness[0] != later.witness[0]).any()
  assert receipt.scope == 'layer' and receipt.span == (10, 14)
  assert receipt.cleared == ('layers/l0/matrix[0]', 'pending', 'logits',
                             'shadows')
  assert receipt.left == ('layers/l0/matrix[1]', 'token log',
                          'forks, prefix caches and artifacts')
  assert book.entries[-1]['op'] == 'revoke' and book.entries[-1]['begin'] == 10
  with pytest.raises(ValueError, match=r'row 0: expected one that follows'):
    forget.revoke(DELTA, state, spot)


def test_every_place_is_in_one_list_of_a_receipt():
  tokens, before, seen, later, _ = streams()
  followed, spot = forget.track(DELTA, before, seen, tokens[0, 10:14])
  _, one = forget.revoke(DELTA, followed, spot)
  _, two = forget.replay_without(DELTA, params(DELTA), later, before,
                                 tokens[0, 10:], (10, 14), chunk=GRID)
  leaves = {path for path, _, _, _ in st.leaves(later)
            if path.startswith('layers/')}
  for receipt in (one, two):
    lists = (*receipt.cleared, *receipt.absent, *receipt.left)
    assert len(lists) == len(set(lists))
    assert {n.split('[')[0] for n in lists} == leaves | set(forget.OUTSIDE)
  assert two.scope == 'model' and set(two.left) == {
      'token log', 'forks, prefix caches and artifacts'}


MIXERS = {
    'deferred': c.GatedDeltaNetConfig(2, 4, 8, 8, conv=1, decode='deferred'),
    'delta_product': c.DeltaProductConfig(2, 4, 8, 8, conv=1),
    'bitwise': c.KDAConfig(2, 8, 8, conv=1, decode='bitwise'),
    'delta_net': c.DeltaNetConfig(2, 8, 8, conv=1),
    'gated_delta_net': c.GatedDeltaNetConfig(2, 4, 8, 8, conv=1),
    'kda': c.KDAConfig(2, 8, 8, conv=1), 'kda_conv': c.KDAConfig(2, 8, 8),
    'gated_delta_net2': c.GatedDeltaNet2Config(2, 4, 8, 8, conv=1),
    'gla': c.GLAConfig(2, 8, 8), 'lightning': c.LightningConfig(2, 8, 8),
    'retnet': c.RetNetConfig(2, 8, 8, rope=None),
    'mamba2': c.Mamba2Config(4, 2, 8, 8, conv=1)}


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in MIXERS if n != 'kda_conv'])
def test_a_lone_layer_forgets_a_span(name):
  """Its inputs do not depend on its state, so that nothing is left."""
  own, tokens = model(MIXERS[name]), text(30)
  before = feed(own, own.init_state(2, 0), tokens[:, :10])
  state = feed(own, before, tokens[:, 10:14])
  state, spot = forget.track(own, before, state, tokens[1, 10:14], row=1)
  state = feed(own, state, tokens[:, 14:])
  state, receipt = forget.revoke(own, state, spot, row=1)
  never = feed(own, before, tokens[:, 14:])
  # What comes after reads the same, also where writes are deferred.
  more = text(5, seed=3)
  state, never = (feed(own, s, more) for s in (state, never))
  whole = lambda s: np.asarray(forget.span.whole_matrix(
      s.layers['l0'])[0, 1])
  assert far(whole(state), whole(never)) < 1e-5
  assert receipt.scope == 'model', receipt


@pytest.mark.slow
def test_a_convolution_mixes_a_span_into_what_comes_after():
  own, tokens = model(MIXERS['kda_conv']), text(30)
  before = feed(own, own.init_state(2, 0), tokens[:, :10])
  state = feed(own, before, tokens[:, 10:14])
  state, spot = forget.track(own, before, state, tokens[0, 10:14])
  for more, left in ((2, 'layers/l0/tail_k[0]'), (1, None)):
    state, tokens = feed(own, state, tokens[:, :more]), tokens[:, more:]
    gone, receipt = forget.revoke(own, state, spot)
    tails = [n for n in receipt.left if 'tail' in n]
    assert receipt.scope == 'none' and (left in tails if left else not tails)
    assert 'layers/l0/matrix[0]' in receipt.left


def test_spans_that_share_a_spot_go_together_and_others_are_dropped():
  tokens, before, seen, _, never = streams()
  one, spot = forget.track(DELTA, before, seen, tokens[0, 10:14])
  apart, _ = forget.track(DELTA, before, seen, tokens[0, 10:14])
  between = feed(DELTA, one, tokens[:, 14:20])
  # Six tokens of row 0 are followed too, in the same spot or another.
  after = feed(DELTA, between, tokens[:, 20:26])
  both, same = forget.track(DELTA, between, after, tokens[0, 20:26], spot=spot)
  two, other = forget.track(DELTA, between, after, tokens[0, 20:26])
  assert same == spot != other and both.spans[0, spot].tolist() == [10, 26, 10]
  state, receipt = forget.revoke(DELTA, feed(DELTA, both, tokens[:, 26:]), spot)
  want = feed(DELTA, feed(DELTA, before, tokens[:, 14:20]), tokens[:, 26:])
  assert far(matrix(state, 0), matrix(want, 0)) < 1e-5
  state, receipt = forget.revoke(DELTA, two, other)
  assert receipt.dropped == ((10, 14),)
  assert (np.asarray(state.spans)[0] == -1).all()
  with pytest.raises(ValueError, match='follows the same span there'):
    forget.track(DELTA, forget.untracked(between), after, tokens[0, 20:26],
                 spot=spot)


def test_shadows_travel_with_the_state(tmp_path):
  tokens, before, seen, _, _ = streams()
  state, spot = forget.track(DELTA, before, seen, tokens[0, 10:14])
  serving.save_state(tmp_path / 'a', DELTA, params(DELTA), state)
  again = serving.load_state(tmp_path / 'a', DELTA, params(DELTA))
  assert st.diff(again, state) is None and st.spans(again) == 1
  copy = st.take(again, [1, 0])
  one, _ = forget.revoke(DELTA, copy, spot, row=1)
  two, _ = forget.revoke(DELTA, state, spot)
  assert not far(matrix(one, 0, row=1), matrix(two, 0))
  # A document ends, and its spans with it.
  _, new = DELTA.step(params(DELTA), state, text(2), None, [[0, 1], [0, 0]])
  assert new.spans.tolist() == [[[-1] * 3]] * 2
  assert not new.layers['l0'].shadow.any()


@pytest.mark.parametrize('model', [
    DELTA, pytest.param(HYBRID, marks=pytest.mark.slow)], ids=['gla', 'all'])
def test_a_replay_is_a_stream_that_never_saw_it(model):
  """Slots, stores, tails, matrices and witness, to the bit; other rows too."""
  tokens = text(30, seed=2)
  before = feed(model, model.init_state(2, 40, logits=True), tokens[:, :10])
  # What was drawn but not absorbed is in the log by now.
  kept = dataclasses.replace(st.snapshot(before), pending=jnp.array([7, 7]))
  state = feed(model, before, tokens[:, 10:])
  never = feed(model, before, np.delete(tokens, range(13, 18), axis=1)[:, 10:])
  found = forget.last_before([state, kept], 13)
  new, receipt = forget.replay_without(
      model, params(model), state, found, tokens[0, 10:], (13, 18), chunk=GRID)
  # All that is in memory, not only what means something.
  for (path, a, axes, _), (_, b, _, _), (_, old, _, _) in zip(*map(
      st.leaves, (new, never, state))):
    at = axes.index('batch')
    a, b, old = (np.moveaxis(np.asarray(x), at, 0) for x in (a, b, old))
    assert a[0].tobytes() == b[0].tobytes(), path
    assert a[1].tobytes() == old[1].tobytes(), path
  assert receipt.scope == 'model' and receipt.span == (13, 18)
  assert {'logits', 'pending'} | {
      path for path, _, _, _ in st.leaves(new)
      if path.startswith('layers/')} == set(receipt.cleared)
  assert ('slots.json' in receipt.left) == (model is HYBRID)


@functools.cache
def written(folder):
  """A memory, a state before a write and after, and the edit's entry."""
  memory = mem.Memory(HYBRID, journal=jn.Journal(folder), host=True)
  before = feed(HYBRID, HYBRID.init_state(2, 40, logits=True), text(6))
  state, _ = memory.write(params(HYBRID), before, [3, 31], key=[31],
                          value=[29, 7])
  return memory, before, state, memory.journal.entries[-1]


@pytest.fixture(scope='module')
def book(tmp_path_factory):
  return written(tmp_path_factory.mktemp('edits') / 'journal')


@pytest.mark.slow
def test_a_fact_is_purged_from_the_model_before_a_token_is_read(book):
  memory, before, state, _ = book
  assert forget.plan(memory, state, 0).mode == 'purge'
  # Of a copy of the journal: another test needs the salt of this one.
  copy = jn.Journal(memory.journal.path.parent / 'copy')
  copy.append(memory.journal.entries[0])
  copy._salt = dict(memory.journal._salt)
  other = dataclasses.replace(memory, journal=copy)
  gone, receipt = forget.purge(other, state, 0)
  assert receipt.scope == 'model'
  assert 'slots.json' in receipt.cleared and 'token log' in receipt.absent
  assert set(receipt.left) == {'layers/l0/seq', 'layers/l0/next_oid',
                               'forks, prefix caches and artifacts'}
  for (path, a, _, _), (_, b, _, _) in zip(st.leaves(gone), st.leaves(before)):
    if path != 'witness' and path not in receipt.left:
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
  # Without the journal it is not known that nobody else has said it.
  alone = dataclasses.replace(memory, journal=None)
  _, receipt = forget.purge(alone, state, 0)
  assert receipt.scope == 'bank' and 'layers/l2/matrix' in receipt.left


@pytest.mark.slow
def test_a_fact_that_was_read_wants_a_replay(book):
  memory, before, state, entry = book
  tokens = np.array([[4, 31, 5, 6]] * 2, np.int32)
  later = feed(HYBRID, state, tokens)
  assert memory.list(later)[0].reads == 1
  plan = forget.plan(memory, later, 0)
  assert plan.mode == 'replay' and plan.before == 6
  new, receipt = forget.replay_without(
      HYBRID, params(HYBRID), later, before, tokens[0],
      edits=[forget.Edit(entry)], chunk=GRID)
  assert st.diff(st.take(new, 0), st.take(feed(HYBRID, before, tokens), 0)
                 ) is None
  assert receipt.scope == 'model' and receipt.span == (-1, -1)
  # An edit that stays is made again; only the tokens go.
  again = lambda s: memory.write(params(HYBRID), s, [3, 31], key=[31],
                                 value=[29, 7])
  new, receipt = forget.replay_without(
      HYBRID, params(HYBRID), later, before, tokens[0], (7, 8),
      edits=[forget.Edit(entry, again)], chunk=GRID)
  assert memory.list(new)[0].values == ((29, 7),)
  assert memory.list(new)[0].reads == 0
  assert [r.outcome for r in receipt.again] == ['committed']
  # A write that was new before may be there already, but not come to nothing.
  quiet = dataclasses.replace(memory, journal=None)
  refused = lambda s: quiet.delete(s, 3)
  with pytest.raises(ValueError, match='a write, to change something again, it '
                     'has come to missing'):
    forget.replay_without(
        HYBRID, params(HYBRID), later, before, tokens[0], (7, 8),
        edits=[forget.Edit(entry, refused)], chunk=GRID)
  with pytest.raises(ValueError, match='an edit of the journal is not among'):
    forget.replay_without(HYBRID, params(HYBRID), later, before, tokens[0],
                          (7, 8), chunk=GRID)


@pytest.mark.slow
def test_a_fact_that_lay_beside_one_that_was_read_wants_a_replay(tmp_path):
  """It was never read, and has lessened the weight of the other."""
  memory, before, state, _ = written(tmp_path / 'edits')
  state, _ = memory.write(params(HYBRID), state, [3, 30], key=[30], value=[8])
  later = feed(HYBRID, state, np.array([[4, 31, 5, 6]] * 2, np.int32))
  assert [s.reads for s in memory.list(later)] == [1, 0]
  plan = forget.plan(memory, later, 1)
  assert (plan.mode, plan.before) == ('replay', 6)
  # The one that was read is emptied, and with it when it was.
  gone, _ = memory.purge(later, 0)
  assert forget.plan(memory, gone, 1).mode == 'replay'
  # Before anything is read it may have been met: by what asks for a version
  # that it does not keep, say.
  assert forget.plan(memory, state, 1).mode == 'purge'
  quiet = feed(HYBRID, state, np.full((2, 3), 4, np.int32))
  assert forget.plan(memory, quiet, 1) == forget.Plan(
      'replay', 6, 'written from outside at 6')
  _, receipt = forget.purge(memory, later, 1)
  assert receipt.scope == 'bank' and 'logits' in receipt.left


@pytest.mark.slow
def test_a_fact_that_was_deleted_wants_a_replay(tmp_path):
  """A tombstone keeps the model from looking elsewhere, and counts no reads."""
  memory, _, state, _ = written(tmp_path / 'edits')
  state, _ = memory.delete(state, 0)
  assert forget.plan(memory, state, 0).mode == 'purge'
  later = feed(HYBRID, state, np.full((2, 3), 4, np.int32))
  assert forget.plan(memory, later, 0) == forget.Plan(
      'replay', 6, 'written from outside at 6')


@pytest.mark.slow
def test_suppressing_empties_the_slot_and_says_what_it_leaves(book):
  memory, _, state, _ = book
  gone, receipt = forget.suppress(memory, state, 0)
  assert receipt.scope == 'bank' and receipt.edit.outcome == 'committed'
  assert not memory.bank(gone).value[0, 0].any()
  assert 'layers/l0/value' in receipt.cleared
  assert {'layers/l0/key', 'layers/l1/k', 'slots.json'} <= set(receipt.left)
  _, receipt = forget.suppress(memory, gone, 0)
  assert receipt.scope == 'none' and receipt.cleared == ()
  # What the stream might have said is not known to be gone by a purge.
  bank = memory.bank(state)
  layer = state.layers['l0']
  for name, value, want in (
      ('source', (5, 1), forget.Plan(
          'replay', 2, 'said by the stream from 2 on')),
      ('version', 2, forget.Plan(
          'replay', 0, 'it is not known who wrote its first version'))):
    held = getattr(bank, name).at[0, 0].set(jnp.array(value))
    other = dataclasses.replace(state, layers=state.layers | {
        'l0': dataclasses.replace(layer, **{name: held[None]})})
    assert forget.plan(memory, other, 0) == want
  with pytest.raises(ValueError, match='expected an object, got an empty'):
    forget.plan(memory, state, 1)


def test_bad_spans_are_named():
  tokens, before, seen, later, _ = streams()
  track = functools.partial(forget.track, DELTA)
  with pytest.raises(ValueError, match='from 10, .* to 14, .* got 3 of them'):
    track(before, seen, tokens[0, 10:13])
  with pytest.raises(ValueError, match='do not lead from the state before'):
    track(before, seen, tokens[1, 10:14])
  with pytest.raises(ValueError, match='spot 2, row 0: expected one that'):
    track(before, seen, tokens[0, 10:14], spot=2)
  with pytest.raises(ValueError, match='row: expected 0 to 1, got 2'):
    track(before, seen, tokens[0, 10:14], row=2)
  with pytest.raises(ValueError, match='of row 0 alone or of all 2 rows'):
    track(st.take(before, [0, 1, 1]), seen, tokens[0, 10:14])
  full = model(c.AttentionConfig(heads=1, kv_heads=1, key=8, value=8))
  with pytest.raises(ValueError, match='no layer with a recurrent matrix'):
    forget.track(full, full.init_state(1, 4), full.init_state(1, 4), [1])
  replay = functools.partial(
      forget.replay_without, DELTA, params(DELTA), later, before)
  for span in ((9, 12), (12, 12), (14, 31), (14, 12)):
    with pytest.raises(ValueError, match='positions 10 <= first < last <= 30'):
      replay(tokens[0, 10:], span)
  with pytest.raises(ValueError, match='log: expected the 20 tokens from 10'):
    replay(tokens[0, 11:], (12, 14))
  with pytest.raises(ValueError, match='its witness is another'):
    replay(tokens[1, 10:], (12, 14))
  with pytest.raises(ValueError, match='expected a span or an edit'):
    replay(tokens[0, 10:])
  with pytest.raises(ValueError, match=r'integers of 0 to 31'):
    replay(np.full(20, 32), (12, 14))
  with pytest.raises(ValueError, match='chunk: expected >= 1, got 0'):
    replay(tokens[0, 10:], (12, 14), chunk=0)
  with pytest.raises(ValueError, match=r'at most 9 tokens, got \[10, 14\]'):
    forget.last_before([before, seen], 9)
