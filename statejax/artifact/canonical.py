"""Canonical JSON: one text for one value, and a parser that takes no other.

    CJ = json.dumps(sort_keys, separators=(",", ":"), no ASCII escapes)

over objects, lists, strings, booleans and integers below 2^53: there it equals
RFC 8785. What is signed or hashed is such a text, so that two readers of it
can never see two different things. Imports no jax.
"""

import json
import re

MAX_BYTES = 1 << 20
MAX_DEPTH = 6
MAX_INT = 2 ** 53 - 1
_ODD = re.compile(rb'[^ -~]')
# A string, also one that does not end: else each quote in it would be tried as
# the beginning of another one.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)')
_BRACKETS = re.compile(r'[][{}]')


def dumps(value) -> bytes:
  """Returns the one JSON text of a value without floats.

  >>> dumps({'b': [1, True], 'a': 'x'})
  b'{"a":"x","b":[1,true]}'
  """
  return json.dumps(value, sort_keys=True, separators=(',', ':'),
                    ensure_ascii=False).encode()


def loads(data: bytes, *, max_bytes: int = MAX_BYTES):
  """Returns the value of a canonical text of printable ASCII.

  Args:
    data: nested at most 6 deep.
    max_bytes: how long it may be.

  Raises:
    ValueError: too large, too deep, or not the bytes that `dumps` gives for
      what they say: floats, null, huge integers, duplicate keys, other order,
      spaces, escapes that need not be. Says which, where it can.
  """
  if len(data) > max_bytes:
    raise ValueError(f'expected at most {max_bytes} bytes, got {len(data)}')
  odd = _ODD.search(data)
  if odd:
    raise ValueError(f'expected printable ASCII, got byte {data[odd.start()]} '
                     f'at {odd.start()}')
  text = data.decode('ascii')
  _refuse_depth(text)
  value = json.loads(text, object_pairs_hook=_object, parse_int=_integer,
                     parse_float=_no_float, parse_constant=_no_float)
  _refuse_null(value)
  if dumps(value) != data:
    raise ValueError('expected canonical JSON (sorted keys, no spaces, no '
                     'needless escapes), got another text of the same value')
  return value


def _refuse_depth(text):
  # Before json.loads, which recurses once per level.
  depth = 0
  for bracket in _BRACKETS.findall(_STRING.sub('', text)):
    depth += 1 if bracket in '[{' else -1
    if depth > MAX_DEPTH:
      raise ValueError(f'expected at most {MAX_DEPTH} levels, got more')


def _object(pairs):
  result = dict(pairs)
  if len(result) < len(pairs):
    seen: set[str] = set()
    for name, _ in pairs:
      if name in seen:
        raise ValueError(f'expected one field {name[:60]!r}, got two')
      seen.add(name)
  return result


def _integer(text):
  if len(text) > 17 or abs(int(text)) > MAX_INT:
    raise ValueError(f'expected integers up to 2^53-1, got {text[:20]}')
  return int(text)


def _no_float(text):
  raise ValueError(f'expected no floats, got {text[:20]}')


def _refuse_null(value):
  if value is None:
    raise ValueError('expected no null; an empty field is "" or []')
  children = value.values() if isinstance(value, dict) else (
      value if isinstance(value, list) else ())
  for child in children:
    _refuse_null(child)
