"""An engine of three slots, and wrong ones that the library refuses.

The engine moves rows with `statejax.state` and keeps a `Standing` of each, as
whoever serves states has to. A mutant does one thing wrong; what refuses it is
`standing.check`, `mint` or `load`. The sound engine passes all of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store as small

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.artifact import identity, load, mint, standing, store
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

MLP = c.SwiGLUConfig(8)
LAYERS = (
    c.LayerConfig('conv', c.GatedConvConfig(width=8, taps=3), MLP),
    c.LayerConfig('full', c.AttentionConfig(
        heads=1, kv_heads=1, key=4, value=4), MLP))
MODEL = lm.LanguageModel(c.ModelConfig(
    vocab=16, width=8, layers=LAYERS, groups=(c.GroupConfig(
        ('conv', 'full')),)))
ROOM, CHUNK = 24, 4
ALICE = Principal('alice', 'acme')
HOST = identity.Host(MODEL.config, MODEL.state_schema, '0' * 64,
                     program=identity.Program(CHUNK, 3, ROOM))
TOKENS = np.random.default_rng(0).integers(0, 16, (3, 12))


@functools.cache
def params():
  return MODEL.init(jax.random.key(0))


def step(state, tokens, count):
  return MODEL.step(params(), state, tokens, np.asarray(count, np.int32),
                    keep='last')[1]


class Engine:
  """Slots, where each must stand, and the host's tokens of each.

  Attributes:
    state: of all slots.
    stands: of each slot.
    logs: the tokens of each since it was fresh.
    step, put, load, snapshot, fork: what a mutant replaces.
  """

  def __init__(self, shop, **wrong):
    self.shop = shop
    self.state = MODEL.init_state(3, ROOM, logits=True)
    self.stands = [standing.Standing()] * 3
    self.logs = [[], [], []]
    self.step, self.put, self.load = step, st.put, load.load
    self.snapshot, self.fork = st.snapshot, st.fork
    for name, mutant in wrong.items():
      setattr(self, name, functools.partial(mutant, getattr(self, name)))

  def absorb(self, tokens, count):
    self.state = self.step(self.state, tokens, count)
    for row, n in enumerate(count):
      new = tokens[row, :n].tolist()
      self.stands[row] = self.stands[row].after(new)
      self.logs[row] += new

  def leave(self, row):
    """The row becomes an artifact."""
    return mint.mint(self.shop, self.state, row, HOST, small.TERMS,
                     transcript=mint.Transcript(tuple(self.logs[row])))

  def enter(self, row, id):
    """An artifact becomes the row; whoever asked is told how it ended."""
    found = self.load(self.shop, id, ALICE, HOST)
    if found.state is not None:
      self.state = self.put(self.state, row, found.state)
    self.stands[row] = found.stands
    return found.decision

  def check(self):
    standing.check(self.state, dict(enumerate(self.stands)))


def begin(shop, **wrong):
  """Prompts of six, three and no tokens, the last chunk of each padded."""
  engine = Engine(shop, **wrong)
  engine.absorb(TOKENS[:, :4], [4, 3, 0])
  engine.absorb(TOKENS[:, 4:8], [2, 0, 0])
  return engine


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  return small.store(tmp_path_factory.mktemp('mutants'))


@pytest.fixture(scope='module')
def kept(shop):
  """An artifact of the first row, and of the row one token later."""
  jax.config.update('jax_disable_most_optimizations', True)
  engine = begin(shop)
  first = engine.leave(0).id
  other = Engine(shop)  # as long, of other tokens
  other.absorb(TOKENS[::-1, :4], [4, 3, 0])
  other.absorb(TOKENS[::-1, 4:8], [2, 0, 0])
  return first, other.leave(0).id


def test_the_sound_engine(shop, kept):
  engine = begin(shop)
  engine.check()
  rest = standing.at_rest(engine.state, 0)
  engine.absorb(TOKENS[:, 8:], [0, 4, 2])
  standing.check(engine.state, {0: rest})
  engine.check()
  assert str(engine.enter(2, kept[0])) == 'resumed(6)'
  assert engine.stands[2] == rest
  engine.check()
  before = shop.catalog.objects()
  assert {engine.leave(row).id for row in range(2)}.isdisjoint(before)


# Steps.


def chunk_absorbed_twice(right, state, tokens, count):
  return right(right(state, tokens, count), tokens, count)


def last_token_dropped(right, state, tokens, count):
  return right(state, tokens, np.maximum(np.array(count) - 1, 0))


def padding_absorbed(right, state, tokens, count):
  return right(state, tokens, np.where(np.array(count) > 0, CHUNK, 0))


def accept_count_of_another_row(right, state, tokens, count):
  return right(state, tokens, np.roll(count, 1))


def inactive_slot_advanced(right, state, tokens, count):
  return right(state, tokens, np.maximum(count, 1))


def tokens_of_another_row(right, state, tokens, count):
  return right(state, np.roll(tokens, 1, axis=0), count)


def chunk_backwards(right, state, tokens, count):
  return right(state, tokens[:, ::-1], count)


STEPS = {
    chunk_absorbed_twice: 0, last_token_dropped: 0, padding_absorbed: 0,
    accept_count_of_another_row: 0, inactive_slot_advanced: 1,
    # As long as they should be: only the witness knows.
    tokens_of_another_row: 0, chunk_backwards: 0}


def steps(shop, kept, patch, wrong):
  row = STEPS[wrong]
  engine = begin(shop, step=wrong)
  with pytest.raises(Refused, match=f'E_WITNESS: row {row}: '):
    engine.check()
  before = shop.catalog.objects()
  with pytest.raises(Refused, match='E_WITNESS: '):
    engine.leave(row)
  assert shop.catalog.objects() == before


# Rows that enter a slot.


def neighbour_slot_written(right, state, row, other):
  return right(state, row - 1, other)


def stores_without_the_rest(right, state, row, other):
  return st.map_leaves(
      lambda path, axes, kind, new, old: new if kind == 'growing' else old,
      right(state, row, other), state)


def entering(shop, kept, patch, wrong):
  engine = begin(shop, put=wrong)
  assert str(engine.enter(2, kept[0])) == 'resumed(6)'
  with pytest.raises(Refused, match='E_WITNESS: row 2: length: expected 6'):
    standing.check(engine.state, {2: engine.stands[2]})


def load_ends_early(right, shop, id, who, host):
  return right(shop, id, Principal('mallory'), host)


def previous_occupant_after_an_aborted_load(shop, kept, patch):
  engine = begin(shop, load=load_ends_early)
  assert str(engine.enter(1, kept[0])) == 'refused(E_ACL)'
  # The engine takes no notice and goes on with what the slot holds.
  with pytest.raises(Refused, match='row 1: expected a row that was loaded'):
    engine.check()
  log = TOKENS[0, :6].tolist()
  with pytest.raises(Refused, match='E_WITNESS: row: length: expected 6'):
    mint.mint(shop, engine.state, 1, HOST, small.TERMS,
              stands=standing.Standing().after(log))


def one_layer_of_an_earlier_artifact(shop, kept, patch, layer):
  """The stores restored without the recurrent rows, or the other way round."""
  right, other = store.fill, shop.place(kept[1]) / 'state'
  def wrong(opened, arrays):
    part = {path: x for path, x in arrays.items()
            if path.startswith(f'layers/{layer}/')}
    right(opened, {path: x for path, x in arrays.items() if path not in part})
    right(store.open_payload(other), part)
  patch.setattr(store, 'fill', wrong)
  engine = begin(shop)
  before = standing.at_rest(engine.state, 2)
  assert str(engine.enter(2, kept[0])) == 'refused(E_DIGEST)'
  standing.check(engine.state, {2: before})


# Snapshots.


def snapshot_one_block_off(shop, kept, patch):
  engine = Engine(shop)
  engine.absorb(TOKENS[:, :4], [4, 4, 4])
  stale = st.snapshot(engine.state)
  engine.absorb(TOKENS[:, 4:8], [4, 4, 4])
  known = list(engine.stands)
  standing.check(st.snapshot(engine.state), dict(enumerate(known)))
  # A cache that hands out the snapshot before under the key of this one.
  with pytest.raises(Refused, match='E_WITNESS: row 0: length: expected 8'):
    standing.check(stale, dict(enumerate(known)))
  later = st.snapshot(engine.state)
  # Or puts it back after the row has gone back further.
  with pytest.raises(ValueError, match='row 0: .* its 4 tokens, got one of 8'):
    st.restore_fixed(st.restore_fixed(engine.state, stale), later)


# What is copied stays the same, to the bit; the witness says nothing of that.


def fork_without_conv_leaf(right, state, row, copies):
  return st.map_leaves(
      lambda path, axes, kind, x: jnp.zeros_like(x) if 'conv' in path else x,
      right(state, row, copies))


def forking_without_conv_leaf(shop, kept, patch):
  sound, engine = begin(shop), begin(shop, fork=fork_without_conv_leaf)
  rest = standing.at_rest(engine.state, 0)
  standing.check(sound.fork(sound.state, 0, 2), {0: rest, 1: rest})
  with pytest.raises(Refused, match='E_DIGEST: row 0: expected'):
    standing.check(engine.fork(engine.state, 0, 2), {0: rest, 1: rest})


def shared_tail_written(right, state, tokens, count):
  """The second row's last token goes into the stores of the first as well."""
  state = right(state, tokens, count)
  stores = state.layers['full']
  at = int(state.length[1]) - 1
  shared = stores.k.at[:, 0, :, at].set(stores.k[:, 1, :, at])
  return dataclasses.replace(state, layers=state.layers | {
      'full': dataclasses.replace(stores, k=shared)})


def writing_a_shared_tail(shop, kept, patch, wrong=shared_tail_written):
  engine = begin(shop)
  # Both copies of a row go on; the second writes where the first has written.
  engine.state = st.put(engine.state, 1, st.take(engine.state, 0))
  engine.stands[1], engine.logs[1] = engine.stands[0], list(engine.logs[0])
  engine.absorb(TOKENS[:, 8:], [1, 0, 0])
  rest = standing.at_rest(engine.state, 0)
  if wrong is not None:
    engine.step = functools.partial(wrong, engine.step)
  engine.absorb(TOKENS[:, 4:8], [0, 1, 0])
  engine.check()
  if wrong is None:
    standing.check(engine.state, {0: rest})
    return
  with pytest.raises(Refused, match='E_DIGEST: row 0: expected'):
    standing.check(engine.state, {0: rest})


def stale_logits(right, state, row, other):
  new = right(state, row, other)
  return dataclasses.replace(new, logits=state.logits)


def entering_with_stale_logits(shop, kept, patch):
  engine = begin(shop, put=stale_logits)
  assert str(engine.enter(2, kept[0])) == 'resumed(6)'
  with pytest.raises(Refused, match='E_DIGEST: row 2: expected'):
    engine.check()


# The twelve, some of them in several forms.
CASES = {
    **{wrong.__name__: functools.partial(steps, wrong=wrong)
       for wrong in STEPS},
    **{wrong.__name__: functools.partial(entering, wrong=wrong)
       for wrong in (neighbour_slot_written, stores_without_the_rest)},
    'previous_occupant': previous_occupant_after_an_aborted_load,
    **{f'{layer} of an earlier artifact': functools.partial(
        one_layer_of_an_earlier_artifact, layer=layer)
       for layer in ('conv', 'full')},
    'snapshot_one_block_off': snapshot_one_block_off,
    'fork_without_conv_leaf': forking_without_conv_leaf,
    'shared_tail_written': writing_a_shared_tail,
    'stale_logits': entering_with_stale_logits}


def test_mutants(shop, kept, monkeypatch):
  """Each is refused by the check that is meant, which its function asserts."""
  missed = {}
  for name, case in CASES.items():
    with monkeypatch.context() as patch:
      try:
        case(shop, kept, patch)
      except pytest.fail.Exception as error:
        missed[name] = error
  print(f'engine mutants: tried {len(CASES)}, caught '
        f'{len(CASES) - len(missed)}')
  assert not missed and len(CASES) > 12


def test_a_tail_that_is_not_shared(shop, kept, monkeypatch):
  writing_a_shared_tail(shop, kept, monkeypatch, None)


def test_a_sound_engine_is_no_mutant(shop, kept, monkeypatch):
  """What is caught is the mutant and not the engine."""
  monkeypatch.setitem(STEPS, step_as_it_is, 0)
  with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
    steps(shop, kept, monkeypatch, step_as_it_is)


def step_as_it_is(right, state, tokens, count):
  return right(state, tokens, count)
