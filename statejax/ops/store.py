"""Append-only stores: the only way anything enters a growing leaf."""

import dataclasses

import jax
import jax.numpy as jnp


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
  data = store.data
  slots, length = data.shape[-2], new.shape[-2]
  width = min(slots, length)
  if width == 0:
    return store
  begin = jnp.clip(slot, 0, slots - width)
  where = jnp.stack(
      [jnp.broadcast_to(store.layer, begin.shape), begin], axis=-1)
  # The window of `width` slots around the new tokens is read, merged and
  # written back whole, so one scatter of B windows serves every case.
  window = (1, 1, *data.shape[2:-2], width, data.shape[-1])
  rank = data.ndim
  middle = tuple(range(1, rank - 1))
  old = jax.lax.gather(
      data, where,
      jax.lax.GatherDimensionNumbers(
          offset_dims=middle, collapsed_slice_dims=(0,),
          start_index_map=(0, rank - 2), operand_batching_dims=(1,),
          start_indices_batching_dims=(0,)),
      slice_sizes=window, mode='clip')
  source = (begin - slot + first)[:, None] + (
      jnp.arange(width, dtype=jnp.int32)[None])
  keep = (source >= first[:, None]) & (source < count[:, None])
  shape = (new.shape[0],) + (1,) * (new.ndim - 3) + (width, 1)
  fresh = jnp.take_along_axis(
      new, jnp.clip(source, 0, length - 1).reshape(shape), axis=-2)
  merged = jnp.where(keep.reshape(shape), fresh.astype(data.dtype), old)
  data = jax.lax.platform_dependent(
      data, where, merged, cpu=_write_rows, default=_scatter_rows)
  return dataclasses.replace(store, data=data)


def _scatter_rows(data, where, merged):
  """Writes merged[b] at data[layer, b, ..., slot:, :], all rows at once."""
  rank = data.ndim
  return jax.lax.scatter(
      data, where, merged,
      jax.lax.ScatterDimensionNumbers(
          update_window_dims=tuple(range(1, rank - 1)),
          inserted_window_dims=(0,),
          scatter_dims_to_operand_dims=(0, rank - 2),
          operand_batching_dims=(1,), scatter_indices_batching_dims=(0,)),
      unique_indices=True, mode='clip')


def _write_rows(data, where, merged):
  """The same row after row: XLA's CPU backend copies a whole store before it
  scatters into it, but updates a loop's carry in place."""
  def one(row, data):
    at = (where[row, 0], row, *(0,) * (data.ndim - 4), where[row, 1], 0)
    # With 64-bit types the loop counts in int64.
    at = [jnp.asarray(i, jnp.int32) for i in at]
    return jax.lax.dynamic_update_slice(data, merged[row][None, None], at)
  return jax.lax.fori_loop(0, merged.shape[0], one, data)
