"""Times the kernels at the named workloads, on the device that is there.

  python -m pallas_kernels.bench --workloads tiny_kda tiny_kda_decode

Against each kernel stands the recurrence in plain JAX (`pallas_kernels.plain`),
compiled by XLA. Runs alternate; printed are medians and the ratio of medians.
Where a kernel cannot run, the reason stands in its place: it is never timed in
interpret mode. The op as a whole, its XLA form included, is timed by
`experiments/bench_delta.py`.
"""

import argparse
import statistics
import time

import jax

from pallas_kernels import plain
from pallas_kernels.workloads import WORKLOADS

_TOKENS = ('q', 'k', 'v', 'log_decay', 'erase', 'write')


def contestants(workload: str) -> dict:
  """From name to a function of (inputs, state), or why there is none."""
  shapes = WORKLOADS[workload]
  scale = shapes.width ** -0.5

  def recurrence(inputs, state):
    return plain.delta_rule(*inputs, state=state, scale=scale)

  return {'recurrence': recurrence, 'pallas_tpu': _on_tpu(shapes, scale)}


def _on_tpu(shapes, scale):
  if jax.default_backend() != 'tpu':
    return f'it needs a TPU, the backend is {jax.default_backend()}'
  if shapes.length == 1:
    from pallas_kernels.delta_rule_step_tpu import delta_rule_step as kernel
  else:
    from pallas_kernels.delta_rule_tpu import delta_rule as kernel
  return lambda inputs, state: kernel(*inputs, state=state, scale=scale)


def gradient(function):
  """Of a sum of both results, by all inputs and the state."""
  def loss(inputs, state):
    y, after = function(inputs, state)
    return y.astype('float32').sum() + after.sum()
  return jax.grad(loss, argnums=(0, 1))


def milliseconds(functions: dict, inputs, state, repeats: int) -> dict:
  """Median times of functions that take turns; the first turn compiles."""
  jitted = {name: jax.jit(f) for name, f in functions.items()}
  taken = {name: [] for name in functions}
  for turn in range(repeats + 1):
    for name, function in jitted.items():
      start = time.perf_counter()
      jax.block_until_ready(function(inputs, state))
      if turn:
        taken[name].append(1e3 * (time.perf_counter() - start))
  return {name: statistics.median(x) for name, x in taken.items()}


def run(workload: str, repeats: int, backward: bool) -> list[str]:
  """Times one workload; returns a line per contestant."""
  arrays = WORKLOADS[workload].arrays()
  state = arrays['state']
  inputs = [arrays[name] for name in _TOKENS]
  found = contestants(workload)
  able = {n: f for n, f in found.items() if not isinstance(f, str)}
  if backward:
    able = {n: gradient(f) for n, f in able.items()}
  times = milliseconds(able, inputs, state, repeats)
  what = f'{workload} {"forward+backward" if backward else "forward"}'
  lines = []
  for name, function in found.items():
    if name not in times:
      lines.append(f'{what}: {name} not timed: {function}')
      continue
    ratio = times['recurrence'] / times[name]
    lines.append(f'{what}: {name} {times[name]:.3f} ms, {ratio:.2f}x')
  return lines


def main(arguments=None):
  """Prints versions, the device, and a line per workload and contestant."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workloads', nargs='+', choices=sorted(WORKLOADS),
                      default=[n for n in WORKLOADS if 'tiny' not in n])
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--backward', action='store_true')
  options = parser.parse_args(arguments)
  device = jax.devices()[0]
  print(f'jax {jax.__version__}, {device.platform}: {device.device_kind}')
  for name in options.workloads:
    print(*run(name, options.repeats, options.backward), sep='\n', flush=True)


if __name__ == '__main__':
  main()
