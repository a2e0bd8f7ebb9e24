"""Every TPU kernel compiles for every chip at real widths; nothing is run."""

import json
import pathlib

import pytest

from pallas_kernels import aot
from pallas_kernels.workloads import GOALS, WORKLOADS

RESULTS = pathlib.Path(__file__).parents[2] / 'experiments/results'
TABLE = RESULTS / 'tpu_kernels.json'
WIDTHS = ('qwen3.6', 'kimi_linear')
# Workloads and chunk sizes; two chunks show what a long sequence needs.
CHUNKED = [('qwen3.6', 64), ('kimi_linear', 64), ('gated_deltanet_2', 64)]
RARE = [('qwen3.6_float32', 64), ('kimi_linear_float32', 64),
        ('kimi_linear', 128), ('qwen3.6', 128), ('qwen3.6_float32', 128),
        ('kimi_linear', 16),
        ('kimi_linear_float32', 16), ('kimi_linear_float32', 128),
        ('gated_deltanet_2_float32', 64), ('wide_keys', 64),
        ('wide_values', 64), ('wide', 64), ('widest', 64)]

pytestmark = pytest.mark.skipif(
    aot.missing() is not None, reason=str(aot.missing()))


def job(chip, program, workload, **args):
  return aot.Job(chip, f'pallas_kernels.programs:{program}',
                 {'workload': workload, **args}, inside=True)


def jobs(program, workloads=WIDTHS, **args):
  return [job(chip, program, name, **args)
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


def test_the_decode_step_compiles_for_odd_shapes():
  todo = [job('v5e', 'step', name) for name in WORKLOADS if 'odd' in name]
  assert len(aot.compile_all(todo)) == 2


def planned(chips, workload, size):
  """Going backward takes both kernels, with the heads that the plans chose."""
  return [job(chip, 'backward', workload, chunk_size=size, length=2 * size)
          for chip in chips]


@pytest.mark.parametrize('workload, size', CHUNKED)
def test_the_chunk_kernels_compile_as_planned(workload, size):
  found, = aot.compile_all(planned(['v5e'], workload, size))
  assert 'delta_rule_backward' in found['kernel']


@pytest.mark.slow
@pytest.mark.parametrize('workload, size', CHUNKED + RARE)
def test_the_chunk_kernels_compile_as_planned_for_every_chip(workload, size):
  chips = [c for c in aot.CHIPS if c != 'v5e' or (workload, size) in RARE]
  assert len(aot.compile_all(planned(chips, workload, size))) == len(chips)


@pytest.mark.slow
@pytest.mark.parametrize('program', ['forward', 'backward'])
def test_the_chunk_kernels_compile_at_full_length(program):
  assert len(aot.compile_all(jobs(program))) == 2 * len(aot.CHIPS)


@pytest.mark.parametrize('chip', [
    pytest.param('v5e', marks=pytest.mark.slow), 'v6e'])
def test_bundles_meet_the_goals(chip):
  # Few heads per step, to compile soon: more of them take fewer bundles each.
  todo = [job(chip, name, 'kimi_linear', heads=4, length=128)
          for name in ('forward', 'backward')]
  names = [found['kernel'] for found in aot.compile_all([
      job(chip, name, 'kimi_linear', heads=1, length=16, chunk_size=16)
      for name in ('forward', 'backward')])]
  for name, found in zip(('forward', 'backward'),
                         aot.compile_all(todo, names), strict=True):
    assert 64 * found['bundles'] / found['work'] <= GOALS[name, chip], name


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
