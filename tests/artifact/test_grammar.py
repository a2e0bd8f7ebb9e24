"""Every field of every document, wrong in every way; made from the grammars.

What is wrong with a value follows from its type in the grammar; what is right
comes from one full example of each document, in which every field stands.
"""

import copy

import example
import pytest

from statejax.artifact import canonical, grant, manifest, revoke, tree, trust
from statejax.artifact.grammar import (
  Int,
  Items,
  OneOf,
  Record,
  Row,
  Table,
  Text,
)


def full():
  """A manifest in which no list is empty and no field is left out."""
  about = example.make(**{
      'sealed': 'aes256gcm1', 'x-note': 'a b',
      'seal': {'kek': 'k', 'wrapped': 'AAAA', 'chunk': 1 << 20},
      'env': {'assumptions': [{'name': 'n', 'value': example.K}]},
      'model': {'adapters': [example.H]},
      'tools': {'schema': example.K, 'items': [example.K]},
      'provenance': {'root': example.OTHER, 'depth': 1, 'parents': [
          {'id': example.OTHER, 'role': 'state'}]}})
  return about


def plain():
  leaves = {leaf['path']: '5' * 64 for leaf in example.LEAVES}
  return {'tree': 'sha256:' + tree.combine(leaves), 'witness': '0' * 32,
          'token_chain': '', 'leaves': leaves, 'edits': [[1, 'a' * 64]]}


PEM = '-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n'
CRL = {'number': 1, 'this_update': 1, 'next_update': 2, 'entries': [
    {'kind': 'org', 'value': 'x', 'from': 1}]}
TRUST = {'number': 1, 'min_epoch': 0, 'classes': ['public'], 'orgs': {'acme': [
    {'pem': PEM, 'status': 'active', 'not_before': 0, 'not_after': 1,
     'may': ['mint']}]}}
GRANT = {'id': '0' * 32, 'target': example.OTHER, 'org': 'acme',
         'rights': ['resume'], 'holder': PEM, 'not_before': 1, 'not_after': 2,
         'max_uses': 1, 'key': 'AAAA', 'exports': '', 'scope': 'root'}


def by(grammar):
  return lambda data: grammar(canonical.loads(data), '')


DOCUMENTS = {
    'manifest': (manifest.GRAMMAR, full(), manifest.parse),
    'plain.json': (manifest.PLAIN_GRAMMAR, plain(),
                   lambda data: manifest.parse_plain(data, full())),
    'revocations': (revoke.GRAMMAR, CRL, by(revoke.GRAMMAR)),
    'trust': (trust.GRAMMAR, TRUST, by(trust.GRAMMAR)),
    'grant': (grant.GRAMMAR, GRANT, by(grant.GRAMMAR))}


def fields(check, value, path=()):
  """Yields (path, check, value) of every place of a document, its root too."""
  yield path, check, value
  if isinstance(check, Record):
    known = {**check.fields, **check.optional}
    assert known.keys() <= value.keys(), (path, known.keys() - value.keys())
    assert not check.extra or value.keys() - known.keys()
    for name, item in value.items():
      yield from fields(known[name] if name in known else check.extra[1], item,
                        (*path, name))
  elif isinstance(check, Row):
    for i, (inner, item) in enumerate(zip(check.items, value)):
      yield from fields(inner, item, (*path, i))
  elif isinstance(check, (Items, Table)):
    assert value, path
    key = next(iter(value)) if isinstance(value, dict) else 0
    yield from fields(check.item, value[key], (*path, key))


def replaced(document, path, new):
  if not path:
    return new
  document = copy.deepcopy(document)
  here = document
  for key in path[:-1]:
    here = here[key]
  here[path[-1]] = new
  return document


def types(value):
  """Values of every other type; a bool is no integer."""
  for other in (1, True, 'a', [], {}, [[]], {'a': 1}, 1.5, None):
    if type(other) is not type(value):
      yield 'type', other
  if isinstance(value, int):
    yield 'type', float(value)


def wrong(check, value):
  """Yields (kind, value) of what is no value of a type."""
  yield from types(value)
  if isinstance(check, Text):
    long = value or 'a'
    yield 'range', (long * (check.limit // len(long) + 1))[:check.limit + 1]
    yield 'range', 'x' * (check.limit + 1)
    yield 'huge', 'x' * (1 << 16)
    yield from (('range', text) for text in (
        'a\x00', '\u00e9', value + '\u00e9', value + '\x7f', '\ud800'))
    if not check.empty:
      yield 'range', ''
  elif isinstance(check, Int):
    yield from (('range', n) for n in (check.low - 1, check.high + 1))
    yield from (('huge', n) for n in (2 ** 53, 2 ** 64, -2 ** 63, 10 ** 5000))
  elif isinstance(check, OneOf):
    yield from (('range', other) for other in ('', 'X', 'live ', -1))
    if isinstance(value, str):
      yield 'range', value.upper()
    yield 'huge', 'x' * (1 << 16)
  elif isinstance(check, Items):
    yield 'huge', value * (check.high // len(value) + 1)
    yield 'range', value[:0] if check.low else [*value, []]
    if check.order:
      yield 'duplicate', [value[0], value[0], *value[1:]]
      if len(value) > 1:
        yield 'range', value[::-1]
  elif isinstance(check, Row):
    yield 'missing', value[:-1]
    yield 'unknown', [*value, 1]
  elif isinstance(check, Record):
    for name in check.fields:
      yield 'missing', {k: v for k, v in value.items() if k != name}
    yield 'unknown', {**value, 'surplus': 1}
    yield 'unknown', {**value, '': ''}
    if check.extra:
      yield 'huge', {**value, **{f'x-{i}': '' for i in range(99)}}
      yield 'range', {**value, 'x-Note': ''}
  elif isinstance(check, Table):
    key = next(iter(value))
    yield 'huge', {f'k{i}': value[key] for i in range(check.high + 1)}
    yield 'range', {**value, '\u00e9': value[key]}


def twice(document, path, check, value):
  """Yields the texts in which one field of a record stands twice."""
  if isinstance(check, (Record, Table)) and value:
    whole = canonical.dumps(replaced(document, path, '@@'))
    for name in value:
      one = canonical.dumps({name: value[name]})[1:-1]
      text = canonical.dumps(value).replace(one, one + b',' + one, 1)
      yield whole.replace(b'"@@"', text)


def dumps(value):
  try:
    return canonical.dumps(value)
  except UnicodeEncodeError:  # half a letter, as another writer might write it
    return canonical.dumps(str(value)[:0]) + b'\xed\xa0\x80'
  except ValueError:  # more digits than Python writes
    return None


@pytest.mark.parametrize('name', DOCUMENTS)
def test_every_field(name):
  grammar, document, parse = DOCUMENTS[name]
  parse(canonical.dumps(document))
  tried, places, accepted, aborts = {}, set(), [], []

  def refused(kind, path, data):
    tried[kind] = tried.get(kind, 0) + 1
    try:
      parse(data)
      accepted.append(f'{path} {kind} was accepted: {data[:200]!r}')
    except ValueError as error:  # as `Refused` is
      # A newer version has a code of its own.
      if getattr(error, 'code', 'E_MANIFEST') not in (
          'E_MANIFEST', 'E_PLAIN', 'E_VERSION'):
        aborts.append((path, kind, error))
    except Exception as error:
      aborts.append((path, kind, error))

  for path, check, value in fields(grammar, document):
    places.add(path)
    for kind, new in wrong(check, value):
      data = dumps(replaced(document, path, new))
      if data is None:
        mark = canonical.dumps(replaced(document, path, '@@'))
        data = mark.replace(b'"@@"', b'9' * 5000)
      refused(kind, path, data)
    for data in twice(document, path, check, value):
      refused('duplicate', path, data)
  assert {'missing', 'type', 'range', 'huge', 'duplicate', 'unknown'} <= (
      tried.keys())
  print(f'fields of {name}: {len(places)} places, tried {sum(tried.values())} '
        f'({tried}), accepted wrongly {len(accepted)}, aborts {len(aborts)}')
  assert not accepted and not aborts, (accepted[:3], aborts[:3])


def test_an_open_field_would_be_seen(monkeypatch):
  """The suite fails where a type lets through what it should not."""
  monkeypatch.setattr(Int, '__call__', lambda self, value, where: None)
  with pytest.raises(AssertionError, match='was accepted'):
    test_every_field('revocations')
