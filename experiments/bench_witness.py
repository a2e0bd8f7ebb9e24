"""What the witness costs: its share of a decode step, on this machine.

  python -m experiments.bench_witness

The same greedy step, with donated states, is compiled twice: as it is, and with
the update of the witness left out. Per size of a hybrid (three KDA layers to
one of attention over 1,024 tokens, float32) and number of rows: milliseconds of
both, steps in turn, medians; microseconds of the update by itself, as a program
of its own and as one of a thousand in a program; operations and bytes of both
steps by the compiler's count.

A large step varies by more than the update takes. So the claim is about the
update as a program of its own, call and all, over the step: in a step it takes
less than that, and more than in a loop. The difference of the two steps is
printed beside it, with the quartiles of its rounds.

Expected: at most 0.5 % of a step from the size `small` on, by the clock and by
the compiler's counts. `tiny` is a model of the tests, a step of which is mostly
calling it: what the witness is of that is printed, and not promised. Two
minutes on one core that is free.
"""

import dataclasses
import functools
import pathlib
import statistics
import time
from unittest import mock

from absl import app, flags, logging

from experiments import report
from experiments.record import Record
from statejax import config as c

ROUNDS = flags.DEFINE_integer('rounds', 15, 'rounds by turns', lower_bound=2)
OUT = flags.DEFINE_string(
    'out', 'experiments/results/bench_witness.json', 'results')
SMOKE = flags.DEFINE_bool('smoke', False, 'the tiny size, two rounds')

LIMIT = 0.5  # percent
UPDATES, CALLS, CONTEXT = 1000, 200, 1024
# Name: (width, heads of 64 or 16, times four layers, steps of a round, rows).
SIZES = {'tiny': (64, 4, 1, 50, (1, 8)), 'small': (512, 8, 2, 10, (1, 8)),
         'medium': (1024, 16, 3, 4, (1, 8))}


@functools.cache
def built(size):
  """A model and its parameters, of random numbers."""
  import jax

  from statejax.model import LanguageModel
  width, heads, groups, _, _ = SIZES[size]
  key = width // heads
  mlp = c.SwiGLUConfig(4 * width)
  layers = (
      c.LayerConfig('kda', c.KDAConfig(heads=heads, key=key, value=key,
                                       rank=key), mlp),
      c.LayerConfig('full', c.AttentionConfig(
          heads=heads, kv_heads=max(1, heads // 4), key=key, value=key), mlp))
  model = LanguageModel(c.ModelConfig(
      vocab=256 if size == 'tiny' else 32768, width=width, layers=layers,
      groups=(c.GroupConfig(('kda', 'kda', 'kda', 'full'), groups),)))
  return model, model.unstack(jax.jit(model.init)(jax.random.key(0)))


def stepper(size):
  """(params, state, tokens [B]) -> (next tokens [B], state)."""
  import jax.numpy as jnp

  from statejax import model as lm
  model, _ = built(size)
  def step(params, state, tokens):
    logits, state = lm.apply(model, params, state, tokens[:, None],
                             keep='last')
    logits = logits.reshape(len(tokens), -1)
    return jnp.argmax(logits, -1).astype(jnp.int32), state
  return step


def programs(size, rows):
  """Returns {'with', 'without'} compiled, a state, and tokens."""
  import jax
  import jax.numpy as jnp

  from statejax import model as lm
  model, params = built(size)
  state = model.init_state(rows, CONTEXT + 1)
  state = dataclasses.replace(state, length=jnp.full_like(
      state.length, CONTEXT // 2))
  tokens = jnp.ones(rows, jnp.int32)
  found = {}
  for name in ('with', 'without'):
    with mock.patch.object(
        lm.witness, 'absorb', lm.witness.absorb if name == 'with'
        else lambda old, *_: old):
      found[name] = jax.jit(stepper(size), donate_argnums=1).lower(
          params, state, tokens).compile()
  return found, params, state, tokens


def updates(rows):
  """The update of the witness, and a thousand, compiled; what they take."""
  import jax
  import jax.numpy as jnp

  from statejax.ops import witness
  one = jnp.ones(rows, jnp.int32)
  def run(old, tokens):
    # Each of another token, so that none can be left out or done once for all.
    return jax.lax.fori_loop(0, UPDATES, lambda i, x: witness.absorb(
        x, (tokens + i)[:, None], one), old)
  args = jnp.zeros((rows, 4), jnp.uint32), one
  return [jax.jit(f).lower(*args).compile() for f in (
      lambda old, tokens: witness.absorb(old, tokens[:, None], one), run)], args


def counted(program):
  """Returns (operations, bytes) of a program by the compiler's count."""
  facts = program.cost_analysis()
  facts = facts[0] if isinstance(facts, list) else facts
  return facts['flops'], facts['bytes accessed']


def took(times, program, *args):
  """Microseconds of so many calls, one after another."""
  import jax
  clock = time.perf_counter()
  for _ in range(times):
    jax.block_until_ready(program(*args))
  return 1e6 * (time.perf_counter() - clock)


def measured(size, rows, rounds):
  """Returns what one cell of the results has."""
  import jax
  import jax.numpy as jnp
  found, params, state, tokens = programs(size, rows)
  (update, thousand), args = updates(rows)
  steps = SIZES[size][3]
  states = {name: jax.tree.map(jnp.copy, state) for name in found}
  times, calls, loops = {name: [] for name in found}, [], []
  for i in range(rounds + 1):  # the first round does not count
    spent = {name: [] for name in found}
    for k in range(2 * steps):
      name = ('with', 'without')[(i + k) % 2]
      clock = time.perf_counter()
      out, states[name] = found[name](params, states[name], tokens)
      jax.block_until_ready(out)
      spent[name].append(1e3 * (time.perf_counter() - clock))
    calls.append(took(CALLS, update, *args) / CALLS)
    loops.append(took(1, thousand, *args) / UPDATES)
    for name in found:
      times[name].append(statistics.median(spent[name]))
  times = {name: x[1:] for name, x in times.items()}
  more = [1e3 * (a - b) for a, b in zip(times['with'], times['without'])]
  counts = {name: counted(program) for name, program in found.items()}
  return {
      'parameters': sum(x.size for x in jax.tree.leaves(params)),
      'step_ms': statistics.median(times['with']),
      'without_ms': statistics.median(times['without']),
      'alone_us': statistics.median(calls[1:]),
      'loop_us': statistics.median(loops[1:]),
      'more_us': statistics.quantiles(more, n=4),
      'flops': [counts[name][0] for name in ('with', 'without')],
      'bytes': [counts[name][1] for name in ('with', 'without')]}


def shares(found):
  """Returns percent of a step: by the clock, by operations, by bytes."""
  more = lambda pair: 100 * (pair[0] - pair[1]) / pair[0]
  return {'time': 0.1 * found['alone_us'] / found['step_ms'],
          'operations': more(found['flops']), 'bytes': more(found['bytes'])}


def claims(cells):
  """Rows of the report; cells are {(size, rows): facts}."""
  return [report.Row(
      f'{size}, {rows} rows: the witness of a step, by {what}',
      'not promised' if size == 'tiny' else f'<= {LIMIT} %', f'{share:.3f} %',
      size == 'tiny' or share <= LIMIT)
          for (size, rows), found in cells.items()
          for what, share in shares(found).items()]


def table(cells):
  """Returns lines: all that was measured."""
  lines = ['size, rows, parameters      step  without  alone, in a loop  '
           'difference: quartiles']
  return lines + [
      f'  {size}, {rows}, {found["parameters"]:,}'.ljust(28)
      + f'{found["step_ms"]:.3f}  {found["without_ms"]:.3f} ms  '
      f'{found["alone_us"]:.1f}, {found["loop_us"]:.2f} us  '
      + ', '.join(f'{x:+.1f}' for x in found['more_us']) + ' us'
      for (size, rows), found in cells.items()]


def main(_):
  """Measures, prints, writes JSON."""
  logging.set_verbosity(logging.WARNING)
  smoke = SMOKE.value
  rounds = 2 if smoke else ROUNDS.value
  out = pathlib.Path('runs/bench_witness.json' if smoke else OUT.value)
  if smoke:
    out.unlink(missing_ok=True)
  record = Record(out, f'python -m experiments.bench_witness --rounds={rounds}',
                  lambda key: f'{rounds} rounds')
  cells = {
      (size, rows): record.get(f'{size}/{rows}', functools.partial(
          measured, size, rows, rounds))
      for size, (*_, many) in SIZES.items() for rows in many
      if not smoke or size == 'tiny'}
  lines, rows = table(cells), claims(cells)
  print('\n'.join(lines), report.table(rows), sep='\n\n')
  record.write(rows, table=lines)
  raise SystemExit(0 if all(r.ok for r in rows) else 1)


if __name__ == '__main__':
  app.run(main)
