"""The delta rule for one token on TPU: the state is read and written once.

  D = diag(exp(log_decay)) S;  r = write * v - D^T (erase * k)
  S' = D + k r^T;  y = scale * (D^T q + (q . k) r)

A grid step holds the matrices of one row and a few heads. They are replaced
where they lie (`input_output_aliases`); rows without a token are neither read
nor written. Everything is float32 and elementwise: no matrix unit, no rounding.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import MOST_VMEM, manual, plain

NAME = 'delta_rule_step'
# Two of these come and two go while one is worked on.
_BLOCK_BYTES = 2 ** 21
_STEPS = 8


def head_block(batch, heads, key_heads, width, values) -> int:
  """Value heads per grid step: whole tiles of rows, whole groups of heads.

  Wide blocks hide latency, if enough of them are left to hide the traffic.
  """
  groups = heads // key_heads
  fitting = [n for n in (8, 16) if heads % n == 0 and
             (n % groups == 0 or groups % n == 0)]
  wide = [n for n in fitting
          if batch * heads >= _STEPS * n
          and n * _matrix_bytes(width, values) <= _BLOCK_BYTES]
  return max(wide, default=min(fitting, default=heads))


def _matrix_bytes(width, values):
  return 4 * (-(-width // 8) * 8) * (-(-values // 128) * 128)


def _vmem(size, width, values) -> int | None:
  """Bytes to ask for, None for what every compiler grants unasked."""
  block = size * _matrix_bytes(width, values)
  return None if block <= _BLOCK_BYTES else 2 ** 23 + 4 * block


def declines(q, v) -> str | None:
  """Returns why the kernel cannot take arrays of these shapes, or None."""
  batch, _, heads, values = v.shape
  key_heads, width = q.shape[2:]
  size = head_block(batch, heads, key_heads, width, values)
  need = _vmem(size, width, values) or 0
  if need <= MOST_VMEM:
    return None
  return (f'{size} of {heads} heads, K={width} and V={values} need '
          f'{-(-need >> 20)} MiB of VMEM; there may be {MOST_VMEM >> 20}')


def delta_rule_step(q, k, v, log_decay, erase, write, state, n_valid=None, *,
                    scale, interpret=False):
  """One token of every row.

  Args:
    q: [B, 1, HK, K], any float dtype.
    k: [B, 1, HK, K].
    v: [B, 1, HV, V].
    log_decay: [B, 1, HV] or [B, 1, HV, K]; None for 0.
    erase: [B, 1, HV] or [B, 1, HV, K]; None for 0.
    write: [B, 1, HV] or [B, 1, HV, V]; None for 1.
    state: [B, HV, K, V] float32; donate it, or it is copied first.
    n_valid: [B] int32, or None if every row has its token.
    scale: static factor on q.
    interpret: run on any device, slowly, for tests.

  Returns:
    y [B, 1, HV, V] in v.dtype and the state [B, HV, K, V]. Differentiable: the
    backward pass is plain JAX.

  Raises:
    ValueError: see `declines`.

  Reference: arXiv 2412.06464, 2510.26692.
  """
  reason = declines(q, v)
  if reason:
    raise ValueError(f'{reason}: take another implementation.')
  inputs = q, k, v, log_decay, erase, write
  return _run(scale, interpret, *manual.alike(inputs, state, n_valid))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(scale, interpret, inputs, state, n_valid):
  q, k, v, log_decay, erase, write = inputs
  batch, heads, width, values = state.shape
  key_heads = q.shape[2]
  size = head_block(batch, heads, key_heads, width, values)
  rows = _visits(n_valid, batch)
  limit = _vmem(size, width, values)

  def by_row(b, rows):
    return rows[1, b]

  # Heads outermost: a row without a token repeats the block before it, which
  # must belong to the same core.
  def whole(g, b, rows):
    return by_row(b, rows), 0, 0, 0

  def part(g, b, rows):
    return by_row(b, rows), 0, g, 0

  vectors = dict(q=q, k=k, v=v, log_decay=log_decay, erase=erase, write=write)
  vectors = {n: x.astype(jnp.float32) for n, x in vectors.items()
             if x is not None}
  specs = {}
  for name, x in vectors.items():
    if x.ndim == 3:
      specs[name] = pl.BlockSpec(
          (1, 1, heads), lambda g, b, rows: (by_row(b, rows), 0, 0),
          memory_space=pltpu.SMEM)
    elif name in 'qk':
      specs[name] = pl.BlockSpec((1, 1, *x.shape[2:]), whole)
    else:
      specs[name] = pl.BlockSpec((1, 1, size, x.shape[3]), part)
  matrices = pl.BlockSpec(
      (1, size, width, values), lambda g, b, rows: (by_row(b, rows), g, 0, 0))
  y, after = pl.pallas_call(
      functools.partial(_kernel, scale=scale, groups=heads // key_heads,
                        names=tuple(vectors)),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(heads // size, batch),
          in_specs=[*specs.values(), matrices],
          out_specs=[
              pl.BlockSpec((1, 1, size, values), lambda g, b, _: (b, 0, g, 0)),
              matrices]),
      out_shape=[manual.struct(v.shape, jnp.float32, state),
                 manual.struct(state.shape, state.dtype, state)],
      input_output_aliases={len(vectors) + 1: 1},
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'),
          vmem_limit_bytes=limit),
      interpret=interpret, name=NAME,
  )(rows, *vectors.values(), state)
  return y.astype(v.dtype), after


def _run_forward(scale, interpret, inputs, state, n_valid):
  out = _run(scale, interpret, inputs, state, n_valid)
  return out, (inputs, state, n_valid)


def _run_backward(scale, interpret, residuals, cotangents):
  inputs, state, n_valid = residuals

  def run(inputs, state):
    return plain.delta_rule(
        *inputs, state=state, n_valid=n_valid, scale=scale)

  return *jax.vjp(run, inputs, state)[1](cotangents), None


_run.defvjp(_run_forward, _run_backward)


def _visits(n_valid, batch):
  """[2, B]: what to do with a row, and whose memory to hold meanwhile.

  1 works on a row; 0 passes over it, holding the last row worked on; -1 passes
  over it before any row was, holding the first to come.
  """
  index = jnp.arange(batch, dtype=jnp.int32)
  if n_valid is None:
    return jnp.stack([jnp.ones_like(index), index])
  valid = n_valid > 0
  last = lax.cummax(jnp.where(valid, index, -1))
  first = jnp.argmax(valid).astype(jnp.int32)
  action = jnp.where(valid, 1, jnp.where(last < 0, -1, 0))
  return jnp.stack([action.astype(jnp.int32), jnp.where(last < 0, first, last)])


def _kernel(rows, *refs, scale, groups, names):
  inputs = dict(zip(names, refs))
  before, y, after = refs[len(names):]
  action = rows[0, pl.program_id(1)]
  first = pl.program_id(0) * before.shape[1]

  @pl.when(action == 1)
  def _():
    _work(inputs, before, y, after, first, scale, groups)

  @pl.when(action != 1)
  def _():
    y[...] = jnp.zeros_like(y)

  # Held, never worked on if there is no valid row at all, and written back.
  @pl.when(action == -1)
  def _():
    after[...] = before[...]


def _work(inputs, before, y, after, first, scale, groups):
  """One row: each head's matrix goes through the registers once."""
  size, _, values = before.shape[1:]
  q = scale * _key_rows(inputs['q'], first, size, groups)
  k = _key_rows(inputs['k'], first, size, groups)
  attention = jnp.sum(q * k, axis=1, keepdims=True)

  def by_channel(name):
    return len(inputs[name].shape) == 4

  def row(name, head):
    """[1, K or V], a gate per head spread over the values."""
    if by_channel(name):
      return inputs[name][0, 0, head:head + 1]
    return jnp.full((1, values), inputs[name][0, 0, first + head])

  def column(row):
    # Transposing a full square is quicker than spreading a column.
    return jnp.broadcast_to(row, (values, row.shape[1])).T

  for head in range(size):
    index = slice(head // groups, head // groups + 1)
    keys = column(k[index])
    decayed = before[0, head]
    if 'log_decay' in inputs:
      decay = jnp.exp(row('log_decay', head))
      decayed *= column(decay) if by_channel('log_decay') else decay
    residual = row('v', head)
    if 'write' in inputs:
      residual *= row('write', head)
    if 'erase' in inputs:
      erase = row('erase', head)
      erasing = column(erase * k[index]) if by_channel('erase') else keys
      recalled = jnp.sum(erasing * decayed, axis=0, keepdims=True)
      residual -= recalled if by_channel('erase') else erase * recalled
    read = jnp.sum(column(q[index]) * decayed, axis=0, keepdims=True)
    y[0, 0, head:head + 1] = read + attention[index] * residual
    after[0, head] = decayed + keys * residual


def _key_rows(ref, first, size, groups):
  """The rows [HK of the step, K] that belong to `size` heads from `first`."""
  key_heads, width = ref.shape[2:]
  if size == key_heads * groups:
    return ref[0, 0]
  first, count = first // groups, max(1, size // groups)
  if width <= 128:
    return ref[0, 0, pl.ds(first, count)]
  # Rows of several tiles can only be taken from anywhere one by one.
  rows = [ref[0, 0, pl.ds(first + i, 1)] for i in range(count)]
  return jnp.concatenate(rows)
