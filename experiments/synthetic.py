"""Recall, reversal and stacks: every delta-family layer at equal state bytes.

  python -m experiments.synthetic

Two layers of each kind are trained on multi-query associative recall,
palindromes and 64 stacks with the same number of state bytes (within 2.5%,
counted from the schema), the same parameters (within 1%, by the width of the
feed-forward block), the same data and the same AdamW; the peak rate is the
better of RATES for the layer and task, by the training loss of seed 0. Reported
are the accuracy on unseen items, and as the speed of learning the mean accuracy
over all updates, where every item is new too: means over seeds with 95%
t-intervals.

Expected is the order of the Kimi Linear report, KDA >= Gated DeltaNet >=
Mamba-2 (arXiv 2510.26692, figure 4), in both. There two layers of two heads of
128 see up to 20,000 updates at 256 to 2,048 tokens; here it is heads of 16, 500
updates and 32 to 48 tokens, so that speed weighs more and length less. The
stacks are the easiest: two or three of the 64 are filled at a time, two in five
pops return what was pushed just before (there Mamba-2 fails from 1,024 tokens).

Layers begin as published. With one decay per head that is a lottery over two
heads: where they forget within a few tokens, 500 updates do not undo it. 'GDN,
slow start' is Gated DeltaNet without it: every head begins by forgetting at
most 4% per token. So the order fails in recall, between layers that have not
learned it yet (GDN 21%, Mamba-2 27%; with a slow start GDN has 100%).

120 trainings, twenty compilations, an hour of one core. Results are kept after
each training: the same command goes on where a killed run stopped, and repeats
what was run with other settings. Status 1 if a claim does not hold or is not
measured yet.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import time

from absl import app, flags, logging

from experiments import report
from experiments.record import Record, digest
from statejax import config as c

OUT = flags.DEFINE_string('out', 'experiments/results/synthetic.json',
                          'results; what it holds is not run again')
SMOKE = flags.DEFINE_bool('smoke', False, 'three layers, a few updates')
SEEDS = flags.DEFINE_integer('seeds', 3, 'seeds', lower_bound=1, upper_bound=5)
LAYERS = flags.DEFINE_list('layers', [], 'run only these; empty: all')
RUN = flags.DEFINE_bool('run', True, 'false: only tables of what is there')
TASKS = flags.DEFINE_list('tasks', [], 'run only these; empty: all')

SLOW = ', slow start'
# 3,200 bytes a layer where matrix and convolutions have heads of 16 x 16; what
# has no convolution gets a larger matrix, what has larger tails a smaller one.
MIXERS = {
    'KDA': c.KDAConfig(2, 16, 16, rank=8, chunk=16),
    'GDN': c.GatedDeltaNetConfig(2, 2, 16, 16, chunk=16),
    'Mamba-2': c.Mamba2Config(2, 2, 16, 16, chunk=16),
    f'GDN{SLOW}': c.GatedDeltaNetConfig(2, 2, 16, 16, chunk=16,
                                             dt_bias=-6.0),
    'GDN-2': c.GatedDeltaNet2Config(2, 2, 16, 16, rank=8, chunk=16),
    'DeltaNet': c.DeltaNetConfig(2, 16, 16, chunk=16),
    'DeltaProduct': c.DeltaProductConfig(2, 2, 16, 12, writes=2, chunk=16),
    'GLA': c.GLAConfig(2, 16, 25, rank=8, chunk=16),
    'RetNet': c.RetNetConfig(2, 16, 25, chunk=16),
    'lightning': c.LightningConfig(2, 20, 20, chunk=16),
}
TASK = {
    'mqar': c.TaskConfig('mqar', pairs=12, vocab=32),
    'palindrome': c.TaskConfig('palindrome', vocab=20),
    'stack': c.TaskConfig('stack', stacks=64, vocab=83),
}
LENGTH = {'mqar': 48, 'palindrome': 32, 'stack': 48}
ORDER = ('KDA', 'GDN', 'Mamba-2')
TIE, SPREAD = 0.02, 0.2
RATES = (8e-3, 4e-3)
TRAIN = c.TrainConfig(steps=500, rows=24, peak=1.0, warmup=20, decay=200,
                      weight_decay=0.1, eval_batches=20)
WIDTH, VOCAB, PARAMETERS = 64, 83, 57_000
# Two-sided 95% of Student's t, by the number of seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


@functools.cache
def model(name):
  """Returns two layers of a kind, its feed-forward block as wide as fits."""
  import jax

  from statejax.model import LanguageModel
  def build(hidden):
    layer = c.LayerConfig(name, MIXERS[name], c.SwiGLUConfig(hidden))
    return LanguageModel(c.ModelConfig(
        vocab=VOCAB, width=WIDTH, layers=(layer,),
        groups=(c.GroupConfig((name,), 2),)))
  def size(hidden):
    shapes = jax.eval_shape(build(hidden).init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  base, each = size(1), size(2) - size(1)
  hidden = 1 + round((PARAMETERS - base) / each)
  return build(hidden), base + each * (hidden - 1)


def state_bytes(name):
  """Bytes of one row's state in one layer, from the schema."""
  from statejax import state as st
  built, _ = model(name)
  schema = built.state_schema(1, 0)
  rest = st.nbytes(dataclasses.replace(schema, layers={}))
  return (st.nbytes(schema)['fixed'] - rest['fixed']) // 2


def make_jitted():
  """Returns `initial` and `update` as in `statejax.train.step`, but with key
  and rate as arguments: one compilation for all seeds and rates."""
  import jax

  from statejax.train import optimizer as opt
  from statejax.train import step

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def initial(built, config, key):
    params = built.init(key)
    chain = opt.make_optimizer(config, built.axes())
    return step.TrainState(params, chain.init(params), jax.numpy.int32(0),
                           jax.random.key_data(key))

  @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
  def update(built, config, state, batch, rate):
    def loss(params):
      sums = step.score(built, params, batch)
      return sums.loss / sums.count, sums
    grads, sums = jax.grad(loss, has_aux=True)(state.params)
    chain = opt.make_optimizer(config, built.axes())
    updates, optimizer = chain.update(grads, state.optimizer, state.params)
    # Updates of AdamW are linear in the rate, for which TRAIN.peak is 1.
    params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
    return dataclasses.replace(
        state, params=params, optimizer=optimizer, step=state.step + 1), (
            sums.loss, sums.correct, sums.count)
  return initial, update


def train(jitted, name, task, seed, rate, train_config):
  """Trains one model; returns its facts, of JSON types."""
  import jax
  import numpy as np

  from statejax.tasks import pipeline
  from statejax.train import loop
  (initial, update), (built, _) = jitted, model(name)
  seeded = dataclasses.replace(train_config, seed=seed, length=LENGTH[task])
  config = c.Config(built.config, seeded, TASK[task])
  shape = dict(rows=seeded.rows, length=seeded.length)
  data = pipeline.batches(loop.make_task(config), seed=seed, **shape)
  unseen = pipeline.evaluation(loop.make_task(config, 'eval'), **shape,
                               batches=seeded.eval_batches)
  clock, cpu = time.perf_counter(), time.process_time()
  state, sums = initial(built, train_config, jax.random.key(seed)), []
  for _ in range(seeded.steps):
    state, new = update(built, train_config, state, next(data), rate)
    sums.append(new)
  # At rate 0 nothing is learned: one program, and one compilation, for both.
  for batch in unseen:
    state, new = update(built, train_config, state, batch, 0.0)
    sums.append(new)
  loss, correct, count = np.array(sums, np.float64).T
  trained, end = slice(seeded.steps), max(1, seeded.steps // 10)
  curve = correct[trained] / count[trained]
  return {'accuracy': round(correct[seeded.steps:].sum()
                            / count[seeded.steps:].sum(), 4),
          'speed': round(curve.mean(), 4),
          'loss': round((loss[trained] / count[trained])[-end:].mean(), 4),
          'curve': [round(x.mean(), 3)
                    for x in np.array_split(curve, min(10, len(curve)))],
          'seconds': round(time.perf_counter() - clock, 1),
          'cpu_seconds': round(time.process_time() - cpu, 1)}


def settings(train_config, key):
  """Returns a digest of what a training depends on; None if it is unknown."""
  task, name, *_ = key.split('/')
  if task not in TASK or name not in MIXERS:
    return None
  facts = [c.to_dict(model(name)[0].config), c.to_dict(TASK[task]),
           c.to_dict(train_config), LENGTH[task]]
  return digest(facts)


def run_all(record, layers, tasks, seeds, train_config):
  """Trains what is missing, seed by seed, so that early results are fair."""
  jitted = make_jitted()
  def cell(task, name, seed, rate):
    return record.get(
        f'{task}/{name}/{seed}/{rate}',
        lambda: train(jitted, name, task, seed, rate, train_config))
  for rate, task, name in itertools.product(RATES, tasks, layers):
    cell(task, name, 0, rate)
  for seed, task, name in itertools.product(range(1, seeds), tasks, layers):
    cell(task, name, seed, best_rate(record, task, name))


def best_rate(record, task, name):
  """The rate whose loss at the end of training is lowest with seed 0."""
  done = [r for r in RATES if f'{task}/{name}/0/{r}' in record.cells]
  return min(done, default=None,
             key=lambda r: record.cells[f'{task}/{name}/0/{r}']['loss'])


def collect(record, task, name, field, seeds):
  """Values of a field by seed, at the chosen rate; of seeds that are done."""
  rate = best_rate(record, task, name)
  keys = [f'{task}/{name}/{seed}/{rate}' for seed in range(seeds)]
  return {i: record.cells[k][field] for i, k in enumerate(keys)
          if k in record.cells}


def interval(values):
  """Mean and half the width of the 95% interval, as text."""
  if not values:
    return 'missing'
  mean = f'{100 * statistics.mean(values):.1f}'
  if len(values) < 2:
    return f'{mean} (1 seed)'
  half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
  return f'{mean} ± {100 * half:.1f}'


def table(record, layers, tasks, seeds):
  """Returns the results as lines of text, one per layer."""
  heads = ['layer', 'bytes', 'parameters', *(
      f'{task}, {what} %' for task in tasks for what in ('accuracy', 'speed'))]
  lines = [heads]
  for name in layers:
    lines.append([name, f'{state_bytes(name):,}', f'{model(name)[1]:,}', *(
        interval(list(collect(record, task, name, field, seeds).values()))
        for task in tasks for field in ('accuracy', 'speed'))])
  widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
  return '\n'.join(
      '  '.join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip()
      for line in lines)


def claims(record, layers, tasks, seeds):
  """Returns the rows: equal budgets, and the reported order."""
  size = [state_bytes(name) for name in layers]
  count = [model(name)[1] for name in layers]
  rows = [
      report.Row('state bytes, largest over smallest', '<= 1.025',
                 f'{max(size) / min(size):.3f}',
                 max(size) <= 1.025 * min(size)),
      report.Row('parameters, largest over smallest', '<= 1.010',
                 f'{max(count) / min(count):.3f}',
                 max(count) <= 1.01 * min(count))]
  for task in tasks:
    means = [statistics.mean(values.values()) for name in layers
             if (values := collect(record, task, name, 'accuracy', seeds))]
    spread = max(means, default=0.0) - min(means, default=0.0)
    # Else the order below would hold of layers none of which has learned.
    rows.append(report.Row(
        f'{task}, accuracy: best - worst layer',
        f'>= {100 * SPREAD:.0f} points', f'{100 * spread:.1f}',
        bool(spread >= SPREAD)))
    for field in ('accuracy', 'speed'):
      for high, low in zip(ORDER, ORDER[1:]):
        rows.append(compare(record, task, field, high, low, seeds))
  return rows


def compare(record, task, field, high, low, seeds):
  """One row: `high` is not below `low` by more than a tie, seed by seed; or it
  is, and far above where its decays begin slowly."""
  def differences(high):
    a, b = (collect(record, task, n, field, seeds) for n in (high, low))
    return [a[seed] - b[seed] for seed in a if seed in b]
  def at_least(found, limit):
    return bool(found) and bool(statistics.mean(found) >= limit)
  claim, found = f'{task}, {field}: {high} - {low}', differences(high)
  expected, obtained = f'>= -{100 * TIE:.0f} points', interval(found)
  ok = at_least(found, -TIE)
  if not ok and f'{high}{SLOW}' in MIXERS:
    found = differences(f'{high}{SLOW}')
    expected += f', or {100 * SPREAD:.0f} with a slow start'
    obtained += f'; slow start {interval(found)}'
    ok = at_least(found, SPREAD)
  return report.Row(claim, expected, obtained, ok)


def draw(path, record, layers, tasks, seeds):
  """Writes the figure: accuracy on new items while learning, over seeds."""
  from matplotlib import figure
  picture = figure.Figure(figsize=(9.6, 3.2), layout='constrained')
  panels = picture.subplots(1, len(tasks), sharey=True)
  for axes, task in zip(panels, tasks):
    for name in layers:
      curves = collect(record, task, name, 'curve', seeds).values()
      if curves:
        mean = [100 * statistics.mean(point) for point in zip(*curves)]
        share = [(i + 0.5) * TRAIN.steps / len(mean) for i in range(len(mean))]
        axes.plot(share, mean, marker='.', label=name)
    axes.set(title=task, xlabel='updates')
    axes.grid(alpha=0.3)
  panels[0].set(ylabel='accuracy, %')
  panels[-1].legend(fontsize='small')
  picture.savefig(path, dpi=120)


def main(_):
  """Trains what is missing, prints both tables, writes the results."""
  logging.set_verbosity(logging.WARNING)
  layers = LAYERS.value or list(ORDER if SMOKE.value else MIXERS)
  tasks = TASKS.value or list(TASK)
  train_config, seeds, out = TRAIN, SEEDS.value, OUT.value
  if SMOKE.value:
    train_config = dataclasses.replace(
        TRAIN, steps=4, rows=4, warmup=1, decay=1, eval_batches=1)
    seeds, out = 1, pathlib.Path('runs/synthetic/smoke.json')
    out.unlink(missing_ok=True)
  record = Record(out, 'python -m experiments.synthetic',
                  functools.partial(settings, train_config))
  if RUN.value:
    run_all(record, layers, tasks, seeds, train_config)
  # What has not been asked for, or not been run yet, shows as missing.
  everything = record, MIXERS, TASK, seeds
  text, rows = table(*everything), claims(*everything)
  print(f'\n{text}\n\n{report.table(rows)}')
  record.write(rows, table=text.splitlines())
  draw(pathlib.Path(out).with_suffix('.png'), *everything)
  raise SystemExit(0 if SMOKE.value or all(r.ok for r in rows) else 1)


if __name__ == '__main__':
  app.run(main)
