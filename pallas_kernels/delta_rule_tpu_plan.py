"""How many heads the TPU kernels of the delta rule take at a time, and where.

Everything a grid step works on lies in VMEM: its blocks, twice, for the next
ones come and the last ones go meanwhile; the states it carries; and what the
compiler keeps of a chunk, which is most of it in float32 and going backward.
"""

import math

import jax.numpy as jnp

from pallas_kernels import MOST_VMEM
from pallas_kernels import delta_rule_tpu_forward as primal

_LANES = 128
# More heads hide latency better; beyond these, hardly.
_FORWARD_HEADS, _BACKWARD_HEADS = 16, 8
_ENOUGH = 24 << 20  # bytes beyond which fewer heads are taken
_DEFAULT = 16 << 20  # what every compiler grants unasked
# An estimate, for this many times of which the compiler is asked.
_SLACK = 1.25
# What the compiler keeps, measured with libtpu 0.0.52: rows of float32 per head
# and token, and states per head, by decay, exact, backward.
_KEPT = {
    ('channel', False, False): (10, 0), ('channel', False, True): (33, 0),
    ('channel', True, False): (11, 0), ('channel', True, True): (70, 5),
    ('head', False, False): (2, 0), ('head', False, True): (3, 5),
    ('head', True, False): (8, 0), ('head', True, True): (33, 5),
}


def plans(
    q, k, v, log_decay, erase, write, *, scale, chunk_size=64,
    heads_per_step=None, backward_heads_per_step=None, interpret=False,
):
  """Returns the `Plan`s of the forward and of the backward kernel.

  Args:
    q, k, v, log_decay, erase, write: arrays, or their shapes and dtypes, as
      `delta_rule_tpu.delta_rule` takes them; a Python scalar is a gate per
      head, but for an erase of 0 and a write of 1.
    scale, chunk_size, heads_per_step, backward_heads_per_step, interpret: see
      there.

  Raises:
    ValueError: not even the fewest heads fit; says how much they need.
  """
  arrays = q, k, v, log_decay, erase, write
  fields = dict(
      size=chunk_size, groups=v.shape[2] // q.shape[2],
      decay=_kind(log_decay, 0) or 'head', erase=_kind(erase, 0),
      write=_kind(write, 1), scale=float(scale), interpret=interpret,
      exact=any(x.dtype == jnp.float32 for x in (q, k, v)),
  )
  return (_plan(arrays, fields, heads_per_step, False),
          _plan(arrays, fields, backward_heads_per_step, True))


def declines(*arrays, chunk_size=64):
  """Returns why `plans` has none for such arguments, or None."""
  try:
    plans(*arrays, scale=1, chunk_size=chunk_size)
  except ValueError as error:
    return str(error)
  return None


def _plan(arrays, fields, heads_per_step, backward):
  heads, groups, size = arrays[2].shape[2], fields['groups'], fields['size']
  most = heads_per_step or (_BACKWARD_HEADS if backward else _FORWARD_HEADS)
  choices = []
  for step in range(1, most + 1):
    if heads % step == 0 and (step % groups == 0 or groups % step == 0):
      packed = math.gcd(step, max(_LANES // size, 1))
      plan = primal.Plan(heads=step, packed=packed, **fields)
      choices.append((plan, vmem_bytes(plan, arrays, backward)))
  if not heads_per_step:
    choices = [c for c in choices if c[1] <= _ENOUGH] or choices[:1]
  chosen, need = choices[-1]
  asked = int(_SLACK * need)
  if asked > MOST_VMEM:
    way = 'backward' if backward else 'forward'
    raise ValueError(
        f'{chosen.heads} of {heads} heads, chunks of {size} tokens, '
        f'K={arrays[0].shape[-1]} and V={arrays[2].shape[-1]} need '
        f'{-(-asked >> 20)} MiB of VMEM going {way}; there may be '
        f'{MOST_VMEM >> 20}, shorter chunks need less')
  return chosen._replace(vmem=asked if asked > _DEFAULT else None)


def vmem_bytes(plan, arrays, backward):
  """Estimates the VMEM of a grid step that keeps the states before chunks."""
  q, k, v, log_decay, erase, write = arrays
  width, values = (x.shape[-1] + -x.shape[-1] % _LANES for x in (q, v))
  block = lambda heads, x, width: heads * plan.size * width * x.dtype.itemsize
  keys = block(plan.key_heads, q, width) + block(plan.key_heads, k, width)
  value = block(plan.heads, v, values)
  channel = {'decay': (log_decay, width), 'erase': (erase, width),
             'write': (write, values)}
  gates = sum(block(plan.heads, *channel[n]) for n in plan.of_kind('channel'))
  rows = len(plan.of_kind('head')) * plan.packs
  gates += 4 * (rows + -rows % 8) * _LANES
  tokens = keys + 2 * value + gates
  if backward:  # in place of y its gradient, and those of all inputs
    tokens += keys + value + gates
  rows, states = _KEPT[plan.decay, plan.exact, backward]
  rows += 6 * (plan.size == 128)  # pair matrices as large as rows
  # Most rows have the width of the keys where decays have.
  weight = 3 if plan.decay == 'channel' else 1
  kept = rows * plan.size * (weight * width + values) // (weight + 1)
  # Three blocks of states, twice each, and the states carried.
  kept += (7 + states) * width * values
  return 2 * tokens + 4 * plan.heads * kept


def _kind(gate, nothing):
  if gate is None or isinstance(gate, (int, float)) and gate == nothing:
    return None
  if isinstance(gate, (int, float)):
    return 'head'
  return 'head' if gate.ndim == 3 else 'channel'
