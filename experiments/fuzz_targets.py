"""The parsers of what comes from outside, and what each of them owes.

A parser takes bytes and either returns what they say, of which the very same
bytes can be made again, or raises `Refused` with one of its codes. It does so
within a second of processor time for every MiB begun, and little memory. Where
only its own key makes an input, no other input than the seeds is accepted.
"""

import base64
import contextlib
import dataclasses
import functools
import pathlib
import re
import signal
import tempfile
from collections.abc import Callable
from typing import Any

from experiments import fuzz_seeds as seeds
from statejax.artifact import (
  access,
  canonical,
  card,
  compat,
  desk,
  envelope,
  grant,
  head,
  keys,
  manifest,
  names,
  portable,
  revoke,
  sealing,
  trust,
  verify,
)
from statejax.artifact.outcome import Refused

SECONDS = 1.0
_LESS = re.compile(r"[\d.]+|'[^']*'|\"[^\"]*\"")


@dataclasses.dataclass(frozen=True)
class Target:
  """One parser.

  Attributes:
    parse: bytes -> what they say.
    build: what `parse` returned -> the bytes that it must have been given.
    codes: with which it may refuse; () for a plain ValueError.
    change: name of a method of `fuzz_mutate.Mutator`.
    batch: executions at a time, fewer of what is slow.
    large: bytes of the largest input worth trying.
    sign: whether it needs the extra [sign].
    only: whether nothing but the seeds may be accepted.
  """

  parse: Callable[[bytes], Any]
  build: Callable[[Any], bytes]
  codes: tuple[str, ...]
  change: str = 'json'
  batch: int = 1000
  large: int = canonical.MAX_BYTES + 9
  sign: bool = False
  only: bool = False


class Hang(BaseException):
  """An execution took too much processor time."""


def _rang(*_):
  raise Hang()


@contextlib.contextmanager
def watched():
  """Within it, what hangs ends in `Hang`; for the main thread only."""
  old = signal.signal(signal.SIGPROF, _rang)
  try:
    yield
  finally:
    signal.signal(signal.SIGPROF, old)


def execute(target: Target, data: bytes, accepted=()) -> tuple[str, str]:
  """Returns (outcome, fault): what happened, and '' or what is wrong with it.

  To be called within `watched`.

  Args:
    target: the parser.
    data: its input.
    accepted: all inputs that may be accepted, where there are `only` such.
  """
  seconds = SECONDS * (1 + len(data) // (1 << 20))
  signal.setitimer(signal.ITIMER_PROF, seconds)
  try:
    same = target.build(target.parse(data)) == data
  except Refused as error:
    name = f'{error.code}: {_LESS.sub("", error.detail.split(", got")[0])}'
    return name, '' if error.code in target.codes else f'refused by {name}'
  except Hang:
    return 'hang', 'too slow'
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # of any type: that is what is looked for
    name = f'{type(error).__name__}: {_LESS.sub("", str(error)[:200])}'
    fine = isinstance(error, ValueError) and not target.codes
    return name, '' if fine else name
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
  if not same:
    return 'accepted', 'accepted what it does not write itself'
  if target.only and data not in accepted:
    return 'accepted', 'accepted what nobody has made'
  return 'accepted', ''


@functools.cache
def _sides():
  """The full manifest and what its plain.json says; the small one and its."""
  return (seeds.full(), seeds.plain()), (seeds.small(), seeds.bare_plain())


def _manifest(data):
  """As every reader of a manifest uses it before anybody vouches for it."""
  about, ((full, _), _) = manifest.parse(data), _sides()
  if about['state']['logical_bytes'] < 1 << 40:
    access.decide(about, access.Principal('bob', 'acme'), 'resume', now=0)
    compat.compare(about, full), compat.compare(full, about)
    revoke.match(seeds.crl(), about, seeds.ID)
    one, two = (verify.Verified(seeds.ID, x, None, None, '')
                for x in (about, full))
    desk.describe(one), desk.difference(one, two)
  return about


def _plain(data):
  return manifest.parse_plain(data, _sides()[0][0])


def _tokens(data):
  return verify.parse_tokens(data, *_sides()[1])


def _crl(data):
  body, (_, (about, _)) = revoke.parse(data), _sides()
  # Of parameters that no entry names, so that all entries are looked at.
  about = about | {'model': about['model'] | {'params': 'sha256:' + '9' * 64}}
  revoke.match(body, about, 'sj1-' + 'e' * 64)
  return body


def _grant(data):
  body = grant.parse(data)
  base64.b64decode(body['key'])
  return body


def _card(data):
  body = card.parse_body(data)
  card.describe(body)
  return body


def _signed(data):
  trust.parse(data, _pem())
  return data


@functools.cache
def _pem(number=7):
  return keys.public(seeds.private(number))


def _archive(data):
  """Unpacks in memory; returns what the archive of these files would be."""
  with tempfile.TemporaryDirectory(dir='/dev/shm') as folder:
    path, out = pathlib.Path(folder) / 'in', pathlib.Path(folder) / 'out'
    path.write_bytes(data)
    out.mkdir()
    portable.unpack(path, out, max_bytes=1 << 20)
    files = {str(p.relative_to(out)): p.read_bytes()
             for p in out.rglob('*') if p.is_file()}
    return seeds.archive({name: files[name] for name in sorted(
        files, key=lambda n: (not n.startswith('manifest.'), n))})


def _public_key(data):
  """A key of a trust document checks a signature; nobody has signed this."""
  grammar = trust.PEM
  try:
    text = data.decode('ascii')
    grammar(text, 'pem')
  except ValueError as error:
    raise Refused('E_TRUST', str(error)) from None
  keys.hint(text)
  try:
    keys.check(text, envelope.STATEMENT, b'y', _signature())
  except Refused as error:
    # Both are sound: the key was read and says no, or it is none.
    if 'by key' in error.detail:
      return data
    raise
  raise AssertionError('a signature by nobody')


@functools.cache
def _signature():
  return (seeds.CORPUS / 'signature' / 'seed_p256').read_bytes()


def _check(data):
  keys.check(_pem(), envelope.STATEMENT, b'x', data)
  return data


@functools.cache
def _private():
  return seeds.private()


def _opened(data):
  assert keys.decrypt(_private(), data) == bytes(32)
  return data


def _unwrapped(data):
  try:
    text = data.decode('ascii')
  except UnicodeDecodeError as error:
    raise Refused('E_SEALED', str(error)) from None
  assert sealing.unwrap(bytes(32), text, '0' * 32) == bytes(32)
  return data


def _unsealed(data):
  sealing.unseal(bytes(32), '0' * 32, 'a/b', data)
  return data


def _same(value):
  return value


TARGETS = {
    'canonical': Target(canonical.loads, canonical.dumps, ()),
    'manifest': Target(_manifest, canonical.dumps, ('E_MANIFEST', 'E_VERSION')),
    'plain': Target(_plain, canonical.dumps, ('E_PLAIN',)),
    'slots': Target(manifest.parse_slots, canonical.dumps, ('E_PLAIN',)),
    'tokens': Target(_tokens, names.pack, ('E_PLAIN', 'E_WITNESS'), 'bytes',
                     only=True),
    'bundle': Target(envelope.open_bundle, lambda x: envelope.bundle(*x),
                     ('E_SIG',), large=envelope.MAX_BYTES + 9),
    'document': Target(lambda data: envelope.open_document('grant', data),
                       lambda x: envelope.seal('grant', *x), ('E_SIG',),
                       large=envelope.MAX_BYTES + 9),
    'grant': Target(_grant, canonical.dumps, ('E_GRANT',)),
    'crl': Target(_crl, canonical.dumps, ('E_TRUST',)),
    'head': Target(head.parse_body, canonical.dumps, ('E_SIG',)),
    'card': Target(_card, canonical.dumps, ('E_SIG', 'E_VERSION')),
    'trust': Target(trust.parse_body, canonical.dumps, ('E_TRUST',)),
    'header': Target(portable.parse_header,
                     lambda x: portable.header_of(*x), ('E_LAYOUT',),
                     'header', large=4096),
    'archive': Target(_archive, _same, ('E_LAYOUT', 'E_LIMIT'), 'archive', 50,
                      large=1 << 17),
    'signed': Target(_signed, _same, ('E_SIG', 'E_TRUST'), 'json', 100,
                     envelope.MAX_BYTES + 9, sign=True, only=True),
    'public_key': Target(_public_key, _same, ('E_SIG', 'E_TRUST'), 'pem', 100,
                         4096, sign=True),
    'private_key': Target(lambda data: keys.public(data) and data, _same, (),
                          'pem', 100, 1 << 16, sign=True),
    'signature': Target(_check, _same, ('E_SIG',), 'bytes', 100, 1 << 16,
                        sign=True, only=True),
    'sealed_key': Target(_opened, _same, ('E_SEALED',), 'bytes', 100, 1 << 16,
                         sign=True, only=True),
    'wrapped': Target(_unwrapped, _same, ('E_SEALED',), 'bytes', 100, 4096,
                      sign=True, only=True),
    'sealed': Target(_unsealed, _same, ('E_SEALED',), 'bytes', 100,
                     3 << 20, sign=True, only=True)}


def corpus(name: str, kind: str = '') -> dict[str, bytes]:
  """Returns {file name: input} of a parser; private keys are made, not kept.

  Args:
    name: of `TARGETS`.
    kind: 'seed', 'found' or '' for all.
  """
  found = {path.name: path.read_bytes()
           for path in sorted((seeds.CORPUS / name).glob(f'{kind}*'))}
  if name == 'private_key' and kind != 'found':
    found |= {'seed_p256': seeds.private(), 'seed_p384': seeds.private(
        9, 'SECP384R1')}
  return found
