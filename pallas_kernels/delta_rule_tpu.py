"""The delta rule on a TPU: from the public layout to that of the kernels."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import delta_rule_tpu_forward as kernel

_LANES = 128
_FORGET = -200.0  # exp is 0 in float32, and sums of it stay finite
_TO_BASE_2 = 1 / math.log(2)


def delta_rule(
    q, k, v, log_decay, erase, write, state, n_valid=None, resets=None, *,
    scale, chunk_size=64, heads_per_step=None, interpret=False,
):
  """The delta rule, chunk by chunk, with the state in VMEM."""
  batch, length, heads = v.shape[:3]
  width, values = q.shape[-1], v.shape[-1]
  groups = heads // q.shape[2]
  exact = any(x.dtype == jnp.float32 for x in (q, k, v))
  step = _heads_per_step(heads, groups, heads_per_step or 8)
  kind = lambda x: None if x is None else 'head' if x.ndim == 3 else 'channel'
  plan = kernel.Plan(
      chunk_size, step, math.gcd(step, max(_LANES // chunk_size, 1)), groups,
      kind(log_decay), kind(erase), kind(write), float(scale), exact, interpret,
  )
  operands, padded = _operands(
      q, k, v, log_decay, erase, write, state, n_valid, resets, plan
  )
  y, final, _ = kernel.forward(operands, padded, plan, keep=False)
  y = jnp.moveaxis(y, 1, 2)[:, :length, :, :values]
  final = final[:, :, :width, :values]
  if n_valid is not None:
    valid = jnp.arange(length)[None, :] < n_valid[:, None]
    y = jnp.where(valid[:, :, None, None], y, jnp.zeros((), y.dtype))
    final = jnp.where(n_valid[:, None, None, None] > 0, final, state)
  return y, final


def _heads_per_step(heads, groups, limit):
  """The most heads up to `limit` that divide evenly and share whole groups."""
  fits = lambda n: heads % n == 0 and (n % groups == 0 or groups % n == 0)
  return max(n for n in range(1, limit + 1) if fits(n))


def _operands(
    q, k, v, log_decay, erase, write, state, n_valid, resets, plan
):
  length = q.shape[1]
  time = -length % plan.size
  keys, values = -q.shape[-1] % _LANES, -v.shape[-1] % _LANES
  valid = None
  if n_valid is not None:
    valid = jnp.arange(length)[None, :] < n_valid[:, None]

  def clean(x):
    """Padding becomes neutral, whatever it holds."""
    if valid is None:
      return x
    where = valid.reshape(valid.shape + (1,) * (x.ndim - 2))
    return jnp.where(where, x, jnp.zeros((), x.dtype))

  def by_channel(x, channels):
    x = jnp.pad(clean(x), [(0, 0), (0, time), (0, 0), (0, channels)])
    return jnp.moveaxis(x, 2, 1)

  log_decay = clean(log_decay)
  if resets is not None:
    if valid is not None:
      resets = resets & valid
    resets = resets.reshape(resets.shape + (1,) * (log_decay.ndim - 2))
    log_decay = jnp.where(resets, _FORGET, log_decay)
  log_decay = jnp.maximum(log_decay, _FORGET) * _TO_BASE_2
  gates = {'decay': log_decay, 'erase': erase, 'write': write}
  channel = {
      n: by_channel(gates[n], values if n == 'write' else keys)
      for n in plan.of_kind('channel')
  }
  head = [clean(gates[n]) for n in plan.of_kind('head')]
  head = [_head_gates(x, time, plan) for x in head]
  operands = kernel.Operands(
      by_channel(q, keys), by_channel(k, keys), by_channel(v, values),
      channel, jnp.concatenate(head, axis=3) if head else None,
  )
  state = jnp.pad(state, [(0, 0), (0, 0), (0, keys), (0, values)])
  return operands, state


def _head_gates(x, time, plan):
  """[B, T, HV] to [B, HV / heads, T / C, packs, p * C]."""
  batch, _, heads = x.shape
  x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, time), (0, 0)])
  x = x.reshape(
      batch, -1, plan.size, heads // plan.heads, plan.packs, plan.packed
  )
  return x.transpose(0, 3, 1, 4, 5, 2).reshape(
      batch, heads // plan.heads, -1, plan.packs, plan.pack.rows
  )
