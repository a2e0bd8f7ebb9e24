"""Kernels of sparse attention compile for every chip; nothing is run."""

import pytest

from pallas_kernels import aot
from pallas_kernels.workloads import ATTENTION

PROGRAMS = {
    'gather_attend': ('minimax_m3', 'nsa', 'nsa_float32', 'blocks_of_16',
                      'blocks_of_8', 'minimax_m3_prefill', 'mla_blocks'),
    'gather_rows': ('dsa', 'dsa_prefill'),
    'index_scores': ('dsa_index', 'dsa_index_prefill'),
}

pytestmark = pytest.mark.skipif(
    aot.missing() is not None, reason=str(aot.missing()))


def check(chips):
  # Arguments lie as they do outside of any program: a store is not copied.
  todo = [aot.Job(chip, f'pallas_kernels.programs:{program}',
                  {'workload': name})
          for program, names in PROGRAMS.items() for name in names
          for chip in chips]
  for job, found in zip(todo, aot.compile_all(todo), strict=True):
    shapes = ATTENTION[job.args['workload']]
    # Queries that go in pieces are copied, stores are not.
    queries = 2 * shapes.length * shapes.heads * shapes.key
    assert found['temp'] < 64e6 + queries * (shapes.length > 1), job
    assert found['kernel'], job


def test_every_workload_has_a_program():
  assert sorted(n for names in PROGRAMS.values() for n in names) == (
      sorted(ATTENTION))


def test_kernels_compile_without_a_copy_of_a_store():
  check(['v5e'])


@pytest.mark.slow
def test_kernels_compile_for_every_chip():
  check([chip for chip in aot.CHIPS if chip != 'v5e'])
