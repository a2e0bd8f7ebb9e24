"""The benchmark of artifacts runs to its end, and reads what it has kept."""

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_smoke():
  subprocess.run([sys.executable, '-m', 'experiments.bench_artifacts',
                  '--smoke'], check=True, cwd=pathlib.Path(__file__).parent
                 .parent)
