"""Does a job again and again, killed at random times, until it is done.

  python tests/train/kill_jobs.py train|generate FOLDER KILLS SEED

Every attempt is a process of its own, forked from this one, which has imported
what a job needs but started no backend: so an attempt begins at once, and most
kills find it at work. Compiled programs are kept on disk between attempts, of
which one in ten compiles anew all the same, to be killed at that.
After each kill what was published must still be there, and whole. A job that
was done in pieces must leave what an uninterrupted one leaves.
"""

import collections
import json
import os
import pathlib
import random
import signal
import sys
import time
import traceback

import grain  # noqa: F401  (imported here, before the fork)
import jax
import optax  # noqa: F401
import small
from orbax.checkpoint import v1  # noqa: F401

from statejax import generate as gen
from statejax.artifact import commit, serving
from statejax.model import LanguageModel
from statejax.train import loop

EVERY = {'train': 2, 'generate': 4}  # steps, or tokens, between saves
PROMPT = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
TOKENS = 48
SAMPLING = gen.Sampling(temperature=0.9)


def train(workdir):
  """Thirty updates, a checkpoint every second one."""
  config = small.get_config(steps=30, save_every=EVERY['train'], eval_every=5)
  loop.train(config, workdir, report=small.silent)


def generate(workdir):
  """Streams tokens to a file, a state every fourth one."""
  states, log = workdir / 'states', workdir / 'tokens.jsonl'
  states.mkdir(parents=True, exist_ok=True)
  commit.sweep(states)
  layers = [small.KDA, small.RING, small.FULL]
  model = LanguageModel(small.get_config(layers).model)
  params = model.unstack(model.init(jax.random.key(0)))
  state = newest_state(states, model, params)
  if state is None:
    state = model.init_state(2, 64, key=jax.random.key(7))
    state = gen.prefill(model, params, state, PROMPT, sampling=SAMPLING)
  done = int(state.length[0]) - len(PROMPT[0])
  log.touch()
  lines = log.read_bytes().splitlines(keepends=True)
  os.truncate(log, sum(map(len, lines[:done])))
  with open(log, 'a') as file:
    def emit(tokens):
      file.write(f'{tokens.tolist()}\n')
      file.flush()
    while done < TOKENS:
      _, state = gen.generate(model, params, state, EVERY['generate'],
                              sampling=SAMPLING, callback=emit)
      done += EVERY['generate']
      serving.save_state(states / f'state_{done:08d}', model, params, state)


def newest_state(states, model, params):
  """The newest state that can be read, or None."""
  for path in sorted(states.glob('state_*'), reverse=True):
    try:
      return serving.load_state(path, model, params)
    except ValueError as error:
      print(error, file=sys.stderr)
  return None


def facts(job, workdir):
  """Returns (newest published, log lines, whether a save is unfinished)."""
  folder, name, kind = {
      'train': ('checkpoints', 'metrics.jsonl', 'step_'),
      'generate': ('states', 'tokens.jsonl', 'state_')}[job]
  published = sorted((workdir / folder).glob(f'{kind}*'))
  for path in published:
    commit.check(path)
  log = workdir / name
  lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
  lines = [x for x in lines if x.endswith(b'\n') and b'eval' not in x]
  return (int(published[-1].name.removeprefix(kind)) if published else 0,
          len(lines), bool(list((workdir / folder).glob('.*.tmp-*'))))


def outcome(job, workdir):
  """What the finished job leaves, as far as how it went must not matter."""
  if job == 'train':
    return small.outcome(workdir)
  last = workdir / 'states' / f'state_{TOKENS:08d}'
  return (workdir / 'tokens.jsonl').read_bytes(), serving.about(last)


def size(job, workdir):
  """Bytes of the job's log."""
  path = workdir / {'train': 'metrics.jsonl', 'generate': 'tokens.jsonl'}[job]
  return path.stat().st_size if path.exists() else 0


def attempt(job, workdir, seconds, cache=True, at_work=False):
  """Works in a new process; returns whether it was killed.

  Args:
    job: its name.
    workdir: of the job.
    seconds: after which it is killed, if it is not done before.
    cache: whether compiled programs are taken from the disk.
    at_work: the seconds count from its first new log line, not from its start.
  """
  lowest, end = size(job, workdir), None
  child = os.fork()
  if not child:
    try:
      jax.config.update('jax_enable_compilation_cache', cache)
      {'train': train, 'generate': generate}[job](workdir)
      os._exit(0)
    except BaseException:
      traceback.print_exc()
      os._exit(1)
  while not (ended := os.waitpid(child, os.WNOHANG))[0]:
    lowest = min(lowest, now := size(job, workdir))
    if end is None and (now > lowest or not at_work):
      end = time.monotonic() + seconds
    if end and time.monotonic() > end:
      os.kill(child, signal.SIGKILL)
      return os.waitpid(child, 0)[1] == signal.SIGKILL
    time.sleep(0.001)
  assert ended[1] == 0, 'the job failed; see above'
  return False


def main(job, folder, kills, seed):
  """Prints what happened, as JSON."""
  folder, rng = pathlib.Path(folder), random.Random(seed)
  begin = time.monotonic()
  jax.config.update('jax_disable_most_optimizations', True)
  jax.config.update('jax_compilation_cache_dir', str(folder / 'cache'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  assert not attempt(job, folder / 'first', 600)  # fills the cache
  start = time.monotonic()
  assert not attempt(job, folder / 'whole', 600)
  whole = time.monotonic() - start
  expected = outcome(job, folder / 'whole')
  assert outcome(job, folder / 'first') == expected
  found, jobs, lost = collections.Counter(), 0, 0
  while found.total() < kills:
    workdir, done, logged = folder / f'job_{jobs}', 0, 0
    jobs += 1
    # Half of the kills come at any time, half after the first step.
    while attempt(job, workdir, *(
        (600,) if found.total() >= kills else
        (rng.uniform(0, 0.2 * whole), True, True) if rng.random() < 0.5 else
        (rng.uniform(0, 0.8 * whole), rng.random() > 0.2))):
      published, lines, saving = facts(job, workdir)
      assert published >= done, 'a published save is gone'
      lost = max(lost, lines - published)
      # Lines of work to be repeated were dropped by the attempt, if it got far.
      found['saving' if saving else
            'working' if published > done or lines != logged else
            'starting'] += 1
      done, logged = published, lines
    assert outcome(job, workdir) == expected, workdir
  print(json.dumps({
      'kills': found.total(), 'when': found, 'jobs': jobs, 'lost': lost,
      'every': EVERY[job], 'whole': round(whole, 2),
      'seconds': round(time.monotonic() - begin, 1)}))


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
