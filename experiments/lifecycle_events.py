"""Memory events: slots against attention and a delta state, item by item.

  python -m experiments.lifecycle_events

A model of one memory layer reads 72 events and a question about one key, each
one vector (operation, key, value); see `statejax.tasks.lifecycle_events`. It
learns from the answers of all items, and in 10 % of them from what each event
wants of the memory (nothing, write, lock, delete), which object it is about and
whether the version before is asked for. Tested on 600 unseen items of each
seed, 75 of each family. `fallback off` and `lock ignored` are the same trained
model with that part taken out; attention and the delta state are models of the
same size without slots.

Expected: 600 of 600 with slots; without fallback what was evicted or never
written is lost and nothing else, without locks what was protected.
"""

import dataclasses
import functools
import pathlib

from absl import app, flags

from experiments import event_models, report
from experiments.record import Record
from statejax import config as c

OUT = flags.DEFINE_string('out', 'experiments/results/lifecycle_events.json',
                          'results')
SEEDS = flags.DEFINE_integer('seeds', 3, 'seeds', lower_bound=1)
STEPS = flags.DEFINE_integer('steps', 2000, 'updates')
SMOKE = flags.DEFINE_bool('smoke', False, 'one seed, a few updates')

TEST = 600
SLOTS = event_models.SLOTS
MIXERS = {
    'slots': (SLOTS,),
    'attention': (dataclasses.replace(
        event_models.HEADS, rope=c.RopeConfig()),) * 2,
    'delta': (c.KDAConfig(heads=4, key=16, value=16),) * 2}


def cut(params):
  """Parameters of the slots without their fallback."""
  layer = params['group_0']['layer_0']
  mixer = {k: v for k, v in layer['mixer'].items()
           if k not in ('log_kappa', 'salience')}
  return params | {'group_0': {'layer_0': layer | {'mixer': mixer}}}


def claims(counts):
  """Rows of the report, from {system: [{family: right} of each seed]}."""
  total = lambda name: [sum(x.values()) for x in counts[name]]
  family = lambda name, which: [x[which] for x in counts[name]]
  size_of = lambda name: event_models.size(MIXERS[name])
  show = lambda numbers: ', '.join(map(str, numbers))
  rows = [report.Row('slots: right of 600, each seed', 'all 600',
                     show(total('slots')), min(total('slots')) == TEST),
          report.Row('slots: parameters', '<= 250,000', f'{size_of("slots"):,}',
                     size_of('slots') <= 250_000)]
  for name in MIXERS:
    if name != 'slots':
      rows.append(report.Row(
          f'{name}: right of 600, {size_of(name):,} parameters', '< 600',
          show(total(name)), max(total(name)) < TEST))
  lost = {'fallback off': ('pressure', 'no_write'),
          'lock ignored': ('protected',)}
  for name, where in lost.items():
    for which in where:
      rows.append(report.Row(f'{name}: {which}, of 75', '<= 8',
                             show(family(name, which)),
                             max(family(name, which)) <= 8))
    rest = [sum(n for k, n in x.items() if k not in where)
            for x in counts[name]]
    most = 75 * (8 - len(where))
    rows.append(report.Row(f'{name}: all else, of {most}', f'>= {most - 8}',
                           show(rest), min(rest) >= most - 8))
  return rows


def study(name, seed, steps):
  """Trains a system; returns {'right': {variant: {family: right}}, seconds}."""
  mixers = MIXERS[name]
  params, took = event_models.train(mixers, seed, steps)
  test = functools.partial(event_models.test, seed=seed, count=TEST)
  right = {name: test(mixers, params)}
  if name == 'slots':
    off = (dataclasses.replace(SLOTS, fallback=None),)
    right['fallback off'] = test(off, cut(params))
    right['lock ignored'] = test(mixers, params, locks=False)
  return {'right': right, 'seconds': round(took)}


def main(argv):
  """Trains, tests, prints the table and the claims."""
  del argv
  steps, seeds, out = STEPS.value, SEEDS.value, OUT.value
  if SMOKE.value:
    steps, seeds, out = 20, 1, pathlib.Path('runs/lifecycle_events.json')
    out.unlink(missing_ok=True)
  record = Record(
      out, f'python -m experiments.lifecycle_events --seeds={seeds} '
      f'--steps={steps}', lambda key: event_models.settings(
          MIXERS[key.split('/')[0]], steps))
  counts = {}
  for seed in range(seeds):
    for name in MIXERS:
      found = record.get(f'{name}/{seed}', functools.partial(
          study, name, seed, steps))
      for which, right in found['right'].items():
        counts.setdefault(which, []).append(right)
        print(f'{which}, seed {seed}: {sum(right.values())} of {TEST}')
  rows = claims(counts)
  print(report.table(rows))
  record.write(rows)


if __name__ == '__main__':
  app.run(main)
