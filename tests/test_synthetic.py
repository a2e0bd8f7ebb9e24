"""What `experiments.synthetic` says of its own results; nothing is trained."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import synthetic


@pytest.fixture
def record(tmp_path):
  return synthetic.Record(tmp_path / 'results.json', lambda key: 'x')


def fill(record, task, name, accuracies, rate=synthetic.RATES[0], loss=1.0):
  for seed, accuracy in enumerate(accuracies):
    record.cells[f'{task}/{name}/{seed}/{rate}'] = {
        'accuracy': accuracy, 'speed': accuracy / 2, 'loss': loss}


def test_budgets_are_equal():
  # By hand: a matrix and three tails of three tokens, float32.
  assert synthetic.state_bytes('GDN') == 4 * 2 * (16 * 16 + 3 * 3 * 16)
  assert synthetic.state_bytes('DeltaProduct') == 4 * 2 * (
      16 * 12 + 3 * (16 + 2 * (16 + 12)))
  assert synthetic.state_bytes('RetNet') == 4 * 2 * 16 * 25
  rows = synthetic.claims(
      synthetic.Record('nowhere', str), list(synthetic.MIXERS), [], 3)
  assert len(rows) == 2 and all(row.ok for row in rows)


def test_interval_is_student():
  values = [0.5, 0.7, 0.9]
  half = 4.303 * np.std(values, ddof=1) / 3 ** 0.5
  assert synthetic.interval(values) == f'70.0 ± {100 * half:.1f}'
  assert synthetic.interval([0.25]) == '25.0 (1 seed)'
  assert synthetic.interval([]) == 'missing'


@pytest.mark.parametrize('low, ok', [
    ([0.8, 0.8, 0.8], True), ([0.92, 0.9, 0.93], True),
    ([0.95, 0.95, 0.95], False), ([], False)])
def test_order_is_compared_seed_by_seed(record, low, ok):
  fill(record, 'mqar', 'KDA', [0.9, 0.9, 0.9])
  fill(record, 'mqar', 'GDN', low)
  row = synthetic.compare(record, 'mqar', 'accuracy', 'KDA', 'GDN', 3)
  assert row.ok == ok
  assert (row.obtained == 'missing') == (not low)


def test_order_of_untrained_layers_proves_nothing(record):
  for name in synthetic.MIXERS:
    fill(record, 'stack', name, [0.1, 0.1, 0.1])
  rows = synthetic.claims(record, list(synthetic.MIXERS), ['stack'], 3)[2:]
  assert [row.ok for row in rows] == [False, True, True, True, True]
  fill(record, 'stack', 'RetNet', [0.0, 0.0, 0.0])
  fill(record, 'stack', 'GLA', [0.5, 0.2, 0.2])
  assert synthetic.claims(record, list(synthetic.MIXERS), ['stack'], 3)[2].ok


def test_rate_is_chosen_by_the_loss_of_seed_0(record):
  first, second = synthetic.RATES
  fill(record, 'mqar', 'KDA', [0.5], first, loss=1.0)
  fill(record, 'mqar', 'KDA', [0.4, 0.6], second, loss=0.9)
  assert synthetic.best_rate(record, 'mqar', 'KDA') == second
  assert synthetic.collect(record, 'mqar', 'KDA', 'accuracy', 3) == {
      0: 0.4, 1: 0.6}
  assert 'missing' in synthetic.table(record, ['KDA'], ['stack'], 3)


def test_finished_trainings_are_not_repeated(record):
  made = []
  make = lambda: made.append(1) or {'accuracy': 1.0}
  record.get('a', make)
  again = synthetic.Record(record.path, lambda key: 'x')
  assert again.get('a', make) == {'of': 'x', 'accuracy': 1.0}
  assert made == [1]
  other = synthetic.Record(record.path, lambda key: 'other settings')
  assert not other.cells
  other.get('a', make)
  assert made == [1, 1]
  assert json.loads(record.path.read_text())['cells']['a']['of'] != 'x'


def test_settings_tell_layer_task_and_training():
  train = synthetic.TRAIN
  longer = dataclasses.replace(train, steps=train.steps + 1)
  digests = {synthetic.settings(*x) for x in [
      (train, 'mqar/GDN/0/1'), (train, 'stack/GDN/0/1'),
      (train, 'mqar/GLA/0/1'), (longer, 'mqar/GDN/0/1')]}
  assert len(digests) == 4 and None not in digests
  assert synthetic.settings(train, 'mqar/GDN/7/2') in digests
  assert synthetic.settings(train, 'mqar/S4/0/1') is None
