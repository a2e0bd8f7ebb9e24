"""Append-only stores: the only way anything enters a growing leaf."""

import dataclasses

import jax
import jax.numpy as jnp

# Slots that a TPU rewrites together: rows of one tile of bfloat16.
_TILE = 16


def append(store, new, slot, first, count):
  """Writes `new[first:count]` of each row to its slots `slot, slot+1, ...`.

  Slots at or past the capacity are dropped: nothing wraps, clamps or touches
  another row. Rows with `count <= first` keep their bits.

  Args:
    store: `statejax.state.Store` over [layers, B, ..., N, K].
    new: [B, ..., T, K].
    slot: [B] int32.
    first: [B] int32.
    count: [B] int32.

  Returns:
    The store with this layer's rows extended.
  """
  if min(store.data.shape[-2], new.shape[-2]) == 0:
    return store
  data = jax.lax.platform_dependent(
      store.data, store.layer, new, slot, first, count, cpu=_row_by_row,
      tpu=_tile_by_tile, default=_at_once)
  return dataclasses.replace(store, data=data)


def _window(data, new, slot, first, count, begin, width):
  """What is new in the slots `begin .. begin + width - 1` of each row.

  Returns:
    where, [B, ..., width, 1] bool, and what, [B, ..., width, K].
  """
  source = (begin - slot + first)[:, None] + (
      jnp.arange(width, dtype=jnp.int32)[None])
  keep = (source >= first[:, None]) & (source < count[:, None])
  shape = (new.shape[0],) + (1,) * (new.ndim - 3) + (width, 1)
  fresh = jnp.take_along_axis(
      new, jnp.clip(source, 0, new.shape[-2] - 1).reshape(shape), axis=-2)
  return keep.reshape(shape), fresh.astype(data.dtype)


def _tile_by_tile(data, layer, new, slot, first, count):
  """Row after row, whole tiles, read and written inside the loop.

  Fewer slots, or a read of all rows before, and XLA's TPU backend lays out
  the store as the few new rows want it: it copies the store to write to it.
  """
  slots = data.shape[-2]
  width = min(slots, -(-(new.shape[-2] + _TILE - 1) // _TILE) * _TILE)
  begin = jnp.clip(slot // _TILE * _TILE, 0, slots - width)
  keep, fresh = _window(data, new, slot, first, count, begin, width)

  def one(row, data):
    at = _place(layer, row, begin, data)
    old = jax.lax.dynamic_slice(data, at, (1, 1, *fresh.shape[1:]))
    merged = jnp.where(keep[row], fresh[row], old[0, 0])
    return jax.lax.dynamic_update_slice(data, merged[None, None], at)

  return jax.lax.fori_loop(0, new.shape[0], one, data)


def _merged(data, layer, new, slot, first, count):
  """The window of the new slots of each row, read and merged, and where it
  begins: one scatter of B windows serves every case."""
  slots = data.shape[-2]
  width = min(slots, new.shape[-2])
  begin = jnp.clip(slot, 0, slots - width)
  where = jnp.stack([jnp.broadcast_to(layer, begin.shape), begin], axis=-1)
  window = (1, 1, *data.shape[2:-2], width, data.shape[-1])
  rank = data.ndim
  old = jax.lax.gather(
      data, where,
      jax.lax.GatherDimensionNumbers(
          offset_dims=tuple(range(1, rank - 1)), collapsed_slice_dims=(0,),
          start_index_map=(0, rank - 2), operand_batching_dims=(1,),
          start_indices_batching_dims=(0,)),
      slice_sizes=window, mode='clip')
  keep, fresh = _window(data, new, slot, first, count, begin, width)
  return begin, where, jnp.where(keep, fresh, old)


def _at_once(data, layer, new, slot, first, count):
  """Writes merged[b] at data[layer, b, ..., slot:, :], all rows at once."""
  _, where, merged = _merged(data, layer, new, slot, first, count)
  rank = data.ndim
  return jax.lax.scatter(
      data, where, merged,
      jax.lax.ScatterDimensionNumbers(
          update_window_dims=tuple(range(1, rank - 1)),
          inserted_window_dims=(0,),
          scatter_dims_to_operand_dims=(0, rank - 2),
          operand_batching_dims=(1,), scatter_indices_batching_dims=(0,)),
      unique_indices=True, mode='clip')


def _row_by_row(data, layer, new, slot, first, count):
  """The same row after row: XLA's CPU backend copies a whole store before it
  scatters into it, but updates a loop's carry in place."""
  begin, _, merged = _merged(data, layer, new, slot, first, count)
  def one(row, data):
    return jax.lax.dynamic_update_slice(
        data, merged[row][None, None], _place(layer, row, begin, data))
  # A loop of one turn would be unrolled and its write repeated in everything
  # that reads the store, each with a copy; a single row is written twice.
  rows = merged.shape[0]
  return jax.lax.fori_loop(
      0, max(rows, 2), lambda i, data: one(i % rows, data), data)


def _place(layer, row, begin, data):
  """Where the window of a row begins in `data`."""
  at = (layer, row, *(0,) * (data.ndim - 4), begin[row], 0)
  # With 64-bit types the loop counts in int64.
  return [jnp.asarray(i, jnp.int32) for i in at]
