"""Decode steps over long stores compile without a copy of the state."""

import pytest

from experiments import decode_programs
from pallas_kernels import aot

pytestmark = pytest.mark.skipif(
    aot.missing() is not None, reason=str(aot.missing()))


def check(mixers, chips):
  rows = decode_programs.measure(mixers, chips)
  assert len(rows) == len(mixers) * len(chips)
  assert all(r['ok'] for r in rows), rows


@pytest.mark.slow
def test_state_is_replaced_in_place():
  check(['KSA', 'DSA'], ['v5e'])


@pytest.mark.slow
@pytest.mark.parametrize('chip', aot.CHIPS)
def test_state_is_replaced_in_place_on_every_chip(chip):
  check(list(decode_programs.MIXERS), [chip])
