"""Deletes of one slot, and how its object is forgotten for good."""

import dataclasses

import jax
import numpy as np

from statejax import slot_facts
from statejax import state as st
from statejax.artifact import journal
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

  What was written from outside has changed nothing but its slot until the row
  absorbs a token. After that it may have been met without a trace: what is
  asked or said can end at it because of its key, its lock, its owner or its
  place. What the stream has said of the object is in all that came after its
  statement, also where that waits to be committed or an edit has overruled it:
  as far back as the writer looks, `SlotsConfig.statement` tokens. Whether only
  edits have made the object, the journal knows; without one it is taken for
  the stream's. What an object has pushed out when it came, or kept other edits
  from writing, is not brought back; and the same words said elsewhere, without
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
  edits = made(memory, bank, slot, row)
  first, why = _made_at(memory, bank, slot, edits)
  # Where the stream has spoken of it without writing it.
  undone = (e.get('overruled', 0) for e in edits)
  said = [*np.asarray(waits.time)[about], *(at for at in undone if at >= 0)]
  if said:
    begin = _statement(memory, min(said))
    if begin <= first:
      first = begin
      why = f'the stream has spoken of it from {begin} on, not yet in the slot'
  elif edits and int(state.length[row]) == first:
    return Plan('purge', -1, 'written from outside, and no token read since')
  return Plan('replay', first, why)


def _made_at(memory, bank, slot, edits):
  """Where a slot's object may first be in the stream, and how it is known."""
  if edits:
    first = edits[0]['length']
    return first, f'written from outside at {first}'
  version, start, count, time = (int(x[0, slot]) for x in (
      bank.version, bank.source[..., 0], bank.source[..., 1], bank.t_write))
  if version != 1 or start < 0:
    return 0, 'it is not known who wrote its first version'
  # Said again it has a later time, and the source of the first.
  begin = _statement(memory, min(start + count - 1, time))
  return begin, f'said by the stream from {begin} on'


def _statement(memory, time):
  """Where what the writer saw begins, of an event at a position."""
  return max(0, int(time) + 1 - memory.config.statement)


def made(memory, bank, slot, row=0):
  """The edits that have made a slot's object what it is, oldest first: entries
  of the journal, or none.

  Some prove that no stream has written, renewed, locked or named it, in any of
  its versions; that it was read they may hide. None prove nothing.

  Args:
    memory: `statejax.memory.Memory`.
    bank: `statejax.ops.slots.Bank` of one row, in numpy.
    slot: number of the slot.
    row: of the state.
  """
  book, oid = memory.journal, int(bank.oid[0, slot])
  name = journal.object_name({'layer': memory.layer, 'row': row, 'oid': oid})
  if book is None or book.salt(name) is None:
    return []
  edits = [e for e in book.entries if e['row'] == row
           and e.get('layer') == memory.layer and e.get('oid') == oid
           and e['outcome'] in rc.CHANGED]
  held = slot_facts.plain(bank, slot) | {
      'reads': 0, 't_first': -1, 't_read': -1}
  said = [e['after'] for e in edits]
  whole = edits and not edits[0]['old_version'] and (
      [e['before'] for e in edits[1:]] == said[:-1]
      and book.commitment(name, held) == said[-1])
  return edits if whole else []


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
