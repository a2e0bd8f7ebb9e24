"""Inputs that nobody would send in good faith: changed documents and bytes.

A mutator makes an input of a seed. Those of documents know JSON and change
values at places, those of archives know tar headers, those of keys know PEM;
all of them also change bytes. Everything follows from one `random.Random`.
"""

import base64
import json

MAX_INT = 2 ** 53 - 1
VALUES = (
    '', 0, 1, -1, True, False, None, 1.5, 1e400, float('nan'), [], {}, [[]],
    MAX_INT, MAX_INT + 1, -MAX_INT - 2, 2 ** 31, 2 ** 63, 2 ** 64, 10 ** 40,
    4095, 4096, 65535, 65536, 'a', 'self', 'none', 'local', 'x' * 65,
    'x' * 1025, '0' * 64, 'sha256:' + '0' * 64, 'sj1-' + 'f' * 64,
    'hmac:00000000:' + '0' * 64, '\u00e9', '\n', '\x00', '"', '\\', '../a',
    '/a', 'a/b', '.a', 'a.', 'AA==', 'AB==', 'A', '=', '\ud800', '1e3', '-0',
    '0x10', '1_0', ' 1', 'key:' + '0' * 64, 'manifest.json', 'plain.json',
    'tokens.u32', 'state/a', 'x-a', {'a': 1}, [0] * 9, [2 ** 40] * 8)
TOKENS = tuple(x.encode() for x in (
    '"', '\\"', '\\\\', '\\', '\\u0041', '\\/', '[', ']', '{', '}', '[]', '{}',
    '[[', ':', ',', '0', '-', '-0', '.', 'e', '1e9', '00', 'null', 'true',
    'NaN', 'Infinity', '9' * 17, '9' * 4301, ' ', '\n', '\t', '\x00', '\x7f',
    '\u00e9', '{"a":', '"a":0,', '[0,', '="', '==', '/', '../', 'A', '+',
    '-----BEGIN EC PRIVATE KEY-----\n', 'Proc-Type: 4,ENCRYPTED\n'))
BLOCK = 512
# Of a tar header: where a field begins and how long it is.
FIELDS = ((0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12),
          (148, 8), (156, 1), (157, 100), (257, 6), (263, 2), (265, 32),
          (297, 32), (329, 8), (337, 8), (345, 155), (500, 12))
PIECES = (
    b'', b'\0', b' ', b'0', b'7' * 12, b'8', b'-1', b'\x80', b'\xff' * 12,
    b'\x80' + b'\0' * 10 + b'\1', b'0000000\0', b'00000000000\0', b'ustar',
    b'ustar\x0000', b'ustar  \0', b'1', b'2', b'5', b'L', b'K', b'x', b'g',
    b'S', b'a', b'a/b', b'/', b'..', b'state/a', b'plain.json', b'\xc3\xa9',
    b'a\0b', b'x' * 100, b'manifest.json', b'a' * 155)


class Mutator:
  """Draws changes.

  Attributes:
    rng: `random.Random`.
    large: how long an input may grow.
  """

  def __init__(self, rng, large: int):
    self.rng, self.large = rng, large
    self._parsed = {}

  def below(self, n: int) -> int:
    """A number of 0..n-1."""
    return int(self.rng.random() * n)

  def of(self, items):
    """One of several."""
    return items[int(self.rng.random() * len(items))]

  def bytes(self, data: bytes, other: bytes) -> bytes:
    """Changes up to four places; rarely makes the input very long.

    Args:
      data: the seed.
      other: another one, of which to take pieces.
    """
    if self.rng.random() < 1 / 1000:
      return self._swollen(data)
    for _ in range(1 + self.below(4) * self.below(2)):
      data = self._one(data, other)
    return data

  def _one(self, data, other):
    at, kind = self.below(len(data) + 1), self.below(9)
    end = at + self.below(9)
    if kind == 0 and at < len(data):
      return data[:at] + bytes([data[at] ^ 1 << self.below(8)]) + data[at + 1:]
    if kind == 1:
      return data[:at] + bytes([self.below(256)]) + data[at + 1:]
    if kind == 2:
      return data[:at] + data[end:]
    if kind == 3:
      return data[:at] + self.of(TOKENS) + data[at:]
    if kind == 4:
      return data[:at] + self.of(TOKENS) + data[end:]
    if kind == 5:  # a piece twice
      return data[:at] + data[max(0, at - self.below(40)):]
    if kind == 6:
      begin = self.below(len(other) + 1)
      return data[:at] + other[begin:begin + self.below(60)] + data[end:]
    if kind == 7:
      return data[:at] if self.below(8) == 0 else data[:at] + data[at + 1:]
    far = self.below(len(data) + 1)
    one, two, size = min(at, far), max(at, far), self.below(12)
    return (data[:one] + data[two:two + size] + data[one + size:two]
            + data[one:one + size] + data[two + size:])

  def _swollen(self, data):
    """A token very often, or very many names of which one stands twice."""
    at, tail = self.below(len(data) + 1), self.below(2)
    size = int(1024 * (self.large / 1024) ** self.rng.random())
    if self.below(2):
      token = self.of(TOKENS)
      return data[:at] + token * (size // len(token)) + data[at:] * tail
    names = [b'"%06x":0,' % i for i in range(size // 11)]
    at = data.find(b'{', at) + 1 or 1
    return data[:at] + b''.join(names) + names[-1] * tail + data[at:]

  def json(self, data: bytes, other: bytes) -> bytes:
    """Changes up to three places of a document, then maybe bytes."""
    if self.rng.random() < 0.3:
      return self.bytes(data, other)
    value, places = self._value(data)
    if not places:
      return self.bytes(data, other)
    for _ in range(1 + self.below(3) * self.below(2)):
      value = self._changed(value, self.of(places), other)
    try:
      # NaN and what is no ASCII may stand in it: a parser must see to that.
      new = json.dumps(value, sort_keys=True, separators=(',', ':'),
                       ensure_ascii=self.rng.random() < 0.05
                       ).encode(errors='surrogatepass')
    except TypeError:  # names of two types
      return data
    return self._one(new, other) if self.rng.random() < 0.05 else new

  def _value(self, data):
    """Value of a seed, and the paths of all places in it."""
    if data not in self._parsed:
      if len(self._parsed) > 2000:
        self._parsed.clear()
      try:
        value = json.loads(data)
      except (ValueError, RecursionError):
        value = None
      self._parsed[data] = value, list(_places(value, ()))
    return self._parsed[data]

  def _changed(self, value, path, other):
    """The value with another one at a path; what is off the path is shared."""
    if not path:
      return self._new(value, other)
    key, here = path[0], value
    if isinstance(here, dict) and key in here:
      new = dict(here)
    elif isinstance(here, list) and isinstance(key, int) and key < len(here):
      new = list(here)
    else:
      return value  # an earlier change took the place away
    kind = self.below(6) if len(path) == 1 else 9
    if kind == 0:
      del new[key]
    elif kind == 1 and isinstance(new, list):
      new.insert(self.below(len(new) + 1), new[key])
    elif kind == 1:
      new[self.of(tuple(new)) + self.of(('', 'x', '-', ' '))] = new[key]
    elif kind == 2 and isinstance(new, list):
      far = self.below(len(new))
      new[key], new[far] = new[far], new[key]
    elif kind == 2:
      new[self.of(('x-a', 'env', 'a', '', 'version', 'x-' + 'b' * 61))] = (
          self.of(VALUES))
    else:
      new[key] = self._changed(here[key], path[1:], other)
    return new

  def _new(self, old, other):
    kind = self.below(8)
    if kind < 2 or isinstance(old, dict):
      return self.of(VALUES)
    if kind == 2:
      value, places = self._value(other)
      for key in self.of(places or [()]):
        value = value[key]
      return value
    if isinstance(old, bool):
      return not old
    if isinstance(old, int):
      return self.of((old + 1, old - 1, -old, old * 2, old + 4096, float(old),
                      str(old), old << self.below(60)))
    if isinstance(old, str):
      at = self.below(len(old) + 1)
      letter = self.of('aAfFgz0189:/.-_+= "\\\n~\x7f')
      return self.of((old[:at] + letter + old[at + 1:], old[:at] + old[at + 1:],
                      old[:at] + letter + old[at:], old.upper(), old + old,
                      old[:at]))
    if isinstance(old, list):
      return self.of((old[::-1], old + old, old[1:], [old], old[:1] * 300,
                      old + [self.of(VALUES)]))
    return self.of(VALUES)

  def header(self, data: bytes, other: bytes) -> bytes:
    """Changes fields of a tar header, and mostly makes its sum right again."""
    if self.rng.random() < 0.2:
      return self.bytes(data, other)
    data = data[:BLOCK].ljust(BLOCK, b'\0')
    for _ in range(1 + self.below(3)):
      at, size = self.of(FIELDS)
      if self.below(2):
        piece = self.of(PIECES)[:size]
        data = data[:at] + piece + data[at + len(piece):]
      else:
        at += self.below(size)
        data = data[:at] + bytes([self.below(256)]) + data[at + 1:]
    if self.rng.random() < 0.8:
      total = sum(data[:148]) + 256 + sum(data[156:])
      data = data[:148] + b'%06o\0 ' % (total & 0o777777) + data[156:]
    return data

  def archive(self, data: bytes, other: bytes) -> bytes:
    """Changes headers and the order of blocks."""
    kind = self.below(6)
    at = BLOCK * self.below(len(data) // BLOCK + 1)
    if kind == 0:
      return self.bytes(data, other)
    if kind == 1:
      return data[:at] + data[at + BLOCK:]
    if kind == 2:
      return data[:at] + data[max(0, at - BLOCK):]
    if kind == 3:
      begin = BLOCK * self.below(len(other) // BLOCK + 1)
      return data[:at] + other[begin:begin + 2 * BLOCK] + data[at:]
    return data[:at] + self.header(data[at:at + BLOCK], other) + data[
        at + BLOCK:]

  def pem(self, data: bytes, other: bytes) -> bytes:
    """Changes bytes of a PEM text, or of the DER within."""
    lines = data.split(b'\n')
    if self.rng.random() < 0.3 or len(lines) < 3:
      return self.bytes(data, other)
    try:
      inner = base64.b64decode(b''.join(lines[1:-2]))
    except ValueError:
      return self.bytes(data, other)
    text = base64.b64encode(self.bytes(inner, inner))
    return b'\n'.join([lines[0], *(text[i:i + 64] for i in range(
        0, min(len(text), 1 << 16), 64)), *lines[-2:]])


def _places(value, path):
  yield path
  items = value.items() if isinstance(value, dict) else (
      enumerate(value) if isinstance(value, list) else ())
  for key, item in items:
    yield from _places(item, (*path, key))
