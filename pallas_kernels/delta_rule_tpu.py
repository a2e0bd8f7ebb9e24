"""The delta rule on a TPU: from the public layout to that of the kernels."""

import jax.numpy as jnp

from pallas_kernels import delta_rule_tpu_forward as primal
from pallas_kernels import delta_rule_tpu_plan as planning
from pallas_kernels import delta_rule_tpu_vjp as vjp
from pallas_kernels import manual

_LANES = 128


def delta_rule(
    q, k, v, log_decay, erase, write, state, n_valid=None, resets=None, *,
    scale, chunk_size=64, heads_per_step=None, backward_heads_per_step=None,
    interpret=False,
):
  """The delta rule, chunk by chunk, with the state in VMEM; differentiable.

  Args:
    q: queries, [B, T, HK, K], float32 or bfloat16.
    k: keys, [B, T, HK, K].
    v: values, [B, T, HV, V], HV a multiple of HK.
    log_decay: [B, T, HV] or [B, T, HV, K], float32; None for 0.
    erase: [B, T, HV] or [B, T, HV, K], float32; None for 0.
    write: [B, T, HV] or [B, T, HV, V], float32; None for 1.
    state: [B, HV, K, V], float32.
    n_valid: number of real tokens per row, [B], int32; None if all are.
    resets: [B, T] bool, True where the state is emptied first; None for never.
    scale: static factor on q.
    chunk_size: static, 16, 32, 64 or 128.
    heads_per_step: value heads per grid step of the forward kernel, at most;
      None chooses.
    backward_heads_per_step: the same of the backward kernel.
    interpret: static, passed to `pallas_call`: to run without a TPU.

  Returns:
    y [B, T, HV, V] in v.dtype, and the state after n_valid tokens.
  """
  length, values, width = v.shape[1], v.shape[-1], q.shape[-1]
  if log_decay is None:
    log_decay = jnp.zeros(v.shape[:3], jnp.float32)
  forward_plan, backward_plan = planning.plans(
      q, k, v, log_decay, erase, write, scale=scale, chunk_size=chunk_size,
      heads_per_step=heads_per_step,
      backward_heads_per_step=backward_heads_per_step, interpret=interpret,
  )
  operands, padded = manual.alike(*_operands(
      q, k, v, log_decay, erase, write, state, n_valid, resets, forward_plan
  ))
  y, final = vjp.run(forward_plan, backward_plan, operands, padded)
  y = jnp.moveaxis(y, 1, 2)[:, :length, :, :values]
  final = final[:, :, :width, :values]
  if n_valid is not None:  # S * 1 + 0 would lose the sign of a zero
    valid = jnp.arange(length)[None, :] < n_valid[:, None]
    y = jnp.where(valid[:, :, None, None], y, jnp.zeros((), y.dtype))
    final = jnp.where(n_valid[:, None, None, None] > 0, final, state)
  return y, final


def _operands(
    q, k, v, log_decay, erase, write, state, n_valid, resets, plan
):
  """Head-major, masked, padded; gates per head stay a dict of [B, HV, T]."""
  length = q.shape[1]
  time = -length % plan.size
  keys, values = -q.shape[-1] % _LANES, -v.shape[-1] % _LANES
  valid = None
  if n_valid is not None:
    valid = jnp.arange(length)[None, :] < n_valid[:, None]
  along = lambda mask, x: mask.reshape(mask.shape + (1,) * (x.ndim - 2))

  def move(x, channels=0):
    if valid is not None:
      x = jnp.where(along(valid, x), x, jnp.zeros((), x.dtype))
    channels = [(0, channels)] * (x.ndim - 3)
    x = jnp.pad(x, [(0, 0), (0, time), (0, 0), *channels])
    return jnp.moveaxis(x, 2, 1)

  if resets is not None:
    log_decay = jnp.where(along(resets, log_decay), primal.FORGET, log_decay)
  log_decay = log_decay.astype(jnp.float32)
  gates = {'decay': log_decay, 'erase': erase, 'write': write}
  operands = primal.Operands(
      move(q, keys), move(k, keys), move(v, values),
      {
          n: move(gates[n], values if n == 'write' else keys)
          for n in plan.of_kind('channel')
      },
      {n: move(gates[n].astype(jnp.float32)) for n in plan.of_kind('head')},
  )
  state = jnp.pad(state, [(0, 0), (0, 0), (0, keys), (0, values)])
  return operands, state
