"""The kernels at the named workloads, as programs to compile ahead of time."""

import dataclasses
import functools

import jax

from pallas_kernels import aot
from pallas_kernels.workloads import WORKLOADS

_CHUNK = 64
# Heads per grid step, below, are those that the kernels choose at these widths.


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


def forward(workload, heads=16, length=None) -> aot.Program:
  """All tokens, chunk by chunk."""
  specs = _shapes(workload, length).specs()
  return aot.Program(
      functools.partial(_run, heads, heads), (specs,),
      kernel='delta_rule_forward', work=_CHUNK * heads)


def backward(workload, heads=8, length=None) -> aot.Program:
  """The gradient of every input; runs the forward kernel first."""
  specs = _shapes(workload, length).specs()

  def function(inputs, d_y, d_state):
    _, gradient = jax.vjp(functools.partial(_run, 2 * heads, heads), inputs)
    return gradient((d_y, d_state))

  return aot.Program(
      function, (specs, specs['v'], specs['state']),
      kernel='delta_rule_backward', work=_CHUNK * heads)


def _shapes(workload, length):
  shapes = WORKLOADS[workload]
  return dataclasses.replace(shapes, length=length or shapes.length)


def _run(heads, backward_heads, inputs):
  from pallas_kernels import delta_rule_tpu
  return delta_rule_tpu.delta_rule(
      **inputs, scale=inputs['q'].shape[-1] ** -0.5, chunk_size=_CHUNK,
      heads_per_step=heads, backward_heads_per_step=backward_heads)
