"""The kernels at the named workloads, as programs to compile ahead of time."""

import jax

from pallas_kernels import aot
from pallas_kernels.workloads import WORKLOADS


def step(workload, ragged=True) -> aot.Program:
  """The decode step, with its state donated."""
  from pallas_kernels import delta_rule_step_tpu
  shapes = WORKLOADS[workload]
  specs = shapes.specs()
  state = specs.pop('state')
  n_valid = (jax.ShapeDtypeStruct((shapes.batch,), 'int32'),) if ragged else ()

  def function(state, inputs, *n_valid):
    return delta_rule_step_tpu.delta_rule_step(
        **inputs, state=state, n_valid=n_valid[0] if n_valid else None,
        scale=shapes.width ** -0.5)

  return aot.Program(function, (state, specs, *n_valid), donate=(0,),
                     kernels=(delta_rule_step_tpu.NAME,))
