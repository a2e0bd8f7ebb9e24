import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import small

from statejax.artifact import digest
from statejax.train import checkpoint, loop, restore

ROOT = pathlib.Path(__file__).parent.parent.parent


class Crash(Exception):
  """Ends a run as a kill would, but for the process."""


def crash_at(*steps):
  """A progress report that does not return from the given steps."""
  left = [f'step {step}/' for step in steps]
  def report(line):
    if left and line.startswith(left[0]):
      left.pop(0)
      raise Crash(line)
  return report


def train(workdir, report=small.silent, **options):
  return loop.train(small.get_config(**options), workdir, report=report)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run of eight updates with an evaluation after four."""
  workdir = tmp_path_factory.mktemp('loop') / 'whole'
  return workdir, train(workdir, eval_every=4)


def test_what_a_run_leaves(whole):
  workdir, result = whole
  assert small.column(workdir, 'step') == [1, 2, 3, 4, 4, 5, 6, 7, 8]
  assert len(small.column(workdir, 'eval')) == 1
  assert checkpoint.steps(workdir / 'checkpoints') == [6, 8]
  assert json.loads((workdir / 'evaluation.json').read_text()) == (
      result.evaluation)
  assert result.evaluation['tokens'] == 8 * 3
  assert result.step == result.metrics['step'] == 8
  rates = small.column(workdir, 'rate')
  np.testing.assert_allclose(rates[:3], [0, 1.5e-3, 3e-3], atol=1e-6)
  columns = restore.metrics(workdir)
  assert columns['loss'].tolist() == small.column(workdir, 'loss')


@pytest.mark.slow
def test_loss_falls(tmp_path):
  train(tmp_path, layers=[small.KDA, small.FULL], steps=60, rows=16, peak=1e-2,
        save_every=60)
  losses = small.column(tmp_path, 'loss')
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.8


@pytest.mark.parametrize('crashes', [(2,), (5,), (3, 4, 7), (8,)])
def test_resumed_equals_uninterrupted(whole, tmp_path, crashes):
  report = crash_at(*crashes)
  for _ in crashes:
    with pytest.raises(Crash):
      train(tmp_path, report, eval_every=4)
  result = train(tmp_path, report, eval_every=4)
  assert small.outcome(tmp_path) == small.outcome(whole[0])
  assert result.evaluation == whole[1].evaluation
  assert digest.tree_digest(result.params) == digest.tree_digest(
      whole[1].params)


def test_a_finished_run_stays(whole):
  workdir, before = whole[0], small.outcome(whole[0])
  result = train(workdir, eval_every=4)
  assert result.evaluation == whole[1].evaluation and result.tokens == 0
  assert small.outcome(workdir) == before


def test_torn_log_lines_are_dropped(whole, tmp_path):
  report = crash_at(5)
  with pytest.raises(Crash):
    train(tmp_path, report, eval_every=4)
  with open(tmp_path / 'metrics.jsonl', 'a') as log:
    log.write('{"step": 5, "lo')
  train(tmp_path, report, eval_every=4)
  assert small.outcome(tmp_path) == small.outcome(whole[0])


def test_a_trained_model_comes_back(whole):
  model, params = restore.from_workdir(whole[0])
  assert model == whole[1].model
  assert digest.tree_digest(params) == digest.tree_digest(whole[1].params)


@pytest.mark.parametrize('keep, kept', [(1, [8]), (2, [6, 8]), (9, [3, 6, 8])])
def test_keep(tmp_path, keep, kept):
  train(tmp_path, keep=keep)
  assert checkpoint.steps(tmp_path / 'checkpoints') == kept
  assert len(list((tmp_path / 'checkpoints').iterdir())) == len(kept)


def test_a_copy_beside_the_checkpoints_is_no_checkpoint(whole):
  copy = whole[0] / 'checkpoints' / 'step_backup'
  copy.mkdir()
  assert checkpoint.steps(whole[0] / 'checkpoints')[-1] == 8
  copy.rmdir()


def test_trains_in_a_thread(whole, tmp_path):
  thread = threading.Thread(target=train, args=(tmp_path,),
                            kwargs=dict(eval_every=4))
  thread.start()
  thread.join()
  assert small.outcome(tmp_path) == small.outcome(whole[0])


def test_longer_is_the_same_run_and_other_is_not(tmp_path):
  train(tmp_path)
  assert train(tmp_path, steps=10).step == 10
  for options in (dict(peak=1e-2), dict(seed=1), dict(layers=[small.GDN])):
    with pytest.raises(ValueError, match='a run of another config'):
      train(tmp_path, **options)
  assert checkpoint.steps(tmp_path / 'checkpoints')[-1] == 10


def test_not_finite(tmp_path):
  with pytest.raises(FloatingPointError, match='step 2: loss=.* peak rate'):
    train(tmp_path, peak=1e30, warmup=0, save_every=1)
  assert checkpoint.steps(tmp_path / 'checkpoints') == [1]
  assert small.column(tmp_path, 'step') == [1]


@pytest.mark.parametrize('change', [
    lambda data: data[:-1], lambda data: b'',
    lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:]])
def test_damaged_checkpoint(whole, change):
  folder = whole[0] / 'checkpoints' / 'step_00000008'
  for name in ('about.json', 'leaves.json', 'files.json',
               'state/state/manifest.ocdbt'):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(change(data))
    for read in (lambda: train(whole[0], eval_every=4),
                 lambda: restore.from_workdir(whole[0])):
      with pytest.raises(ValueError, match='step_00000008'):
        read()
    (folder / name).write_bytes(data)
  assert train(whole[0], eval_every=4).step == 8


@pytest.mark.parametrize('options, text', [
    (dict(accumulate=3), 'divisible by accumulate=3 .* got rows=8'),
    (dict(rows=6, data=4), r'data \* fsdp = 4 devices, got rows=6'),
    (dict(keep=0), 'TrainConfig.keep: expected >= 1, got 0'),
    (dict(save_every=0), 'save_every: expected >= 1, got 0'),
    (dict(accumulate=0), 'accumulate: expected >= 1, got 0'),
    (dict(warmup=-1), 'warmup: expected >= 0, got -1'),
    (dict(clip=0.0), 'clip: expected > 0, got 0.0'),
    (dict(warmup=5, decay=5), r'warmup=5 \+ decay=5 exceed steps=8'),
    (dict(optimizer='sgd'), "expected 'adamw' or 'muon', got 'sgd'"),
    (dict(data=16), 'the number of devices, 8'),
])
def test_refused(tmp_path, options, text):
  with pytest.raises(ValueError, match=text):
    train(tmp_path, **options)
  assert not any(tmp_path.iterdir())  # before anything is written


def test_unknown_task(tmp_path):
  config = small.get_config()
  task = dataclasses.replace(config.task, name='chess')
  with pytest.raises(ValueError, match="or 'stack', got 'chess'"):
    loop.train(dataclasses.replace(config, task=task), tmp_path)
  with pytest.raises(ValueError, match='expected a run with a checkpoint'):
    restore.from_workdir(tmp_path / 'nothing')


# Told to stop.


def test_sigterm_saves_and_returns(whole, tmp_path):
  def report(line):
    if line.startswith('step 4/'):
      signal.raise_signal(signal.SIGTERM)
  before = signal.getsignal(signal.SIGTERM)
  result = train(tmp_path, report, eval_every=4)
  assert result.step == 5 and result.evaluation is None
  assert signal.getsignal(signal.SIGTERM) is before
  assert checkpoint.steps(tmp_path / 'checkpoints') == [3, 5]
  train(tmp_path, eval_every=4)
  assert small.outcome(tmp_path) == small.outcome(whole[0])


@pytest.mark.slow
def test_sigterm_to_the_command(tmp_path):
  """The process exits with 0, and what it does later is as if never stopped."""
  command = [sys.executable, '-m', 'statejax.main', 'train',
             '--config=configs/tiny_full.py', '--set=train.steps=400',
             '--set=train.save_every=1000', '--set=train.data=1',
             '--set=model.groups.0.repeats=1']
  environment = {
      **os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  def start(name):
    return subprocess.Popen(
        [*command, f'--workdir={tmp_path / name}'], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  with start('stopped') as child:
    log = tmp_path / 'stopped' / 'metrics.jsonl'
    while child.poll() is None and not (log.exists() and log.stat().st_size):
      time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    err = child.communicate()[1]
    assert child.returncode == 0, err
  (step,) = checkpoint.steps(tmp_path / 'stopped' / 'checkpoints')
  assert 0 < step < 400 and 'the same command goes on' in err
  for name in ('stopped', 'whole'):
    with start(name) as child:
      out, err = child.communicate()
      assert child.returncode == 0, err
      assert json.loads(out)['step'] == 400
  assert small.outcome(tmp_path / 'stopped') == small.outcome(
      tmp_path / 'whole')
