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


def _delta_rule_gpu(
    inputs, state, n_valid, resets, scale, *, interpret=False
):
  from pallas_kernels.delta_rule_step_gpu import delta_rule_step
  del resets  # a single token cannot be reset
  return delta_rule_step(
      *inputs, state=state, n_valid=n_valid, scale=scale, interpret=interpret)


def _delta_rule_gpu_declines(q, k, v, log_decay, erase, write):
  """Asks for shapes alone."""
  del k, log_decay, erase, write
  if q.shape[1] != 1:
    return f'it takes one token, not {q.shape[1]}'
  if not (q.size and v.size):
    return f'it has no work in arrays of {q.shape} and {v.shape}'
  from pallas_kernels.delta_rule_step_gpu import declines
  return declines(q, v)


def _gather_attend_tpu(
    q, k, v, ids, last, sink=None, *, block, scale, interpret=False
):
  if _by_row(k, v, ids, block):
    from pallas_kernels.gather_rows_tpu import gather_rows
    return gather_rows(
        q, tuple(x[:, 0] for x in k), ids[:, :, 0], last, sink, scale=scale,
        interpret=interpret)
  from pallas_kernels.gather_attend_tpu import gather_attend
  return gather_attend(q, k, v, ids, last, sink, block=block, scale=scale,
                       interpret=interpret)


def _gather_attend_tpu_declines(q, k, v, ids, *, block):
  """Asks for shapes and dtypes alone."""
  if _by_row(k, v, ids, block):
    import jax

    from pallas_kernels.gather_rows_tpu import declines
    stores = tuple(jax.ShapeDtypeStruct(
        (x.shape[0], *x.shape[2:]), x.dtype) for x in k)
    only = jax.ShapeDtypeStruct((*ids.shape[:2], ids.shape[3]), ids.dtype)
    return declines(q, stores, only)
  from pallas_kernels.gather_attend_tpu import declines
  return declines(q, k, v, ids, block=block)


def _by_row(k, v, ids, block):
  """Whether ids are rows of latents, with or without keys beside them, that
  all heads share."""
  return block == 1 and v is None and len(k) <= 2 and ids.shape[2] == 1


def _index_scores_tpu(q, w, k, count=None, *, relu=True, interpret=False):
  import jax.numpy as jnp

  from pallas_kernels.index_scores_tpu import index_scores
  if w is None:  # what the kernel divides by
    w = jnp.full(q.shape[:3], q.shape[2] ** 0.5, jnp.float32)
  return index_scores(q, w, k, count, relu=relu, interpret=interpret)


def _index_scores_tpu_declines(q, k):
  from pallas_kernels.index_scores_tpu import declines
  return declines(q, k)


_NONE = 'this version ships no kernel; the XLA form runs on every device'

KERNELS = {
    'delta_rule': {'pallas_tpu': _delta_rule_tpu,
                   'pallas_gpu': _delta_rule_gpu},
    'gather_attend': {'pallas_tpu': _gather_attend_tpu, 'pallas_gpu': _NONE},
    'index_topk': {'pallas_tpu': _index_scores_tpu, 'pallas_gpu': _NONE},
}
DECLINES = {
    'delta_rule': {'pallas_tpu': _delta_rule_tpu_declines,
                   'pallas_gpu': _delta_rule_gpu_declines},
    'gather_attend': {'pallas_tpu': _gather_attend_tpu_declines},
    'index_topk': {'pallas_tpu': _index_scores_tpu_declines},
}
