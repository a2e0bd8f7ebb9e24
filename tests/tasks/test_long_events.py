"""Long streams: what their questions mean, where facts stand, and the traps."""

import functools

import numpy as np
import pytest

from statejax.tasks import lifecycle_events as le
from statejax.tasks import long_events as task

LENGTH, ITEMS = 2000, 25


@functools.cache
def streams(seed=0):
  source = task.LongEventsSource(40, LENGTH, ITEMS, seed)
  return [source[i] for i in range(len(source))]


def facts():
  """Yields (class, answer, question, places, [(operation, value)])."""
  for stream in streams():
    events = stream['events']
    for question, answer, family in zip(
        stream['questions'], stream['answer'], stream['family']):
      places = np.flatnonzero(events[:, 1] == question[1])
      yield (task.CLASSES[family], int(answer), question.tolist(), places,
             [(o, v) for o, _, v in events[places].tolist()])


def test_shapes_and_classes():
  for stream in streams():
    assert stream['events'].shape == (LENGTH, 3)
    assert (stream['events'] >= 0).all()
    assert (stream['events'] < [le.OPERATIONS, le.KEYS, le.VALUES + 1]).all()
    assert len(set(stream['questions'][:, 1].tolist())) == ITEMS
    assert np.bincount(stream['family']).tolist() == [ITEMS // 5] * 5


def test_answers_are_what_the_events_mean():
  for name, answer, (op, _, none), _, told in facts():
    assert none == le.NONE
    assert op == (le.BEFORE if name == 'version' else le.NOW)
    held, locked = [], False
    for o, value in told:
      if o == le.SET and not locked:
        held.append(value)
      locked |= o == le.LOCK
    if name == 'no_write':
      assert told == [(le.NOISE, answer)]
    else:
      assert answer == held[-2 if name == 'version' else -1]


def test_the_designed_wrong_value_is_there():
  seen = set()
  for name, answer, _, _, told in facts():
    ops, values = [o for o, _ in told], [v for _, v in told]
    sets = [v for o, v in told if o == le.SET]
    assert len(set(sets)) == len(sets)
    if name in ('overwrite', 'version'):
      assert set(ops) == {le.SET} and 2 <= len(sets) <= 4
    elif name == 'pollution':
      assert ops[-1] in (le.MENTION, le.REJECT) and values[-1] != answer
      seen.add(ops[-1])
    elif name == 'protection':
      assert ops[-1] == le.SET and values[-1] != answer
      assert ops.count(le.LOCK) == 1
  assert seen == {le.MENTION, le.REJECT}


def test_filler_shares_no_key_with_facts():
  for stream in streams():
    events, keys = stream['events'], set(stream['questions'][:, 1].tolist())
    filler = ~np.isin(events[:, 1], list(keys))
    assert (events[filler, 0] == le.NOISE).all()
    assert len(set(events[filler, 1].tolist())) == le.KEYS - ITEMS
    told = events[~filler]
    assert len(told) <= 6 * ITEMS
    noise = told[told[:, 0] == le.NOISE, 1].tolist()
    assert len(set(noise)) == len(noise) == ITEMS // 5


@pytest.mark.parametrize('name', (None, 'no_write'))
def test_facts_stand_anywhere(name):
  """Chi-square over ten tenths of a stream."""
  places = np.concatenate([p for n, _, _, p, _ in facts()
                           if name in (None, n)])
  counts, _ = np.histogram(places, 10, (0, LENGTH))
  expected = len(places) / 10
  assert ((counts - expected) ** 2 / expected).sum() < 27.9  # p = .001


@pytest.mark.parametrize('rule, solves', [
    ('last_value', {'overwrite', 'no_write'}),
    ('last_set', {'overwrite', 'pollution'}), ('first_value', {'no_write'})])
def test_no_rule_solves_more_than_it_should(rule, solves):
  right = {}
  for name, answer, _, _, told in facts():
    if rule == 'last_set':
      told = [x for x in told if x[0] == le.SET] or [(0, -1)]
    said = told[0 if rule == 'first_value' else -1][1]
    right.setdefault(name, []).append(said == answer)
  for name, hits in right.items():
    if name in solves:
      assert all(hits), name
    else:
      assert np.mean(hits) < 0.6, name


def test_pieces_are_the_stream():
  events = streams()[0]['events']
  found = list(task.pieces(events, 768))
  assert [len(p) for p in found] == [768, 768, 464]
  np.testing.assert_array_equal(np.concatenate(found), events)


def test_is_a_function_of_seed_and_index():
  again = task.LongEventsSource(3, LENGTH, ITEMS, 0)
  other = task.LongEventsSource(3, LENGTH, ITEMS, 1)
  for i in range(3):
    np.testing.assert_array_equal(again[i]['events'], streams()[i]['events'])
    assert (other[i]['events'] != again[i]['events']).any()
  with pytest.raises(IndexError, match='stream 3 of 3'):
    again[3]


@pytest.mark.parametrize('change, message', [
    (dict(streams=0), 'streams > 0'), (dict(items=90), 'items <= 88'),
    (dict(length=100), 'length >= 8 items')])
def test_refused(change, message):
  with pytest.raises(ValueError, match=message):
    task.LongEventsSource(**dict(streams=1, length=LENGTH, items=ITEMS,
                                 seed=0) | change)
