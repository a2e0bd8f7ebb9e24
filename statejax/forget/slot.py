"""Deletes of one slot, and how its object is forgotten for good."""

import dataclasses

from statejax.forget import receipt as rc
from statejax.ops import slots as sl

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
  stream has said is in all that came after it. Whether only edits have made the
  object, the journal knows; without one it is taken for the stream's. What an
  object has pushed out when it came is not brought back.

  Raises:
    ValueError: an empty slot.
  """
  held = {s.slot: s for s in memory.list(state, row)}.get(slot)
  if held is None:
    raise ValueError(f'slot {slot}, row {row}: expected an object, got an '
                     'empty or expired slot; nothing is left to forget here.')
  if memory.untouched(state, slot, row):
    if held.reads == 0:
      return Plan('purge', -1, 'written from outside and never read')
    return Plan('replay', held.t_first,
                f'written from outside, first read at {held.t_first}')
  if held.version == 1 and held.source[0] >= 0:
    return Plan('replay', held.source[0],
                f'said by the stream at {held.source[0]}')
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
  found = {s.slot for s in memory.list(state, row)}
  alone = slot in found and plan(memory, state, slot, row).mode == 'purge'
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
