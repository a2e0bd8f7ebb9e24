"""Decoding with a deferred write against the ordinary step, on a CPU.

  python -m experiments.bench_decode

Per kind of gate, batch and number of heads, K = V = 128, float32, donated
states: bytes that a step moves, counted by hand and by the compiler, and time
per step, of `delta_rule` and of `delta_rule_deferred` with C in 4, 8, 16, 32,
and of its bitwise form with C = 16. Rows are at different phases. Each step
takes the next of many states, 192 MiB in all, as the layers of a model follow
each other, so that matrices come from memory; interleaved rounds, medians.

Expected: with C = 8 a step needs 0.71 (one decay per head) and 0.75 (per
channel) of the ordinary step's bytes, the least of the four. XLA's CPU program
comes near that per head (about 0.8 by the compiler's count) but not per channel
(above 1: it writes out the decayed keys), and deferring is slower in both, as
decaying the tail costs arithmetic. So layers write per step unless told
otherwise, and 8 is the chunk of those that defer. Three minutes.
"""

import functools
import json
import os
import pathlib
import statistics
import time

from absl import app, flags, logging

from experiments import report

ROUNDS = flags.DEFINE_integer('rounds', 7, 'interleaved rounds')
STREAM = flags.DEFINE_integer('stream', 192, 'MiB of states that take turns')
OUT = flags.DEFINE_string(
    'out', 'experiments/results/bench_decode.json', 'results')
SMOKE = flags.DEFINE_bool('smoke', False, 'tiny sizes, one round')

CHUNKS = (4, 8, 16, 32)
BITWISE = 16


def hand(kind, rows, heads, width, size=None):
  """Bytes of the state that one step moves, read and written.

  Deferred: the matrix and all C slots of the tail are read, one slot is
  written; every C steps the fold reads and writes both.
  """
  matrix = 4 * width * width
  if size is None:
    return rows * heads * 2 * matrix
  entry = 4 * (2 * width + (width if kind == 'kda' else 1))
  return int(rows * heads * (
      matrix + (size + 1) * entry + 2 * (matrix + size * entry) / size))


def compiled_bytes(step, fold, rows, size):
  """What the compiler counts; its loop over full rows as often as it runs.

  Args:
    step: the compiled step.
    fold: compiled folds of all rows and of one row, or None.
    rows: B.
    size: C.
  """
  count = lambda program: program.cost_analysis()['bytes accessed']
  if fold is None:
    return int(count(step))
  every, one = fold
  return int(count(step) - count(every) + rows / size * count(one))


def make(kind, rows, heads, width, size=None, parity=None):
  """Returns a function of (inputs, state), and a function that makes states."""
  import jax.numpy as jnp
  import numpy as np

  from statejax.ops import delta_deferred, delta_rule
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  if size is None:
    return delta_rule, lambda: draw(rows, heads, width, width)
  run = functools.partial(delta_deferred.delta_rule_deferred, chunk_size=size,
                          parity=parity)

  def state():
    empty = delta_deferred.empty(
        rows, heads, heads, width, width, chunk_size=size, parity=parity,
        decay='channel' if kind == 'kda' else 'head')
    count = jnp.asarray(rng.integers(0, size, rows), jnp.int32)
    live = (jnp.arange(size)[None] < count[:, None])[:, None, :, None]
    fill = lambda x: 0.1 * jnp.where(live, draw(*x.shape), 0.0)
    gate = lambda x: None if x is None else jnp.abs(fill(x))
    return delta_deferred.Deferred(
        draw(*empty.matrix.shape), count, fill(empty.k), fill(empty.u),
        -jnp.abs(fill(empty.log_decay)), gate(empty.erase))

  return run, state


def arguments(kind, rows, heads, width):
  """Returns q, k, v and the gates of one token."""
  import jax
  import jax.numpy as jnp
  keys = jax.random.split(jax.random.key(0), 5)
  shape = (rows, 1, heads, width)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  gate = shape if kind == 'kda' else shape[:3]
  beta = jax.nn.sigmoid(jax.random.normal(keys[3], shape[:3]))
  return (unit(jax.random.normal(keys[0], shape)),
          unit(jax.random.normal(keys[1], shape)),
          jax.random.normal(keys[2], shape),
          -0.1 * jax.nn.softplus(jax.random.normal(keys[4], gate)), beta, beta)


def variants():
  """Name -> (C, parity)."""
  out = {'step': (None, None)}
  out |= {f'deferred C={size}': (size, None) for size in CHUNKS}
  return out | {f'bitwise C={BITWISE}': (BITWISE, 'bitwise')}


def measure(kind, rows, heads, width, stream, rounds):
  """Returns {variant: {microseconds, hand bytes, compiled bytes}}."""
  import jax

  from statejax.ops import delta_grid
  inputs = arguments(kind, rows, heads, width)
  count = max(1, round(stream * 2 ** 20 / (4 * rows * heads * width ** 2)))
  programs, states, found = {}, {}, {}
  for name, (size, parity) in variants().items():
    run, state = make(kind, rows, heads, width, size, parity)
    step = jax.jit(run, donate_argnums=6)
    one = state()
    compiled = step.lower(*inputs, one).compile()
    fold = None
    if size and not parity:
      fold = [jax.jit(
          lambda s, size=size: delta_grid.fold_full(
              s, size, s.count + 1 == size), donate_argnums=0).lower(
                  jax.tree.map(lambda x, n=n: x[:n], one)).compile()
              for n in (rows, 1)]
    programs[name] = compiled
    found[name] = {'hand': hand(kind, rows, heads, width, size)}
    if not parity:
      found[name]['compiled'] = compiled_bytes(compiled, fold, rows, size)
    states[name] = state
  for name, times in _time(programs, states, inputs, count, rounds).items():
    found[name]['microseconds'] = round(1e6 * statistics.median(times), 1)
  return found


def _time(programs, states, inputs, count, rounds):
  """Seconds per step of each program, by turns over its own states."""
  import jax
  spent = {name: [] for name in programs}
  held = {name: [make() for _ in range(count)]
          for name, make in states.items()}
  # A state's phase goes on from round to round: after C calls all were seen.
  for turn in range(-1, rounds):
    for name, program in programs.items():
      mine = held[name]
      clock = time.perf_counter()
      for i in range(count):
        _, mine[i] = program(*inputs, mine[i])
      jax.block_until_ready(mine)
      if turn >= 0:
        spent[name].append((time.perf_counter() - clock) / count)
  return spent


def main(_):
  """Measures every case and prints the table."""
  logging.set_verbosity(logging.WARNING)
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  smoke = SMOKE.value
  width = 16 if smoke else 128
  cases = ([('kda', 2, 2)] if smoke else
           [(kind, rows, heads) for rows, heads in ((8, 32), (1, 32), (1, 8))
            for kind in ('gdn', 'kda')])
  table, facts = [], {}
  for kind, rows, heads in cases:
    found = measure(kind, rows, heads, width, 1 if smoke else STREAM.value,
                    1 if smoke else ROUNDS.value)
    base = found['step']
    for each in found.values():
      each['speed'] = round(base['microseconds'] / each['microseconds'], 2)
      each['traffic'] = round(each['hand'] / base['hand'], 3)
    where = f'{kind}, batch {rows}, {heads} heads'
    facts[where] = found
    deferred = {n: f for n, f in found.items() if n.startswith('deferred')}
    least = min(deferred.values(), key=lambda f: f['traffic'])['traffic']
    table.append(report.Row(
        f'{where}: bytes that a step needs', '<= 0.8 of the ordinary',
        f'{least:.2f}', smoke or least <= 0.8))
    table.append(report.Row(
        f'{where}: bytes by the compiler', 'reported', ', '.join(
            f'{n} {f["compiled"] / base["compiled"]:.2f}x'
            for n, f in deferred.items()), True))
    table.append(report.Row(
        f'{where}: speed of a step', 'reported', ', '.join(
            f'{n} {f["speed"]}x' for n, f in found.items()), True))
    print(where, json.dumps(found), flush=True)
    # After every case, so that a run that is stopped leaves what it measured.
    pathlib.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
    report.write(OUT.value, table, 'python -m experiments.bench_decode',
                 rounds=ROUNDS.value, stream_mib=STREAM.value, width=width,
                 load=round(os.getloadavg()[0], 1), cases=facts)
  print(report.table(table))
  raise SystemExit(0 if all(row.ok for row in table) else 1)


if __name__ == '__main__':
  app.run(main)
