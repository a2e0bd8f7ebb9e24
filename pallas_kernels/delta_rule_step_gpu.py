"""The delta rule for one token on GPU: the state is read and written once.

  D = diag(exp(log_decay)) S;  r = write * v - D^T (erase * k)
  S' = D + k r^T;  y = scale * S'^T q

A block of 128 threads holds 32 columns of one matrix in registers: nothing is
kept in shared memory but the sums of four warps. Everything is float32 and
elementwise: no matrix unit, no rounding. Matrices are replaced where they lie;
those of rows without a token are neither read nor written.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import manual, plain

NAME = 'delta_rule_step'
OLDEST_JAX = 0, 11, 2
COLUMNS = 32  # of a block: 8 threads of 4 floats, one line of memory
ROWS = 16  # taken together: 4 by each of 4 warps
MOST_KEYS = 256  # 64 registers for the matrix, 64 for four vectors


def declines(q, v) -> str | None:
  """Returns why the kernel cannot take arrays of these shapes, or None."""
  if jax.__version_info__ < OLDEST_JAX:
    oldest = '.'.join(map(str, OLDEST_JAX))
    return f'it needs jax {oldest} or later, this is {jax.__version__}'
  width, values = q.shape[3], v.shape[3]
  if width % ROWS or values % COLUMNS or width > MOST_KEYS:
    return (f'K must be a multiple of {ROWS}, at most {MOST_KEYS}, and V of '
            f'{COLUMNS}; they are {width} and {values}')
  return None


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
  from jax.experimental.pallas import mosaic_gpu as plgpu
  q, k, v, log_decay, erase, write = inputs
  batch, heads, _, values = state.shape
  arrays = dict(q=q, k=k, v=v, log_decay=log_decay, erase=erase, write=write,
                n_valid=n_valid)
  arrays = {n: x for n, x in arrays.items() if x is not None}
  matrices = jax.new_ref(state)
  y = plgpu.kernel(
      functools.partial(_kernel, scale=scale, groups=heads // q.shape[2],
                        names=tuple(arrays)),
      # 32 floats are a line of memory; newer JAX refuses to store half a one.
      out_type=manual.struct(v.shape, jnp.float32, state),
      grid=(batch, heads, values // COLUMNS),
      grid_names=('row', 'head', 'columns'), kernel_name=NAME,
      compiler_params=plgpu.CompilerParams(
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
          # It speaks with no other device.
          skip_device_barrier=True),  # pyrefly: ignore
      interpret=(
          plgpu.InterpretGPUParams()  # pyrefly: ignore
          if interpret else None),
  )(*arrays.values(), matrices)
  return y.astype(v.dtype), jax.freeze(matrices)


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


def _kernel(*refs, scale, groups, names):
  inputs = dict(zip(names, refs))
  matrices, y = refs[len(names):]
  row = lax.axis_index('row')
  if 'n_valid' not in inputs:
    _work(inputs, matrices, y, scale, groups)
    return

  @pl.when(inputs['n_valid'][row] > 0)
  def _():
    _work(inputs, matrices, y, scale, groups)

  @pl.when(inputs['n_valid'][row] <= 0)
  def _():
    from jax.experimental.pallas import mosaic_gpu as plgpu
    columns = pl.ds(lax.axis_index('columns') * COLUMNS, COLUMNS)
    y[row, 0, lax.axis_index('head'), columns] = plgpu.layout_cast(
        jnp.zeros((COLUMNS,), jnp.float32), _layout().reduce(0))


def _layout():
  """Each warp holds four rows of 32 columns, and every 16th row after them."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  return plgpu.Layout.TILED(
      plgpu.Tiling(((ROWS, COLUMNS), (4, COLUMNS), (4,))), warp_dims=(-5,),
      lane_dims=(-3, -2), vector_dim=-1)


def _work(inputs, matrices, y, scale, groups):
  """The columns of one matrix: they go through the registers once."""
  from jax.experimental.pallas import mosaic_gpu as plgpu
  layout = _layout()
  row, head = lax.axis_index('row'), lax.axis_index('head')
  columns = pl.ds(lax.axis_index('columns') * COLUMNS, COLUMNS)

  def load(ref, kept):
    """A vector along the rows (kept = 0) or the columns (1), float32."""
    x = plgpu.load(  # pyrefly: ignore
        ref, layout=layout.reduce(1 - kept), optimized=False)
    return x.astype(jnp.float32)

  def gate(name, kept):
    ref = inputs[name]
    if len(ref.shape) == 3:
      return ref[row, 0, head].astype(jnp.float32)
    at = ref.at[row, 0, head]
    return load(at.at[columns] if kept else at, kept)

  def spread(x, kept):
    """To a matrix, unless it is a number."""
    if not x.shape:
      return x
    return lax.broadcast_in_dim(x, decayed.shape, [kept])

  before = matrices.at[row, head, :, columns]
  decayed = plgpu.load(  # pyrefly: ignore
      before, layout=layout, optimized=False)
  q, k = (load(inputs[n].at[row, 0, head // groups], 0) for n in 'qk')
  residual = load(inputs['v'].at[row, 0, head, columns], 1)
  if 'log_decay' in inputs:
    decayed = decayed * spread(jnp.exp(gate('log_decay', 0)), 0)
  if 'write' in inputs:
    residual = gate('write', 1) * residual
  if 'erase' in inputs:
    recalled = jnp.sum(spread(gate('erase', 0) * k, 0) * decayed, axis=0)
    residual = residual - recalled
  after = decayed + spread(k, 0) * spread(residual, 1)
  matrices[row, head, :, columns] = after
  y[row, 0, head, columns] = jnp.sum(spread(scale * q, 0) * after, axis=0)
