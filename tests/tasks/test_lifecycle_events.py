"""The generator's answers, its traps, and what simple rules make of them."""

import functools

import numpy as np
import pytest

from experiments import event_models
from statejax import model
from statejax.tasks import lifecycle_events as le

SIZE = 1600


@functools.cache
def items(seed=0):
  source = le.LifecycleEventsSource(SIZE, seed)
  return [source[i] for i in range(SIZE)]


def replay(events):
  """A dict of every key's values and lock, by the meaning of the events."""
  held, locked = {}, set()
  for op, key, value in events.tolist():
    if op == le.SET and key not in locked:
      held.setdefault(key, []).append(value)
    elif op == le.LOCK:
      locked.add(key)
    elif op == le.DELETE and key not in locked:
      held[key] = []
  return held


def test_answers_are_what_the_events_mean():
  for item in items():
    *events, (op, key, none) = item['events']
    family = le.FAMILIES[item['family']]
    assert none == le.NONE and op == (
        le.BEFORE if family == 'version' else le.NOW)
    values = replay(np.array(events)).get(int(key), [])
    if family == 'no_write':
      assert values == []
      assert [v for o, k, v in events if k == key] == [item['answer']]
    elif family == 'delete':
      assert values == [] and item['answer'] == le.NONE
    else:
      assert item['answer'] == values[-2 if family == 'version' else -1]


def test_shapes_and_ranges():
  for item in items():
    events = item['events']
    assert events.shape == (le.EVENTS + 1, 3) and events.dtype == np.int32
    assert (events >= 0).all()
    assert (events < [le.OPERATIONS, le.KEYS, le.VALUES + 1]).all()


@pytest.mark.parametrize('family', le.FAMILIES)
def test_each_family_has_its_trap(family):
  found = [i for i in items() if le.FAMILIES[i['family']] == family]
  assert len(found) == SIZE // 8
  for item in found:
    key = item['events'][-1, 1]
    mine = item['events'][:-1][item['events'][:-1, 1] == key]
    ops, values = mine[:, 0].tolist(), mine[:, 2].tolist()
    sets = [v for o, v in zip(ops, values) if o == le.SET]
    assert len(set(sets)) == len(sets)
    if family == 'stale':
      assert ops[-1] == le.MENTION and values[-1] in sets[:-1]
    elif family == 'invalid':
      assert ops[-1] == le.REJECT and values[-1] not in sets
    elif family == 'protected':
      assert ops[-1] == le.SET and values[-1] != item['answer']
    elif family == 'pressure':
      at = int(np.argmax(item['events'][:, 1] == key))
      later = item['events'][at + 1:-1]
      later = later[later[:, 0] == le.SET, 1]
      assert ops == [le.SET] and len(set(later.tolist())) == le.PRESSURE


def test_noise_is_about_keys_of_no_stream():
  for item in items():
    events = item['events'][:-1]
    about = {k for o, k, _ in events.tolist() if o != le.NOISE}
    noise = {k for o, k, _ in events.tolist() if o == le.NOISE}
    extra = ({int(item['events'][-1, 1])}
             if le.FAMILIES[item['family']] == 'no_write' else set())
    assert not about & (noise - extra)


def test_the_target_stands_anywhere():
  """Its last event is spread over the item, in all families but pressure."""
  places = []
  for item in items():
    if le.FAMILIES[item['family']] != 'pressure':
      key = item['events'][-1, 1]
      places.append(np.flatnonzero(item['events'][:-1, 1] == key)[0])
  counts, _ = np.histogram(places, 6, (0, le.EVENTS))
  assert counts.min() > 0 and counts[0] < 0.6 * sum(counts)
  # Of a single event every place is equally likely: chi-square, 8 bins.
  single = [np.flatnonzero(i['events'][:-1, 1] == i['events'][-1, 1])[0]
            for i in items() if le.FAMILIES[i['family']] == 'no_write']
  counts, _ = np.histogram(single, 8, (0, le.EVENTS))
  expected = len(single) / 8
  assert ((counts - expected) ** 2 / expected).sum() < 24.3  # p = .001


@pytest.mark.parametrize('rule, solves', [
    ('last_value', {'overwrite', 'pressure', 'no_write'}),
    ('last_set', {'overwrite', 'stale', 'invalid', 'pressure'}),
    ('first_value', {'pressure', 'no_write'})])
def test_no_rule_solves_more_than_it_should(rule, solves):
  right = {}
  for item in items():
    key = item['events'][-1, 1]
    mine = [(o, v) for o, k, v in item['events'][:-1].tolist() if k == key]
    if rule == 'last_set':
      mine = [(o, v) for o, v in mine if o == le.SET] or [(0, -1)]
    answer = mine[0 if rule == 'first_value' else -1][1]
    if (rule, mine[-1][0]) == ('last_value', le.DELETE):
      answer = -1
    right.setdefault(le.FAMILIES[item['family']], []).append(
        answer == item['answer'])
  for family, hits in right.items():
    if family in solves:
      assert all(hits), family
    else:
      assert np.mean(hits) < 0.6, family


def test_is_a_function_of_seed_and_index():
  again = le.LifecycleEventsSource(50, 0)
  for i in range(50):
    np.testing.assert_array_equal(again[i]['events'], items()[i]['events'])
  other = le.LifecycleEventsSource(50, 1)
  assert all((other[i]['events'] != again[i]['events']).any()
             for i in range(50))
  with pytest.raises(ValueError, match='size > 0'):
    le.LifecycleEventsSource(0, 0)
  with pytest.raises(IndexError, match='item 50 of 50'):
    again[50]


@pytest.mark.slow
def test_one_batch_is_learned_by_heart(monkeypatch):
  """A training that cannot do this has a hole, whatever else it scores."""
  class Same(le.LifecycleEventsSource):

    def __init__(self, size, seed, length=72):
      super().__init__(size, 0, length)

    def __getitem__(self, index):
      return super().__getitem__(index % 32)

  monkeypatch.setattr(le, 'LifecycleEventsSource', Same)
  mixers = (event_models.HEADS,) * 2
  params, _ = event_models.train(mixers, 0, 120)
  (events, answer, _), = event_models.batches(32, 0, 32)
  logits, _ = event_models.answers(
      model.LanguageModel(event_models.config(mixers)), params, events, {})
  assert (np.argmax(logits, axis=-1) == answer).all()
