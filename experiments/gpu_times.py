"""Times of the delta rule on a GPU, ours and fla's, in one process by turns.

Everything is compiled and warm before the clock starts. A turn enqueues a run
several times and waits for the last; printed are medians over turns, of one
run. fla runs from a CUDA graph, so that its launches cost what they cost in a
compiled program; where a graph cannot be captured, eagerly, and so it is named.

Decoding passes over so many states that they do not fit the cache together, as
the layers of a model do, and each step waits for the one before.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import delta_rule_step_gpu
from pallas_kernels.workloads import DeltaRule
from statejax.ops import delta_chunk, delta_wide
from statejax.ops.delta_rule import delta_rule

GATES = ('log_decay', 'erase', 'write')
STREAM = 96 << 20  # bytes of states that decoding passes over


@dataclasses.dataclass(frozen=True)
class Job:
  """Something to time: `run` enqueues `units` of work, `wait` waits for it."""

  run: Callable[[], object]
  wait: Callable[[], object]
  units: int = 1


def by_turns(jobs, turns, least=0.02) -> dict[str, float]:
  """Median seconds of one unit of each job."""
  often = {}
  for name, job in jobs.items():
    job.run(), job.wait()
    clock = time.perf_counter()
    job.run(), job.wait()
    once = time.perf_counter() - clock
    often[name] = max(1, min(200, round(least / once)))
  spent = {name: [] for name in jobs}
  for _ in range(turns):
    for name, job in jobs.items():
      clock = time.perf_counter()
      for _ in range(often[name]):
        job.run()
      job.wait()
      spent[name].append(
          (time.perf_counter() - clock) / often[name] / job.units)
  return {name: statistics.median(times) for name, times in spent.items()}


def off(got, want) -> float:
  """Returns |got - want| / |want| by Frobenius norms, NaN if there is one."""
  got, want = (np.asarray(x, np.float32).astype(np.float64)
               for x in (got, want))
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def compiled(functions: dict) -> dict:
  """Compiles {name: (function, arguments, donated)} on several threads."""
  def one(job):
    function, arguments, donated = job
    return jax.jit(function, donate_argnums=donated).lower(
        *arguments).compile()

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    return dict(zip(functions, pool.map(one, functions.values())))


def draw(workload):
  """Returns q, k, v and the gates, and a state; fla has one beta for two."""
  arrays = workload.arrays()
  arrays['write'] = arrays['erase']
  return tuple(arrays[n] for n in ('q', 'k', 'v', *GATES)), arrays['state']


# A whole sequence.


def forms(sizes, groups) -> dict:
  """Name -> form of the chunked rule, with q, k, v, gates and a state."""
  found = {}
  for size in sizes:
    found[f'chunk by chunk, C={size}'] = functools.partial(
        delta_chunk.chunked, chunk_size=size)
    for group, unroll in groups:
      found[f'groups of {group >> 10}Ki by {unroll}, C={size}'] = (
          functools.partial(delta_wide.chunked, chunk_size=size, group=group,
                            unroll=unroll))
  return found


def passes(form, scale, which):
  """The forward or the forward and backward pass of one form."""
  def forward(inputs, state, cotangents):
    del cotangents
    return form(delta_chunk.Inputs(*inputs), state, None, None, scale=scale)

  def gradient(inputs, state, cotangents):
    run = lambda inputs, state: forward(inputs, state, None)
    out, pull = jax.vjp(run, inputs, state)
    return out, pull(cotangents)

  return forward if which == 'forward' else gradient


def sequence(workload: DeltaRule, which, found, turns, fla=True,
             want=None) -> dict:
  """Times one shape.

  Args:
    workload: the shape.
    which: 'forward' or 'gradient', which is forward and backward.
    found: forms by name.
    turns: how often each is timed.
    fla: whether the peer takes part.
    want: (y, state) to compare with; None for the first form's in float32.

  Returns:
    {'ms': {name: milliseconds}, 'error': {name: of y, from the first form in
    float32 operands}}, 'ratio': of the best of ours to the peer's.
  """
  inputs, state = draw(workload)
  scale = workload.width ** -0.5
  rng = np.random.default_rng(1)
  weights = tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype)
                  for x in (inputs[2], state))
  arguments = inputs, state, weights
  programs = compiled({
      name: (passes(form, scale, which), arguments, ())
      for name, form in found.items()})
  if want is None:
    wide = tuple(x.astype(jnp.float32) for x in inputs)
    first = passes(next(iter(found.values())), scale, 'forward')
    want = jax.jit(first)(wide, state, None)
  jobs, errors = {}, {}
  for name, program in programs.items():
    out = program(*arguments)
    y, after = out if which == 'forward' else out[0]
    errors[name] = [off(y, want[0]), off(after, want[1])]
    jobs[name] = _job(functools.partial(program, *arguments))
  if fla:
    name, job, out = peer_sequence(
        workload, inputs, state, weights, scale, which)
    jobs[name] = job
    errors[name] = [off(a, b) for a, b in zip(out, want)]
  times = by_turns(jobs, turns)
  result = {'ms': {n: round(1e3 * t, 4) for n, t in times.items()},
            'error': {n: [float(f'{x:.2g}') for x in e]
                      for n, e in errors.items()}}
  return _with_ratio(result)


def _with_ratio(result):
  key = 'ms' if 'ms' in result else 'us'
  ours = {n: t for n, t in result[key].items() if not n.startswith('fla')}
  best = min(ours, key=ours.get)
  result['best'] = best
  for name, taken in result[key].items():
    if name.startswith('fla'):
      result['fla / ours'] = round(taken / ours[best], 3)
  return result


def _job(run, units=1):
  """A job of a jax function, which waits for its last result."""
  last = []

  def once():
    last[:] = [run()]

  return Job(once, lambda: jax.block_until_ready(last), units)


def peer_sequence(workload, inputs, state, weights, scale, which):
  """Returns name, job and results (y, state) of fla's chunked kernels."""
  import torch
  from fla.ops.gated_delta_rule import chunk_gated_delta_rule
  from fla.ops.kda import chunk_kda
  run = chunk_kda if workload.decay == 'channel' else chunk_gated_delta_rule
  q, k, v, g, beta, _ = (tensor(x) for x in inputs)
  before = tensor(state)
  leaves = [x.requires_grad_(which == 'gradient')
            for x in (q, k, v, g, beta, before)]
  weights = [tensor(w) for w in weights]

  def once():
    out = run(q, k, v, g, beta, scale=scale, initial_state=before,
              output_final_state=True)
    if which == 'gradient':
      torch.autograd.grad(out, leaves, weights)
    return out

  how, job, out = captured(once)
  return f'fla, {how}', job, [x.detach().float().cpu().numpy() for x in out]


def tensor(x):
  """A copy on the GPU, for torch."""
  import torch
  kind = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
  return torch.from_numpy(np.array(x, np.float32)).to('cuda', kind)


def captured(run, units=1):
  """Returns how torch runs it, a job, and the results."""
  import torch
  side = torch.cuda.Stream()
  side.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(side):
    for _ in range(3):
      out = run()
  torch.cuda.current_stream().wait_stream(side)
  torch.cuda.synchronize()
  try:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      run()
    graph.replay()
    torch.cuda.synchronize()
  except RuntimeError as error:
    torch.cuda.synchronize()
    print('no graph:', str(error)[:200], flush=True)
    return 'eager', Job(run, torch.cuda.synchronize, units), out
  return 'graph', Job(graph.replay, torch.cuda.synchronize, units), out


# One token.


def steps() -> dict:
  """Name -> function of the arguments of `delta_rule` for one token."""
  def ours(*args):
    *inputs, state = args
    return delta_rule_step_gpu.delta_rule_step(
        *inputs, state=state, scale=inputs[0].shape[-1] ** -0.5)

  return {'xla': functools.partial(delta_rule, implementation='xla'),
          'pallas_gpu': ours}


def decode(workload: DeltaRule, turns, fla=True, names=None) -> dict:
  """Times one step; see `sequence`. 'bandwidth' is of states, in and out."""
  inputs, state = draw(workload)
  count = min(64, max(2, -(-STREAM // state.nbytes)))

  def chain(step, inputs, states):
    q, k, v, *gates = inputs
    y, after = v, []
    for state in states:
      y, state = step(q, k, v + jnp.bfloat16(1e-3) * y, *gates, state)
      after.append(state)
    return y, after

  fresh = lambda: [jnp.array(state) for _ in range(count)]
  chosen = {n: s for n, s in steps().items() if names is None or n in names}
  programs = compiled({
      name: (functools.partial(chain, step), (inputs, fresh()), (1,))
      for name, step in chosen.items()})
  want = jax.jit(steps()['xla'])(
      *(x.astype(jnp.float32) for x in inputs), state)
  jobs, errors = {}, {}
  for name, program in programs.items():
    out = jax.jit(chosen[name])(*inputs, state)
    errors[name] = [off(a, b) for a, b in zip(out, want)]
    held = [fresh()]

    def run(program=program, held=held):
      y, held[0] = program(inputs, held[0])
      return y, held[0]

    jobs[name] = _job(run, count)
  if fla:
    name, job, out = peer_step(workload, inputs, state, count)
    jobs[name] = job
    errors[name] = [off(a, b) for a, b in zip(out, want)]
  times = by_turns(jobs, turns)
  result = {'us': {n: round(1e6 * t, 3) for n, t in times.items()},
            'GB/s': {n: round(2e-9 * state.nbytes / t, 1)
                     for n, t in times.items()},
            'error': {n: [float(f'{x:.2g}') for x in e]
                      for n, e in errors.items()},
            'states': count}
  gc.collect()
  return _with_ratio(result)


def peer_step(workload, inputs, state, count):
  """Returns name, job and results (y, state) of fla's recurrent kernels."""
  import torch
  from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
  from fla.ops.kda import fused_recurrent_kda
  run = (fused_recurrent_kda if workload.decay == 'channel' else
         fused_recurrent_gated_delta_rule)
  q, k, v, g, beta, _ = (tensor(x) for x in inputs)
  states = [tensor(state) for _ in range(count)]

  @torch.no_grad()
  def once():
    out = []
    for before in states:
      out.append(run(q, k, v, g, beta=beta, initial_state=before,
                     output_final_state=True))
    return out[0]

  how, job, out = captured(once, count)
  return f'fla, {how}', job, [x.float().cpu().numpy() for x in out]
