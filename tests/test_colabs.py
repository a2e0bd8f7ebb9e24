"""Notebooks are made from the percent scripts, and run."""

import json
import pathlib
import subprocess
import sys

import pytest

jupytext = pytest.importorskip(
    'jupytext', reason='notebooks are checked where the test extra is whole')
FOLDER = pathlib.Path(__file__).parent.parent / 'colabs'
SCRIPTS = sorted(FOLDER.glob('*.py'))


def cells(notebook):
  return [(c['cell_type'], ''.join(c['source']).strip())
          for c in notebook['cells']]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.stem)
def test_notebook_is_made_from_its_script(script):
  made = jupytext.reads(script.read_text(), fmt='py:percent')
  kept = json.loads(script.with_suffix('.ipynb').read_text())
  assert cells(made) == cells(kept), (
      f'run: jupytext --to notebook colabs/{script.name}')
  assert all(not c.get('outputs') for c in kept['cells'])


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.stem)
def test_notebook_runs(script):
  done = subprocess.run(
      [sys.executable, '-m', 'pytest', '--nbmake', '-p', 'no:cacheprovider',
       '-o', 'addopts=', '-o', 'testpaths=', str(script.with_suffix('.ipynb'))],
      capture_output=True, text=True, check=False, cwd=FOLDER.parent)
  assert done.returncode == 0, done.stdout[-3000:]
