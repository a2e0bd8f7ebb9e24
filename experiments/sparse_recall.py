"""Recall by sparse and compressed attention at equal state bytes.

  python -m experiments.sparse_recall

Models of two layers, a window of two tokens (it puts a key beside its value)
and the mixer in question, learn multi-query associative recall (arXiv
2312.04927): 8 pairs, then each key once more, 64 tokens in all. Each mixer has
the same bytes of state after those 64 tokens, within 3%: 8 KiB, counted from
the schema, by the width of its heads. A query sees 16 tokens or what stands for
as many; the controls are attention to everything, and a window of 16 tokens
with heads four times as wide. Same data, same Muon; indexers learn by losses
of their own, those that have a stage for it (DSA, kpool, CSA, MiniMax-M3, QSA)
beside dense attention for the first 250 of 400 updates, as DeepSeek-V3.2 does;
all are tested sparse. Accuracy on unseen items, mean and range over seeds; some
learn the task with one seed and not with another, so claims are of the best;
tokens per second of sparse training, from interleaved rounds at the end.

Expected: attention to everything recalls; a window cannot, whatever its width,
nor can one entry for eight tokens (HCA); what selects among all tokens recalls
with a quarter of them. Half an hour.
"""

import dataclasses
import functools
import pathlib
import statistics
import time

from absl import app, flags, logging

from experiments import report
from statejax import config as c

OUT = flags.DEFINE_string('out', 'experiments/results/sparse_recall.json',
                          'results')
SEEDS = flags.DEFINE_integer('seeds', 2, 'seeds', lower_bound=1)
ONLY = flags.DEFINE_list('only', [], 'run only these mixers; empty: all')
SMOKE = flags.DEFINE_bool('smoke', False, 'three mixers, a few updates')

LENGTH, WIDTH, VOCAB = 64, 64, 64
BUDGET = 8192
ROPE = c.RopeConfig(fraction=0.5)


def gqa(key=16, value=16, kv_heads=1, **fields):
  """Four query heads; by default one of keys and values."""
  return c.AttentionConfig(heads=4, kv_heads=kv_heads, key=key, value=value,
                           rope=ROPE, qk_norm=True, **fields)


def mla(rank, rope_width=8):
  """Latent attention of four heads."""
  return c.MLAConfig(heads=4, nope=16, rope_width=rope_width, value=16,
                     rank=rank)


V4 = dict(heads=4, q_rank=32, window=8, out_groups=2, out_rank=32)
QUARTER = c.RopeConfig(fraction=0.25, layout='interleaved', side='trailing')
MIXERS = {
    'attention': gqa(),
    'window': gqa(32, 32, 2, window=16),
    'MLA': mla(24),
    'DSA': c.DSAConfig(mla(16), k=16, index_heads=8, index_width=8),
    'kpool': c.PooledDSAConfig(mla(22), block=4, k=4, index_heads=8,
                               index_width=8),
    'CSA': c.CompressedConfig(
        **V4, width=36, ratio=2, index=c.IndexConfig(8, 8, 10),
        rope=dataclasses.replace(QUARTER, fraction=0.23)),
    'HCA': c.CompressedConfig.heavily(**V4, width=108, ratio=8),
    'NSA': c.NSAConfig(heads=4, kv_heads=1, key=8, value=11, rope=ROPE,
                       compress_block=4, stride=2, compress_hidden=32,
                       select_block=4, select_count=4, initial=0, local=1,
                       window=8),
    'MoBA': c.MoBAConfig(gqa(16, 12), block=4, k=4),
    'MiniMax-M3': c.BlockMaxConfig(gqa(12, 12), block=4, k=4, index_width=8),
    'QSA': c.QSAConfig(gqa(16, 14), block=4, k=4, index_heads=8,
                       index_width=8),
    'LoZA': c.LoZAConfig(mla(112, 16), block=4, sink_blocks=1,
                         recent_blocks=3),
}
CONTROLS = ('attention', 'window')
# They keep no key of most distant tokens, or one for eight of them.
FORGET = ('window', 'HCA', 'LoZA')
TRAIN = c.TrainConfig(steps=400, rows=64, length=LENGTH, peak=5e-3, warmup=20,
                      decay=240, optimizer='muon', eval_batches=8)
# Updates with dense attention, for what has such a stage.
DENSE = 250
TASK = c.TaskConfig('mqar', pairs=8, vocab=VOCAB)


@functools.cache
def model(name, dense=False):
  """A window of two tokens, then the mixer; dense, if it has such a stage."""
  from statejax.model import LanguageModel
  mixer = MIXERS[name]
  if dense and hasattr(mixer, 'stage') and mixer.chooses:
    mixer = dataclasses.replace(mixer, stage='warmup')
  near = c.AttentionConfig(heads=4, kv_heads=4, key=16, value=16, window=2,
                           rope=None)
  layers = (c.LayerConfig('near', near, c.SwiGLUConfig(128)),
            c.LayerConfig('mixer', mixer, c.SwiGLUConfig(128)))
  return LanguageModel(c.ModelConfig(
      vocab=VOCAB, width=WIDTH, layers=layers,
      groups=(c.GroupConfig(('near', 'mixer')),)))


def state_bytes(name):
  """Bytes of the mixer's state after all tokens of an item, and those that one
  more token adds."""
  from statejax import account
  found = account.account(model(name).config, LENGTH)['mixer']
  return {'bytes': found.total, 'per_token': float(found.per_token)}


def train(name, seed, config):
  """Trains one model, returns its accuracy on unseen items and its state."""
  import numpy as np

  from statejax.tasks import pipeline
  from statejax.train import loop, step
  built, seeded = model(name), dataclasses.replace(config, seed=seed)
  whole = c.Config(built.config, seeded, TASK)
  shape = dict(rows=config.rows, length=LENGTH)
  data = pipeline.batches(loop.make_task(whole), seed=seed, **shape)
  # One program for all seeds: the seed enters by the initial state.
  state = step.initial(built, seeded)
  dense = DENSE * config.steps // TRAIN.steps
  for i in range(config.steps):
    state, _ = step.update(
        model(name, dense=i < dense), config, state, next(data))
  sums = [step.evaluate(built, state.params, batch)
          for batch in pipeline.evaluation(
              loop.make_task(whole, 'eval'), **shape,
              batches=config.eval_batches)]
  correct, count = (np.sum([getattr(s, n) for s in sums])
                    for n in ('correct', 'count'))
  return float(correct / count), state, data


def speed(running, config, rounds):
  """Tokens per second of training, interleaved; {name: median}."""
  import jax

  from statejax.train import step
  times = {name: [] for name in running}
  for _ in range(rounds):
    for name, (state, data) in running.items():
      batches = [next(data) for _ in range(3)]
      jax.block_until_ready(state.params)
      clock = time.perf_counter()
      for batch in batches:
        state, _ = step.update(model(name), config, state, batch)
      jax.block_until_ready(state.params)
      times[name].append((time.perf_counter() - clock) / len(batches))
      running[name] = state, data
  return {name: config.rows * LENGTH / statistics.median(found)
          for name, found in times.items()}


def measure(names, seeds, config, rounds):
  """Returns {name: {bytes, per_token, accuracy of each seed, tokens_s}}."""
  out, running = {}, {}
  for name in names:
    runs = [train(name, seed, config) for seed in range(seeds)]
    out[name] = {**state_bytes(name),
                 'accuracy': [round(r[0], 4) for r in runs]}
    running[name] = runs[-1][1:]
    print(name, out[name], flush=True)
  for name, found in speed(running, config, rounds).items():
    out[name]['tokens_s'] = round(found)
  return out


def table(found):
  """Lines: bytes, accuracy, speed."""
  dense = found[CONTROLS[0]]['tokens_s']
  lines = [['mixer', 'state bytes', 'B/token', 'accuracy %', 'tokens/s',
            'of attention']]
  for name, f in found.items():
    low, high = min(f['accuracy']), max(f['accuracy'])
    lines.append([
        name, f"{f['bytes']:,}", f"{f['per_token']:.0f}",
        f"{100 * statistics.mean(f['accuracy']):.1f} "
        f'({100 * low:.1f} to {100 * high:.1f})',
        f"{f['tokens_s']:,}", f"{f['tokens_s'] / dense:.2f}x"])
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return ['  '.join(x.ljust(w) for x, w in zip(line, widths)).rstrip()
          for line in lines]


def claims(found):
  """Rows, of each mixer's best seed: whether it is able to."""
  best = {name: max(f['accuracy']) for name, f in found.items()}
  apart = max(abs(f['bytes'] - BUDGET) for f in found.values()) / BUDGET
  rows = [
      report.Row('state bytes apart from 8 KiB', '<= 3%', f'{100 * apart:.1f}%',
                 apart <= 0.03),
      report.Row('attention to everything', '>= 95%',
                 f"{100 * best['attention']:.1f}%", best['attention'] >= 0.95)]
  for name in found:
    if name in FORGET:
      rows.append(report.Row(
          f'{name} forgets', '<= 60%', f'{100 * best[name]:.1f}%',
          best[name] <= 0.6))
    elif name not in CONTROLS:
      gap = best[name] - best['window']
      rows.append(report.Row(
          f'{name} over the window', '>= 30 points', f'{100 * gap:.1f}',
          gap >= 0.3))
  return rows


def main(_):
  """Trains all, prints both tables, writes the results."""
  logging.set_verbosity(logging.WARNING)
  names, config, seeds = list(MIXERS), TRAIN, SEEDS.value
  out = pathlib.Path(OUT.value)
  if ONLY.value:
    names = [n for n in names if n in (*CONTROLS, *ONLY.value)]
  if SMOKE.value:
    names, seeds = names[:3], 1
    config = dataclasses.replace(TRAIN, steps=3, rows=4, warmup=1, decay=1,
                                 eval_batches=1)
    out = pathlib.Path('runs/sparse_recall/smoke.json')
  found = measure(names, seeds, config, 1 if SMOKE.value else 5)
  lines, rows = table(found), claims(found)
  print('\n'.join(lines), report.table(rows), sep='\n\n')
  out.parent.mkdir(parents=True, exist_ok=True)
  report.write(out, rows, 'python -m experiments.sparse_recall', table=lines,
               mixers=found)
  raise SystemExit(0 if SMOKE.value or all(r.ok for r in rows) else 1)


if __name__ == '__main__':
  app.run(main)
