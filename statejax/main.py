"""Command line: train | generate | memory | state | show | doctor.

  python -m statejax.main train --config=configs/text_kda.py --workdir=runs/a
  python -m statejax.main generate --workdir=runs/a --prompt='def ' --save=s1
  python -m statejax.main generate --workdir=runs/a --resume=s1
  python -m statejax.main memory list s1 --workdir=runs/a
  python -m statejax.main memory delete s1 --workdir=runs/a --slot=3 \
      --save=s2 --journal=edits
  python -m statejax.main state mint chat --workdir=runs/a --prompt='def '
  python -m statejax.main show runs/a
  python -m statejax.main doctor

`state --help` and `memory --help` say what there is, with a verb what it takes.
"""

import codecs
import json
import logging
import pathlib
import runpy
import sys

from absl import app, flags

from statejax import asking, memories, states

CONFIG = flags.DEFINE_string('config', None, 'path of a file in configs/')
SET = flags.DEFINE_multi_string('set', [], 'override, e.g. train.steps=200')
WORKDIR = flags.DEFINE_string('workdir', None, 'directory of the run')
PLOT = flags.DEFINE_bool('plot', False, 'train: write loss.png at the end')
PROMPT = flags.DEFINE_string('prompt', None, 'generate: text to begin with')
TOKENS = flags.DEFINE_integer('tokens', 200, 'generate: tokens to emit')
CAPACITY = flags.DEFINE_integer(
    'capacity', None, 'generate: room of the stores; default what is needed')
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, '0 is greedy')
TOP_K = flags.DEFINE_integer('top_k', None, 'most likely tokens to draw from')
TOP_P = flags.DEFINE_float('top_p', None, 'probability mass to draw from')
SEED = flags.DEFINE_integer('seed', 0, 'generate: sampler seed', 0, 2**32 - 1)
SAVE = flags.DEFINE_string('save', None, 'generate: write the state here')
RESUME = flags.DEFINE_string('resume', None, 'generate: go on from this state; '
                             'memory: the state to look at or edit')
# What each command reads; a flag that it would ignore is refused.
USES = {
    'train': {'config', 'set', 'workdir', 'plot'},
    'generate': {'workdir', 'prompt', 'tokens', 'capacity', 'temperature',
                 'top_k', 'top_p', 'seed', 'save', 'resume'},
    'memory': memories.ALL,
    'state': states.ALL, 'show': set(), 'doctor': set()}


class UserError(Exception):
  """Shown without a traceback."""


def load_config(path, overrides=()):
  """Returns the `Config` of a file, with typed overrides applied.

  Args:
    path: a python file with `get_config()`.
    overrides: 'a.b=value' strings, see `statejax.config.override`.
  """
  from statejax import config as cfg
  if path is None or not pathlib.Path(path).is_file():
    known = sorted(map(str, pathlib.Path('configs').glob('[a-z]*.py')))
    hint = f', for example one of {", ".join(known)}' if known else ''
    raise UserError(f'--config={path}: expected a config file{hint}.')
  module = runpy.run_path(str(path))
  config = module['get_config']()
  for assignment in overrides:
    config = cfg.override(config, assignment)
  return config


def _workdir():
  if WORKDIR.value is None:
    raise UserError('--workdir: name the directory of the run.')
  return pathlib.Path(WORKDIR.value)


def train():
  """Trains a config in a workdir, or goes on where it stopped."""
  from statejax.train import loop
  config = load_config(CONFIG.value, SET.value)
  result = loop.train(config, _workdir())
  print(json.dumps({'step': result.step, 'evaluation': result.evaluation}))
  if PLOT.value:
    from statejax.train import plot
    print(plot.loss_curve(_workdir()))
  if result.step < config.train.steps:
    print('stopped early; the same command goes on', file=sys.stderr)


def generate():
  """Emits text from a trained run, or from a saved state."""
  import jax

  from statejax import generate as gen
  from statejax import state as st
  from statejax.artifact import serving
  from statejax.tasks import text
  from statejax.train import restore
  if RESUME.value and PROMPT.value:
    raise UserError('--resume goes on where the state stands, --prompt begins '
                    'anew: give one of them.')
  if SAVE.value:
    asking.free(pathlib.Path(SAVE.value))
  model, params = restore.from_workdir(_workdir())
  if model.config.vocab != text.VOCAB:
    raise UserError(f'{WORKDIR.value}: expected a text model of {text.VOCAB} '
                    f'tokens, got {model.config.vocab}.')
  params = model.unstack(params)
  sampling = gen.Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
  if RESUME.value:
    facts = serving.about(RESUME.value)
    need = max(facts['length']) + TOKENS.value
    state = serving.load_state(
        RESUME.value, model, params,
        capacity=max(CAPACITY.value or need, facts['capacity'] or 0))
  else:
    prompt = text.encode(PROMPT.value or '\n')[None]
    state = model.init_state(
        1, CAPACITY.value or prompt.shape[1] + TOKENS.value,
        key=jax.random.key(SEED.value))
    sys.stdout.write(PROMPT.value or '')
    state = gen.prefill(model, params, state, prompt, sampling=sampling)
  # Tokens are bytes, a character may take several of them.
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  def show(tokens):
    ids = [i for i in tokens[:1].tolist() if 0 <= i < text.END]
    sys.stdout.write(decoder.decode(bytes(ids)))
    sys.stdout.flush()
  _, state = gen.generate(model, params, state, TOKENS.value,
                          sampling=sampling, stop=(text.END,), callback=show)
  print(decoder.decode(b'', final=True))
  if SAVE.value:
    found = serving.save_state(
        SAVE.value, model, params, state,
        edits=serving.edits(RESUME.value) if RESUME.value else None)
    print(f'saved {SAVE.value}: {int(state.length[0])} tokens, '
          f'{sum(st.nbytes(state).values()):,} bytes, digest {found}',
          file=sys.stderr)


def show(path):
  """Prints what a saved state, checkpoint or workdir is."""
  from statejax.artifact import commit, serving, store
  from statejax.train import checkpoint
  path = pathlib.Path(path)
  if (path / 'checkpoints').is_dir():
    found = checkpoint.steps(path / 'checkpoints')
    if not found:
      raise UserError(f'{path}: a run without a checkpoint yet.')
    path = path / 'checkpoints' / f'step_{found[-1]:08d}'
  if not (path / serving.ABOUT).is_file():
    raise UserError(f'{path}: expected a saved state, a checkpoint or a '
                    'workdir; found none of them.')
  commit.check(path)
  facts = json.loads((path / serving.ABOUT).read_text())
  table = store.read_table(path)
  print(f'{path}: every file matches its digest')
  facts.pop('config', None)
  facts.pop('data', None)
  for key, value in facts.items():
    print(f'  {key}: {value}')
  print(f'  {len(table)} leaves')
  for name, leaf in table.items():
    print(f'    {name}  {leaf["dtype"]}{list(leaf["shape"])}  '
          f'{leaf["digest"][:16]}')


def doctor():
  """Prints versions, devices, and which implementations can run here."""
  import importlib.metadata as metadata
  import os
  import platform

  import jax

  import pallas_kernels
  from statejax.ops import dispatch
  print(f'python {platform.python_version()}')
  for name in ('statejax', 'jax', 'jaxlib', 'flax', 'optax',
               'orbax-checkpoint', 'grain', 'numpy', 'absl-py'):
    try:
      print(f'{name} {metadata.version(name)}')
    except metadata.PackageNotFoundError:
      print(f'{name} not installed')
  print('devices', *(f'{d.platform}:{d.device_kind}' for d in jax.devices()))
  if jax.default_backend() == 'cpu' and sys.platform == 'linux' and (
      'hugetlb' not in os.environ.get('GLIBC_TUNABLES', '')):
    print('huge pages off; training is faster with them: '
          'export GLIBC_TUNABLES=glibc.malloc.hugetlb=1')
  for op, kernels in pallas_kernels.KERNELS.items():
    print(f'{op}: reference: available')
    print(f'{op}: xla: available')
    for name in kernels:
      kernel = dispatch.kernel(op, name)
      why = f'declines: {kernel}' if isinstance(kernel, str) else 'available'
      print(f'{op}: {name}: {why}')


def _refuse_unused(name):
  given = {flag for uses in USES.values() for flag in uses
           if flags.FLAGS[flag].present}
  # A resumed state has a key of its own.
  uses = USES[name] - ({'seed'} if RESUME.value else set())
  for flag in sorted(given - uses):
    hint = ('; the seed of a run is --set=train.seed=N'
            if (name, flag) == ('train', 'seed') else '')
    raise UserError(f'--{flag}: {name} does not use it here{hint}.')


COMMANDS = {'train': train, 'generate': generate, 'memory': memories.run,
            'state': states.run, 'show': show, 'doctor': doctor}


def main(argv):
  """Runs one command; a user's mistake prints one line and exits with 2."""
  name, rest = (argv[1] if len(argv) > 1 else None), argv[2:]
  try:
    takes = {'show': (1,), 'memory': (1, 2, 3), 'state': (1, 2, 3)}.get(
        name or '', (0,))
    if name not in COMMANDS or len(rest) not in takes:
      one = {'memory': memories.usage, 'state': states.usage}.get(name or '')
      raise UserError(f'usage: {one()}.' if one else (
          f'usage: python -m statejax.main {"|".join(COMMANDS)} [flags]; show '
          f'takes one path; {memories.usage()}; {states.usage()}.'))
    _refuse_unused(name)
    COMMANDS[name](*rest)
  except (UserError, ValueError, FloatingPointError, OSError) as error:
    print(f'{name or "statejax"}: {error}', file=sys.stderr)
    sys.exit(2)


def run():
  """Entry point."""
  if _explained(sys.argv[1:]):
    return
  import jax
  jax.config.config_with_absl()
  # It reports every kind of device that is not there.
  logging.getLogger('jax._src.xla_bridge').setLevel(logging.WARNING)
  app.run(main)


def _explained(argv):
  """Prints what `state` or `memory` takes, where that is asked."""
  words = [x for x in argv if not x.startswith('-')]
  verbs = {'state': states, 'memory': memories}
  if not {'--help', '-h', '-help'} & {*argv} or not words or (
      words[0] not in verbs):
    return False
  print(verbs[words[0]].explain(*words[1:2]))
  return True


if __name__ == '__main__':
  run()
