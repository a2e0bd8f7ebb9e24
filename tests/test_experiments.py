"""Experiments as commands, and the names of what they keep."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import event_models, rates
from statejax import config as c

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'bridge', 'frozen_bridge', 'lifecycle_events', 'equal_memories',
    'needle_local', 'writer_auc', 'lifecycle_text', 'stress_2m',
    'lexical_selector'])
def test_smoke(name, tmp_path):
  """From training to the table; what it says is of no use."""
  subprocess.run(
      [sys.executable, '-m', f'experiments.{name}', '--smoke'], cwd=tmp_path,
      check=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
  found = json.loads((tmp_path / f'runs/{name}.json').read_text())
  assert found['rows'] and found['command'].startswith(
      f'python -m experiments.{name}')


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
            'waited': 1, 'others': 8, 'journal': True} | changes
  counts = {'slots': [full | {'alias': alias}], 'fallback off': [none],
            'lifecycle off': [none], 'oracle': [full], 'last update': [none]}
  rows = lifecycle_text.claims(counts, {'slots': [9]}, [stream],
                               [(9., 5., 12.)], 100)
  return [row.claim for row in rows if not row.ok]
assert claims() == []
assert claims(alias=98) == ['slots: alias, right of 100, each seed']
for name, worse in (('restored', 7), ('edited', 7), ('beside', 7),
                    ('others', 7), ('undone', 6), ('journal', False)):
  assert len(claims(**{name: worse})) == 1, name
''')


def test_cells_of_rates():
  """A training at the rate of slots keeps the name that it had."""
  mixers = {'delta': (c.KDAConfig(heads=4, key=16, value=16),) * 2}
  of = functools.partial(rates.settings, mixers, 2000)
  assert rates.cell('delta', 4e-3, 1) == 'delta/1'
  assert of('delta/1') == event_models.settings(mixers['delta'], 2000)
  other = rates.cell('delta', 1e-3, 1)
  assert other == 'delta at 0.001/1'
  assert len({of(k) for k in ('delta/1', other, 'rate/delta')}) == 3
