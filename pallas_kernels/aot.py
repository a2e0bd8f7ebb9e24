"""Compiles programs for TPUs without one, and reads what the compiler says.

libtpu holds the whole TPU compiler; a topology is enough, a chip is not needed.
Everything reported here comes from the compiler: nothing was run or timed.

The compiler ends its process when it meets a bug of its own, and reads its
options from the environment when it is loaded. Programs are therefore named
('module:function') and compiled in another process: see `compile_all`.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import math
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
    printed: whether the compiled program is read for its traffic and kernel.
      libtpu 0.0.52 cannot print some programs for a TPU 7x.
  """

  function: Callable
  specs: tuple
  donate: tuple[int, ...] = ()
  kernel: str = ''
  work: int = 0
  printed: bool = True


@dataclasses.dataclass(frozen=True)
class Job:
  """One program for one chip.

  Attributes:
    chip: a key of `CHIPS`.
    program: 'module:function', a function that returns a `Program`.
    args: keyword arguments of that function; plain numbers and strings.
    inside: see `compile_for`.
  """

  chip: str
  program: str
  args: dict[str, Any] = dataclasses.field(default_factory=dict)
  inside: bool = False


def missing() -> str | None:
  """Returns why nothing can be compiled here, or None."""
  if importlib.util.find_spec('libtpu') is None:
    return 'libtpu, the TPU compiler, is not installed'
  return None


def version() -> str:
  """The version of the compiler, on which every figure depends."""
  return importlib.metadata.version('libtpu')


def compile_for(chip: str, program: Program, inside=False):
  """Compiles for one device of a chip, in this process.

  Args:
    chip: a key of `CHIPS`.
    program: what to compile.
    inside: let the compiler lay out arguments and results as it likes, as it
      does inside a larger program; else they are row-major.

  Returns:
    A `jax.stages.Compiled`, which has `memory_analysis` and `cost_analysis`.
  """
  import jax
  from jax.experimental import layout, topologies
  device = topologies.get_topology_desc(
      platform='tpu', topology_name=CHIPS[chip]).devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  if inside:
    place = layout.Format(layout.Layout.AUTO, place)
  jitted = jax.jit(program.function, donate_argnums=program.donate,
                   in_shardings=place, out_shardings=place)
  with _as_if_on(device):
    lowered = jitted.trace(*program.specs).lower(lowering_platforms=('tpu',))
  return lowered.compile()


def _as_if_on(device):
  """JAX asks for the kind of device while it traces."""
  import jax
  mesh = jax.sharding.AbstractMesh(
      (1,), ('chip',), axis_types=(jax.sharding.AxisType.Auto,),
      abstract_device=abstract_device(device.device_kind))
  return jax.sharding.use_abstract_mesh(mesh)


def abstract_device(kind: str):
  """Returns a `jax.sharding.AbstractDevice`, a TPU of this kind."""
  import jax
  of = jax.sharding.AbstractDevice
  fields: dict[str, Any] = dict(device_kind=kind, num_cores=1, platform='tpu')
  known = [f.name for f in dataclasses.fields(of)]  # no platform in JAX 0.7
  return of(**{n: x for n, x in fields.items() if n in known})


def compile_all(jobs: Sequence[Job], kernels=None, timeout=1800):
  """Compiles every job outside this process.

  Args:
    jobs: what to compile.
    kernels: for every job, the name of its kernel in the program, as an
      earlier call returned it; then the kernel's schedule is read. The compiler
      writes the files of one kernel per process, those of everything else would
      take minutes.
    timeout: seconds for a process.

  Returns:
    A dict per job: `argument`, `output`, `alias`, `temp` (bytes), `accessed`
    (bytes, as `cost_analysis` counts), `traffic` (see `_traffic`; of programs
    that are `printed`), `flops` (those of kernels are not in it), `kernel` (its
    name in the program), and `work`; with `kernels`, also what `_schedule`
    returns.

  Raises:
    RuntimeError: a job failed; names it, with the compiler's last words.
  """
  if kernels is None:
    return _compile(jobs, timeout)
  return [_compile([job], timeout, kernel)[0]
          for job, kernel in zip(jobs, kernels, strict=True)]


def _compile(jobs, timeout, kernel=None):
  """Starts a process; with `kernel`, one whose compiler writes its files."""
  with tempfile.TemporaryDirectory() as dump:
    environment = {
        **os.environ, 'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
    if kernel:
      environment['LIBTPU_INIT_ARGS'] = ' '.join([
          f'--xla_jf_dump_to={dump}', '--xla_jf_dump_llo_text=true',
          f'--xla_jf_dump_only_matching_hlo={kernel}',
          '--xla_jf_dump_llo_pass_label_regex=.*(final_|delay-conv).*'])
    worker = subprocess.run(
        [sys.executable, '-m', 'pallas_kernels.aot'], text=True, check=False,
        input=json.dumps([dataclasses.asdict(job) for job in jobs]),
        capture_output=True, timeout=timeout, env=environment)
    lines = worker.stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{')]
    if worker.returncode:
      job = jobs[len(found)] if len(found) < len(jobs) else None
      raise RuntimeError(
          f'{job}: expected to compile, but the compiler ended with '
          f'{worker.returncode}:\n{worker.stderr[-3000:]}')
    if kernel:
      found[0] |= _schedule(pathlib.Path(dump), kernel)
    return found


def _figures(compiled, program) -> dict[str, Any]:
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis() or {}
  named = {
      'argument': memory.argument_size_in_bytes,
      'output': memory.output_size_in_bytes,
      'alias': memory.alias_size_in_bytes,
      'temp': memory.temp_size_in_bytes,
      'accessed': cost.get('bytes accessed'),
      'flops': cost.get('flops'),
      'work': program.work,
  }
  text = compiled.as_text() if program.printed else ''
  if program.printed:
    named['traffic'] = _traffic(text)
  if program.kernel:
    calls = re.findall(r'%(\S+) = .*custom_call_target="tpu_custom_call"', text)
    named['kernel'], = [name for name in calls if program.kernel in name]
  return {name: x for name, x in named.items() if x is not None}


_INSTRUCTION = re.compile(r'^ *(?:ROOT )?%(\S+) = (.+?) ([\w-]+)\((.*)$', re.M)
_ARRAY = re.compile(r'([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?')
# No instruction of these touches an array: they name one.
_FREE = {'parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element',
         'copy-done', 'slice-done'}


def _traffic(text: str) -> int:
  """Bytes that a compiled program without loops moves from and to HBM.

  Every instruction reads its operands and writes its results; what the compiler
  keeps on the chip (memory space S(1)) is not counted, copies to and from it
  are. Unlike the count in `cost_analysis`, this has donated arguments in it,
  and asynchronous copies.
  """
  total, sizes = 0, {}
  entry = text[text.index('\nENTRY'):]
  for name, kinds, operation, rest in _INSTRUCTION.findall(entry):
    arrays = _ARRAY.findall(kinds)
    if operation == 'slice-start':
      # Its results are ((operand), slice); only the slice is read.
      sizes[name] = _hbm_bytes(arrays[1])
      in_hbm = _hbm_bytes(arrays[0]) > 0
      total += sizes[name] + in_hbm * _hbm_bytes((*arrays[1][:3], ''))
      continue
    # In a copy-start, the second of the results is the operand.
    arrays = arrays[:1 if operation == 'copy-start' else None]
    sizes[name] = sum(map(_hbm_bytes, arrays))
    if operation not in _FREE:
      operands = re.findall(r'%([^\s,)]+)', rest.split('), ')[0])
      total += sizes[name] + sum(sizes.get(x, 0) for x in operands)
  return total


def _hbm_bytes(array) -> int:
  kind, bits, shape, layout = array
  if 'S(' in layout:
    return 0
  count = math.prod(int(n) for n in shape.split(',') if n)
  return count * (int(bits) // 8 if kind != 'pred' else 1)


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
          f'{kernel}: expected files of its schedule, but this compiler wrote '
          f'none; {version()} may call its options otherwise.')
    return paths[-1].read_text()

  bundles, = re.findall(r'total scheduled bundles:\s*(\d+)',
                        text('schedule-analysis_final_bundles.txt'))
  lines = text('final_hlo-static-per-bundle-utilization.txt').splitlines()
  units = [name.strip() for name in lines[1].split(',')]
  capacity = [int(x) for x in lines[2].split()]
  rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
  used = [sum(column) for column in zip(*rows)]
  sizes = re.findall(r'space=vmem, size = (0x[0-9a-f]+)',
                     text('post-delay-converter.txt'))
  return {
      'bundles': int(bundles),
      'slots': {unit: round(n / (c * len(rows)), 3)
                for unit, n, c in zip(units, used, capacity)},
      'vmem': sum(int(size, 16) for size in sizes),
  }


def main():
  """Compiles the jobs read from standard input, one line of JSON for each."""
  for job in json.load(sys.stdin):
    module, _, name = job['program'].partition(':')
    program = getattr(importlib.import_module(module), name)(**job['args'])
    compiled = compile_for(job['chip'], program, job['inside'])
    print(json.dumps(_figures(compiled, program)), flush=True)


if __name__ == '__main__':
  main()
