"""Time of one decode step against the context, mixer by mixer, on a CPU.

  python -m experiments.bench_context

One layer of width 512 with 8 heads, 2 key/value heads of 64 or a latent of 128
+ 64, float32, one row, donated states whose stores hold random numbers. Per
context from 1K to 128K tokens: median milliseconds per step of interleaved
rounds; and the slope from 16K to 128K in ns per token of context, beside the
bytes per token that a step has to read by the mixer's definition. What is
chosen is 1,024 tokens for each.

Expected: a fixed state costs the same at every context. What reads bytes of
every token has a slope; that of the sparse mixers is that of their index (and
of the search for the best), far below that of attention to everything. Five
minutes.
"""

import functools
import json
import pathlib
import statistics
import time

from absl import app, flags, logging

from experiments import report
from statejax import config as c

ROUNDS = flags.DEFINE_integer('rounds', 7, 'interleaved rounds')
STEPS = flags.DEFINE_integer('steps', 5, 'steps of a round')
OUT = flags.DEFINE_string(
    'out', 'experiments/results/bench_context.json', 'results')
SMOKE = flags.DEFINE_bool('smoke', False, 'two contexts, one round')

CONTEXTS = tuple(2 ** p for p in range(10, 18))
WIDTH = 512
GQA = c.AttentionConfig(heads=8, kv_heads=2, key=64, value=64)
MLA = c.MLAConfig(heads=8, nope=64, rope_width=64, value=64, rank=128,
                  q_rank=128)
V4 = dict(heads=8, width=128, q_rank=128, window=128, out_groups=2,
          out_rank=64)
# Name: configuration, and floats that a step reads per token of context.
MIXERS = {
    'attention': (GQA, 2 * 2 * 64),
    'latent attention': (MLA, 128 + 64),
    'HCA': (c.CompressedConfig.heavily(**V4), 128 / 128),
    'CSA': (c.CompressedConfig(**V4, index=c.IndexConfig(256, 8, 64)), 64 / 4),
    'DSA': (c.DSAConfig(MLA, k=1024, index_heads=8, index_width=64), 64),
    'kpool': (c.PooledDSAConfig(MLA, block=4, k=256, index_heads=8,
                                index_width=64), 64 / 4),
    'MiniMax-M3': (c.BlockMaxConfig(GQA, block=64, k=16, index_width=64), 64),
    'MoBA': (c.MoBAConfig(GQA, block=64, k=16), 2 * 64 / 64),
    'QSA': (c.QSAConfig(GQA, block=16, k=64, index_heads=8, index_width=64),
            64 / 16),
    'NSA': (c.NSAConfig(heads=8, kv_heads=2, key=64, value=64,
                        compress_hidden=64), 2 * 2 * 64 / 16),
    'LoZA': (c.LoZAConfig(MLA), 0),
    'window': (c.AttentionConfig(**(vars(GQA) | {'window': 1024})), 0),
    'KDA': (c.KDAConfig(heads=8, key=64, value=64), 0),
}
# Slopes of fewer floats a token drown in what a step costs anyway.
SEEN = 16
DENSE = {'DSA': 'latent attention', 'kpool': 'latent attention',
         'CSA': 'attention', 'HCA': 'attention', 'MiniMax-M3': 'attention',
         'MoBA': 'attention', 'QSA': 'attention', 'NSA': 'attention'}


@functools.cache
def model(name):
  """One layer of a kind."""
  from statejax.model import LanguageModel
  layer = c.LayerConfig(name, MIXERS[name][0], c.SwiGLUConfig(64))
  return LanguageModel(c.ModelConfig(
      vocab=64, width=WIDTH, layers=(layer,), groups=(c.GroupConfig((name,)),)))


@functools.cache
def stepper(name):
  """A compiled step with a donated state, and parameters."""
  import jax

  from statejax import model as lm
  built = model(name)
  def step(params, state, tokens):
    logits, state = lm.apply(built, params, state, tokens, keep='last')
    return logits, state
  params = built.unstack(built.init(jax.random.key(0)))
  return jax.jit(step, donate_argnums=1), params


def filled(name, context, room):
  """A state of `context` tokens with random leaves."""
  import dataclasses

  import jax
  import numpy as np
  rng = np.random.default_rng(0)
  state = model(name).init_state(1, context + room)
  def one(x):
    if x.dtype != np.float32:
      return x
    block = rng.standard_normal(min(x.size, 2 ** 20), np.float32)
    return jax.numpy.asarray(np.resize(block, x.shape))
  return dataclasses.replace(
      state, layers=jax.tree.map(one, state.layers),
      length=jax.numpy.full_like(state.length, context))


def measure(contexts, rounds, steps):
  """Returns {name: {context: milliseconds}}."""
  import jax
  import jax.numpy as jnp
  token = jnp.ones((1, 1), jnp.int32)
  cases = [(name, context) for context in contexts for name in MIXERS]
  states, times = {}, {case: [] for case in cases}
  for name, context in cases:
    step, params = stepper(name)
    state = filled(name, context, (rounds + 1) * steps + 1)
    states[name, context] = jax.block_until_ready(step(params, state, token)[1])
  # Contexts too are interleaved: the machine is not as fast all the time.
  for _ in range(rounds):
    for case in cases:
      step, params = stepper(case[0])
      for _ in range(steps):
        clock = time.perf_counter()
        logits, states[case] = step(params, states[case], token)
        jax.block_until_ready(logits)
        times[case].append(1e3 * (time.perf_counter() - clock))
  return {name: {context: statistics.median(times[name, context])
                 for context in contexts} for name in MIXERS}


def growth(times, name, contexts):
  """The slope over that of its dense control, by that of the bytes read."""
  low, dense = contexts[len(contexts) // 2], DENSE[name]
  share = MIXERS[name][1] / MIXERS[dense][1]
  return slope(times[name], low) / slope(times[dense], low) / share


def slope(found, low):
  """ns per token of context, from `low` tokens to the longest."""
  high = max(found)
  return 1e6 * (found[high] - found[low]) / (high - low)


def claims(times, contexts):
  """Rows: what is flat, and what grows as slowly as its definition says."""
  first, last = contexts[0], contexts[-1]
  rows = []
  for name, (_, floats) in MIXERS.items():
    found = times[name]
    if not floats:
      ratio = found[last] / found[first]
      rows.append(report.Row(
          f'{name}: {last:,} over {first:,} tokens', '<= 1.3x',
          f'{ratio:.2f}x', ratio <= 1.3))
    elif name in DENSE:
      dense = times[DENSE[name]][last]
      rows.append(report.Row(
          f'{name}: {DENSE[name]} over it at {last:,}', '> 1x',
          f'{dense / found[last]:.1f}x', dense > found[last]))
      if floats >= SEEN:
        more = growth(times, name, contexts)
        rows.append(report.Row(
            f'{name}: slope by bytes read, against {DENSE[name]}',
            '0.3x to 3x', f'{more:.2f}x', 0.3 <= more <= 3))
  return rows


def table(times, contexts):
  """Returns lines: milliseconds per context, slope, bytes read per token."""
  low = contexts[len(contexts) // 2]
  lines = [['mixer', *(f'{n:,}' for n in contexts), 'ns/token', 'B/token']]
  for name, (_, floats) in MIXERS.items():
    lines.append([name, *(f'{times[name][n]:.2f}' for n in contexts),
                  f'{slope(times[name], low):.2f}', f'{4 * floats:.0f}'])
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return ['  '.join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(
      zip(line, widths))) for line in lines]


def draw(path, times):
  """Writes the figure."""
  from matplotlib import figure
  picture = figure.Figure(figsize=(7.2, 4.6), layout='constrained')
  axes = picture.subplots()
  for i, (name, found) in enumerate(times.items()):
    axes.plot(list(found), list(found.values()), label=name,
              marker='o^sv'[i % 4], markersize=4, linewidth=1,
              linestyle='-' if i < 7 else '--')
  axes.set(xscale='log', yscale='log', xlabel='context, tokens',
           ylabel='one decode step, ms', title='one layer, one row, CPU')
  axes.set_xscale('log', base=2)
  axes.grid(alpha=0.3)
  axes.legend(fontsize='small', ncols=2)
  picture.savefig(path, dpi=120)


def main(_):
  """Measures, prints, writes JSON and figure."""
  logging.set_verbosity(logging.WARNING)
  contexts = CONTEXTS[:2] if SMOKE.value else CONTEXTS
  rounds = 1 if SMOKE.value else ROUNDS.value
  times = measure(contexts, rounds, STEPS.value)
  lines, rows = table(times, contexts), claims(times, contexts)
  print('\n'.join(lines), report.table(rows), sep='\n\n')
  out = pathlib.Path('runs/bench_context.json' if SMOKE.value else OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  command = (f'python -m experiments.bench_context --rounds={rounds} '
             f'--steps={STEPS.value}')
  report.write(out, rows, command, table=lines,
               milliseconds=json.loads(json.dumps(times)))
  draw(out.with_suffix('.png'), times)
  raise SystemExit(0 if SMOKE.value or all(r.ok for r in rows) else 1)


if __name__ == '__main__':
  app.run(main)
