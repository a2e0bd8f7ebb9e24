"""Attention to blocks of a store, on a TPU: blocks are fetched by their ids.

  p_j = exp(scale q.k_j) / (exp(sink) + sum_i exp(scale q.k_i))
  out = sum_j p_j v_j;   lse = log(exp(sink) + sum_i exp(scale q.k_i))

over the keys j <= last of the blocks named by `ids`. The grid runs over rows,
sets of heads and queries, and one after the other over the ids of a query:
they are prefetched, and the index maps of the keys' blocks read them. Maximum,
sum and weighted sum stay in VMEM meanwhile. Nothing is gathered in HBM.

XLA lays out a store on a TPU so that no lane is empty: one whose width is no
multiple of 128 has its positions along the lanes. It is taken as it lies, or it
would be copied; then 128 positions are fetched for a block of fewer.

Single rows are `gather_rows_tpu`'s.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import manual, plain_gather
from pallas_kernels.plain_gather import MASKED, parts

NAME = 'gather_attend'
LANES = 128
# Prefetched ids lie in SMEM, of which there is 1 MiB. Twice as many failed.
MOST_IDS = 2 ** 17
# Rows of a tile as XLA lays out a store.
TILE = 8


def declines(q, k, v, ids, *, block) -> str | None:
  """Returns why the kernel cannot take arrays of these shapes, or None."""
  if block % TILE:
    return f'its blocks are multiples of {TILE} rows, not {block}'
  if any(map(narrow, (*parts(k), *([] if v is None else [v])))) and (
      LANES % block and block % LANES):
    return (f'of keys whose width is no multiple of {LANES} its blocks divide '
            f'{LANES} or are multiples of it, not {block}')
  batch, steps, sets, count = ids.shape
  if not (batch and steps and count and parts(k)[0].shape[2]):
    return f'it has no work for ids of {ids.shape}'
  if batch * sets * count > MOST_IDS:
    return (f'SMEM holds {MOST_IDS} ids, one query of each row has '
            f'{batch * sets * count}')
  return None


def gather_attend(q, k, v, ids, last, sink=None, *, block, scale,
                  interpret=False):
  """Attends to the named blocks of each query and group of heads.

  Query head h belongs to group h // (H / G) of the store and to set
  h // (H / S). Where q and k are tuples, the scores of their parts add.

  Args:
    q: [B, T, H, K], float32 or bfloat16; or a tuple of such parts.
    k: [B, G, N, K]; or a tuple of as many parts, each with its own K.
    v: [B, G, N, V]; None takes the first part of k.
    ids: [B, T, S, M] int32, distinct blocks of each query and set: block i is
      the rows i * block and on. -1 names none. S is a multiple of G.
    last: the last position that a query may see, [B, T] int32.
    sink: logit per head, [H] float32, or None.
    block: rows per block, a multiple of 8.
    scale: factor on the scores.
    interpret: run on any device, slowly, for tests.

  Returns:
    out: [B, T, H, V] in q.dtype; 0 where nothing is seen.
    lse: [B, T, H] float32; -1e30 where nothing is seen and there is no sink.
    Differentiable: the backward pass gathers in plain JAX.

  Raises:
    ValueError: see `declines`.

  Reference: arXiv 2502.11089 (NSA), the selected branch.
  """
  reason = declines(q, k, v, ids, block=block)
  if reason:
    raise ValueError(f'{reason}: take another implementation.')
  arrays = manual.alike((parts(q), parts(k), v, sink), ids, last)
  return _run((block, float(scale), interpret), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static, floats, ids, last):
  return in_pieces(functools.partial(_call, static), floats, ids, last)


def _run_forward(static, floats, ids, last):
  return _run(static, floats, ids, last), (floats, ids, last)


def _run_backward(static, residuals, cotangents):
  floats, ids, last = residuals
  block, scale, _ = static

  def plain(floats):
    q, k, v, sink = floats
    return plain_gather.gather_attend(
        q, k, v, ids, last, sink, block=block, scale=scale)

  return *jax.vjp(plain, floats)[1](cotangents), None, None


_run.defvjp(_run_forward, _run_backward)


def in_pieces(call, floats, ids, last):
  """Runs `call` on as many queries at a time as SMEM has room for ids of.

  Args:
    call: function of (floats, ids, last) to (out, lse).
    floats: (q, k, v, sink); q is a tuple of [B, T, ...].
    ids: [B, T, ..., M].
    last: [B, T].
  """
  q, *rest = floats
  steps = ids.shape[1]
  size = max(1, MOST_IDS * steps // ids.size)
  if size >= steps:
    return call(floats, ids, last)
  count = -(-steps // size)
  size = -(-steps // count)

  def cut(x, fill=0):
    missing = [(0, 0)] * x.ndim
    missing[1] = (0, count * size - steps)
    x = jnp.pad(x, missing, constant_values=fill)
    return jnp.moveaxis(
        x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

  pieces = tuple(map(cut, q)), cut(ids, -1), cut(last)
  found = lax.map(lambda x: call((x[0], *rest), *x[1:]), pieces)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(
      x.shape[1], -1, *x.shape[3:])[:, :steps]
  return jax.tree.map(join, found)


def _call(static, floats, ids, last):
  block, scale, interpret = static
  q, k, v, sink = floats
  stores = [*k] if v is None else [*k, v]
  fetched = max(block, LANES) if any(map(narrow, stores)) else block
  batch, steps, sets, count = ids.shape
  size, heads = k[0].shape[2], q[0].shape[2] // sets
  each = sets // k[0].shape[1]
  width = (k[0] if v is None else v).shape[-1]
  q = [x.reshape(batch, steps, sets, heads, x.shape[-1]) for x in q]
  by_query = lambda b, g, t, m, *_: (b, t, g, 0, 0)

  def by_id(b, g, t, m, ids, last):
    at = ((b * steps + t) * sets + g) * count + m
    # What names no slot of the store is masked, but fetched all the same.
    fetch = jnp.clip(ids[at] * block // fetched, 0, (size - 1) // fetched)
    return b, g // each, fetch, 0

  def by_id_turned(*index):
    b, group, at, _ = by_id(*index)
    return b, group, 0, at

  arrays, specs = list(q), [
      pl.BlockSpec((1, 1, 1, heads, x.shape[-1]), by_query) for x in q]
  for x in stores:
    width_of = x.shape[-1]
    if narrow(x):
      arrays.append(x.swapaxes(2, 3))
      specs.append(pl.BlockSpec((1, 1, width_of, fetched), by_id_turned))
    else:
      arrays.append(x)
      specs.append(pl.BlockSpec((1, 1, fetched, width_of), by_id))
  if sink is not None:
    arrays.append(sink.astype(jnp.float32).reshape(sets, heads, 1))
    specs.append(pl.BlockSpec((1, heads, 1), lambda b, g, t, m, *_: (g, 0, 0)))
  out, lse = pl.pallas_call(
      functools.partial(
          _kernel, turned=tuple(map(narrow, stores)), parts=len(q),
          sink=sink is not None, scale=scale, size=size, block=block,
          fetched=fetched),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(batch, sets, steps, count),
          in_specs=specs,
          out_specs=[pl.BlockSpec((1, 1, 1, heads, width), by_query),
                     pl.BlockSpec((1, 1, 1, 1, heads), by_query)],
          scratch_shapes=scratch(heads, width)),
      out_shape=[
          manual.struct((batch, steps, sets, heads, width), q[0].dtype, q[0]),
          manual.struct((batch, steps, sets, 1, heads), jnp.float32, q[0])],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'parallel',
                               'arbitrary')),
      interpret=interpret, name=NAME,
  )(ids.reshape(-1), last.reshape(-1), *arrays)
  return (out.reshape(batch, steps, sets * heads, width),
          lse.reshape(batch, steps, sets * heads))


def _kernel(ids, last, *refs, turned, parts, sink, scale, size, block, fetched):
  inputs, (out, lse, *carried) = refs[:-5], refs[-5:]
  q, stores = inputs[:parts], inputs[parts:parts + len(turned)]
  b, g, t, m = (pl.program_id(i) for i in range(4))
  sets, steps, count = (pl.num_programs(i) for i in (1, 2, 3))
  query = b * steps + t
  chosen = ids[(query * sets + g) * count + m]

  @pl.when(m == 0)
  def _():
    clear(carried)

  @pl.when(chosen >= 0)
  def _():
    # What is fetched may begin before the block and end behind it.
    begin = chosen * block % fetched
    bound = jnp.minimum(last[query], size - 1) - chosen * block + begin
    end = jnp.minimum(bound, begin + block - 1)
    at = lax.broadcasted_iota(jnp.int32, (1, fetched), 1)
    scores = sum(
        (product if turn else product_nt)(a[0, 0, 0], x[0, 0])
        for a, x, turn in zip(q, stores, turned))
    # Without values of their own, keys are the values.
    own = -1 if len(stores) > parts else 0
    values = stores[own][0, 0].astype(q[0].dtype)
    if size % fetched:  # past its end a store holds anything
      axis = 1 if turned[own] else 0
      at_value = lax.broadcasted_iota(jnp.int32, values.shape, axis)
      values = jnp.where(at_value <= bound, values.astype(jnp.float32), 0)
    absorb(carried, scale * scores, (at >= begin) & (at <= end),
           values.astype(q[0].dtype), turned[own])

  @pl.when(m == count - 1)
  def _():
    finish(carried, inputs[-1][0] if sink else None, out.at[0, 0, 0],
           lse.at[0, 0, 0])


def narrow(x):
  """Whether XLA has the positions of a store along the lanes."""
  return x.shape[-1] % LANES != 0


# Parts that `gather_rows_tpu` shares: an online softmax.


def scratch(heads, width):
  """Maximum and sum, in every lane, and weighted sum."""
  of = lambda lanes: pltpu.VMEM((heads, lanes), jnp.float32)
  return [of(LANES), of(LANES), of(width)]


def clear(carried):
  """Before the first key."""
  top, total, weighted = carried
  top[...] = jnp.full_like(top, MASKED)
  total[...] = jnp.zeros_like(total)
  weighted[...] = jnp.zeros_like(weighted)


def absorb(carried, scores, seen, values, turned=False):
  """Adds keys: scores [R, J] float32, seen [1, J], values [J, V], or turned
  [V, J]."""
  top, total, weighted = carried
  scores = jnp.where(seen, scores, MASKED)
  before = top[:, :1]
  after = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
  # Where nothing was seen yet, the difference is 0 and so is what it scales.
  fade = jnp.exp(before - after)
  p = jnp.where(seen, jnp.exp(scores - after), 0.0)
  sums = fade * total[:, :1] + jnp.sum(p, axis=1, keepdims=True)
  top[...] = jnp.broadcast_to(after, top.shape)
  total[...] = jnp.broadcast_to(sums, total.shape)
  weighted[...] = fade * weighted[...] + (product_nt if turned else product)(
      p.astype(values.dtype), values)


def finish(carried, sink, out, lse):
  """After the last key: sink is a column [R, 1] or None."""
  top, total, weighted = (x[...] for x in carried)
  top, total = top[:, :1], total[:, :1]
  if sink is not None:
    before, top = top, jnp.maximum(top, sink)
    fade = jnp.exp(before - top)
    total, weighted = fade * total + jnp.exp(sink - top), fade * weighted
  # What is no number has been seen too, and has to be passed on.
  some = ~(total <= 0)
  safe = jnp.where(some, total, 1.0)
  out[...] = (weighted / safe).astype(out.dtype)
  column = jnp.where(some, top + jnp.log(safe), MASKED)
  # A column becomes a row.
  heads = column.shape[0]
  i, j = (lax.broadcasted_iota(jnp.int32, (heads, heads), d) for d in (0, 1))
  lse[...] = jnp.sum(jnp.where(i == j, column, 0.0), axis=0, keepdims=True)


def product_nt(a, b):
  """a b^T of [R, D] and [J, D], operands as a, float32 sums."""
  return _dot(a, b.astype(a.dtype), ((1,), (1,)))


def product(a, b):
  """a b of [R, J] and [J, D], operands as a, float32 sums."""
  return _dot(a, b.astype(a.dtype), ((1,), (0,)))


def _dot(a, b, contract):
  exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (contract, ((), ())), precision=exact,
                         preferred_element_type=jnp.float32)
