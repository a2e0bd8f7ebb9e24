"""Signed documents: what is signed, and the one form in which it is read.

DSSE signs PAE(type, payload) = "DSSEv1" type and payload with their lengths.
An artifact's `manifest.sig` is an OpenSSF Model Signing bundle (v1.0, method
`key`) around a statement of all files and their digests; other documents are
bare DSSE envelopes around canonical JSON. The mathematics are in `keys`;
nothing here needs more than the standard library, and nothing loads jax.
"""

import base64
import binascii
import contextlib
import hashlib

from statejax.artifact import canonical, layout
from statejax.artifact.grammar import Items, OneOf, Record, Text
from statejax.artifact.outcome import Refused

STATEMENT = 'application/vnd.in-toto+json'
MEDIA = 'application/vnd.dev.sigstore.bundle.v0.3+json'
KINDS = ('trust', 'grant', 'crl', 'head', 'card')
MAX_BYTES = 4 << 20
_B64 = Text(MAX_BYTES, '[A-Za-z0-9+/]+={0,2}', empty=False, name='base64')
_HINT = Text(64, '[0-9a-f]{64}', empty=False, name='64 hex digits')


def _envelope(kind, keyid):
  return Record({
      'payload': _B64, 'payloadType': OneOf((kind,)),
      'signatures': Items(Record({'keyid': keyid, 'sig': _B64}), 1, 1)})


_BUNDLE = Record({
    'mediaType': OneOf((MEDIA,)),
    'verificationMaterial': Record({
        'publicKey': Record({'hint': _HINT}),
        'tlogEntries': Items(OneOf(()), 0)}),
    'dsseEnvelope': _envelope(STATEMENT, OneOf(('',)))})


def pae(kind: str, payload: bytes) -> bytes:
  """Returns the bytes that are signed.

  >>> pae('a/b', b'xyz')
  b'DSSEv1 3 a/b 3 xyz'
  """
  return b'DSSEv1 %d %s %d %s' % (len(kind), kind.encode(), len(payload),
                                  payload)


def statement(data: bytes, about: dict) -> bytes:
  """Returns the statement over an artifact's files, as its manifest lists them.

  Args:
    data: bytes of the manifest.
    about: the same, parsed.
  """
  digests = {name: digest for name, _, digest in about['files']}
  digests['manifest.json'] = hashlib.sha256(data).hexdigest()
  names = sorted(digests)
  root = hashlib.sha256(b''.join(bytes.fromhex(digests[n]) for n in names))
  return canonical.dumps({
      '_type': 'https://in-toto.io/Statement/v1',
      'subject': [{'name': 'statejax-artifact',
                   'digest': {'sha256': root.hexdigest()}}],
      'predicateType': 'https://model_signing/signature/v1.0',
      'predicate': {
          'resources': [{'name': name, 'algorithm': 'sha256',
                         'digest': digests[name]} for name in names],
          'serialization': {
              'method': 'files', 'hash_type': 'sha256',
              'allow_symlinks': False, 'ignore_paths': [layout.SIG]}}})


def bundle(payload: bytes, signature: bytes, hint: str) -> bytes:
  """Returns the content of `manifest.sig`.

  Args:
    payload: of `statement`.
    signature: of PAE(STATEMENT, payload).
    hint: by which to know the key, `keys.hint`.
  """
  return canonical.dumps({
      'mediaType': MEDIA,
      'verificationMaterial': {'publicKey': {'hint': hint}, 'tlogEntries': []},
      'dsseEnvelope': _fields(STATEMENT, payload, signature, '')})


def open_bundle(data: bytes) -> tuple[bytes, bytes, str]:
  """Returns (payload, signature, hint) of a bundle of exactly this form.

  Raises:
    Refused: E_SIG.
  """
  value = _read(data, _BUNDLE, layout.SIG)
  inner = value['dsseEnvelope']
  return (_bytes(inner['payload']), _bytes(inner['signatures'][0]['sig']),
          value['verificationMaterial']['publicKey']['hint'])


def seal(kind: str, payload: bytes, signature: bytes, hint: str) -> bytes:
  """Returns a signed document of `KINDS`; see `media` for what is signed."""
  return canonical.dumps(_fields(media(kind), payload, signature, hint))


def kind_of(data: bytes) -> str:
  """Returns which of `KINDS` a signed document says it is.

  Raises:
    Refused: E_SIG: none of them.
  """
  for kind in KINDS:
    with contextlib.suppress(Refused):
      open_document(kind, data)
      return kind
  raise Refused('E_SIG', f'expected a signed document, {", ".join(KINDS)}, got '
                'something else')


def open_document(kind: str, data: bytes) -> tuple[bytes, bytes, str]:
  """Returns (payload, signature, hint) of a signed document of one kind.

  Raises:
    Refused: E_SIG.
  """
  value = _read(data, _envelope(media(kind), _HINT), kind)
  one = value['signatures'][0]
  return _bytes(value['payload']), _bytes(one['sig']), one['keyid']


def media(kind: str) -> str:
  """Returns the payload type of a kind of document."""
  if kind not in KINDS:
    raise ValueError(f'kind: expected one of {KINDS}, got {kind!r}.')
  return f'application/vnd.statejax.{kind}+json'


def _fields(kind, payload, signature, keyid):
  return {'payload': base64.b64encode(payload).decode(), 'payloadType': kind,
          'signatures': [{'keyid': keyid,
                          'sig': base64.b64encode(signature).decode()}]}


def _read(data, grammar, what):
  try:
    value = canonical.loads(data, max_bytes=MAX_BYTES)
    grammar(value, '')
    return value
  except (ValueError, RecursionError) as error:
    raise Refused('E_SIG', f'{what}: {error}') from None


def _bytes(text):
  try:
    raw = base64.b64decode(text, validate=True)
  except binascii.Error as error:
    raise Refused('E_SIG', f'expected base64, got {error}') from None
  if base64.b64encode(raw).decode() != text:  # spare bits that mean nothing
    raise Refused('E_SIG', 'expected the one base64 text of these bytes')
  return raw
