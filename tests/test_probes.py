"""Rows of probes, and the paired bootstrap by hand."""

import numpy as np
import pytest

from experiments import event_models, probes
from statejax.tasks import lifecycle_events as task


def test_rows():
  found = probes.rows(10, [5, 6], [5, 7], ['slot', 'log'], [96, 97])
  assert found == ['10 5 5 slot 96', '11 6 7 log 97']
  # By the number of the item, not by the order of the rows.
  assert probes.hits(found[::-1]).tolist() == [True, False]
  hit = np.array([1, 0, 1, 1, 1, 0], bool)
  assert probes.counted(hit, ('a', 'b')) == {'a': 3, 'b': 1}
  with pytest.raises(ValueError, match='zip'):
    probes.rows(0, [5], [5, 7], ['slot'], [96])


def test_misses_are_placed_where_they_count_worst():
  rule = np.array([1, 1, 0, 0, 1, 0], bool)
  hit = probes.placed({'a': 2, 'b': 1}, rule)
  assert probes.counted(hit, ('a', 'b')) == {'a': 2, 'b': 1}
  assert hit.tolist() == [True, False, True, True, False, False]


def test_gain():
  rule = np.arange(400) % 4 == 0
  ours = np.arange(400) % 4 < 3
  mean, low, high = probes.gain(ours, rule)
  # Deviation of a mean of 400 of 0 or 100, half each, is 2.5.
  assert mean == 50 and abs(low - 45.1) < 0.6 and abs(high - 54.9) < 0.6
  assert probes.gain(rule, rule) == (0, 0, 0)
  # Pairs that agree make it narrower than pairs that do not.
  mixed = np.roll(ours, 1)
  wide = probes.gain(mixed, rule)
  assert wide[0] == mean and wide[2] - wide[1] > high - low
  assert probes.strongest({'a': rule, 'b': ours, 'c': mixed}) == 'b'


def test_rules_of_events():
  """Each solves what it is made for, and no lock and no version."""
  found = {name: probes.counted(hit, task.FAMILIES)
           for name, hit in event_models.rules(0, 160).items()}
  last = found['last set or delete']
  for family in ('overwrite', 'stale', 'invalid', 'delete', 'pressure'):
    assert last[family] == 20, family
  for family in ('protected', 'version', 'no_write'):
    assert last[family] == 0, family
  assert found['last mention']['stale'] == found['last mention']['delete'] == 0
  assert found['last mention']['no_write'] == 20
  assert found['first mention']['overwrite'] == 0
  assert probes.strongest(event_models.rules(0, 160)) == 'last set or delete'
