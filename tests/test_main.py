import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import grain  # noqa: F401  (its flags must be there before they are saved)
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from statejax import generate as gen
from statejax import main

ROOT = pathlib.Path(__file__).parent.parent
TINY = [f'--set={change}' for change in (
    'model.width=16', 'model.groups.0.repeats=1',
    'model.layers.kda.mixer.heads=1', 'model.layers.kda.mixer.rank=4',
    'model.layers.kda.mixer.key=8', 'model.layers.kda.mixer.value=8',
    'model.layers.full.mixer.heads=2', 'model.layers.full.mixer.kv_heads=1',
    'model.layers.kda.mlp.hidden=16', 'model.layers.full.mlp.hidden=16',
    'train.steps=4', 'train.warmup=1', 'train.decay=1', 'train.save_every=2',
    'train.rows=4', 'train.length=32', 'train.eval_batches=1', 'train.data=1')]
TRAIN = ['train', f'--config={ROOT}/configs/text_kda.py', *TINY]


def call(*argv):
  """Runs one command in this process; returns its exit status."""
  with flagsaver.flagsaver():
    rest = flags.FLAGS(['statejax', *map(str, argv)])
    try:
      main.main(rest)
    except SystemExit as error:
      return error.code
  return 0


@pytest.fixture
def run(capsys):
  """Runs one command; returns status, standard output and error."""
  def run(*argv):
    capsys.readouterr()
    return call(*argv), *capsys.readouterr()
  return run


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('main') / 'run'
  assert call(*TRAIN, f'--workdir={path}') == 0
  return path


# A mistake is one line and exit status 2.


@pytest.mark.parametrize('argv, text', [
    ([], 'statejax: usage: python -m statejax.main train'),
    (['fly'], 'fly: usage: .*doctor'),
    (['show'], 'show: usage: .*show takes one path'),
    (['show', 'a', 'b'], 'show: usage'),
    (['memory'], 'memory: usage: .*memory takes one of list, read, export'),
    (['doctor', 'a'], 'doctor: usage'),
    (['train'], 'train: --config=None: .*configs/text_kda.py'),
    (['train', '--config=configs/text.py'], 'one of configs/mqar_kda.py, '),
    (['train', '--config=configs/text_kda.py'], '--workdir: name the'),
    (['train', '--config=configs/text_kda.py', '--set=train.step=3'],
     "train.step: unknown key 'step'.*Did you mean 'steps'"),
    (['train', '--config=configs/text_kda.py', '--set=train.steps=few'],
     "train.steps: expected int, got 'few'"),
    ([*TRAIN, '--workdir=nothing', '--set=train.rows=5',
      '--set=train.data=2'], 'got rows=5'),
    ([*TRAIN, '--workdir=nothing', '--seed=7'],
     '--seed: train does not use it here; .* --set=train.seed=N'),
    (['generate', '--workdir=nothing', '--resume=a', '--seed=7'],
     '--seed: generate does not use it here'),
    (['doctor', '--set=a.b=1'], '--set: doctor does not use it'),
    ([*TRAIN, '--workdir=/proc/nothing'], 'train: .*No such file'),
    (['generate'], '--workdir: name the directory'),
    (['generate', '--workdir=nothing'], 'generate: nothing: .* train first'),
    (['show', 'nothing'], 'show: nothing: expected a saved state, a'),
])
def test_mistakes(run, monkeypatch, tmp_path, argv, text):
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  monkeypatch.chdir(tmp_path)
  status, out, err = run(*argv)
  assert status == 2 and not out
  assert re.search(text, err) and err.count('\n') == 1


def test_help_of_a_verb(monkeypatch, capsys):
  for argv, texts in (
      (['state', 'mint', '--help'], ['--acl', '--export', '--prompt', 'never']),
      (['state', '--help'], ['python -m statejax.main state mint', 'VERB']),
      (['memory', 'write', '-h'], ['needs', '--statement', '--ttl']),
      (['memory', '--help'], ['python -m statejax.main memory list'])):
    monkeypatch.setattr('sys.argv', ['main', *argv])
    main.run()
    out = capsys.readouterr().out
    assert all(text in out for text in texts), argv


def test_train_goes_on(run, workdir):
  status, out, err = run(*TRAIN, f'--workdir={workdir}')
  assert status == 0 and 'resumed from step 4' in err
  result = json.loads(out)
  assert result['step'] == 4
  assert result['evaluation'] == json.loads(
      (workdir / 'evaluation.json').read_text())
  status, out, err = run(*TRAIN, f'--workdir={workdir}', '--set=train.peak=1.0')
  assert status == 2 and 'holds a run of another config' in err


def test_plot(run, workdir):
  pytest.importorskip('matplotlib', reason='only the plot needs matplotlib')
  status, out, _ = run(*TRAIN, f'--workdir={workdir}', '--plot')
  assert status == 0 and out.splitlines()[-1] == str(workdir / 'loss.png')
  assert (workdir / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_generate(run, workdir):
  base = ['generate', f'--workdir={workdir}', '--tokens=12']
  status, out, err = run(*base, '--prompt=def ', '--seed=3')
  assert status == 0 and out.startswith('def ') and not err
  assert out == run(*base, '--prompt=def ', '--seed=3')[1]
  assert out != run(*base, '--prompt=def ', '--seed=4')[1]
  # Without a prompt it begins after a line break.
  assert run(*base, '--temperature=0')[0] == 0


def test_save_and_resume(run, workdir, tmp_path):
  base = ['generate', f'--workdir={workdir}', '--capacity=40',
          '--temperature=0']
  whole = run(*base, '--prompt=def ', '--tokens=20')[1]
  first = run(*base, '--prompt=def ', '--tokens=8', f'--save={tmp_path}/a')
  second = run(*base, '--tokens=12', f'--resume={tmp_path}/a',
               f'--save={tmp_path}/b')
  assert first[0] == second[0] == 0
  assert first[1].rstrip('\n') + second[1] == whole
  assert re.fullmatch(r'saved .*/a: 12 tokens, [\d,]+ bytes, digest \w{64}\n',
                      first[2])
  # By itself the resumed state gets the room it needs.
  assert run(*base[:2], '--tokens=99', f'--resume={tmp_path}/a')[0] == 0


@pytest.mark.parametrize('argv, text', [
    (['--save=taken'], '--save=taken: exists already'),
    (['--save=no/where'], 'expected no to be a directory; make it first'),
    (['--resume=taken'], 'taken'),
    (['--resume=taken', '--prompt=x'], 'give one of them'),
    (['--prompt=x', '--tokens=0'], 'expected steps >= 1'),
    (['--prompt=xyz', '--capacity=2'], 'row 0 would hold 3 tokens'),
    (['--prompt=xyz', '--capacity=9'], 'expected room for 203 tokens, got 9'),
    (['--temperature=-1'], 'temperature: expected 0, which is greedy'),
])
def test_generate_mistakes(run, workdir, monkeypatch, tmp_path, argv, text):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'taken').mkdir()
  status, _, err = run('generate', f'--workdir={workdir}', *argv)
  assert status == 2 and text in err and err.count('\n') == 1


def test_characters_of_several_bytes(run, workdir, monkeypatch):
  """Tokens arrive byte by byte; what is printed is text."""
  def generate(model, params, state, steps, *, sampling, stop, callback):
    assert stop == (256,)
    for byte in [*'é€'.encode(), 256, -1, 0xe2]:
      callback(np.array([byte], np.int32))
    return None, state
  monkeypatch.setattr(gen, 'generate', generate)
  status, out, _ = run('generate', f'--workdir={workdir}', '--prompt=a')
  assert status == 0 and out == 'aé€\ufffd\n'


def test_show(run, workdir, tmp_path):
  status, out, _ = run('show', workdir)
  assert status == 0 and 'step_00000004: every file matches' in out
  assert 'params/embed  float32[257, 16]' in out and 'step: 4' in out
  run('generate', f'--workdir={workdir}', '--tokens=3', f'--save={tmp_path}/a')
  status, out, _ = run('show', tmp_path / 'a')
  assert status == 0 and 'length: [4]' in out
  assert 'layers/kda/matrix  float32[1, 1, 1, 8, 8]' in out
  with open(tmp_path / 'a' / 'about.json', 'a') as file:
    file.write(' ')
  status, out, err = run('show', tmp_path / 'a')
  assert status == 2 and 'about.json: expected' in err and not out


def test_doctor(run):
  status, out, err = run('doctor')
  assert status == 0 and not err
  assert re.search(r'^jax \d', out, re.M) and 'devices cpu:' in out
  assert 'delta_rule: xla: available' in out
  assert ('delta_rule: pallas_tpu: declines: it needs a TPU, the backend is cpu'
          in out)


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is not None,
                    reason='libtpu looks for a TPU, for long')
def test_absent_devices_are_no_news():
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  done = subprocess.run(
      [sys.executable, '-m', 'statejax.main', 'doctor'], cwd=ROOT, check=True,
      capture_output=True, text=True, env=environment)
  assert 'Unable to initialize' not in done.stderr
