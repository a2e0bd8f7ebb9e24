"""What a row of slots takes over from another one, slot by slot.

Slots are the same object where they have the same owner and the same tokens as
key. The higher version of an object wins, a deletion's too; of equal versions
which say different things ours stays. What is not here takes a slot as a write
does. Nothing else of a state can be merged: what a recurrent matrix holds
depends on the inputs that its gates have seen.

`steps` decides, in numpy. What is taken over is an event of
`statejax.ops.lifecycle`, so that locks, owners and the policy of overflow hold
as ever; then the slot is given what no event can say, its version and the
values before the last one.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from statejax import edit_events, slot_facts
from statejax import state as st
from statejax.ops import slots as sl

_HELD = ('value', 'span', 'status', 'lock', 'version', 'salience')


@dataclasses.dataclass(frozen=True)
class Step:
  """What is to be done about one slot of the other row.

  Attributes:
    theirs: its number.
    outcome: of `sl.OUTCOMES`, COMMITTED where it is to be taken over; else why
      it is not.
    slot: of ours that has the object, -1 for none.
    fields: of the WRITE that takes it over, as of one event.
    held: fields of the bank that our slot has then.
    gone: whether it is deleted there.
  """

  theirs: int
  outcome: int
  slot: int = -1
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)
  held: dict[str, Any] = dataclasses.field(default_factory=dict)
  gone: bool = False

  @property
  def new(self) -> bool:
    return self.slot < 0


def steps(rules, ours, theirs, *, lengths, principal: int,
          host: bool) -> Iterator[Step]:
  """Yields what is to be done: first about what is here, then about the rest.

  Args:
    rules: `statejax.config.SlotRules`.
    ours, theirs: `sl.Bank` of one row each, in numpy.
    lengths: tokens that our row has absorbed, and theirs.
    principal: whose slots are merged; others stay apart.
    host: whether the host's capability is shown: its locks come along then.

  Raises:
    ValueError: banks of different shapes.
  """
  require_like(ours, theirs)
  here, there = ([held for held in (
      slot_facts.of(bank, m) for m in range(rules.slots))
                  if held.status != 'empty' and held.owner == principal
                  and not slot_facts.expired(held, length)]
                 for bank, length in zip((ours, theirs), lengths))
  late: list[slot_facts.Slot] = []
  for held in there:
    found, twins = ([x for x in side if x.key == held.key]
                    for side in (here, there))
    if not held.key or held.status == 'quarantined':
      yield Step(held.slot, sl.INVALID)
    elif max(len(found), len(twins)) > 1:
      yield Step(held.slot, sl.CONFLICT)  # no key of one object
    elif not found:
      late.append(held)
    elif held.version > found[0].version:
      yield _taken(theirs, held, found[0].slot, lengths, host)
    elif held.version == found[0].version and not (
        _says_the_same(held, found[0])):
      yield Step(held.slot, sl.CONFLICT, found[0].slot)
  # Only now: a new object may push out one that was to be compared.
  for held in late:
    yield _taken(theirs, held, -1, lengths, host)


def _says_the_same(one, other):
  """Whether two slots are alike in all that a reader is told."""
  return (one.status, one.values[:1]) == (other.status, other.values[:1])


def _taken(theirs, held, slot, lengths, host):
  m, new = held.slot, slot < 0
  if held.lock == 'host' and not host:
    return Step(m, sl.FORBIDDEN, slot)
  pick = {name: getattr(theirs, name)[0, m] for name in (*_HELD, 'key')}
  # What it was until then is told in our own positions.
  expires = held.expires if held.expires < 0 else (
      lengths[0] + held.expires - lengths[1])
  if expires > slot_facts.MOST:
    return Step(m, sl.INVALID, slot)
  gone = held.status == 'tombstone'
  span = np.zeros_like(pick['span'][0]) if gone else pick['span'][0]
  fields = {'slot': slot, 'key': pick['key'], 'value': pick['value'][0],
            'span': span, 'key_span': theirs.key_span[0, m],
            'salience': pick['salience'], 'expires': expires}
  exact = {name: pick[name] for name in (*_HELD, *(['key'] if new else []))}
  exact |= {'expires': np.int32(expires),
            'source': np.full_like(theirs.source[0, m], -1)}
  return Step(m, sl.COMMITTED, slot, fields, exact, gone)


def require_like(ours, theirs):
  """Raises ValueError unless two banks have the same fields and shapes."""
  for field in dataclasses.fields(sl.Bank):
    one, other = (getattr(bank, field.name) for bank in (ours, theirs))
    if (one.shape, one.dtype) != (other.shape, other.dtype):
      raise ValueError(
          f'other: {field.name}: expected {one.dtype} {list(one.shape[1:])} in '
          f'a row, as of this model, got {other.dtype} '
          f'{list(other.shape[1:])}; slots compare within one model.')


def taken(memory, state, row, step, brought):
  """Returns the state after a step, and the numbers of its `memory.Receipt`.

  Args:
    memory: `statejax.memory.Memory`.
    state: `ServingState`.
    row: of it.
    step: of `steps`.
    brought: slots that this merge has filled, which nothing evicts.
  """
  nothing = dict.fromkeys(('oid', 'evicted'), -1) | dict.fromkeys(
      ('version', 'old_version', 'seq'), 0) | {'slot': step.slot}
  if step.outcome != sl.COMMITTED:
    return state, nothing | {'outcome': step.outcome}
  events = memory.events(sl.OPS[sl.WRITE], np.arange(st.rows(state)) == row,
                         **step.fields)
  held, at = state.layers[memory.layer], sorted(brought)
  new, receipts = edit_events.commit(
      memory.model, memory.layer, _with(state, memory.layer, _locked(
          held, row, at, sl.HOST)), events)
  found = {f.name: int(getattr(receipts, f.name)[row, 0])
           for f in dataclasses.fields(receipts)}
  if step.new and found['old_version']:  # its address is another object's
    return state, nothing | {'outcome': sl.CONFLICT, 'slot': found['slot']}
  if found['outcome'] not in (sl.COMMITTED, sl.REFRESHED):
    return state, found
  if step.gone and found['evicted'] >= 0:
    return state, nothing | {'outcome': sl.FULL}
  found |= {'outcome': sl.COMMITTED, 'version': int(step.held['version']),
            'seq': int(held.seq[0, row, found['slot']]) + 1}
  after = _locked(new.layers[memory.layer], row, at, np.asarray(
      held.lock)[0, row, at])
  after = _put(after, row, found['slot'],
               step.held | {'seq': np.int32(found['seq'])})
  return _with(new, memory.layer, after), found


def _with(state, name, held):
  return dataclasses.replace(state, layers=state.layers | {name: held})


def _locked(held, row, slots, lock):
  """A `SlotsState` with other locks of some slots of a row."""
  if not slots:
    return held
  locks = np.array(held.lock)
  locks[0, row, slots] = lock
  return dataclasses.replace(held, lock=jax.numpy.asarray(locks))


@jax.jit
def _put(held, row, slot, fields):
  """A `SlotsState` one slot of which has these fields of a bank, to the bit."""
  return dataclasses.replace(held, **{
      name: getattr(held, name).at[0, row, slot].set(x)
      for name, x in fields.items()})
