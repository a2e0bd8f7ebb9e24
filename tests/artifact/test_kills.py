"""kill -9 at random times of mint, import, deletion, collection, revocation."""

import json
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize('kills', [
    20, pytest.param(800, marks=pytest.mark.slow)])
def test_killed_at_random(tmp_path, kills):
  done = subprocess.run(
      [sys.executable, str(HERE / 'killer.py'), str(tmp_path), str(kills), '1'],
      check=True, stdout=subprocess.PIPE, cwd=HERE.parent.parent,
      env={'PYTHONPATH': str(HERE.parent.parent)})
  found = json.loads(done.stdout)
  print(f'kills: tried {kills}, {found["cut"]} of them in the middle, '
        f'acknowledged {found["acknowledged"]}, lost or damaged '
        f'{len(found["wrong"])}')
  assert found['wrong'] == []
  assert found['acknowledged'] > kills // 4 and found['cut'] > kills // 20
