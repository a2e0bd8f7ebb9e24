"""Decode steps over long stores compile without a copy of the state."""

import pytest

from experiments import decode_programs
from pallas_kernels import aot

ROWS, CAPACITY = 8, 131_072
# Most temporary bytes. No state is copied; beyond 64 MB there are scores of
# every head and token (GQA, CSA's indexer), the rope keys among which XLA
# gathers rows (DSA), and weights that are laid out anew (MLA on a TPU v5p, CSA,
# HCA).
TEMPORARY = {'GQA': 285e6, 'MLA': 80e6, 'DSA': 290e6, 'CSA': 75e6,
             'HCA': 75e6}

pytestmark = pytest.mark.skipif(
    aot.missing() is not None, reason=str(aot.missing()))


def check(mixers, chips):
  todo = [aot.Job(chip, 'experiments.decode_programs:step',
                  {'mixer': mixer, 'rows': ROWS, 'capacity': CAPACITY})
          for mixer in mixers for chip in chips]
  for job, found in zip(todo, aot.compile_all(todo), strict=True):
    mixer = job.args['mixer']
    assert found['alias'] >= decode_programs.state_bytes(
        mixer, ROWS, CAPACITY), job
    assert found['temp'] < TEMPORARY[mixer], job


def test_every_mixer_has_a_limit():
  assert TEMPORARY.keys() == decode_programs.MIXERS.keys()


def test_state_is_replaced_in_place():
  check(['GQA', 'MLA', 'HCA'], ['v5e'])


@pytest.mark.slow
@pytest.mark.parametrize('chip', aot.CHIPS)
def test_state_is_replaced_in_place_on_every_chip(chip):
  check(TEMPORARY, [chip])
