"""The main job: train, recall, generate, kill, resume, account, in minutes.

  python -m experiments.quickstart

Trains a small KDA-attention hybrid on the text of the Python standard library,
a smaller one on associative recall, generates with the first, kills the
generating process with SIGKILL, resumes from its saved state in another, and
draws the bytes of state against context. Prints expected next to obtained and
exits with 1 if a row is not ok. Everything lands in --workdir, where a second
call goes on from what the first has done.
"""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import app, flags, logging

from experiments import process, report, state_bytes

WORKDIR = flags.DEFINE_string('workdir', 'runs/quickstart', 'where to work')
SMOKE = flags.DEFINE_bool('smoke', False, 'a few steps only; claims not met')
ROLE = flags.DEFINE_enum(
    'role', 'main', ['main', 'recall', 'killed', 'resumed'],
    'what a child process does')

# Bits per byte on held-out files, and accuracy on unseen recall items.
BITS = 2.95
RECALL = 0.99
PROMPT = 'def __init__(self'
HALF = 64
SHORT = ('train.steps=4', 'train.warmup=1', 'train.decay=1',
         'train.eval_batches=1')


def train(name):
  """Trains one config in the workdir; returns its evaluation."""
  from statejax import config as cfg
  from statejax.train import loop
  config = importlib.import_module(f'configs.{name}').get_config()
  for assignment in SHORT if SMOKE.value else ():
    config = cfg.override(config, assignment)
  say = lambda line: print(f'  {name}: {line}', file=sys.stderr, flush=True)
  return loop.train(config, pathlib.Path(WORKDIR.value) / name,
                    report=say).evaluation


def train_both():
  """Returns the rows of two trainings, of which each keeps one core busy."""
  recall = start('recall', stderr=None)
  text = train('text_kda')
  status, recall = end(recall)
  return [
      report.Row('text, bits per byte, held out', f'<= {BITS:.2f}',
                 f'{text["bits"]:.3f}', text['bits'] <= BITS),
      report.Row('recall accuracy, unseen items', f'>= {RECALL:.2f}',
                 f'{recall["accuracy"]:.4f}',
                 status == 0 and recall['accuracy'] >= RECALL)]


def generate(role):
  """Generates as `role` says; returns what came of it."""
  import jax

  from statejax import generate as gen
  from statejax.artifact import serving
  from statejax.tasks import text
  from statejax.train import restore
  workdir = pathlib.Path(WORKDIR.value)
  model, params = restore.from_workdir(workdir / 'text_kda')
  params = model.unstack(params)
  sampling = gen.Sampling(temperature=0.8)
  saved = workdir / 'state'
  if role == 'resumed':
    state = serving.load_state(saved, model, params)
  else:
    prompt = text.encode(PROMPT)[None]
    state = model.init_state(1, prompt.shape[1] + 2 * HALF,
                             key=jax.random.key(1))
    state = gen.prefill(model, params, state, prompt, sampling=sampling)
  tokens, state = gen.generate(
      model, params, state, 2 * HALF if role == 'whole' else HALF,
      sampling=sampling)
  if role == 'killed':
    serving.save_state(saved, model, params, state)
    print(json.dumps({'tokens': tokens[0].tolist()}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
  return {'tokens': tokens[0].tolist(), 'digest': serving.state_digest(state),
          'text': text.decode(tokens[0])}


def start(role, stderr=subprocess.PIPE):
  """Starts a new process with `role`."""
  command = [sys.executable, '-m', 'experiments.quickstart', f'--role={role}',
             f'--workdir={pathlib.Path(WORKDIR.value).absolute()}',
             f'--smoke={SMOKE.value}']
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr,
                          text=True, cwd=pathlib.Path(__file__).parent.parent)


def end(process):
  """Waits for a process; returns (exit status, the facts it printed)."""
  out, err = process.communicate()
  try:
    return process.returncode, json.loads(out.splitlines()[-1])
  except (IndexError, ValueError):
    raise RuntimeError(
        f'{" ".join(process.args)} ended with {process.returncode}:\n'
        f'{(err or "")[-2000:]}') from None


def kill_and_resume():
  """Returns the rows that compare a killed run with one that never stopped."""
  import shutil
  shutil.rmtree(pathlib.Path(WORKDIR.value) / 'state', ignore_errors=True)
  status, killed = end(start('killed'))
  resumed = start('resumed')
  whole = generate('whole')
  _, resumed = end(resumed)
  print(f'  {PROMPT}{whole["text"]}'.replace('\n', '\n  '))
  tokens = killed['tokens'] + resumed['tokens']
  same = sum(a == b for a, b in zip(tokens, whole['tokens']))
  return [
      report.Row('generating process ends by', 'SIGKILL',
                 signal.Signals(-status).name if status < 0 else str(status),
                 status == -signal.SIGKILL),
      report.Row('tokens equal to never stopped', f'{2 * HALF}', f'{same}',
                 same == 2 * HALF and len(tokens) == 2 * HALF),
      report.Row('state digest equal', whole['digest'][:16],
                 resumed['digest'][:16],
                 whole['digest'] == resumed['digest'])]


def compile_quickly():
  """Compiles less well, and once for all processes: nothing runs for long."""
  os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=1')
  programs = pathlib.Path(WORKDIR.value).absolute() / 'programs'
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(programs))


def main(_):
  """Runs all parts and prints the table."""
  logging.set_verbosity(logging.WARNING)
  compile_quickly()
  if ROLE.value != 'main':
    print(json.dumps(train('mqar_kda') if ROLE.value == 'recall' else
                     generate(ROLE.value)))
    return
  begin = time.perf_counter()
  workdir = pathlib.Path(WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  print('1/3 train on text (the Python standard library) and on recall')
  rows = train_both()
  print('2/3 generate, kill, resume')
  rows += kill_and_resume()
  print('3/3 state bytes against context')
  rows += state_bytes.run(workdir)[0]
  seconds = time.perf_counter() - begin
  print(f'\n{report.table(rows)}\n\n{seconds:.0f} s; figure: '
        f'{workdir / "state_bytes.png"}')
  report.write(workdir / 'results.json', rows,
               'python -m experiments.quickstart', seconds=round(seconds, 1))
  raise SystemExit(0 if all(r.ok for r in rows) else 1)


if __name__ == '__main__':
  process.start_with_huge_pages()
  app.run(main)
