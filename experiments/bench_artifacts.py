"""What artifacts cost: a verified restore, a mint beside a decode loop.

  python -m experiments.bench_artifacts

Restore: states of 8, 64 and 256 MiB, half of them attention stores of 1,024
tokens, from their artifact with every check of a load, beside what Orbax alone
needs for the same arrays (and, for comparison, Orbax into numpy arrays that
reach no device). Mint: how long `Minter.start` keeps a decode loop, beside what
numpy needs to copy as many bytes right before, and the loop's steps, with a
mint always under way and without. Re-prefill: a state of
256 to 16,384 tokens of a small hybrid (KDA, one attention layer in four) and of
attention alone, restored with its transcript, beside absorbing the tokens
again. Medians of interleaved rounds; random weights. On a busy machine look at
the ratios. What was measured is kept: a run that was stopped goes on there.
Five minutes on one core that is free.

Obtained on two shared cores: all but twice at 256 MiB, see the results.

Expected: a restore takes at most twice what Orbax alone does; a mint keeps the
loop 10 ms in 99 of 100 cases at most, and a large one at most twice as long as
numpy's copy; from 1,024 tokens on a restore is the faster
way, the more so the longer.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import statistics
import tempfile
import time

from absl import app, flags, logging

from experiments import report
from experiments.record import Record
from statejax import config as c

ROUNDS = flags.DEFINE_integer('rounds', 15, 'interleaved rounds', lower_bound=1)
STARTS = flags.DEFINE_integer('starts', 100, 'mints beside the loop, per size',
                              lower_bound=1)
OUT = flags.DEFINE_string(
    'out', 'experiments/results/bench_artifacts.json', 'results')
SMOKE = flags.DEFINE_bool('smoke', False, 'small, one round')

SIZES, LOOPS = (8, 64, 256), (8, 32, 64)
LARGE = 32  # MiB; of less the call itself takes longer than the copy
LENGTHS = (256, 1024, 4096, 16384)
STORED, ROOM = 1000, 1024  # tokens of a state in the first two parts
MLP = c.SwiGLUConfig(16)
WIDE = (c.LayerConfig('kda', c.KDAConfig(heads=8, key=64, value=64, rank=16),
                      MLP),
        c.LayerConfig('full', c.AttentionConfig(
            heads=8, kv_heads=8, key=64, value=64), MLP))
SMALL = (c.LayerConfig('kda', c.KDAConfig(heads=4, key=32, value=32, rank=32),
                       c.SwiGLUConfig(256)),
         c.LayerConfig('full', c.AttentionConfig(
             heads=4, kv_heads=4, key=32, value=32), c.SwiGLUConfig(256)))
FAMILIES = {'hybrid': ('kda', 'kda', 'kda', 'full'),
            'attention': ('full',) * 4}


@functools.cache
def wide(mib):
  """A model whose state after 1,024 tokens has so many MiB, almost."""
  from statejax.model import LanguageModel
  pairs = round(mib / 4.13)  # of one layer of each kind
  return LanguageModel(c.ModelConfig(
      vocab=64, width=64, layers=WIDE,
      groups=(c.GroupConfig(('kda', 'full'), pairs),)))


@functools.cache
def family(name):
  """A model of four layers, and its parameters."""
  import jax

  from statejax.model import LanguageModel
  model = LanguageModel(c.ModelConfig(
      vocab=64, width=128, layers=SMALL if name == 'hybrid' else SMALL[1:],
      groups=(c.GroupConfig(FAMILIES[name]),)))
  return model, model.unstack(model.init(jax.random.key(0)))


def tokens_of(length):
  """Random tokens."""
  import numpy as np
  return np.random.default_rng(length).integers(0, 64, length)


def filled(model):
  """A random state after `STORED` tokens, under their witness."""
  import jax.numpy as jnp
  import numpy as np

  from statejax import state as st
  from statejax.artifact import names
  rng = np.random.default_rng(0)
  def one(path, axes, kind, leaf):
    block = rng.standard_normal(1 << 16, np.float32)
    return jnp.asarray(np.resize(block, leaf.shape), leaf.dtype)
  mark = bytes.fromhex(names.witness(tokens_of(STORED).tolist()))
  return dataclasses.replace(
      st.map_leaves(one, model.state_schema(1, ROOM)),
      length=jnp.full(1, STORED, jnp.int32), pending=jnp.zeros(1, jnp.int32),
      witness=jnp.asarray(np.frombuffer(mark, '<u4'))[None],
      key=jnp.zeros((1, 2), jnp.uint32))


def host_of(model, capacity):
  """What mints and loads; of no particular parameters."""
  from statejax.artifact import identity
  return identity.Host(
      model.config, model.state_schema, '0' * 64,
      program=identity.Program(capacity=capacity))


@contextlib.contextmanager
def opened():
  """Yields a store that is gone at the end."""
  from statejax.artifact import objects
  os.makedirs('runs', exist_ok=True)
  with tempfile.TemporaryDirectory(dir='runs') as folder:
    yield objects.Store(f'{folder}/store',
                        objects.Secrets(f'{folder}/secrets'))


def mint(shop, model, state, length):
  """Mints a state with its transcript; returns the id."""
  from statejax.artifact import mint
  return mint.mint(
      shop, state, 0, host_of(model, state.capacity), mint.Terms('bench'),
      transcript=mint.Transcript(tuple(tokens_of(length).tolist()), keep=True),
  ).id


def restore(shop, id, model, capacity):
  """Loads an artifact with every check; returns the state, on the device."""
  import jax

  from statejax.artifact import access, load
  found = load.load(shop, id, access.Principal('bench'),
                    host_of(model, capacity))
  assert found.decision.outcome == 'resumed', found.decision
  return jax.block_until_ready(found.state)


def timed(times, function, *args):
  """Calls a function; appends the milliseconds it took."""
  clock = time.perf_counter()
  result = function(*args)
  times.append(1e3 * (time.perf_counter() - clock))
  return result


def restored(mib, rounds):
  """Returns {'bytes', 'verified', 'orbax', 'numpy'}, milliseconds."""
  import jax
  import numpy as np

  from statejax import state as st
  from statejax.artifact import digest, store
  model = wide(mib)
  state = filled(model)
  row = digest.named_leaves(st.live(state, 0))
  targets = {
      'orbax': {path: jax.ShapeDtypeStruct(x.shape, x.dtype)
                for path, x in row.items()},
      'numpy': {path: np.zeros(x.shape, x.dtype) for path, x in row.items()}}
  times = {name: [] for name in ('verified', *targets)}
  with opened() as shop:
    id = mint(shop, model, state, STORED)
    def bare(target):
      return jax.block_until_ready(store.load_payload(
          shop.place(id) / 'state', target))
    for i in range(rounds + 1):
      # The first round, which compiles and imports, does not count.
      found = times if i else {name: [] for name in times}
      timed(found['verified'], restore, shop, id, model, ROOM)
      for name, target in targets.items():
        timed(found[name], bare, target)
  return {'bytes': sum(x.nbytes for x in row.values())} | {
      name: statistics.median(found) for name, found in times.items()}


def loop(model, params, state, steps, minter=None):
  """Decodes; returns milliseconds of steps, of `Minter.start`, of bare copies.

  With a minter a mint is always under way: the next is started once one is
  done. Right before each numpy copies as many bytes as are live in the row.
  """
  import jax
  import numpy as np

  from statejax import generate as gen
  from statejax import state as st
  from statejax.artifact import mint as minting
  state = dataclasses.replace(
      jax.tree.map(jax.numpy.copy, state),
      length=jax.numpy.full_like(state.length, ROOM // 2))
  live = sum(x.nbytes // (2 if kind == 'growing' else 1)
             for _, x, _, kind in st.leaves(state))
  source, target = np.ones(live, np.uint8), np.zeros(live, np.uint8)
  host, step_ms, start_ms, copy_ms = host_of(model, ROOM), [], [], []
  np.copyto(target, source)  # the first one is about pages
  pending = None
  for _ in range(steps):
    ready = minter is not None and (pending is None or pending.done())
    if ready:
      timed(copy_ms, np.copyto, target, source)
    clock = time.perf_counter()
    if ready:
      pending = timed(start_ms, minter.start, state, 0, host,
                      minting.Terms('bench'))
    tokens, state = gen.decode(model, params, state)
    np.asarray(tokens)
    step_ms.append(1e3 * (time.perf_counter() - clock))
  if pending is not None:
    pending.result()
  return step_ms, start_ms, copy_ms


def looped(mib, starts):
  """Returns {'alone', 'beside', 'start', 'copy': (p50, p99, how many)}."""
  import jax
  import numpy as np

  from statejax.artifact import background
  model, state = wide(mib), filled(wide(mib))
  params = model.unstack(model.init(jax.random.key(0)))
  alone, beside, start, copy = [], [], [], []
  with opened() as shop, background.Minter(shop, state) as minter:
    loop(model, params, state, 2, minter)
    while len(start) < starts:
      alone += loop(model, params, state, 100)[0]
      for all, more in zip((beside, start, copy),
                           loop(model, params, state, 100, minter)):
        all += more
  return {name: [*map(float, np.percentile(found, (50, 99))), len(found)]
          for name, found in (('alone', alone), ('beside', beside),
                              ('start', start), ('copy', copy))}


def ways(name, length, rounds):
  """Returns {'restore', 'prefill': milliseconds} of a state."""
  import jax

  from statejax import generate as gen
  from statejax import state as st
  model, params = family(name)
  times = {'restore': [], 'prefill': []}
  def prefill():
    return jax.block_until_ready(gen.prefill(
        model, params, model.init_state(1, length + 64),
        tokens_of(length)[None]))
  with opened() as shop:
    id = ''
    for i in range(rounds + 1):
      found = times if i else {way: [] for way in times}
      state = timed(found['prefill'], prefill)
      id = id or mint(shop, model, state, length)
      again = timed(found['restore'], restore, shop, id, model, length + 64)
      assert st.diff(again, state) is None
  return {way: statistics.median(found) for way, found in times.items()}


def claims(restores, loops, either):
  """Rows of the report."""
  rows = []
  for mib, found in restores.items():
    ratio = found['verified'] / found['orbax']
    rows.append(report.Row(f'{mib} MiB: verified restore over Orbax alone',
                           '<= 2x', f'{ratio:.2f}x', ratio <= 2))
  for mib, found in loops.items():
    (p50, p99, _), bare = found['start'], found['copy'][0]
    rows.append(report.Row(f'{mib} MiB: a mint keeps the loop, p99',
                           '<= 10 ms', f'{p99:.1f} ms', p99 <= 10))
    if mib >= LARGE:
      rows.append(report.Row(
          f'{mib} MiB: that, over a bare copy of what is live, p50', '<= 2x',
          f'{p50 / bare:.2f}x', p50 <= 2 * bare))
  for name, found in either.items():
    ratios = {n: x['prefill'] / x['restore'] for n, x in found.items()}
    for length, ratio in ratios.items():
      if length >= 1024:
        rows.append(report.Row(
            f'{name}, {length:,} tokens: absorbing them over a restore', '> 1x',
            f'{ratio:.1f}x', ratio > 1))
    first, last = min(ratios), max(ratios)
    if first == last:
      continue
    rows.append(report.Row(
        f'{name}: that ratio at {last:,} over {first:,} tokens', '> 1x',
        f'{ratios[last] / ratios[first]:.1f}x', ratios[last] > ratios[first]))
  return rows


def table(restores, loops, either):
  """Returns lines: all that was measured, milliseconds."""
  lines = ['restore, ms        verified  Orbax alone  Orbax into numpy']
  lines += [f'  {mib:4d} MiB ({x["bytes"]:,} B)'.ljust(28)
            + f'{x["verified"]:.0f}  {x["orbax"]:.0f}  {x["numpy"]:.0f}'
            for mib, x in restores.items()]
  lines.append('loop, ms           p50, p99 of how many')
  lines += [f'  {mib:4d} MiB {what}'.ljust(28) + f'{x[0]:.2f}  {x[1]:.2f}  '
            f'of {x[2]}' for mib, found in loops.items()
            for what, x in found.items()]
  lines.append('state of, ms       absorbing  restore  ratio')
  lines += [f'  {name}, {length:,}'.ljust(28) + f'{x["prefill"]:.0f}  '
            f'{x["restore"]:.0f}  {x["prefill"] / x["restore"]:.1f}x'
            for name, found in either.items() for length, x in found.items()]
  return lines


def draw(path, restores, loops, either):
  """Writes the figure: one panel for each part."""
  from matplotlib import figure
  picture = figure.Figure(figsize=(10.5, 3.6), layout='constrained')
  left, middle, right = picture.subplots(1, 3)
  for name, label in (('verified', 'verified'), ('orbax', 'Orbax alone'),
                      ('numpy', 'Orbax into numpy')):
    left.plot(list(restores), [x[name] for x in restores.values()], 'o-',
              label=label)
  left.set(xscale='log', yscale='log', xlabel='state, MiB', ylabel='ms',
           title='restore')
  labels = [f'{mib} MiB\n{what}' for mib, x in loops.items() for what in x]
  for i, label in ((0, 'p50'), (1, 'p99')):
    middle.plot(labels, [x[i] for found in loops.values()
                         for x in found.values()], 'os'[i], label=label)
  middle.axhline(10, color='gray', linewidth=0.8)
  middle.set(yscale='log', ylabel='ms', title='step alone, beside mints; start')
  middle.tick_params(axis='x', labelsize='x-small')
  for name, found in either.items():
    right.plot(list(found), [x['prefill'] / x['restore']
                             for x in found.values()], 'o-', label=name)
  right.axhline(1, color='gray', linewidth=0.8)
  right.set(yscale='log', xlabel='tokens', ylabel='absorbing again / restore',
            title='two ways back to a state')
  right.set_xscale('log', base=2)
  for axes in (left, middle, right):
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
  picture.savefig(path, dpi=120)


def main(_):
  """Measures, prints, writes JSON and figure."""
  logging.set_verbosity(logging.WARNING)
  smoke = SMOKE.value
  rounds, starts = (1, 2) if smoke else (ROUNDS.value, STARTS.value)
  out = pathlib.Path('runs/bench_artifacts.json' if smoke else OUT.value)
  if smoke:
    out.unlink(missing_ok=True)
  record = Record(out, f'python -m experiments.bench_artifacts '
                  f'--rounds={rounds} --starts={starts}',
                  lambda key: f'{rounds} rounds, {starts} starts')
  def get(key, function, *args):
    facts = record.get(key, functools.partial(function, *args))
    return {name: value for name, value in facts.items()
            if name not in ('of', 'on')}
  restores = {mib: get(f'restore/{mib}', restored, mib, rounds)
              for mib in (SIZES[:1] if smoke else SIZES)}
  loops = {mib: get(f'loop/{mib}', looped, mib, starts)
           for mib in (LOOPS[:1] if smoke else LOOPS)}
  either = {name: {length: get(f'{name}/{length}', ways, name, length, rounds)
                   for length in (LENGTHS[:1] if smoke else LENGTHS)}
            for name in FAMILIES}
  lines = table(restores, loops, either)
  rows = claims(restores, loops, either)
  print('\n'.join(lines), report.table(rows), sep='\n\n')
  record.write(rows, table=lines)
  draw(out.with_suffix('.png'), restores, loops, either)
  raise SystemExit(0 if smoke or all(r.ok for r in rows) else 1)


if __name__ == '__main__':
  app.run(main)
