"""Memories of equal bytes on one task: what was set, locked, deleted, evicted?

  python -m experiments.equal_memories

Every model reads the events of `statejax.tasks.lifecycle_events` and answers
one question, trained as in `lifecycle_events`. Slots are one layer; the others
are two, which together hold as many bytes after the question as the slots and
what their fallback keeps. `slots alone` has no fallback, and no more bytes for
it. Labels help slots only: the others have nothing that they could name, and so
see no item twice. All others learn at one rate, `RATE`, between the two best of
`lifecycle_events`, at which attention answers 170 and 169, the delta rule 130
and 140 of 240; for slots the rate is that of `lifecycle_events`.

Expected: slots answer more than any other memory of their size. One seed, as
the others take a core up to 17 minutes each.
"""

import dataclasses
import functools
import pathlib

from absl import app, flags

from experiments import equal_state, event_models, report
from experiments.record import Record, digest
from statejax.tasks import lifecycle_events as task

OUT = flags.DEFINE_string('out', 'experiments/results/equal_memories.json',
                          'results')
SEEDS = flags.DEFINE_integer('seeds', 1, 'seeds', lower_bound=1)
STEPS = flags.DEFINE_integer('steps', 2000, 'updates')
NAMES = flags.DEFINE_list('names', [], 'memories to train; none: all')
SMOKE = flags.DEFINE_bool('smoke', False, 'one seed, a few updates, two names')

CONTEXT, TEST, RATE = 1 + task.EVENTS, 600, 3e-3


def memories():
  """Returns {name: (mixers, bytes of them all)}."""
  slots = event_models.SLOTS
  alone = dataclasses.replace(slots, fallback=None)
  count = lambda mixer: equal_state.nbytes(mixer, CONTEXT, event_models.WIDTH)
  out = {'slots': ((slots,), count(slots)),
         'slots alone': ((alone,), count(alone))}
  for name, (mixer, size) in equal_state.sized(
      count(slots) // 2, CONTEXT).items():
    out[name] = ((mixer,) * 2, 2 * size)
  return out


def claims(found, counts):
  """Rows of the report.

  Args:
    found: of `memories`.
    counts: {name: [{family: right} of each seed]}.
  """
  total = {name: [sum(x.values()) for x in seeds]
           for name, seeds in counts.items()}
  show = lambda numbers: ', '.join(map(str, numbers))
  least = min(total.get('slots', [TEST]))
  rows = []
  for name, right in total.items():
    mixers, size = found[name]
    ok = name == 'slots' or max(right) < least
    rows.append(report.Row(
        f'{name}: right of {TEST}; {size:,} bytes, '
        f'{event_models.size(mixers):,} parameters',
        'the most' if name == 'slots' else 'fewer', show(right), ok))
  return rows


def rate(name):
  """Of the optimizer, for the memory of this name."""
  return event_models.RATE if name.startswith('slots') else RATE


def cell(mixers_of, steps, key):
  """Returns a digest of what a result depends on, None of no memory here."""
  name = key.split('/')[0]
  return None if name not in mixers_of else digest(
      [event_models.settings(mixers_of[name], steps), rate(name)])


def study(mixers, name, steps, seed):
  """Trains a model; returns {'right': {family: right}, 'seconds'}."""
  params, took = event_models.train(mixers, seed, steps, rate=rate(name))
  return {'right': event_models.test(mixers, params, seed, TEST),
          'seconds': round(took)}


def main(argv):
  """Trains, tests, prints the table."""
  del argv
  steps, seeds, out = STEPS.value, SEEDS.value, OUT.value
  found = memories()
  mixers_of = {name: mixers for name, (mixers, _) in found.items()}
  if SMOKE.value:
    steps, seeds = 20, 1
    out = pathlib.Path('runs/equal_memories.json')
    out.unlink(missing_ok=True)
    found = {name: found[name] for name in ('slots', 'window')}
  if NAMES.value:
    found = {name: found[name] for name in NAMES.value}
  record = Record(
      out, f'python -m experiments.equal_memories --seeds={seeds} '
      f'--steps={steps} --names={",".join(NAMES.value)}',
      functools.partial(cell, mixers_of, steps))
  counts = {name: [] for name in found}
  for seed in range(seeds):
    for name, (mixers, size) in found.items():
      right = record.get(f'{name}/{seed}', functools.partial(
          study, mixers, name, steps, seed))['right']
      counts[name].append(right)
      print(f'{name}, seed {seed}, {size:,} bytes: {sum(right.values())} of '
            f'{TEST}', flush=True)
  rows = claims(found, counts)
  print(report.table(rows))
  record.write(rows, bytes={name: size for name, (_, size) in found.items()})


if __name__ == '__main__':
  app.run(main)
