"""Every TPU kernel compiles for every chip at real widths; nothing is run."""

import json
import pathlib

import pytest

from pallas_kernels import aot
from pallas_kernels.workloads import WORKLOADS

RESULTS = pathlib.Path(__file__).parents[2] / 'experiments/results'
TABLE = RESULTS / 'tpu_kernels.json'
WIDTHS = ('qwen3.6', 'kimi_linear')

pytestmark = pytest.mark.skipif(
    aot.missing() is not None, reason=str(aot.missing()))


def jobs(program, workloads=WIDTHS, **args):
  return [aot.Job(chip, f'pallas_kernels.programs:{program}',
                  {'workload': name, **args}, inside=True)
          for name in workloads for chip in aot.CHIPS]


def test_the_decode_step_replaces_its_state_in_place():
  todo = jobs('step', [f'{name}_decode' for name in WIDTHS])
  for job, found in zip(todo, aot.compile_all(todo), strict=True):
    state = WORKLOADS[job.args['workload']].specs()['state']
    size = state.size * 4
    assert found['alias'] == size, job
    # The vectors of a token in float32, no matrix.
    assert found['temp'] < size / 16, job
    assert found['traffic'] < 2.1 * size, job


def test_the_chunk_kernels_compile():
  # Two chunks and two heads per step: the widths are real, the wait is not.
  todo = jobs('backward', heads=2, length=128)
  for found in aot.compile_all(todo):
    assert 'delta_rule_backward' in found['kernel']


@pytest.mark.slow
@pytest.mark.parametrize('program', ['forward', 'backward'])
def test_the_chunk_kernels_compile_as_they_are_used(program):
  assert len(aot.compile_all(jobs(program))) == 2 * len(aot.CHIPS)


def test_a_failure_names_the_job():
  job = aot.Job('v5e', 'pallas_kernels.programs:step', {'workload': 'none'})
  with pytest.raises(RuntimeError, match="(?s)'none'.*KeyError"):
    aot.compile_all([job])


def table():
  return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def same_compiler():
  return not aot.missing() and table().get('libtpu') == aot.version()


@pytest.mark.slow
@pytest.mark.skipif(not same_compiler(), reason='the table of schedules was '
                    'made by another libtpu, or there is none')
def test_schedules_are_not_longer_than_in_the_table():
  rows = [r for r in table()['kernels'] if r['chip'] in ('v5e', 'v6e')]
  todo = [aot.Job(r['chip'], f'pallas_kernels.programs:{r["kernel"]}',
                  {'workload': r['workload']}, inside=True) for r in rows]
  names = [found['kernel'] for found in aot.compile_all(todo)]
  for row, found in zip(rows, aot.compile_all(todo, names), strict=True):
    assert found['bundles'] <= 1.02 * row['bundles_per_step'], row
    assert found['traffic'] <= 1.02 * row['hbm'], row
