"""Scores of a lightning indexer on a TPU: keys stream by, heads never leave.

  I_tj = HI^-1/2 sum_h w_th relu(q_th . k_j dI^-1/2)

A grid step holds the keys of one tile and all heads of a few queries; of what
it computes, [queries, HI, tile], only the sum over the heads is written.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import manual, plain_gather
from pallas_kernels.gather_attend_tpu import product_nt

NAME = 'index_scores'
_TILE = 1024
# Rows of queries and heads per step; each has a row of scores of a tile.
_ROWS = 512


def declines(q, k) -> str | None:
  """Returns why the kernel cannot take arrays of these shapes, or None."""
  batch, steps, heads, width = q.shape
  if not (batch and steps and heads and k.shape[1]):
    return f'it has no work in arrays of {q.shape} and {k.shape}'
  if heads * 8 > 4 * _ROWS and steps > 1:
    return f'eight queries of {heads} heads do not fit its VMEM'
  return None


def index_scores(q, w, k, count=None, *, relu=True, interpret=False):
  """Scores every key of a store for every query.

  Args:
    q: [B, T, HI, dI], float32 or bfloat16.
    w: [B, T, HI], any float dtype.
    k: [B, N, dI].
    count: keys of a row that matter, [B] int32; None for all. Tiles after them
      are not read, and their scores are 0.
    relu: whether a head's score below 0 counts as 0.
    interpret: run on any device, slowly, for tests.

  Returns:
    [B, T, N] float32. Differentiable: the backward pass is plain JAX.

  Raises:
    ValueError: see `declines`.

  Reference: DeepSeek-V3.2, equation 1.
  """
  reason = declines(q, k)
  if reason:
    raise ValueError(f'{reason}: take another implementation.')
  batch, size = k.shape[:2]
  if count is None:
    count = jnp.full((batch,), size, jnp.int32)
  return _run((relu, interpret), *manual.alike((q, w, k), count))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static, floats, count):
  relu, interpret = static
  q, w, k = floats
  batch, steps, heads, width = q.shape
  size = k.shape[1]
  tile = min(_TILE, -(-size // 128) * 128)
  each = 1 if steps == 1 else max(8, _ROWS // heads // 8 * 8)
  each = min(each, -(-steps // 8) * 8)
  padded = -(-steps // each) * each
  longer = lambda x: jnp.pad(
      x, [(0, 0), (0, padded - steps)] + [(0, 0)] * (x.ndim - 2))
  q = longer(q).reshape(batch, padded * heads, width)
  w = w.astype(jnp.float32) * (heads * width) ** -0.5
  w = longer(w).reshape(batch, padded * heads, 1)
  by_query = lambda b, t, n, count: (b, t, 0)

  def by_tile(b, t, n, count):
    # A tile that is not read repeats the one before: nothing is fetched.
    most = jnp.maximum((count[b] + tile - 1) // tile - 1, 0)
    return b, jnp.minimum(n, most), 0

  scores = pl.pallas_call(
      functools.partial(_kernel, heads=heads, relu=relu, tile=tile),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(batch, padded // each, -(-size // tile)),
          in_specs=[pl.BlockSpec((1, each * heads, width), by_query),
                    pl.BlockSpec((1, each * heads, 1), by_query),
                    pl.BlockSpec((1, tile, width), by_tile)],
          out_specs=pl.BlockSpec((1, each, tile),
                                 lambda b, t, n, count: (b, t, n))),
      out_shape=manual.struct((batch, padded, size), jnp.float32, q),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary')),
      interpret=interpret, name=NAME,
  )(count, q, w, k)
  return scores[:, :steps]


def _run_forward(static, floats, count):
  return _run(static, floats, count), (floats, count)


def _run_backward(static, residuals, cotangent):
  floats, count = residuals
  size = floats[2].shape[1]
  tile = min(_TILE, -(-size // 128) * 128)
  read = -(-count // tile) * tile
  cotangent = jnp.where(
      jnp.arange(size)[None, None] < read[:, None, None], cotangent, 0.0)
  plain = functools.partial(plain_gather.index_scores, relu=static[0])
  return jax.vjp(lambda x: plain(*x), floats)[1](cotangent)[0], None


_run.defvjp(_run_forward, _run_backward)


def _kernel(count, q, w, k, out, *, heads, relu, tile):
  live = pl.program_id(2) * tile < count[pl.program_id(0)]

  @pl.when(live)
  def _():
    dots = product_nt(q[0], k[0])
    if relu:
      dots = jnp.maximum(dots, 0.0)
    dots = w[0] * dots
    out[0] = jnp.sum(dots.reshape(-1, heads, tile), axis=1)

  @pl.when(jnp.logical_not(live))
  def _():
    out[0] = jnp.zeros_like(out[0])
