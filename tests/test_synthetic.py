"""`experiments.synthetic`: its accounts, and its training on a tiny model."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import synthetic
from experiments.record import Record
from statejax import config as c
from statejax.model import LanguageModel
from statejax.tasks import pipeline
from statejax.train import loop, step


@pytest.fixture
def record(tmp_path):
  return Record(tmp_path / 'results.json', 'run', lambda key: 'x')


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
      Record('nowhere', 'run', str), list(synthetic.MIXERS), [], 3)
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
  again = Record(record.path, 'run', lambda key: 'x')
  found = again.get('a', make)
  assert found.pop('on').startswith('cpu, ')
  assert found == {'of': 'x', 'accuracy': 1.0}
  assert made == [1]
  other = Record(record.path, 'run', lambda key: 'other settings')
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


@pytest.mark.slow
def test_trains_as_the_loop_does(monkeypatch):
  layer = c.LayerConfig('full', c.AttentionConfig(
      heads=2, kv_heads=2, key=4, value=4), c.SwiGLUConfig(16))
  built = LanguageModel(c.ModelConfig(
      vocab=32, width=16, layers=(layer,), groups=(c.GroupConfig(('full',)),)))
  task = c.TaskConfig('mqar', pairs=3, items=1000, vocab=32)
  train = c.TrainConfig(steps=6, rows=8, length=16, peak=1.0, warmup=2,
                        decay=2, eval_batches=2, seed=5)
  monkeypatch.setattr(synthetic, 'model', lambda name: (built, 0))
  monkeypatch.setitem(synthetic.TASK, 'mqar', task)
  monkeypatch.setitem(synthetic.LENGTH, 'mqar', train.length)
  initial, update = synthetic.make_jitted()
  final = []
  def watched(*arguments):
    state, sums = update(*arguments)
    final.append(jax.device_get(state.params))
    return state, sums
  facts = synthetic.train((initial, watched), 'tiny', 'mqar', 5, 0.01, train)

  real = dataclasses.replace(train, peak=0.01)
  config = c.Config(built.config, real, task)
  data = pipeline.batches(loop.make_task(config), rows=8, length=16, seed=5)
  state, expected = step.initial(built, real), []
  for _ in range(6):
    state, metrics = step.update(built, real, state, next(data))
    expected.append(metrics)
  hits = [float(m['accuracy']) for m in expected]
  np.testing.assert_allclose(facts['curve'], hits, atol=6e-4)
  assert abs(facts['speed'] - np.mean(hits)) < 1e-4
  assert abs(facts['loss'] - float(expected[-1]['loss'])) < 1e-4
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  jax.tree.map(same, final[5], state.params)
  # Evaluation changes nothing, and counts what the library's own does.
  jax.tree.map(np.testing.assert_array_equal, final[5], final[7])
  sums = [step.evaluate(built, state.params, batch)
          for batch in pipeline.evaluation(
              loop.make_task(config, 'eval'), rows=8, length=16, batches=2)]
  right = sum(float(s.correct) for s in sums) / sum(
      float(s.count) for s in sums)
  assert abs(facts['accuracy'] - right) < 1e-4
