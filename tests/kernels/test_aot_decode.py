"""Decode steps over long stores compile without a copy of the state."""

import pytest

from experiments import decode_programs
from pallas_kernels import aot

ROWS, CAPACITY, SHORT = 8, 131_072, 1024
# Most temporary bytes more than over a short store. No state is copied; beyond
# 64 MB there are scores of every head and token (GQA), and the rope keys among
# which XLA gathers rows (DSA). The compiler for a TPU 7x also copies what a
# loop takes slices of.
TEMPORARY = {'GQA': 275e6, 'MLA': 64e6, 'DSA': 300e6, 'CSA': 64e6, 'HCA': 64e6}
_7X = 245e6

pytestmark = pytest.mark.skipif(
    aot.missing() is not None, reason=str(aot.missing()))


def check(mixers, chips):
  of = lambda mixer, chip, capacity: aot.Job(
      chip, 'experiments.decode_programs:step',
      {'mixer': mixer, 'rows': ROWS, 'capacity': capacity})
  cases = [(mixer, chip) for mixer in mixers for chip in chips]
  found = aot.compile_all([of(*case, capacity) for case in cases
                           for capacity in (CAPACITY, SHORT)])
  for (mixer, chip), long, short in zip(cases, found[::2], found[1::2]):
    assert long['alias'] >= decode_programs.state_bytes(
        mixer, ROWS, CAPACITY), (mixer, chip)
    most = TEMPORARY[mixer] if chip != 'tpu7x' else max(TEMPORARY[mixer], _7X)
    assert long['temp'] - short['temp'] < most, (mixer, chip)


def test_every_mixer_has_a_limit():
  assert TEMPORARY.keys() == decode_programs.MIXERS.keys()


def test_state_is_replaced_in_place():
  check(['GQA', 'MLA'], ['v5e'])


@pytest.mark.slow
@pytest.mark.parametrize('chip', aot.CHIPS)
def test_state_is_replaced_in_place_on_every_chip(chip):
  check(TEMPORARY, [chip])
