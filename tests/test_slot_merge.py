"""Merging tables of slots: the newer version of each key, and nothing else."""

import dataclasses
import functools
import random

import jax
import numpy as np
import pytest
from test_memory import MODEL, after_all, blank, changed, heard, params

from statejax import config as c
from statejax import edit_marks, slot_facts
from statejax import memory as mem
from statejax import model as lm
from statejax.artifact import journal as jn
from statejax.artifact import names
from statejax.forget import slot as forget_slot
from statejax.ops import slots as sl

MEMORY = mem.Memory(MODEL)
HOST = dataclasses.replace(MEMORY, host=True)


def vector(token):
  """The address of a key; no test here runs the model to make one."""
  return np.random.default_rng(token).standard_normal(8).astype(np.float32)


def write(state, token, value, memory=MEMORY, *, ttl=None, at=None, known=True):
  """A key of one token, at the address of `at` or of itself."""
  fields = {
      'key': vector(token if at is None else at), 'salience': np.float32(1),
      'value': np.float32([*value, 0, 0, 0, 0, 0])[:6],
      'span': np.int32([*value, -1, -1])[:3], 'key_span': np.int32([token, -1]),
      'expires': -1 if ttl is None else int(state.length[0]) + ttl}
  events = memory.events('write', np.arange(2) == 0, **fields)
  new, receipts = mem.commit(MODEL, 'memory', state, events)
  new, (receipt,) = memory.noted(state, new, 'write', receipts)
  assert receipt.changed or not known
  return new


def said(state, token, value):
  """The same of what the model makes of a statement."""
  return MEMORY.write(params(), state, [3, token], key=[token], value=value)[0]


@functools.cache
def base():
  """Three objects in slots 0 to 2 of the first of two rows."""
  state = blank()
  for token in (10, 11, 12):
    state = write(state, token, [token + 10, 7])
  return state


def later(state, length):
  """The state as if it had absorbed more tokens; no test runs the model."""
  return dataclasses.replace(state, length=np.full_like(state.length, length))


def slots(state, row=0):
  """{key: Slot} of a row."""
  return {s.key[0]: s for s in MEMORY.list(state, row)}


def bits(state, slot):
  """All of a slot that a merge takes over."""
  bank = MEMORY._row_bank(state, 0)
  return [np.asarray(getattr(bank, n)[0, slot]).tobytes() for n in (
      'value', 'span', 'version', 'salience', 'status', 'lock', 'key_span')]


def merge(state, other, memory=MEMORY, **where):
  """The merged state and {their key: outcome}, of their slots that count."""
  new, found = memory.merge(state, other, **where)
  key = {s.slot: s.key[:1] for s in map(functools.partial(
      slot_facts.of, memory._row_bank(other, where.get('other_row', 0))),
                                        range(4))}
  return new, {key[m][0] if key[m] else -1: r.outcome
               for m, r in found.items()}


def test_the_newer_version_of_each_key():
  ours = later(write(base(), 10, [1]), 2)       # version 2 here
  theirs = write(write(base(), 11, [2]), 11, [3])  # version 3 there
  theirs = later(write(theirs, 13, [4], ttl=9), 5)
  new, found = merge(ours, theirs)
  assert found == {11: 'committed', 13: 'committed'}
  mine = slots(new)
  assert {k: (s.version, s.values) for k, s in mine.items()} == {
      10: (2, ((1,), (20, 7))), 11: (3, ((3,), (2,))), 12: (1, ((22, 7),)),
      13: (1, ((4,),))}
  for key in (11, 13):
    assert bits(new, mine[key].slot) == bits(theirs, slots(theirs)[key].slot)
  # An object that was here stays itself; another one is given a number of ours,
  # written by a host, and read by nobody here.
  assert (mine[11].oid, mine[11].seq) == (1, 2) and mine[13].oid == 3
  assert mine[13].source == (-1, -1) and mine[13].reads == 0
  assert (mine[13].expires, mine[13].t_write) == (6, 2)
  # Two slots of one row, and their witness; not a bit of anything else.
  rest = changed(ours, new)
  assert {x[1] for x in rest} == {0}
  assert {x[2] for x in rest if x[0] not in ('witness', 'next_oid')} == {1, 3}
  assert 'witness' in {x[0] for x in rest}
  assert not {x[0] for x in rest} & {'length', 'matrix', 'near', 'k', 'logits'}
  # Once more there is nothing to do, either way.
  again, found = merge(new, theirs)
  assert again is new and found == {}
  assert merge(ours, base())[1] == {} == merge(ours, ours)[1]


def test_a_deletion_wins_by_its_version_too():
  gone, _ = MEMORY.delete(base(), 1)            # version 2
  newer = write(write(base(), 11, [1]), 11, [2])  # version 3
  new, found = merge(base(), gone)
  assert found == {11: 'committed'} and slots(new)[11].status == 'tombstone'
  assert bits(new, 1) == bits(gone, 1)
  assert not MEMORY._row_bank(new, 0).value[0, 1].any()
  assert merge(newer, gone)[1] == {}
  back, found = merge(gone, newer)
  assert found == {11: 'committed'} and slots(back)[11].values[0] == (2,)
  # Of two deletions the later one stays, so that nothing between comes back.
  late, _ = MEMORY.delete(newer, 1)             # version 4
  new, found = merge(gone, late)
  assert found == {11: 'committed'} and slots(new)[11].version == 4
  assert slots(new)[11].status == 'tombstone' and merge(new, newer)[1] == {}
  # What is unknown here is kept from coming back, where there is room.
  other, _ = MEMORY.delete(write(base(), 13, [1]), 3)
  new, found = merge(base(), other)
  assert found == {13: 'committed'} and slots(new)[13].status == 'tombstone'
  full = write(base(), 14, [1])
  new, found = merge(full, other)
  assert new is full and found == {13: 'full'}


def test_equal_versions_that_differ_stay_as_they_are_here():
  ours, theirs = write(base(), 11, [1]), write(base(), 11, [2])
  new, found = merge(ours, theirs)
  assert new is ours and found == {11: 'conflict'}
  gone, _ = MEMORY.delete(base(), 11 - 10)
  assert merge(ours, gone)[1] == {11: 'conflict'} == merge(gone, ours)[1]
  # Whoever has said the same has said nothing else.
  assert merge(ours, write(base(), 11, [1]))[1] == {}


def test_what_is_protected_stays():
  newer = write(base(), 11, [2])
  locked, _ = MEMORY.lock(base(), 1)
  kept, _ = HOST.lock(base(), 1)
  apart, _ = MEMORY.quarantine(base(), 1)
  for ours in (locked, kept, apart):
    new, found = merge(ours, newer)
    assert new is ours and found == {11: 'invalid' if ours is apart
                                     else 'locked'}
  # A lock comes along; a host's only with his capability.
  theirs, _ = MEMORY.lock(newer, 1)
  assert slots(merge(base(), theirs)[0])[11].lock == 'stream'
  theirs, _ = HOST.lock(newer, 1)
  new, found = merge(base(), theirs)
  assert found == {11: 'forbidden'} and slots(new)[11].version == 1
  assert slots(merge(base(), theirs, HOST)[0])[11].lock == 'host'
  # Neither what is quarantined there, nor has expired, nor is another's.
  theirs, _ = MEMORY.quarantine(newer, 1)
  assert merge(base(), theirs)[1] == {11: 'invalid'}
  theirs, _ = MEMORY.expire(newer, 1, ttl=1)
  assert merge(base(), theirs)[1] == {11: 'committed'}
  assert merge(base(), later(theirs, 1))[1] == {}
  # What has expired here stands in nobody's way.
  ours = later(MEMORY.expire(newer, 1, ttl=1)[0], 1)
  new, found = merge(ours, base())
  assert found == {11: 'committed'}
  assert (slots(new)[11].slot, slots(new)[11].version) == (3, 1)
  other = dataclasses.replace(MEMORY, principal=5)
  theirs = write(base(), 13, [1], other)
  assert merge(base(), theirs)[1] == {}
  assert merge(base(), theirs, other)[1] == {13: 'committed'}
  # Nor anything without a key to know it by.
  held = theirs.layers['memory']
  nameless = dataclasses.replace(theirs, layers=theirs.layers | {
      'memory': dataclasses.replace(
          held, key_span=np.full_like(held.key_span, -1))})
  assert merge(base(), nameless)[1] == {-1: 'invalid'}


def test_a_new_object_takes_the_slot_that_a_write_would():
  full = write(base(), 14, [1])
  theirs = write(blank(), 20, [9])
  want = {s.key[0] for s in slots(write(full, 20, [9])).values()}
  new, found = merge(full, theirs)
  assert found == {20: 'committed'} and {*slots(new)} == want == {
      11, 12, 14, 20}
  # But only when all that is here was compared, in whatever order they lie.
  first = write(blank(), 20, [9])
  for value in (1, 2, 3):
    first = write(first, 10, [value])
  new, found = merge(later(full, 5), first)
  assert list(found) == [10, 20] and {k: s.version for k, s in slots(
      new).items()} == {10: 3, 12: 1, 14: 1, 20: 1}
  # Never what is locked.
  locked, _ = MEMORY.lock(full, 0)
  assert {*slots(merge(locked, theirs)[0])} == {10, 12, 14, 20}
  for slot in (1, 2, 3):
    locked, _ = MEMORY.lock(locked, slot)
  new, found = merge(locked, theirs)
  assert new is locked and found == {20: 'full'}
  # Nor what this merge has brought.
  for token in (21, 22, 23):
    theirs = write(theirs, token, [9])
  locked, _ = MEMORY.lock(MEMORY.lock(full, 0)[0], 1)
  new, found = merge(locked, theirs)
  assert {*slots(new)} == {10, 11, 20, 21}
  assert found == {20: 'committed', 21: 'committed', 22: 'full', 23: 'full'}


def test_one_address_is_one_object():
  """Another key whose vector is that of an object here, or a name of it."""
  theirs = write(blank(), 20, [9])
  ours = write(blank(), 21, [8], at=20)
  new, found = merge(ours, theirs)
  assert new is ours and found == {20: 'conflict'}
  # Nor are two of one key, on either side, which one could be taken for.
  twins = write(blank(), 13, [8], at=30)
  twins = write(write(twins, 13, [9], at=31), 13, [7], at=31)
  one = write(blank(), 13, [5], at=30)
  for ours, theirs in ((one, twins), (twins, write(one, 13, [6], at=30)),
                       (base(), twins)):
    new, found = MEMORY.merge(ours, theirs)
    assert new is ours and {r.outcome for r in found.values()} == {'conflict'}
  theirs = write(blank(), 20, [9])
  ours, _ = MEMORY._simple(sl.ALIAS, base(), 1, {}, name=vector(20))
  new, found = merge(ours, theirs)
  assert new is ours and found == {20: 'conflict'}


def test_it_is_written_down(tmp_path):
  book = jn.Journal(tmp_path / 'edits')
  memory = dataclasses.replace(MEMORY, journal=book)
  ours = blank()
  for token in (10, 11, 12):
    ours = write(ours, token, [token + 10, 7], memory)
  theirs = write(write(base(), 11, [2]), 13, [4])
  new, found = memory.merge(ours, theirs, reason='of another run')
  receipts = list(found.values())
  assert [e['op'] for e in book.entries] == 3 * ['write'] + 2 * ['merge']
  first, last = book.entries[-2:]
  assert (first['before'], first['reason']) == (
      book.entries[1]['after'], 'of another run')
  assert last['before'] == '' and jn.Journal(tmp_path / 'edits').entries == (
      book.entries)
  for entry, slot in ((first, 1), (last, 3)):
    assert entry['after'] == book.commitment(
        jn.object_name(entry), slot_facts.plain(memory._row_bank(new, 0), slot))
  assert forget_slot.made(memory, memory._row_bank(new, 0), 3)
  edits = [(0, edit_marks.mark(entry)) for entry in book.entries]
  assert [r.mark for r in receipts] == [mark for _, mark in edits[-2:]]
  assert names.lanes(np.asarray(new.witness[0])) == names.witness([], edits)
  assert 'layers/kda/matrix' in receipts[0].carriers
  # What is refused is written down, and nothing to do is not.
  locked, _ = memory.lock(new, 1)
  memory.merge(locked, write(write(theirs, 11, [5]), 11, [6]))
  memory.merge(locked, theirs)
  assert [e['outcome'] for e in book.entries[-2:]] == ['committed', 'locked']
  # What the journal has forgotten is told before anything is written down.
  book.forget('memory/0/1')
  entries, newer = [*book.entries], write(write(base(), 10, [2]), 11, [3])
  with pytest.raises(ValueError, match='has forgotten memory/0/1;'):
    memory.merge(ours, newer)
  assert book.entries == entries


@pytest.mark.slow
def test_the_model_reads_what_was_merged():
  ours = blank()
  for token in (10, 11, 12):
    ours = said(ours, token, [token + 10, 7])
  state = merge(ours, said(ours, 13, [4]))[0]
  ask = lambda token: heard(state, [token], [])[1].layers['memory'].reads[0, 0]
  for token in (10, 11, 12, 13):
    assert np.asarray(ask(token)).tolist() == [
        int(n == token - 10) for n in range(4)]


@pytest.mark.slow
def test_what_was_said_before_does_not_undo_it():
  ours = blank()
  for token in (10, 12):
    ours = said(ours, token, [7])
  theirs = said(said(ours, 10, [8]), 10, [9])
  _, ours = heard(ours, [21, 10], [], want='write')
  new, found = merge(ours, theirs)
  assert found == {10: 'committed'}
  assert slots(after_all(new))[10].values == ((9,), (8,))
  # What waits about anything else does come.
  other = said(ours, 12, [8])
  assert slots(after_all(merge(ours, other)[0]))[10].values == (
      (21, 10), (7,))


def test_rows_and_other_memories():
  theirs = write(base(), 13, [4])
  new, found = merge(base(), theirs, row=1)
  assert {*slots(new, 1)} == {10, 11, 12, 13} and {
      x[1] for x in changed(base(), new)} == {1}
  assert merge(theirs, theirs, row=0, other_row=1)[1] == {}
  with pytest.raises(ValueError, match='row: expected 0 to 1, got 2'):
    MEMORY.merge(base(), theirs, other_row=2)
  mixer = dataclasses.replace(
      MEMORY.config, rules=c.SlotRules(slots=4, key=8, value=4, span=3,
                                       key_span=2, aliases=2))
  small = lm.LanguageModel(dataclasses.replace(
      MODEL.config, layers=(c.LayerConfig('memory', mixer, c.SwiGLUConfig(16)),
                            *MODEL.config.layers[1:])))
  with pytest.raises(ValueError, match='value: expected .*another model'):
    MEMORY.merge(base(), small.init_state(2, 32))


def edited(rng, state, count):
  """The state after random edits of five keys, of which four fit."""
  for _ in range(count):
    here, token = slots(state), rng.randrange(10, 15)
    if token not in here or rng.random() < .6:
      state = write(state, token, [rng.randrange(32)], known=False)
    else:
      op = rng.choice(('delete', 'lock', 'unlock', 'quarantine', 'restore'))
      state, _ = getattr(MEMORY, op)(state, here[token].slot)
  return state


def expected(ours, theirs):
  """{key: (version, values, status)} of the keys that are told by versions."""
  out = {}
  for key, there in theirs.items():
    here = ours.get(key)
    if here is None or 'quarantined' in (here.status, there.status):
      continue
    win = there if there.version > here.version and here.lock == 'open' else (
        here)
    out[key] = win.version, win.values, win.status
  return out


def test_random_edits_on_both_sides():
  """Against a dictionary: which version each key has, in place of what."""
  rng, tried, wrong = random.Random(0), 0, 0
  for _ in range(12):
    start = edited(rng, blank(), 4)
    ours, theirs = (edited(rng, start, rng.randrange(1, 5)) for _ in range(2))
    new, found = MEMORY.merge(ours, theirs)
    mine, there, after = slots(ours), slots(theirs), slots(new)
    out = {r.evicted for r in found.values()}
    for key, facts in expected(mine, there).items():
      tried += 1
      got = after.get(key)
      wrong += mine[key].oid not in out and (
          got is None or (got.version, got.values, got.status) != facts)
    # What they do not have stays, but for what a new object has pushed out.
    for key in mine.keys() - there.keys():
      tried, wrong = tried + 1, wrong + (
          after.get(key) != mine[key] and mine[key].oid not in out)
    changes = {r.slot for r in found.values() if r.changed}
    tried, wrong = tried + 1, wrong + (changes != {*MEMORY.diff(ours, new)})
    wrong += any(slots(ours)[k].lock != 'open' and after.get(k) != mine[k]
                 for k in mine)
  print(f'merges of random edits: tried {tried}, accepted wrongly {wrong}')
  assert not wrong


@pytest.mark.slow
def test_where_the_key_says_which_slots_there_are():
  rules = dataclasses.replace(MEMORY.config.rules, mode='hashed', ways=2)
  layers = (c.LayerConfig('memory', dataclasses.replace(
      MEMORY.config, rules=rules), c.SwiGLUConfig(16)),)
  model = lm.LanguageModel(dataclasses.replace(
      MODEL.config, layers=layers, groups=(c.GroupConfig(('memory',)),)))
  found = jax.jit(model.init)(jax.random.key(0))
  memory, state = mem.Memory(model), model.init_state(1, 0)
  write = lambda state, token: memory.write(
      found, state, [3, token], key=[token], value=[2])
  place = {token: write(state, token)[1].slot // 2 for token in range(10, 20)}
  one, other, third = [t for t in place if place[t] == place[10]][:3]
  ours = write(write(state, one)[0], other)[0]
  for slot in (0, 1):
    ours, _ = memory.lock(ours, 2 * place[10] + slot)
  theirs = write(state, third)[0]
  # Its own two are taken, of which nothing is evicted; two more are free.
  new, receipts = memory.merge(ours, theirs)
  assert [r.outcome for r in receipts.values()] == ['full'] and new is ours
  new, receipts = memory.merge(write(state, one)[0], theirs)
  assert [r.slot // 2 for r in receipts.values()] == [place[10]]
  assert {s.key[0] for s in memory.list(new)} == {one, third}
