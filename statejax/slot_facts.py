"""What a slot holds, as plain facts, and numbers as a bank can hold them."""

import dataclasses
import operator
from typing import Any

import numpy as np

STATUS = ('empty', 'live', 'tombstone', 'quarantined')
LOCKS = ('open', 'stream', 'host')
# The largest integer of a bank; a larger one would be taken for another.
MOST = 2 ** 31 - 1
# Integers of a slot, as they stand in the bank.
_FACTS = ('status', 'lock', 'oid', 'version', 'seq', 't_write', 't_first',
          't_read', 'reads', 'owner', 'expires')


@dataclasses.dataclass(frozen=True)
class Slot:
  """What a slot holds; positions and ids are -1 for none.

  Attributes:
    slot: its number.
    status: 'live', 'tombstone', 'quarantined' or 'empty'.
    lock: 'open', 'stream' or 'host'.
    key: tokens of the key.
    values: tokens of the value and of those before it, newest first.
    source: (first token, count) of the value in the stream; (-1, -1) of a
      host's.
    names: how many other names it has.
    oid, version, seq, t_write, t_first, t_read, reads, owner, expires: see
      `statejax.ops.slots.Bank`.
  """

  slot: int
  status: str
  lock: str
  key: tuple[int, ...]
  values: tuple[tuple[int, ...], ...]
  source: tuple[int, int]
  names: int
  oid: int
  version: int
  seq: int
  t_write: int
  t_first: int
  t_read: int
  reads: int
  owner: int
  expires: int


FIELDS = tuple(f.name for f in dataclasses.fields(Slot))


def of(bank, m) -> Slot:
  """Returns a `Slot` of a bank of one row in numpy."""
  cut = lambda x: tuple(int(t) for t in x if t >= 0)
  facts: dict[str, Any] = {n: int(getattr(bank, n)[0, m]) for n in _FACTS}
  oid, (begin, count) = facts['oid'], bank.source[0, m]
  facts |= {'status': STATUS[facts['status']], 'lock': LOCKS[facts['lock']]}
  values = tuple(cut(x) for x in bank.span[0, m])
  return Slot(slot=m, key=cut(bank.key_span[0, m]),
              values=tuple(v for v in values if v),
              source=(int(begin), int(count)),
              names=int((bank.alias_oid[0] == oid).sum()) * (oid >= 0), **facts)


def plain(bank, m) -> dict:
  """Returns a slot's row without floats, every bit of it."""
  held = dataclasses.asdict(of(bank, m))
  bits = {n: np.ascontiguousarray(getattr(bank, n)[0, m]).tobytes().hex()
          for n in ('key', 'value', 'salience')}
  return held | {'bits': bits}


def matching(slots, where) -> list[Slot]:
  """Returns the slots whose fields are those of a dict; tokens may be a list.

  Raises:
    ValueError: a field that no slot has, or what it cannot be.
  """
  known(where)
  where = {name: _as_field(name, x) for name, x in where.items()}
  return [s for s in slots if all(
      getattr(s, name) == x for name, x in where.items())]


def _as_field(name, x):
  """What a field is compared with, as a `Slot` has it."""
  words = {'status': STATUS, 'lock': LOCKS}.get(name)
  if words:
    if x not in words:
      raise ValueError(f'{name}: expected one of {", ".join(words)}; got '
                       f'{x!r}.')
    return x
  if name not in ('key', 'values', 'source'):
    return integer(name, x, -1)
  whole = lambda xs: tuple(integer(name, t, -1) for t in xs)
  try:
    return tuple(map(whole, x)) if name == 'values' else whole(x)
  except (TypeError, ValueError):
    raise ValueError(f'{name}: expected {"lists of " * (name == "values")}'
                     f'integers, got {x!r}.') from None


def expired(slot, length) -> bool:
  """Whether a slot is hidden where its row has absorbed `length` tokens."""
  return 0 <= slot.expires <= length


def known(fields):
  """Raises ValueError unless these are names of fields of `Slot`."""
  wrong = fields if isinstance(fields, str) else sorted(
      {str(x) for x in fields} - set(FIELDS))
  if wrong:
    raise ValueError(f'fields: expected a list of some of {", ".join(FIELDS)}; '
                     f'got {wrong!r}.')


def integer(what: str, x, least: int, most: int = MOST) -> int:
  """Returns an integer of a range; what is none is not rounded or wrapped.

  >>> integer('slot', np.int64(3), 0, 7)
  3

  Raises:
    ValueError: it is no integer, or outside.
  """
  try:
    found = None if isinstance(x, bool | np.bool_) else operator.index(x)
  except TypeError:
    found = None
  if found is None:
    raise ValueError(f'{what}: expected an integer of {least} to {most}, got '
                     f'{x!r}.')
  if not least <= found <= most:
    raise ValueError(f'{what}: expected {least} to {most}, got {found}.')
  return found
