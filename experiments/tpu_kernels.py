"""TPU kernels of the delta rule as their compiler sees them.

  python -m experiments.tpu_kernels

No TPU was used: programs are compiled ahead of time for one device of each
chip, and every figure is the compiler's. Nothing was run, nothing was timed.

Claims: kernels compile for every chip at the widths of Qwen3.6 and Kimi Linear;
the schedules of a 64-token chunk and head take no more instruction bundles than
stated in `GOALS`; programs move at most 1.5 times the bytes that each pass must
read and write once. Needs libtpu; about five minutes of one core.

  bundles  of one grid step, by head and 64 tokens (decode: by head and token);
           about a cycle each, waiting for memory excluded
  VMEM     on-chip memory of the kernel, with double buffers and spills
  HBM      what the compiled instructions read and write off the chip, with the
           layouts of arguments left to the compiler, as inside a model
  alone    ratio for row-major arguments, transposed first; on one chip
  minimum  by hand: every pass reads its arguments and writes its results once
  FLOP     by hand: multiplications and additions of the recurrence itself
"""

import dataclasses
import pathlib
import sys

from absl import app, flags, logging

from experiments import report
from pallas_kernels import aot
from pallas_kernels.workloads import GOALS, WORKLOADS

OUT = flags.DEFINE_string('out', 'experiments/results', 'where to write')
SMOKE = flags.DEFINE_bool('smoke', False, 'the decode step on one chip alone')

PROGRAMS = {'step': ('qwen3.6_decode', 'kimi_linear_decode'),
            'forward': ('qwen3.6', 'kimi_linear'),
            'backward': ('qwen3.6', 'kimi_linear')}
RATIO = 1.5
_CHUNK = 64


def minimum_bytes(name: str, workload: str) -> int:
  """What a pass must read and write, each array once."""
  shapes = WORKLOADS[workload]
  size = {n: x.size * x.dtype.itemsize for n, x in shapes.specs().items()}
  inputs, y, state = sum(size.values()), size['v'], size['state']
  if name == 'step':
    return inputs + y + state + 4 * shapes.batch
  if name == 'forward':
    return inputs + y + state
  # The gradient runs forward, keeps the state before every chunk, and comes
  # back; y itself is not needed.
  starts = state * (shapes.length // _CHUNK)
  gradients = inputs
  return inputs + starts + (inputs + starts + y + state + gradients)


def flops(name: str, workload: str) -> int:
  """Of the recurrence: decay, recall, write, read; backward three times it."""
  shapes = WORKLOADS[workload]
  per_token = 7 * shapes.width * shapes.values
  passes = {'step': 1, 'forward': 1, 'backward': 3}[name]
  return passes * per_token * shapes.batch * shapes.length * shapes.heads


def measure(programs, chips) -> list[dict]:
  """Compiles everything; row-major arguments on the first chip alone."""
  rows = []
  for name, workload in [(n, w) for n, ws in programs.items() for w in ws]:
    jobs = [aot.Job(chip, f'pallas_kernels.programs:{name}',
                    {'workload': workload}, inside=True) for chip in chips]
    alone, = aot.compile_all([dataclasses.replace(jobs[0], inside=False)])
    least = minimum_bytes(name, workload)
    for chip, job in zip(chips, jobs):
      found, = aot.compile_all([job], [alone['kernel']])
      tokens = 1 if name == 'step' else _CHUNK
      rows.append({
          'kernel': name, 'workload': workload, 'chip': chip,
          'bundles': round(found['bundles'] * tokens / found['work'], 1),
          'bundles_per_step': found['bundles'], 'vmem': found['vmem'],
          'hbm': found['traffic'], 'minimum': least,
          'ratio': round(found['traffic'] / least, 3),
          'argument': found['argument'], 'output': found['output'],
          'aliased': found['alias'], 'temporary': found['temp'],
          'flops': flops(name, workload), 'slots': found['slots']})
      if chip == chips[0]:
        rows[-1] |= {'hbm_alone': alone['traffic'],
                     'ratio_alone': round(alone['traffic'] / least, 3)}
      print(*(rows[-1][k] for k in ('kernel', 'workload', 'chip', 'bundles')),
            file=sys.stderr, flush=True)
  return rows


def claims(rows) -> list[report.Row]:
  """The rows of the table of claims that these measurements speak to."""
  out = [report.Row('kernels compiled', str(len(rows)), str(len(rows)), True)]
  for (name, chip), goal in GOALS.items():
    found = [r['bundles'] for r in rows
             if (r['kernel'], r['chip']) == (name, chip)]
    if found:
      out.append(report.Row(f'{name}, {chip}: most bundles', f'<= {goal}',
                            f'{max(found):.0f}', max(found) <= goal))
  for name in PROGRAMS:
    found = [r['ratio'] for r in rows if r['kernel'] == name]
    if found:
      out.append(report.Row(f'{name}: HBM over minimum', f'<= {RATIO}',
                            f'{max(found):.2f}', max(found) <= RATIO))
  step = [r for r in rows if r['kernel'] == 'step']
  states = {r['workload']: WORKLOADS[r['workload']].specs()['state'].size * 4
            for r in step}
  copied = [r for r in step if r['aliased'] != states[r['workload']]]
  out.append(report.Row('step: state replaced in place', 'all',
                        f'{len(step) - len(copied)} of {len(step)}',
                        not copied))
  return out


def markdown(rows) -> str:
  """Returns the measurements as a table."""
  head = ('kernel', 'workload', 'chip', 'bundles', 'VMEM MiB', 'HBM MB',
          'minimum MB', 'ratio', 'alone', 'temporary MB', 'GFLOP')
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for r in rows:
    cells = (r['kernel'], r['workload'], r['chip'], f"{r['bundles']:.0f}",
             f"{r['vmem'] / 2 ** 20:.2f}", f"{r['hbm'] / 1e6:.1f}",
             f"{r['minimum'] / 1e6:.1f}", f"{r['ratio']:.2f}",
             f"{r['ratio_alone']:.2f}" if 'ratio_alone' in r else '',
             f"{r['temporary'] / 1e6:.1f}", f"{r['flops'] / 1e9:.2f}")
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main(_):
  """Compiles, prints the table and the claims, writes both."""
  logging.set_verbosity(logging.WARNING)
  if aot.missing():
    raise SystemExit(f'{aot.missing()}: install the extra "tpu".')
  programs, chips = PROGRAMS, list(aot.CHIPS)
  if SMOKE.value:
    programs, chips = {'step': PROGRAMS['step'][:1]}, ['v5e']
  rows = measure(programs, chips)
  verdict = claims(rows)
  text = markdown(rows)
  print(text, report.table(verdict), sep='\n\n')
  if not SMOKE.value:
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    about = __doc__.split('\n\n', 2)[2]
    (out / 'tpu_kernels.md').write_text(
        f'# TPU kernels, by their compiler (libtpu {aot.version()})\n\n'
        f'{about}\n{text}\n')
    report.write(out / 'tpu_kernels.json', verdict,
                 'python -m experiments.tpu_kernels', libtpu=aot.version(),
                 kernels=rows)
  raise SystemExit(0 if all(r.ok for r in verdict) else 1)


if __name__ == '__main__':
  app.run(main)
