"""kill -9 at every step of a mint, and at random times of mint, import,
deletion, collection, revocation.
"""

import collections
import json
import pathlib
import subprocess
import sys

import kill_points
import pytest

HERE = pathlib.Path(__file__).parent


def run(program, *arguments):
  done = subprocess.run(
      [sys.executable, str(HERE / program), *map(str, arguments)], check=True,
      stdout=subprocess.PIPE, cwd=HERE.parent.parent,
      env={'PYTHONPATH': str(HERE.parent.parent)})
  return json.loads(done.stdout)


@pytest.mark.parametrize('kills', [
    40, pytest.param(800, marks=pytest.mark.slow)])
def test_killed_at_random(memory, kills):
  found = run('killer.py', memory, kills, 1)
  print(f'kills: tried {kills}, {found["cut"]} of them in the middle, '
        f'acknowledged {found["acknowledged"]}, lost or damaged '
        f'{len(found["wrong"])}, aborts {len(found["aborts"])}')
  assert found['wrong'] == found['aborts'] == []
  assert found['acknowledged'] > kills // 4 and found['cut'] > kills // 20


@pytest.mark.parametrize('seeds', [
    (0,), pytest.param(range(1, 21), marks=pytest.mark.slow)])
def test_killed_at_every_step(memory, seeds):
  pytest.importorskip('cryptography', reason='[sign] is not installed')
  cases = [one for seed in seeds for one in run(
      'kill_points.py', memory / str(seed), seed)]
  count = {what: sum(len(one[what]) if isinstance(one[what], list) else
                     one[what] for one in cases)
           for what in ('middle', 'kept', 'lost', 'accepted wrongly', 'wrong',
                        'aborts')}
  print(f'kills at every step: tried {len(cases)}, killed in the middle '
        f'{count["middle"]}, kept {count["kept"]}, lost {count["lost"]}, '
        f'accepted wrongly {count["accepted wrongly"]}, otherwise wrong '
        f'{count["wrong"]}, aborts {count["aborts"]}')
  assert [one for one in cases if one['lost'] or one['accepted wrongly']
          or one['wrong'] or one['aborts']] == []
  tried = collections.Counter((one['situation'], one['step']) for one in cases)
  assert tried == {(situation, step): len(seeds)
                   for situation in kill_points.SITUATIONS
                   for step in kill_points.STEPS}
  # Only the last of all moments comes after it was acknowledged.
  assert len(cases) * 11 // 12 <= count['middle']
  assert len(seeds) * 4 <= count['kept'] <= len(seeds) * 8
