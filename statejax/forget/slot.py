"""Deletes of one slot, and how its object is forgotten for good."""

import dataclasses

import jax
import numpy as np

from statejax import state as st
from statejax.forget import receipt as rc
from statejax.layers import slots as layer
from statejax.ops import lifecycle
from statejax.ops import slots as sl
from statejax.slot_facts import integer

# What deleting a slot empties, and what purging it does not.
_DELETED = ('value', 'span', 'source', 'salience')
_COUNTERS = ('seq', 'next_oid')


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a slot's object is forgotten by the whole model.

  Attributes:
    mode: 'purge', or 'replay' from a snapshot of at most `before` tokens.
    before: position; -1 for 'purge'.
    why: the reason.
  """

  mode: str
  before: int
  why: str


def plan(memory, state, slot, row=0):
  """Returns the `Plan` that forgets a slot's object in the whole model.

  A value that was written from outside and never read has changed nothing but
  its slot. What was read is in all that came after the first read, and what the
  stream has said of the object is in all that came after it, also where that
  waits to be committed. Whether only edits have made the object, the journal
  knows; without one it is taken for the stream's. What an object has pushed out
  when it came is not brought back, and the same words said elsewhere, without
  an event of this object, are not looked for.

  Raises:
    ValueError: an empty slot, or none of this number.
  """
  state_row = st.take(state, row)
  bank = jax.device_get(memory.bank(state_row))
  slot = integer('slot', slot, 0, bank.status.shape[1] - 1)
  # What has expired is hidden, and still there until the next commit.
  if bank.status[0, slot] == sl.EMPTY:
    raise ValueError(f'slot {slot}, row {row}: expected an object, got an '
                     'empty slot; nothing is left to forget here.')
  waits = jax.tree.map(lambda x: x[0], state_row.layers[memory.layer])
  waits = layer.waiting(waits)
  about = np.asarray(lifecycle.meant(
      memory.config.rules, memory.bank(state_row), waits)) == slot
  if about.any():
    said = np.asarray(waits.source)[about][:, 0]
    begin = int(np.where(said < 0, np.asarray(waits.time)[about], said).min())
    return Plan('replay', begin,
                f'the stream has spoken of it at {begin}, which waits')
  version, source, first = (int(x[0, slot]) for x in (
      bank.version, bank.source[..., 0], bank.t_first))
  if memory.untouched(state, slot, row):
    if bank.reads[0, slot] == 0:
      return Plan('purge', -1, 'written from outside and never read')
    return Plan('replay', first, f'written from outside, first read at {first}')
  if version == 1 and source >= 0:
    return Plan('replay', source, f'said by the stream at {source}')
  return Plan('replay', 0, 'it is not known who wrote its first version')


def suppress(memory, state, slot, row=0, **where):
  """Deletes a slot's values: its answers stop, the bank keeps no byte of them.

  Args:
    memory: `statejax.memory.Memory`.
    state: `ServingState`.
    slot: number of the slot.
    row: of the state.
    **where: of `Memory.delete`.

  Returns:
    The state and a `Receipt` of scope 'bank', or 'none' where it was refused.
  """
  new, edit = memory.delete(state, slot, row=row, **where)
  return new, _of_slot('suppress', memory, state, edit, _DELETED, 'bank')


def purge(memory, state, slot, row=0, **where):
  """Empties a slot; in the whole model, where `plan` says that this suffices.

  Args: as of `suppress`; wants the host's capability.
  """
  slot = integer('slot', slot, 0, memory.config.rules.slots - 1)
  there = memory.bank(state).status[row, slot] != sl.EMPTY
  alone = there and plan(memory, state, slot, row).mode == 'purge'
  new, edit = memory.purge(state, slot, row=row, **where)
  fields = [f.name for f in dataclasses.fields(sl.Bank)
            if f.name not in _COUNTERS]
  return new, _of_slot('purge', memory, state, edit, fields,
                       'model' if alone else 'bank')


def _of_slot(mode, memory, state, edit, fields, scope):
  names = rc.carriers(state)
  if not edit.changed:
    return rc.make(mode, state, edit.row, (-1, -1), 'none', (), (), names,
                    edit=edit)
  cleared = {f'layers/{memory.layer}/{name}' for name in fields}
  if mode == 'purge' and memory.journal is not None:
    cleared.add('slots.json')
  # What has made nothing of the slot but the edits of it.
  others = {f'layers/{memory.layer}/{name}' for name in _COUNTERS} | {
      'forks, prefix caches and artifacts'}
  absent = {n for n in names if n not in cleared | others} if (
      scope == 'model') else rc.unused(state)
  return rc.make(mode, state, edit.row, (-1, -1), scope, cleared, absent,
                  names, edit=edit)
