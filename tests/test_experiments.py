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
    'needle_local', 'writer_auc'])
def test_smoke(name, tmp_path):
  """From training to the table; what it says is of no use."""
  subprocess.run(
      [sys.executable, '-m', f'experiments.{name}', '--smoke'], cwd=tmp_path,
      check=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
  found = json.loads((tmp_path / f'runs/{name}.json').read_text())
  assert found['rows'] and found['command'].startswith(
      f'python -m experiments.{name}')


def test_cells_of_rates():
  """A training at the rate of slots keeps the name that it had."""
  mixers = {'delta': (c.KDAConfig(heads=4, key=16, value=16),) * 2}
  of = functools.partial(rates.settings, mixers, 2000)
  assert rates.cell('delta', 4e-3, 1) == 'delta/1'
  assert of('delta/1') == event_models.settings(mixers['delta'], 2000)
  other = rates.cell('delta', 1e-3, 1)
  assert other == 'delta at 0.001/1'
  assert len({of(k) for k in ('delta/1', other, 'rate/delta')}) == 3
