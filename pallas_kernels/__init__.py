"""Pallas kernels: op -> implementation -> function, or why there is none.

Kernels import jax and numpy alone and stand behind `statejax.ops`. Functions
take what the op hands to any of its forms.
"""


def _delta_rule_tpu(
    inputs, state, n_valid, resets, scale, *, chunk_size=None, interpret=False
):
  if inputs.q.shape[1] == 1:  # a single token cannot be reset
    from pallas_kernels.delta_rule_step_tpu import delta_rule_step
    return delta_rule_step(
        *inputs, state=state, n_valid=n_valid, scale=scale,
        interpret=interpret)
  from pallas_kernels.delta_rule_tpu import delta_rule
  return delta_rule(
      **inputs._asdict(), state=state, n_valid=n_valid, resets=resets,
      scale=scale, chunk_size=chunk_size or 64, interpret=interpret,
  )


_NONE = 'this version ships no kernel; the XLA form runs on every device'

KERNELS = {
    'delta_rule': {'pallas_tpu': _delta_rule_tpu, 'pallas_gpu': _NONE},
}
