"""Types of which the grammar of a document is built; each checks one value.

A type is called with (value, where) and raises ValueError which names the
field, what was expected and what was found. Nothing is converted and nothing
unknown is let through.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], None]


def fail(where: str, expected: str, got):
  """Raises the error of a field."""
  shown = repr(got)
  shown = shown if len(shown) <= 60 else f'{shown[:57]}...'
  raise ValueError(f'{where}: expected {expected}, got {shown}')


@dataclasses.dataclass(frozen=True)
class Text:
  """Printable ASCII up to `limit`, of a `pattern`, '' only where `empty`."""

  limit: int
  pattern: str = '[ -~]*'
  empty: bool = True
  name: str = 'text'

  def __call__(self, value, where):
    if isinstance(value, str) and value == '' and self.empty:
      return
    if (not isinstance(value, str) or not value or len(value) > self.limit
        or not re.fullmatch(self.pattern, value)):
      fail(where, f'{self.name} of at most {self.limit} letters', value)


@dataclasses.dataclass(frozen=True)
class Int:
  """An integer of low..high; a bool is none."""

  low: int = 0
  high: int = 2 ** 53 - 1

  def __call__(self, value, where):
    if type(value) is not int or not self.low <= value <= self.high:
      fail(where, f'an integer of {self.low}..{self.high}', value)


@dataclasses.dataclass(frozen=True)
class OneOf:
  """One of the listed values, of the same type."""

  values: tuple

  def __call__(self, value, where):
    if not any(type(value) is type(v) and value == v for v in self.values):
      fail(where, ' or '.join(map(repr, self.values)), value)


@dataclasses.dataclass(frozen=True)
class Items:
  """A list of low..high items; `order` gives keys that must ascend."""

  item: Check
  high: int
  low: int = 0
  order: Callable[[Any], Any] | None = None

  def __call__(self, value, where):
    if not isinstance(value, list) or not self.low <= len(value) <= self.high:
      fail(where, f'a list of {self.low}..{self.high} items', value)
    for i, item in enumerate(value):
      self.item(item, f'{where}[{i}]')
    if self.order:
      keys = [self.order(item) for item in value]
      if any(a >= b for a, b in zip(keys, keys[1:])):
        fail(where, 'distinct items in ascending order', value)


@dataclasses.dataclass(frozen=True)
class Row:
  """A list of exactly these types."""

  items: tuple[Check, ...]

  def __call__(self, value, where):
    if not isinstance(value, list) or len(value) != len(self.items):
      fail(where, f'a list of {len(self.items)}', value)
    for i, (check, item) in enumerate(zip(self.items, value)):
      check(item, f'{where}[{i}]')


@dataclasses.dataclass(frozen=True)
class Record:
  """An object of exactly these fields.

  Attributes:
    fields: name -> type; all required.
    optional: name -> type; may be absent.
    extra: (pattern of a name, type, how many); for names beside these.
  """

  fields: Mapping[str, Check]
  optional: Mapping[str, Check] = dataclasses.field(default_factory=dict)
  extra: tuple[str, Check, int] | None = None

  def __call__(self, value, where):
    if not isinstance(value, dict):
      fail(where or 'document', 'an object', value)
    missing = sorted(self.fields.keys() - value.keys())
    if missing:
      fail(where or 'document', f'field {missing[0]!r}', sorted(value))
    others = 0
    for name, item in value.items():
      path = f'{where}.{name}' if where else name
      check = self.fields.get(name) or self.optional.get(name)
      if check is None and self.extra and re.fullmatch(self.extra[0], name):
        check, others = self.extra[1], others + 1
      if check is None:
        fail(where or 'document', 'no unknown field', name)
      check(item, path)
    if self.extra and others > self.extra[2]:
      fail(where, f'at most {self.extra[2]} further fields', others)


@dataclasses.dataclass(frozen=True)
class Table:
  """An object of up to `high` names of one type, with values of another."""

  name: Check
  item: Check
  high: int

  def __call__(self, value, where):
    if not isinstance(value, dict) or len(value) > self.high:
      fail(where, f'an object of at most {self.high} fields', value)
    for name, item in value.items():
      self.name(name, f'{where} (name)')
      self.item(item, f'{where}.{name}')
