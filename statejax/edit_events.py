"""Edits of many rows at once, as events that a jitted program can commit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from statejax import state as st
from statejax.layers import slots as layer
from statejax.ops import lifecycle
from statejax.ops import slots as sl
from statejax.slot_facts import MOST

# What of an event a caller says; who acts is not.
_GIVEN = tuple(f.name for f in dataclasses.fields(sl.Events)
               if f.name not in ('op', 'host', 'principal'))


def of_rows(rules, op, mine, fields, *, principal, host):
  """Returns one edit of each of some rows, `statejax.ops.slots.Events` [B, 1].

  Runs inside `jax.jit` too; numbers that are traced are not looked at.

  Args:
    rules: `statejax.config.SlotRules`.
    op: of `statejax.ops.slots.OPS`.
    mine: the rows that it is for, [B] bool.
    fields: dict of those of `Events`, [B, ...] or what all rows have in common.
    principal, host: of all of them.

  Raises:
    ValueError: an unknown op or field, one of another shape, or a number that a
      bank cannot hold.
  """
  if op not in sl.OPS:
    raise ValueError(f'op: expected one of {", ".join(sl.OPS)}; got {op!r}.')
  # What is not traced needs no program.
  on = lambda x: jnp if isinstance(x, jax.core.Tracer) else np
  mine = on(mine).asarray(mine)
  if mine.ndim != 1 or mine.dtype != bool:
    raise ValueError(f'mine: expected [B] bool, got {mine.shape} {mine.dtype}.')
  wrong = sorted(set(fields) - set(_GIVEN))
  if wrong:
    raise ValueError(f'fields: expected some of {", ".join(_GIVEN)}; got '
                     f'{", ".join(wrong)}.')
  given, kinds = fields | {'principal': principal, 'host': host}, _kinds(rules)
  for name, x in given.items():
    dtype, rest = kinds[name]
    x, shape = on(x).asarray(x), (mine.size, *rest)
    if dtype == jnp.int32:
      _check(name, x, on(x) is np)
    if x.shape not in ((), rest, shape):
      raise ValueError(f'{name}: expected {shape} or {rest}, got {x.shape}.')
    given[name] = on(x).broadcast_to(x, shape)[:, None]
  number = on(mine).where(mine, sl.OPS.index(op), sl.NULL)
  return sl.events(rules, number[:, None], **given)


def commit(model, name, state, events):
  """Applies events to the slots of a layer; pure, for use inside `jax.jit`.

  What the model has decided and not committed yet, and would undo them, is
  dropped: see `statejax.ops.lifecycle.overruled`. An expired slot is none: a
  write makes a new object, in its place or elsewhere.

  Args:
    model: `LanguageModel`.
    name: of the slot layer.
    state: `ServingState` of B rows.
    events: `statejax.ops.slots.Events` [B, E]; those of no time happen now.
      See `Memory.events`.

  Returns:
    The state, its witness as it was, and `statejax.ops.slots.Receipts` [B, E];
    `Memory.noted` writes them down.

  Raises:
    ValueError: a layer without slots, or events of another number of rows.
  """
  state_of(model, name, state)
  if events.op.ndim != 2 or events.op.shape[0] != st.rows(state):
    raise ValueError(f'events: expected [{st.rows(state)}, E], as many rows as '
                     f'the state has, got {events.op.shape}.')
  new, receipts = _commit(model.config.layer(name).mixer.rules,
                          state.layers[name], state.length, events)
  return dataclasses.replace(
      state, layers=state.layers | {name: new}), receipts


def state_of(model, name, state):
  """Returns the state of a slot layer.

  Raises:
    ValueError: no slot layer has this name, or the state is another model's.
  """
  found = state.layers.get(name)
  if not isinstance(found, layer.SlotsState):
    raise ValueError(f'name: expected a slot layer of {list(state.layers)}, '
                     f'got {name!r}.')
  rules = model.config.layer(name).mixer.rules
  wanted = sl.specs(rules, st.rows(state), found.value.dtype)
  for field in dataclasses.fields(sl.Bank):
    want = list(getattr(wanted, field.name).shape)
    got = list(getattr(found, field.name).shape[1:])
    if got != want:
      raise ValueError(
          f'{name}: {field.name}: expected {want}, as the model has it, got '
          f'{got}; this is the state of another model.')
  return found


@functools.partial(jax.jit, static_argnums=0)
def _commit(rules, held, length, events):
  """One program for all models with such a memory."""
  events = dataclasses.replace(events, time=jnp.where(
      events.time < 0, length[:, None], events.time))
  fields = [f.name for f in dataclasses.fields(sl.Bank)]
  flat = jax.tree.map(lambda x: x[0], held)
  held = sl.Bank(**{n: getattr(flat, n) for n in fields})
  # Hidden from edits as from reads, but left for the stream to empty: an edit
  # of one slot changes no other. A PURGE gets at what is still there.
  purged = jnp.any((events.op == sl.PURGE)[..., None] & jax.nn.one_hot(
      events.slot, rules.slots, dtype=bool), axis=1)
  gone = (held.expires >= 0) & (length[:, None] >= held.expires) & ~purged
  before = dataclasses.replace(
      held, status=jnp.where(gone, sl.EMPTY, held.status))
  bank, receipts = lifecycle.commit(
      rules, before, events, jnp.full_like(length, -1))
  flat = layer.drop(flat, lifecycle.overruled(
      rules, before, bank, events, receipts, layer.waiting(flat)))
  bank = dataclasses.replace(bank, status=jnp.where(
      gone & (bank.oid == held.oid), held.status, bank.status))
  flat = dataclasses.replace(flat, **{n: getattr(bank, n) for n in fields})
  return jax.tree.map(lambda x: x[None], flat), receipts


@jax.jit
def row_of(held, row):
  """The bank of one row of a slot layer's state."""
  return sl.Bank(**{f.name: getattr(held, f.name)[0][row][None]
                    for f in dataclasses.fields(sl.Bank)})


@functools.cache
def _kinds(rules):
  """{field: (dtype, shape behind [B, E])}."""
  blank = jax.eval_shape(lambda: sl.events(rules, jnp.zeros((1, 1))))
  return {f.name: (getattr(blank, f.name).dtype, getattr(blank, f.name).shape[
      2:]) for f in dataclasses.fields(sl.Events)}


def _check(name, x, known):
  """Raises unless a bank holds integers as they are; `known` ones are seen."""
  if x.dtype.kind not in 'iu' or (
      known and x.size and (x.min() < -1 or x.max() > MOST)):
    raise ValueError(f'{name}: expected integers of -1 to {MOST}, got '
                     f'{x.tolist() if known else x.dtype}.')


def undone_at(before, after, row):
  """Returns the position of the first token whose event waited in a row and was
  undone by an edit, -1 for none.

  Args:
    before, after: the layer's `SlotsState`.
    row: of them.
  """
  waited, waits, time = (np.asarray(x)[0, row] for x in (
      before.want, after.want, before.want_time))
  gone = waited != waits
  return int(time[gone].min()) if gone.any() else -1
