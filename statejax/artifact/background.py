"""Minting beside a decode loop, which waits for a copy of the row alone.

What a mint does otherwise, digests, payload, disk and catalog, is done by a
thread, from the copy: steps that consume the state meanwhile change nothing.
"""

import functools
import os
import sys
import threading
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from statejax import state as st
from statejax.artifact import mint
from statejax.artifact.objects import Kept

# Slots of a growing leaf that are copied at once; what lies behind the row's
# length is not worth the time.
_BLOCK = 128
# By how much the thread and those it starts give way to the loop.
_NICE = 10


class Busy(RuntimeError):
  """As many mints as there may be are not done yet."""


class Minter:
  """Mints rows of the states of one loop; of one thread, as its store is.

    with Minter(shop, state) as minter:
      pending = minter.start(state, row, host, terms, ref='chat')
      ... steps that consume the state ...
      kept = pending.result()

  They are done one after another, in the order in which they were started. A
  process that dies before `result` returns leaves what a dying `mint.mint`
  does: the artifact whole and in the catalog, or nothing of it.
  """

  def __init__(self, shop, state, *, most: int = 2):
    """Sets memory aside for rows and compiles the copy.

    Args:
      shop: `objects.Store`; the thread opens it once more.
      state: one as those that will be minted: its layers and capacity. Stays
        usable.
      most: mints that may be under way; each has memory of its own, a row's.
        A copy taken beside a mint takes longer: on two cores almost twice.

    Raises:
      ValueError: most < 1.
    """
    if most < 1:
      raise ValueError(f'most: expected >= 1, got {most}.')
    self._shop, self._facts = shop.again(), _facts(state)
    self._lock = threading.Lock()
    self._free = [_room(state) for _ in range(most)]
    self._most = most
    self._thread = futures.ThreadPoolExecutor(1, 'mint', _give_way)

  def start(self, state, row: int, host, terms: mint.Terms,
            **more) -> 'futures.Future[Kept]':
    """Takes a copy of a row, to be minted; returns before it is.

    Args:
      state: `ServingState`; the next step may consume it.
      row: of it.
      host, terms, **more: see `mint.mint`, the principal who acts among them;
        `expect` is of the time at which it is kept, after those that were
        started before.

    Returns:
      A future. Its `result()` waits for `objects.Kept` and raises what
      `mint.mint` raises, a full disk or an unsound state.

    Raises:
      Busy: `most` are not done; wait for one, or leave this one out.
      ValueError: no such row, or a state of another kind than the first.
    """
    if not 0 <= row < st.rows(state):
      raise ValueError(f'row: expected 0..{st.rows(state) - 1}, got {row}.')
    if _facts(state) != self._facts:
      raise ValueError('state: expected the layers and the capacity of the '
                       'state that this Minter was made for, on such devices, '
                       'got others; make another Minter.')
    with self._lock:
      if not self._free:
        raise Busy(f'expected fewer than {self._most} mints under way, got '
                   f'{self._most}; wait for the result of one, or leave this '
                   'one out.')
      room = self._free.pop()
    try:
      held = room = (_copy if _at_hand(state) else _hold)(room, state, row)
      done = self._thread.submit(self._mint, held, host, terms, more)
    except BaseException:
      self._give_back(room)
      raise
    done.add_done_callback(
        lambda done: self._give_back(held) if done.cancelled() else None)
    return done

  def close(self):
    """Waits for all that was started; what failed is told by its `result`."""
    self._thread.shutdown()
    self._shop.catalog.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _mint(self, held, host, terms, more):
    try:
      return mint.mint(self._shop, jax.tree.map(jnp.asarray, held), 0, host,
                       terms, **more)
    finally:  # before its result is there: whoever waits for it may start one
      self._give_back(held)

  def _give_back(self, room):
    with self._lock:
      self._free.append(room)


def _give_way():
  if sys.platform == 'linux':  # elsewhere priorities are of whole processes
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _facts(state):
  """All that makes two states' rows fit into the same memory."""
  return state.capacity, state.strides, _at_hand(state), [
      (path, axes, x.dtype, tuple(n for n, a in zip(x.shape, axes)
                                  if a != 'batch'))
      for path, x, axes, _ in st.leaves(state)]


def _at_hand(state):
  """Whether every array lies whole in this host's memory."""
  return all([device.platform for device in x.devices()] == ['cpu']
             for x in jax.tree.leaves(state))


def _room(state):
  """Memory for one row, where `_copy` or `_hold` will put it."""
  first = _first(state)
  if _at_hand(state):
    return jax.tree.map(np.array, first)
  # Where the row lies on its devices is as it comes out of the state.
  return _hold(first, state, 0)


def _copy(room, state, row):
  """As `_hold`, of arrays in this host's memory, which numpy copies faster."""
  strides, length = dict(state.strides), int(np.asarray(state.length)[row])
  def one(path, axes, kind, held, x):
    at = [slice(None)] * x.ndim
    at[axes.index('batch')] = slice(0, 1)
    if kind == 'growing':
      at[axes.index('capacity')] = slice(length // strides.get(path, 1))
    there = list(at)
    there[axes.index('batch')] = slice(row, row + 1)
    np.copyto(held[tuple(at)], np.asarray(x)[tuple(there)])
    return held
  return st.map_leaves(one, room, state)


@jax.jit
def _first(state):
  """A copy of the first row, never the state's own memory."""
  return st.map_leaves(lambda path, axes, kind, x: jnp.copy(
      jax.lax.slice_in_dim(x, 0, 1, axis=axes.index('batch'))), state)


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _hold(room, state, row):
  """Copies a row, of growing leaves what is live, into memory set aside.

  Args:
    room: a state of one row; consumed, its memory is the result's.
    state: any number of rows.
    row: int32 scalar.

  Returns:
    A state of one row; behind its length it holds whatever `room` did.
  """
  strides = dict(state.strides)
  length = jax.lax.dynamic_index_in_dim(state.length, row, keepdims=False)
  def one(path, axes, kind, old, x):
    batch = axes.index('batch')
    if kind == 'fixed':
      return jax.lax.dynamic_slice_in_dim(x, row, 1, batch)
    axis = axes.index('capacity')
    size = [1 if i == batch else n for i, n in enumerate(x.shape)]
    size[axis] = min(_BLOCK, x.shape[axis])
    def copy(i, old):
      start = [jnp.int32(0)] * x.ndim
      start[axis] = jnp.minimum(i * size[axis], x.shape[axis] - size[axis])
      there = [row if i == batch else at for i, at in enumerate(start)]
      return jax.lax.dynamic_update_slice(
          old, jax.lax.dynamic_slice(x, there, size), start)
    slots = jnp.minimum(length // strides.get(path, 1), x.shape[axis])
    return jax.lax.fori_loop(0, -(-slots // max(1, size[axis])), copy, old)
  return st.map_leaves(one, room, state)
