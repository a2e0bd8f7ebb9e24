"""Every registered mixer is among those that resume a million tokens."""

import pathlib
import subprocess
import sys

import pytest

from experiments import resume_worker as rw
from statejax.layers import block


def test_the_list_is_whole():
  assert {type(mixer) for mixer in rw.MIXERS.values()} == set(block.MIXERS)
  for family in rw.FAMILIES:
    assert rw.config(family).names


@pytest.mark.slow
def test_smoke():
  subprocess.run([sys.executable, '-m', 'experiments.resume_million',
                  '--smoke'], check=True, cwd=pathlib.Path(__file__).parent
                 .parent)
