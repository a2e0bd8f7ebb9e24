"""The kernels at the named workloads, as programs to compile ahead of time."""

import dataclasses
import functools

import jax

from pallas_kernels import aot
from pallas_kernels.workloads import ATTENTION, WORKLOADS


def step(workload) -> aot.Program:
  """The decode step: some rows have a token, the state is donated."""
  from pallas_kernels import delta_rule_step_tpu as kernel
  shapes = WORKLOADS[workload]
  specs = shapes.specs()
  state = specs.pop('state')
  n_valid = jax.ShapeDtypeStruct((shapes.batch,), 'int32')

  def function(state, inputs, n_valid):
    return kernel.delta_rule_step(
        **inputs, state=state, n_valid=n_valid, scale=shapes.width ** -0.5)

  heads = kernel.head_block(shapes.batch, shapes.heads, shapes.key_heads,
                            shapes.width, shapes.values)
  return aot.Program(function, (state, specs, n_valid), donate=(0,),
                     kernel=kernel.NAME, work=heads)


def forward(workload, heads=None, length=None, chunk_size=64) -> aot.Program:
  """All tokens, chunk by chunk; heads per grid step, None for the plan's."""
  specs = _shapes(workload, length).specs()
  options = dict(chunk_size=chunk_size, heads_per_step=heads)
  return aot.Program(
      functools.partial(_run, options), (specs,), kernel='delta_rule_forward',
      work=chunk_size * _plans(options, specs)[0].heads)


def backward(workload, heads=None, length=None, chunk_size=64) -> aot.Program:
  """The gradient of every input; runs the forward kernel first."""
  specs = _shapes(workload, length).specs()
  options = dict(chunk_size=chunk_size, heads_per_step=heads,
                 backward_heads_per_step=heads)

  def function(inputs, d_y, d_state):
    _, gradient = jax.vjp(functools.partial(_run, options), inputs)
    return gradient((d_y, d_state))

  return aot.Program(
      function, (specs, specs['v'], specs['state']),
      kernel='delta_rule_backward',
      work=chunk_size * _plans(options, specs)[1].heads)


def gather_attend(workload) -> aot.Program:
  """Attention to chosen blocks."""
  from pallas_kernels import gather_attend_tpu as kernel
  shapes = ATTENTION[workload]
  function = functools.partial(
      kernel.gather_attend, block=shapes.block, scale=shapes.key ** -0.5)
  return aot.Program(function, shapes.blocks(), kernel=kernel.NAME)


def gather_rows(workload) -> aot.Program:
  """Attention to chosen rows of latents."""
  from pallas_kernels import gather_rows_tpu as kernel
  shapes = ATTENTION[workload]
  function = functools.partial(kernel.gather_rows, scale=shapes.key ** -0.5)
  return aot.Program(function, shapes.rows(), kernel=kernel.NAME)


def index_scores(workload) -> aot.Program:
  """Scores of a lightning indexer."""
  from pallas_kernels import index_scores_tpu as kernel
  return aot.Program(
      kernel.index_scores, ATTENTION[workload].index(), kernel=kernel.NAME)


def _shapes(workload, length):
  shapes = WORKLOADS[workload]
  return dataclasses.replace(shapes, length=length or shapes.length)


def _run(options, inputs):
  from pallas_kernels import delta_rule_tpu
  return delta_rule_tpu.delta_rule(
      **inputs, scale=inputs['q'].shape[-1] ** -0.5, **options)


def _plans(options, specs):
  from pallas_kernels import delta_rule_tpu_plan
  tokens = {name: x for name, x in specs.items() if name != 'state'}
  return delta_rule_tpu_plan.plans(**tokens, scale=1, **options)
