"""Pallas kernels: op -> implementation -> function, or why there is none.

Kernels import jax and numpy alone and stand behind `statejax.ops`. Functions
take what the op hands to any of its forms. `DECLINES` has what may keep them
from it: from the same arguments to a reason, or None.
"""

# Bytes a TPU kernel may ask for: the smallest VMEM, of a TPU 7x, has 64 MiB.
MOST_VMEM = 48 << 20


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


def _delta_rule_tpu_declines(
    q, k, v, log_decay, erase, write, *, chunk_size=None
):
  """Asks for shapes and dtypes alone; gates may be Python scalars."""
  batch, length, heads, values = v.shape
  if not (batch and heads and values and q.shape[-1]):
    return f'it has no work in arrays of {q.shape} and {v.shape}'
  if length == 1:
    from pallas_kernels.delta_rule_step_tpu import declines
    return declines(q, v)
  from pallas_kernels.delta_rule_tpu_plan import declines
  return declines(
      q, k, v, log_decay, erase, write, chunk_size=chunk_size or 64)


_NONE = 'this version ships no kernel; the XLA form runs on every device'

KERNELS = {
    'delta_rule': {'pallas_tpu': _delta_rule_tpu, 'pallas_gpu': _NONE},
}
DECLINES = {'delta_rule': {'pallas_tpu': _delta_rule_tpu_declines}}
