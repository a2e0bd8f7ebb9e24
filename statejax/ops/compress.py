"""From a block of tokens to one entry, carrying the block left open.

Every compressor takes the tokens of a step, the residual of the open block and
the step's `blocks.Blocks`, and returns the entries of the blocks that the step
completes and the new residual. A residual has a fixed size whatever the size
of a block. Sums and exponentials are float32 (float64 of float64 values).

Laws: split (L1), start (L2), padding (L3), packed (L4), initial gradient (L16).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from statejax.ops import blocks as bk

# Below every gate: an empty pool takes no part in a softmax, without NaN.
EMPTY = -1e30


class Pool(NamedTuple):
  """A softmax per channel over some tokens, as sums relative to its maximum.

    m = max_j g_j;   l = sum_j exp(g_j - m);   acc = sum_j exp(g_j - m) v_j

  All [..., D]; (-1e30, 0, 0) where there are no tokens. The entry is acc / l.
  """

  m: jax.Array
  l: jax.Array  # noqa: E741
  acc: jax.Array


class Overlap(NamedTuple):
  """Residual of `gated_overlap`: two pools.

  Attributes:
    current: the open block's own half, begun with the half which the block
      before it left to it.
    following: the half that the open block leaves to the next.
  """

  current: Pool
  following: Pool


class Extremes(NamedTuple):
  """Bounds per channel, [..., D]; (1e30, -1e30) where there are no tokens."""

  low: jax.Array
  high: jax.Array


def add_position_bias(gates, bias, positions):
  """Adds to each gate the bias of its token's place in the block.

  Args:
    gates: [B, T, D], any float dtype.
    bias: [size, D] float32.
    positions: [B, T] int32.

  Returns:
    [B, T, D] float32.
  """
  wide = _wide(gates)
  return gates.astype(wide) + bias.astype(wide)[positions % bias.shape[0]]


def gated(values, gates, residual, blocks):
  """`entry = sum_j softmax_j(gate_j) * value_j` per channel and block.

  Args:
    values: [B, T, D], any float dtype.
    gates: [B, T, D], any float dtype, position bias included.
    residual: `Pool` of [B, D], float32.
    blocks: `blocks.Blocks`.

  Returns:
    entries: [B, W, D] float32; 0 where no block completes.
    residual: `Pool`; bit-equal where n_valid is 0.

  Reference: DeepSeek-V4, heavily compressed attention (HCA).
  """
  whole, opened = _pools((gates, values), residual, blocks, _pool, _join,
                         _empty_pool)
  return _entries(whole, blocks), _frozen(blocks, residual, opened)


def gated_overlap(values, gates, residual, blocks):
  """`gated` where an entry also sees the block before its own.

    entry_w = softmax over {a-gates of block w-1} and {b-gates of block w} per
    channel, applied to a-values of block w-1 and b-values of block w

  Block 0 of a document has no left half: it is absent, not of gate 0.

  Args:
    values: halves (a | b), [B, T, 2 D], any float dtype.
    gates: halves (a | b), [B, T, 2 D], any float dtype, bias included.
    residual: `Overlap` of pools [B, D], float32.
    blocks: `blocks.Blocks`.

  Returns:
    entries: [B, W, D] float32; 0 where no block completes.
    residual: `Overlap`; bit-equal where n_valid is 0.

  Reference: DeepSeek-V4, compressed sparse attention (CSA).
  """
  (left_values, own_values), (left_gates, own_gates) = (
      jnp.split(x, 2, axis=-1) for x in (values, gates))
  left, left_open = _pools((left_gates, left_values), residual.following,
                           blocks, _pool, _join, _empty_pool)
  own, own_open = (_reduce((own_gates, own_values), chosen, _pool)
                   for chosen in (bk.members(blocks), bk.open_members(blocks)))

  # `current` has the left half for the first block that the state's document
  # completes, and what it saw of that block itself.
  goes_on = blocks.length > 0
  first = goes_on if blocks.document is None else (
      goes_on & (blocks.document[:, 0] == 0))
  none = _empty_pool(residual.current)
  brought = _choose(first, residual.current, none)
  # The block before it in the list is the one before it in its document,
  # unless the document begins with it.
  before = jax.tree.map(
      lambda x, y: jnp.concatenate([x[:, None], y[:, :-1]], axis=1),
      brought, left)
  index = jnp.arange(blocks.end.shape[1], dtype=jnp.int32)[None]
  linked = (index == 0) | (blocks.block > 0)
  before = _choose(linked, before, _empty_pool(before))
  entries = _entries(_join(before, own), blocks)

  # The same of the open block: after the last block of its document in this
  # step, or, without one, after what the state had of the document.
  at = jnp.maximum(blocks.count - 1, 0)[:, None, None]
  newest = jax.tree.map(
      lambda x: jnp.take_along_axis(x, at, axis=1)[:, 0], left)
  same = goes_on & (blocks.start == 0)
  current = _choose(blocks.count > blocks.first, newest,
                    _choose(same, residual.current, none))
  new = Overlap(_join(current, own_open), left_open)
  return entries, _frozen(blocks, residual, new)


def mean(values, residual, blocks):
  """`entry = sum_j value_j / size` per block.

  Args:
    values: [B, T, D], any float dtype.
    residual: sum of the open block, [B, D] float32.
    blocks: `blocks.Blocks`.

  Returns:
    entries: [B, W, D] float32; 0 where no block completes.
    residual: [B, D] float32; bit-equal where n_valid is 0.

  Reference: MoBA, arXiv 2502.13189; pooled index keys of Qwen's QSA.
  """
  total = lambda mask, x: jnp.sum(jnp.where(mask, x, _zero(x)), axis=-2)
  whole, opened = _pools((values,), residual, blocks, total, jnp.add,
                         jnp.zeros_like)
  return whole / blocks.size, _frozen(blocks, residual, opened)


def extremes(values, residual, blocks):
  """The smallest and the largest value of each channel and block.

  Args:
    values: [B, T, D], any float dtype.
    residual: `Extremes` of [B, D], float32.
    blocks: `blocks.Blocks`.

  Returns:
    entries: `Extremes` of [B, W, D] float32; empty where no block completes.
    residual: `Extremes`; bit-equal where n_valid is 0.

  Reference: Quest, arXiv 2406.10774.
  """
  def bounds(mask, x):
    least, most = (jnp.asarray(e, x.dtype) for e in (EMPTY, -EMPTY))
    return Extremes(
        jnp.min(jnp.where(mask, x, most), axis=-2, initial=-EMPTY),
        jnp.max(jnp.where(mask, x, least), axis=-2, initial=EMPTY))

  join = lambda a, b: Extremes(jnp.minimum(a.low, b.low),
                               jnp.maximum(a.high, b.high))
  empty = lambda x: Extremes(jnp.full_like(x.low, -EMPTY),
                             jnp.full_like(x.high, EMPTY))
  whole, opened = _pools((values,), residual, blocks, bounds, join, empty)
  return whole, _frozen(blocks, residual, opened)


def stored(pool, n_valid):
  """A pool as a leaf of a state, [B, 3, D].

  The maximum of an empty pool is never read, and -1e30 would drown the rest of
  the leaf where states are compared: it becomes 0, except in rows that took no
  step and keep their bits.

  Args:
    pool: `Pool` of [B, D].
    n_valid: [B] int32.
  """
  kept = (pool.l > 0) | (n_valid == 0)[:, None]
  return jnp.stack([jnp.where(kept, pool.m, 0.0), pool.l, pool.acc], axis=1)


def _pools(tokens, residual, blocks, reduce, join, empty):
  """Reduces the completed blocks, [B, W, D], and the open one, [B, D], each
  with the part that the residual has of it."""
  whole = _reduce(tokens, bk.members(blocks), reduce)
  opened = _reduce(tokens, bk.open_members(blocks), reduce)
  # Chosen before they are joined: what the residual holds for a block that it
  # is not of must reach neither values nor gradients.
  none = empty(residual)
  begun = _choose(blocks.spans, residual, none)
  head = join(jax.tree.map(lambda x: x[:, None], begun),
              jax.tree.map(lambda x: x[:, :1], whole))
  whole = jax.tree.map(lambda x, y: jnp.concatenate([x, y[:, 1:]], axis=1),
                       head, whole)
  return whole, join(_choose(blocks.continues, residual, none), opened)


def _reduce(tokens, chosen, reduce):
  """Gathers tokens [B, T, D] to [B, ..., M, D] and reduces over M."""
  index, mask = chosen
  flat = index.reshape(index.shape[0], -1, 1)
  gathered = [
      jnp.take_along_axis(x, flat, axis=1).reshape(*index.shape, x.shape[-1])
      .astype(_wide(x)) for x in tokens]
  return reduce(mask[..., None], *gathered)


def _pool(mask, gates, values):
  empty = jnp.asarray(EMPTY, gates.dtype)
  gates = jnp.where(mask, gates, empty)
  m = jnp.max(gates, axis=-2, initial=EMPTY)
  weight = jnp.where(mask, jnp.exp(gates - m[..., None, :]), _zero(gates))
  values = jnp.where(mask, values, _zero(values))
  return Pool(m, jnp.sum(weight, axis=-2), jnp.sum(weight * values, axis=-2))


def _join(a, b):
  """The pool of the tokens of both."""
  m = jnp.maximum(a.m, b.m)
  x, y = jnp.exp(a.m - m), jnp.exp(b.m - m)
  return Pool(m, a.l * x + b.l * y, a.acc * x + b.acc * y)


def _entries(pool, blocks):
  exists = blocks.exists[..., None]
  total = jnp.where(exists, pool.l, jnp.ones((), pool.l.dtype))
  return jnp.where(exists, pool.acc / total, _zero(pool.acc))


def _empty_pool(pool):
  return Pool(jnp.full_like(pool.m, EMPTY), jnp.zeros_like(pool.l),
              jnp.zeros_like(pool.acc))


def _frozen(blocks, old, new):
  """The new residual; of rows without tokens the old one, bit for bit."""
  return _choose(blocks.n_valid > 0, new, old)


def _choose(mask, a, b):
  """`where` over the leading axes of every leaf."""
  return jax.tree.map(lambda x, y: jnp.where(
      mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, y), a, b)


def _zero(x):
  return jnp.zeros((), x.dtype)


def _wide(x):
  return jnp.float64 if x.dtype == jnp.float64 else jnp.float32
