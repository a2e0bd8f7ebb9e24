"""Attention to single rows of latent stores, on a TPU.

  out = sum_j p_j c_j,   p = softmax_j(scale (q_c.c_j + q_r.r_j)),   j in ids

A TPU cannot fetch less than a tile: the eight rows that hold the wanted one;
of a store whose width is no multiple of 128, which XLA lays out with its
positions along the lanes, the 128 columns. All eight rows are scored, and what
was not asked for is masked: no row is moved twice. Of the 128 columns the same
eight are turned to their place. Tiles of the next rows come while one works.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import gather_attend_tpu as blocks
from pallas_kernels import manual, plain_gather
from pallas_kernels.gather_attend_tpu import LANES, TILE, narrow

NAME = 'gather_rows'
# Rows asked for in a grid step: whole lanes of tiles.
_ROWS = 64
_GROUP = LANES // TILE


def declines(q, stores, ids) -> str | None:
  """Returns why the kernel cannot take arrays of these shapes, or None."""
  latent, *keys = stores
  if narrow(latent):
    return (f'its latents have a multiple of {LANES} channels, not '
            f'{latent.shape[-1]}')
  least = LANES if any(map(narrow, keys)) else TILE
  if latent.shape[1] % least:
    return f'its stores have a multiple of {least} slots, not {latent.shape[1]}'
  if not (q[0].size and ids.size and latent.shape[1]):
    return f'it has no work for ids of {ids.shape}'
  kinds = {x.dtype.name for x in stores}
  if kinds - {'float32', 'bfloat16'}:
    return f'its stores are float32 or bfloat16, not {sorted(kinds)}'
  if any(x.shape[-1] % 16 for x in keys):
    return f'its keys have a multiple of 16 channels, not {keys[0].shape[-1]}'
  each = -(-ids.shape[2] // _ROWS) * _ROWS
  if ids.shape[0] * each > blocks.MOST_IDS:
    return (f'SMEM holds {blocks.MOST_IDS} ids, one query of each row has '
            f'{ids.shape[0] * each}')
  return None


def gather_rows(q, stores, ids, last, sink=None, *, scale, interpret=False):
  """Attends to the named rows, one set for all heads.

  Args:
    q: (q_c [B, T, H, R], q_r [B, T, H, dr]), float32 or bfloat16; or (q_c,).
    stores: latents, first part of the keys and the values, [B, N, R]; and the
      second part of the keys, [B, N, dr], if there is one.
    ids: [B, T, M] int32, distinct rows of each query; -1 names none.
    last: the last position that a query may see, [B, T] int32.
    sink: logit per head, [H] float32, or None.
    scale: factor on the scores.
    interpret: run on any device, slowly, for tests.

  Returns:
    out [B, T, H, R] and lse [B, T, H], see `gather_attend_tpu.gather_attend`.

  Raises:
    ValueError: see `declines`.

  Reference: DeepSeek-V3.2, sparse attention in its absorbed form.
  """
  reason = declines(q, stores, ids)
  if reason:
    raise ValueError(f'{reason}: take another implementation.')
  missing = -ids.shape[2] % _ROWS
  ids = jnp.pad(ids, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
  arrays = manual.alike((q, tuple(stores), None, sink), ids, last)
  return _run((float(scale), interpret), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static, floats, ids, last):
  return blocks.in_pieces(functools.partial(_call, static), floats, ids, last)


def _run_forward(static, floats, ids, last):
  return _run(static, floats, ids, last), (floats, ids, last)


def _run_backward(static, residuals, cotangents):
  floats, ids, last = residuals

  def plain(floats):
    q, stores, _, sink = floats
    return plain_gather.gather_attend(
        q, tuple(x[:, None] for x in stores), None, ids[:, :, None], last, sink,
        block=1, scale=static[0])

  return *jax.vjp(plain, floats)[1](cotangents), None, None


_run.defvjp(_run_forward, _run_backward)


def _call(static, floats, ids, last):
  scale, interpret = static
  q, stores, _, sink = floats
  batch, steps, count = ids.shape
  heads, width = q[0].shape[2:]
  # Of the rows of a tile, the one asked for.
  tile = jnp.arange(TILE, dtype=ids.dtype).reshape(1, 1, 1, TILE)
  seen = (ids >= 0) & (ids <= last[..., None])
  seen = seen[..., None] & (ids[..., None] % TILE == tile)
  seen = seen.astype(jnp.float32).reshape(batch, steps, 1, count * TILE)
  # Grid steps that have an id.
  index = jnp.arange(1, count + 1, dtype=jnp.int32)[None, None]
  used = jnp.max(jnp.where(ids >= 0, index, 0), axis=-1)
  used = ((used + _ROWS - 1) // _ROWS).reshape(-1)

  by_query = lambda b, t, j, *_: (b, t, 0, 0)
  specs = [pl.BlockSpec((1, 1, heads, x.shape[-1]), by_query) for x in q]
  specs.append(pl.BlockSpec((1, 1, 1, _ROWS * TILE),
                            lambda b, t, j, *_: (b, t, 0, j)))
  specs += [pl.BlockSpec(memory_space=pl.ANY) for _ in stores]
  arrays = [*q, seen, *(x.swapaxes(1, 2) if narrow(x) else x for x in stores)]
  if sink is not None:
    arrays.append(sink.astype(jnp.float32).reshape(heads, 1))
    specs.append(pl.BlockSpec((heads, 1), lambda b, t, j, *_: (0, 0)))
  # Without keys of their own, of latents alone, their place is not used.
  key = stores[-1]
  tiles, placed = [TILE, LANES], pltpu.VMEM((TILE, LANES), jnp.int32)
  if narrow(key):
    tiles = [_ROWS, key.shape[-1], LANES]
    packed = key.dtype.itemsize == 2
    placed = pltpu.VMEM((key.shape[-1] // (1 + packed), _ROWS * TILE),
                        jnp.int32 if packed else key.dtype)
  elif len(stores) > 1:
    tiles = [_ROWS * TILE, key.shape[-1]]
  out, lse = pl.pallas_call(
      functools.partial(_kernel, turned=narrow(key), parts=len(stores),
                        sink=sink is not None, scale=scale),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(batch, steps, count // _ROWS),
          in_specs=specs,
          out_specs=[pl.BlockSpec((1, 1, heads, width), by_query),
                     pl.BlockSpec((1, 1, 1, heads), by_query)],
          scratch_shapes=[
              pltpu.VMEM((2, _ROWS * TILE, width), stores[0].dtype),
              pltpu.VMEM((2, *tiles), key.dtype), placed,
              pltpu.SemaphoreType.DMA((2, 2)),
              *blocks.scratch(heads, width)]),
      out_shape=[manual.struct((batch, steps, heads, width), q[0].dtype, q[0]),
                 manual.struct((batch, steps, 1, heads), jnp.float32, q[0])],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary')),
      interpret=interpret, name=NAME,
  )(ids.reshape(-1), used, *arrays)
  return out, lse.reshape(batch, steps, heads)


def _kernel(ids, used, q, *refs, turned, parts, sink, scale):
  # Keys beside the latents, and queries of them: one of each, or none.
  *q_key, seen, latent = refs[:parts + 1]
  key, refs = refs[parts + 1:2 * parts], refs[2 * parts:]
  sink = refs[0] if sink else None
  out, lse, latents, keys, placed, arrived, *carried = refs[sink is not None:]
  b, t, j = (pl.program_id(i) for i in range(3))
  query = b * pl.num_programs(1) + t
  count = pl.num_programs(2)

  def wanted(step, i):
    row = ids[(query * count + step) * _ROWS + i]
    return jnp.clip(row, 0, latent.shape[1] - 1)

  def copies(step, i):
    """Of the tiles of the i-th row of a step."""
    slot, row = step % 2, wanted(step, i)
    rows = pl.ds(pl.multiple_of(row // TILE * TILE, TILE), TILE)
    to = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
    yield pltpu.make_async_copy(
        latent.at[b, rows], latents.at[slot, to], arrived.at[slot, 0])
    if not key:
      return
    if turned:
      lanes = pl.ds(pl.multiple_of(row // LANES * LANES, LANES), LANES)
      yield pltpu.make_async_copy(
          key[0].at[b, :, lanes], keys.at[slot, i], arrived.at[slot, 1])
    else:
      yield pltpu.make_async_copy(
          key[0].at[b, rows], keys.at[slot, to], arrived.at[slot, 1])

  def each(step, what):
    def body(i, _):
      for copy in copies(step, i):
        what(copy)
      return _
    lax.fori_loop(0, _ROWS, body, 0)

  @pl.when(j == 0)
  def _():
    blocks.clear(carried)

  @pl.when((j == 0) & (used[query] > 0))
  def _():
    each(0, lambda copy: copy.start())

  @pl.when(j + 1 < used[query])
  def _():
    each(j + 1, lambda copy: copy.start())

  @pl.when(j < used[query])
  def _():
    each(j, lambda copy: copy.wait())
    slot = j % 2
    values = latents[slot]
    scores = blocks.product_nt(q[0, 0], values)
    if not key:
      pass
    elif turned:
      _place(keys.at[slot], placed, lambda i: wanted(j, i))
      found = placed[...]
      if keys.dtype != placed.dtype:
        found = pltpu.bitcast(found, keys.dtype)
      scores += blocks.product(q_key[0][0, 0], found)
    else:
      scores += blocks.product_nt(q_key[0][0, 0], keys[slot])
    blocks.absorb(carried, scale * scores, seen[0, 0] > 0,
                  values.astype(q.dtype))

  @pl.when(j == count - 1)
  def _():
    blocks.finish(carried, None if sink is None else sink[...], out.at[0, 0],
                  lse.at[0, 0])


def _place(tiles, placed, wanted):
  """Puts columns of tiles [rows, dr, 128] side by side, eight of each."""
  def group(n, _):
    lane = lax.broadcasted_iota(jnp.int32, (placed.shape[0], LANES), 1) // TILE
    together = jnp.zeros((placed.shape[0], LANES), placed.dtype)
    for i in range(_GROUP):
      at = n * _GROUP + i
      tile = tiles[at]
      if tile.dtype != placed.dtype:
        tile = pltpu.bitcast(tile, placed.dtype)  # lanes turn by 32 bits
      here = wanted(at) % LANES // TILE
      tile = pltpu.roll(tile, (i - here) * TILE % LANES, 1)
      together = jnp.where(lane == i, tile, together)
    placed[:, pl.ds(pl.multiple_of(n * LANES, LANES), LANES)] = together
    return _

  lax.fori_loop(0, _ROWS // _GROUP, group, 0)
