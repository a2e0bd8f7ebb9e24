"""Compiles programs for TPUs without one, and reads what the compiler says.

libtpu holds the whole TPU compiler; a topology is enough, a chip is not needed.
Everything reported here comes from the compiler: nothing was run or timed.

The compiler ends its process when it meets a bug of its own, and reads its
options from the environment when it is loaded. Programs are therefore named
('module:function') and compiled in another process: see `compile_all`.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

# The smallest topology of each chip; a kernel needs one device of it.
CHIPS = {
    'v5e': 'v5e:2x2',
    'v6e': 'v6e:2x2',
    'v5p': 'v5p:2x2x1',
    'tpu7x': 'tpu7x:2x2x1',
}


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled.

  Attributes:
    function: takes arrays, traceable by `jax.jit`.
    specs: a ShapeDtypeStruct (or a tree of them) per argument.
    donate: positions of the arguments whose memory the results reuse.
    kernel: the name given to the `pallas_call` whose schedule is wanted.
    work: heads times tokens of one grid step of that kernel.
  """

  function: Callable
  specs: tuple
  donate: tuple[int, ...] = ()
  kernel: str = ''
  work: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
  """One program for one chip.

  Attributes:
    chip: a key of `CHIPS`.
    program: 'module:function', a function that returns a `Program`.
    args: keyword arguments of that function; plain numbers and strings.
  """

  chip: str
  program: str
  args: dict[str, Any] = dataclasses.field(default_factory=dict)


def missing() -> str | None:
  """Returns why nothing can be compiled here, or None."""
  if importlib.util.find_spec('libtpu') is None:
    return 'libtpu, the TPU compiler, is not installed'
  return None


def version() -> str:
  """The version of the compiler, on which every figure depends."""
  return importlib.metadata.version('libtpu')


def compile_for(chip: str, program: Program):
  """Compiles for one device of a chip, in this process.

  Returns:
    A `jax.stages.Compiled`, which has `memory_analysis` and `cost_analysis`.
  """
  import jax
  from jax.experimental import topologies
  device = topologies.get_topology_desc(
      platform='tpu', topology_name=CHIPS[chip]).devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  jitted = jax.jit(program.function, donate_argnums=program.donate,
                   in_shardings=place, out_shardings=place)
  with _as_if_on(device):
    lowered = jitted.trace(*program.specs).lower(lowering_platforms=('tpu',))
  return lowered.compile()


def _as_if_on(device):
  """Newer versions of JAX ask for the kind of device while they trace."""
  import jax
  if not hasattr(jax.sharding, 'AbstractDevice'):
    return contextlib.nullcontext()
  mesh = jax.sharding.AbstractMesh(
      (1,), ('chip',), axis_types=(jax.sharding.AxisType.Auto,),
      abstract_device=jax.sharding.AbstractDevice(
          device_kind=device.device_kind, num_cores=1, platform='tpu'))
  return jax.sharding.use_abstract_mesh(mesh)


def compile_all(jobs: Sequence[Job], schedules=False, timeout=1800):
  """Compiles every job outside this process.

  Args:
    jobs: what to compile.
    schedules: also read the kernel's schedule, see `_schedule`. Every job then
      has a process of its own: the compiler writes the files of one kernel.
    timeout: seconds for a process.

  Returns:
    A dict per job: `argument`, `output`, `alias`, `temp` (bytes), `accessed`
    (bytes, the compiler's count), `flops`, and with `schedules`, what
    `_schedule` returns and `work`.

  Raises:
    RuntimeError: a job failed; names it, with the compiler's last words.
  """
  if schedules:
    return [_work([job], True, timeout)[0] for job in jobs]
  return _work(jobs, False, timeout)


def _work(jobs, schedules, timeout):
  order = {'jobs': [dataclasses.asdict(job) for job in jobs],
           'schedules': schedules}
  worker = subprocess.run(
      [sys.executable, '-m', 'pallas_kernels.aot'], input=json.dumps(order),
      text=True, capture_output=True, timeout=timeout, check=False,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
           'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'})
  lines = worker.stdout.splitlines()
  found = [json.loads(line) for line in lines if line.startswith('{')]
  if worker.returncode:
    job = jobs[len(found)] if len(found) < len(jobs) else None
    raise RuntimeError(
        f'{job}: expected to compile, but the compiler ended with '
        f'{worker.returncode}:\n{worker.stderr[-3000:]}')
  return found


def _figures(compiled) -> dict[str, float]:
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis() or {}
  named = {
      'argument': memory.argument_size_in_bytes,
      'output': memory.output_size_in_bytes,
      'alias': memory.alias_size_in_bytes,
      'temp': memory.temp_size_in_bytes,
      'accessed': cost.get('bytes accessed'),
      'flops': cost.get('flops'),
  }
  return {name: x for name, x in named.items() if x is not None}


def _schedule(dump: pathlib.Path, kernel: str) -> dict[str, Any]:
  """Reads the static schedule of a kernel from the compiler's files.

  Returns:
    `bundles`: instruction bundles of one grid step, about one cycle each where
    code is straight, waiting for memory excluded; `slots`: from unit to the
    share of its capacity in use; `vmem`: bytes of on-chip memory, double
    buffers and spills included.
  """
  def text(suffix):
    paths = sorted(dump.glob(f'*{kernel}*{suffix}'))
    if not paths:
      raise RuntimeError(
          f'{kernel}: expected a schedule, the compiler wrote none; is that '
          'the name given to pallas_call?')
    return paths[-1].read_text()

  bundles = re.search(r'total scheduled bundles:\s*(\d+)',
                      text('schedule-analysis_final_bundles.txt'))
  lines = text('final_hlo-static-per-bundle-utilization.txt').splitlines()
  units = [name.strip() for name in lines[1].split(',')]
  capacity = [int(x) for x in lines[2].split()]
  rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
  used = [sum(column) for column in zip(*rows)]
  sizes = re.findall(r'space=vmem, size = (0x[0-9a-f]+)',
                     text('post-delay-converter.txt'))
  return {
      'bundles': int(bundles[1]),
      'slots': {unit: round(n / (c * len(rows)), 3)
                for unit, n, c in zip(units, used, capacity)},
      'vmem': sum(int(size, 16) for size in sizes),
  }


def main():
  """Compiles the jobs read from standard input, one line of JSON for each."""
  order = json.load(sys.stdin)
  for job in order['jobs']:
    module, _, name = job['program'].partition(':')
    program = getattr(importlib.import_module(module), name)(**job['args'])
    with tempfile.TemporaryDirectory() as dump:
      if order['schedules']:
        os.environ['LIBTPU_INIT_ARGS'] = ' '.join([
            f'--xla_jf_dump_to={dump}', '--xla_jf_dump_llo_text=true',
            f'--xla_jf_dump_only_matching_hlo={program.kernel}.1',
            '--xla_jf_dump_llo_pass_label_regex=.*(final_|delay-conv).*'])
      found = _figures(compile_for(job['chip'], program))
      if order['schedules']:
        found |= _schedule(pathlib.Path(dump), program.kernel)
        found['work'] = program.work
    print(json.dumps(found), flush=True)


if __name__ == '__main__':
  main()
