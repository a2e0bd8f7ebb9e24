"""Experiments as commands, and the names of what they keep."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import event_models, interrupted, rates
from experiments.record import Record
from statejax import config as c
from statejax.tasks import lifecycle_text, lifecycle_words

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'bridge', 'frozen_bridge', 'lifecycle_events', 'equal_memories',
    'needle_local', 'writer_auc', 'lifecycle_text', 'stress_2m',
    'lexical_selector', 'forgetting'])
def test_smoke(name, tmp_path):
  """From training to the table; what it says is of no use."""
  subprocess.run(
      [sys.executable, '-m', f'experiments.{name}', '--smoke'], cwd=tmp_path,
      check=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
  found = json.loads((tmp_path / f'runs/{name}.json').read_text())
  assert found['rows'] and found['command'].startswith(
      f'python -m experiments.{name}')


@pytest.mark.parametrize('name', [
    'lifecycle_events', 'lifecycle_text', 'bridge', 'equal_memories',
    'frozen_bridge', 'writer_auc', 'lexical_selector',
    pytest.param('stress_2m', marks=pytest.mark.slow)])
def test_what_is_recorded_is_of_these_settings(name, tmp_path):
  """All trainings are there, and the table of them is that of the file."""
  kept = ROOT / f'experiments/results/{name}.json'
  text, out = json.loads(kept.read_text()), tmp_path / 'x.json'
  out.write_text(json.dumps(text))
  arguments = text['command'].split()[2:]
  subprocess.run([sys.executable, '-m', *arguments, f'--out={out}'], cwd=ROOT,
                 check=True, timeout=300, env=os.environ)
  found = json.loads(out.read_text())
  assert found.get('cells') == text.get('cells')
  assert found['rows'] == text['rows']
  assert all(row['ok'] for row in found['rows'])


def alone(program):
  """Runs a program by itself: two experiments may have flags of one name."""
  subprocess.run([sys.executable, '-c', program], check=True,
                 env=os.environ | {'PYTHONPATH': str(ROOT)})


def test_what_deletes_leave_of_a_slot_and_above():
  alone('''
import experiments.forgetting as forgetting
rest, above = forgetting.slot_layer(later=3)
assert rest == 0, rest
assert above == {'suppress': [1., 1.], 'replay': [0., 0.]}, above
''')


def test_claims_of_text():
  """One alias too few is told, and so is an edit that was not undone."""
  alone('''
import experiments.lifecycle_text as lifecycle_text
from statejax.tasks import lifecycle_text as task
def claims(alias=99, **changes):
  full, none = (dict.fromkeys(task.SCENARIOS, n) for n in (100, 0))
  stream = {'rows': 8, 'restored': 8, 'edited': 8, 'beside': 8, 'undone': 7,
            'waited': 1, 'others': 8, 'journal': True, 'amid': 8,
            'again': 8} | changes
  counts = {'slots': [full | {'alias': alias}], 'fallback off': [none],
            'lifecycle off': [none], 'oracle': [full], 'last update': [none]}
  rows = lifecycle_text.claims(counts, {'slots': [9]}, [stream],
                               [(9., 5., 12.)], 100)
  return [row.claim for row in rows if not row.ok]
assert claims() == []
assert claims(alias=98) == ['slots: alias, right of 100, each seed']
for name, worse in (('restored', 7), ('edited', 7), ('beside', 7),
                    ('others', 7), ('amid', 7), ('again', 7), ('undone', 6),
                    ('journal', False)):
  assert len(claims(**{name: worse})) == 1, name
''')


def test_the_best_rate_is_that_of_all_seeds(tmp_path):
  """Seed 0 chooses, by items that are in no test; nothing is trained twice."""
  made = []

  def study(seed, rate):
    made.append((seed, rate))
    return {'dev': {1e-3: 3, 2e-3: 5, 4e-3: 5}[rate], 'right': [seed, rate]}

  found = Record(tmp_path / 'x.json', '', lambda key: rates.named(key))
  best = functools.partial(rates.best, found)
  facts = best('delta', (1e-3, 2e-3, 4e-3), 2, study)
  assert [x['right'] for x in facts] == [[0, 2e-3], [1, 2e-3]]
  assert made == [(0, 1e-3), (0, 2e-3), (0, 4e-3), (1, 2e-3)]
  assert best('slots', (4e-3,), 1, lambda *_: {'right': 7})[0]['right'] == 7
  assert set(found.cells) == {'delta at 0.001/0', 'delta at 0.002/0',
                              'delta at 0.002/1', 'delta at 0.004/0', 'slots/0'}
  assert {x['of'] for x in found.cells.values()} == {'delta', 'slots'}


def test_only_slots_see_labels(monkeypatch):
  def sources(make, steps, rows, share):
    raise InterruptedError(share)

  monkeypatch.setattr(event_models.labels, 'sources', sources)
  for mixer, share in ((event_models.SLOTS, 0.1), (c.KDAConfig(4, 16, 16), 0)):
    with pytest.raises(InterruptedError) as found:
      event_models.train((mixer,), 0, 4)
    assert found.value.args == (share,)


def test_slots_may_be_trained_without_labels(monkeypatch):
  def sources(make, steps, rows, share):
    raise InterruptedError(share)

  monkeypatch.setattr(event_models.labels, 'sources', sources)
  with pytest.raises(InterruptedError) as found:
    event_models.train((event_models.SLOTS,), 0, 4, share=0.)
  assert found.value.args == (0.,)


def test_where_texts_are_interrupted():
  """An edit at `over` comes after the last word on its key, in mid-log."""
  source = lifecycle_text.LifecycleTextSource(
      8, 3000, 'test', length=1280, scenarios=('base',), questions=2)
  logs = interrupted.texts(None, None, source)
  within, start = [], np.zeros_like(logs.last)
  for row in range(len(logs.tokens)):
    key = lifecycle_words.name(source.record(row).questions[0].key)
    said = lambda begin, end, row=row: lifecycle_words.decode(
        logs.tokens[row, begin[row]:end[row]])
    assert key in said(start, logs.over)
    assert key not in said(logs.over, logs.last)
    assert (key in said(logs.half, logs.last)) == logs.late[row]
    assert key in said(logs.last, logs.ask)
    assert key not in said(logs.answered, logs.again)
    assert said(logs.last - 1, logs.last) == lifecycle_words.STOP
    assert said(logs.ask, logs.ask + 1) == lifecycle_words.COLON
    within.append(logs.over[row] < logs.last[row])
  assert any(within) and logs.late.any()


def test_only_slots_see_labels_of_text():
  alone('''
import experiments.lifecycle_text as lifecycle_text
def sources(make, steps, rows, share):
  raise InterruptedError(share)
lifecycle_text.labels.sources = sources
for name, share in (('slots', 0.1), ('delta', 0)):
  try:
    lifecycle_text.train(lifecycle_text.MEMORY[name], 0, 4)
  except InterruptedError as found:
    assert found.args == (share,), found
  else:
    assert False
''')


def test_words_of_names_stay_as_they_were_drawn():
  alone('''
import jax
import numpy as np
import experiments.lifecycle_text as lifecycle_text
from statejax.tasks import lifecycle_words as words
memory = lifecycle_text.MEMORY['delta']
drawn = lifecycle_text.language_model(memory).init(jax.random.key(0))['embed']
found = lifecycle_text.train(memory, 0, 1)[0]['embed']
same = {w for w, a, b in zip(words.WORDS, drawn, found) if np.all(a == b)}
assert same == {*words.ADJECTIVES, *words.NOUNS, *words.CALLSIGNS}, same
''')


@pytest.mark.parametrize('share, want', [(0., 1.), (0.5, 2.)])
def test_losses_of_layers_are_per_token_that_has_one(share, want, monkeypatch):
  """Of all where nobody has labels, or they would decide every clipping."""
  told = []
  monkeypatch.setattr(event_models.logging, 'info',
                      lambda _, i, cost, right: told.append(float(cost)))

  def answers(params, events, hints):
    own = jnp.float32(events.shape[0] * events.shape[1])
    return jnp.zeros((len(events), 65)) + params['w'], {'loss': own}

  event_models.fit(answers, {'w': jnp.zeros(())}, lambda x: (x['events'],), 0,
                   4, rows=2, share=share)
  assert told == [pytest.approx(math.log(65) + want, abs=1e-5)]


def test_a_result_knows_its_rate():
  mixers = {'slots': (event_models.SLOTS,), 'delta': (c.KDAConfig(4, 16, 16),)}
  of = lambda key, steps=2000: event_models.cell(mixers, steps, key)
  keys = ('slots/0', 'delta at 0.001/0', 'delta at 0.002/0')
  assert len({of(key) for key in keys}) == 3
  assert of('delta at 0.001/1') == of('delta at 0.001/0') != of(
      'delta at 0.001/0', 1000)
  assert of('rate/delta') is None


def test_results_of_what_is_no_more_are_left_out(tmp_path):
  path = tmp_path / 'x.json'
  path.write_text(json.dumps({'cells': {
      'old/0': {'of': 'x'}, 'new/0': {'of': 'y'}, 'new/1': {'of': 'x'}}}))
  found = Record(path, '', lambda key: {'new': 'y'}.get(rates.named(key)))
  assert set(found.cells) == {'new/0'}
