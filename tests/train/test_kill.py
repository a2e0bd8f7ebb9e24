"""Killed at any moment, a job loses nothing that was saved."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def killed(job, folder, kills):
  done = subprocess.run(
      [sys.executable, '-W', 'ignore', pathlib.Path(__file__).parent /
       'kill_jobs.py', job, folder, str(kills), '0'],
      capture_output=True, text=True, check=False,
      env={**os.environ, 'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stderr[-4000:]
  print(done.stdout)
  return json.loads(done.stdout)


@pytest.mark.parametrize('job, kills', [
    ('train', 2), pytest.param('generate', 1, marks=pytest.mark.slow)])
def test_few_kills(job, kills, tmp_path):
  facts = killed(job, tmp_path, kills)
  assert facts['kills'] == kills and facts['lost'] <= facts['every']


@pytest.mark.slow
@pytest.mark.parametrize('job', ['train', 'generate'])
def test_a_hundred_kills(job, tmp_path):
  facts = killed(job, tmp_path, 100)
  assert facts['kills'] == 100 and facts['lost'] <= facts['every']
  # They came at every kind of moment.
  assert all(facts['when'][x] >= 5 for x in ('starting', 'working', 'saving'))
