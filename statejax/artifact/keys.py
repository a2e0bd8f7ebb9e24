"""Signing keys: ECDSA over P-256, P-384 or P-521. Needs the extra [sign]."""

import dataclasses
import hashlib

from statejax.artifact import envelope, layout, manifest
from statejax.artifact.outcome import Refused

_HASHES = {'secp256r1': 'SHA256', 'secp384r1': 'SHA384', 'secp521r1': 'SHA512'}


def generate() -> bytes:
  """Returns a new private key, as PEM without a password."""
  ec, serialization, _ = _library()
  return ec.generate_private_key(ec.SECP256R1()).private_bytes(
      serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
      serialization.NoEncryption())


def public(private: bytes) -> str:
  """Returns the public key of a private one, as SPKI PEM text."""
  _, serialization, _ = _library()
  return _private(private).public_key().public_bytes(
      serialization.Encoding.PEM,
      serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def normal(pem: str | bytes) -> str:
  """Returns a public key from elsewhere as SPKI PEM text, as `public` does.

  Its name is a hash of that text: ends of lines or a remark before it would
  make it that of a key which nobody has.

  Raises:
    ValueError: none, or on no known curve, or a private key.
  """
  _, serialization, _ = _library()
  data = pem if isinstance(pem, bytes) else pem.encode()
  if b'PRIVATE KEY' in data:
    raise ValueError('key: expected the PEM of a public key, got one with a '
                     'private key, which is nobody else\'s to see; name the '
                     'file of the public one, e.g. NAME.pub.')
  return _public(serialization.load_pem_public_key, data).public_bytes(
      serialization.Encoding.PEM,
      serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def hint(pem: str) -> str:
  """Returns the name of a public key: hex of H(SPKI PEM)."""
  return hashlib.sha256(pem.encode()).hexdigest()


def sign(private: bytes, kind: str, payload: bytes) -> bytes:
  """Returns the DER signature of a payload of a type."""
  ec, _, hashes = _library()
  key = _private(private)
  return key.sign(envelope.pae(kind, payload), ec.ECDSA(
      getattr(hashes, _HASHES[key.curve.name])()))


def check(pem: str, kind: str, payload: bytes, signature: bytes):
  """Raises unless a key has signed a payload of a type.

  Raises:
    Refused: E_SIG.
  """
  ec, serialization, hashes = _library()
  from cryptography import exceptions
  try:
    key = _public(serialization.load_pem_public_key, pem.encode())
  except ValueError as error:
    raise Refused('E_SIG', str(error)) from None
  try:
    key.verify(signature, envelope.pae(kind, payload), ec.ECDSA(
        getattr(hashes, _HASHES[key.curve.name])()))
  except exceptions.InvalidSignature:
    raise Refused('E_SIG', f'expected a signature by key {hint(pem)[:16]}, got '
                  'another one') from None


def encrypt(pem: str, data: bytes) -> bytes:
  """Returns data that only the holder of a key can read.

  An ephemeral key on the holder's curve, its shared secret by HKDF-SHA256, then
  AES-256-GCM: u16 length + ephemeral SPKI DER + ciphertext.
  """
  ec, serialization, _ = _library()
  target = _public(serialization.load_pem_public_key, pem.encode())
  mine = ec.generate_private_key(target.curve)
  head = mine.public_key().public_bytes(
      serialization.Encoding.DER,
      serialization.PublicFormat.SubjectPublicKeyInfo)
  body = _shared(mine, target, head).encrypt(bytes(12), data, head)
  return len(head).to_bytes(2, 'little') + head + body


def decrypt(private: bytes, data: bytes) -> bytes:
  """Undoes `encrypt`.

  Raises:
    Refused: E_SEALED: for another key, or changed.
  """
  _, serialization, _ = _library()
  from cryptography import exceptions
  size = int.from_bytes(data[:2], 'little')
  head, body = data[2:2 + size], data[2 + size:]
  try:
    theirs = _public(serialization.load_der_public_key, head)
    return _shared(_private(private), theirs, head).decrypt(
        bytes(12), body, head)
  except (exceptions.InvalidTag, ValueError):
    raise Refused('E_SEALED', 'expected a key sealed to this holder, got '
                  'another one') from None


def _shared(private, public, info):
  from cryptography.hazmat.primitives.ciphers.aead import AESGCM
  from cryptography.hazmat.primitives.kdf.hkdf import HKDF

  ec, _, hashes = _library()
  return AESGCM(HKDF(
      algorithm=hashes.SHA256(), length=32, salt=None,
      info=b'statejax.grant.v1\0' + info).derive(
          private.exchange(ec.ECDH(), public)))


def _public(load, data):
  """A public key on a known curve; ValueError of whatever else."""
  return _curve(load, 'EllipticCurvePublicKey', data)


def _private(pem):
  """A private key on a known curve; ValueError of whatever else."""
  _, serialization, _ = _library()
  return _curve(serialization.load_pem_private_key, 'EllipticCurvePrivateKey',
                pem, None)


def _curve(load, kind, *args):
  ec, _, _ = _library()
  from cryptography import exceptions
  try:
    key = load(*args)
  except (ValueError, TypeError, exceptions.UnsupportedAlgorithm) as error:
    # A TypeError is what a key gives that needs a password.
    raise ValueError('key: expected a readable one, without a password, got '
                     f'{error}') from None
  if not isinstance(key, getattr(ec, kind)) or key.curve.name not in _HASHES:
    raise ValueError(f'key: expected one on a curve of {list(_HASHES)}, got '
                     f'{type(key).__name__}.')
  return key


@dataclasses.dataclass(frozen=True)
class Signer:
  """A private key at work; for `vouch` of `objects.Store.keep`.

  Attributes:
    private: PEM.
  """

  private: bytes = dataclasses.field(repr=False)

  @property
  def name(self) -> str:
    """As a manifest names its producer: 'key:' and 64 hex digits."""
    return f'key:{hint(public(self.private))}'

  def __call__(self, folder, data: bytes):
    """Writes `manifest.sig` over a manifest and the files which it lists."""
    payload = envelope.statement(data, manifest.parse(data))
    (folder / layout.SIG).write_bytes(envelope.bundle(
        payload, sign(self.private, envelope.STATEMENT, payload),
        hint(public(self.private))))

  def document(self, kind: str, payload: bytes) -> bytes:
    """Returns a signed document; see `envelope.KINDS`."""
    return envelope.seal(
        kind, payload, sign(self.private, envelope.media(kind), payload),
        hint(public(self.private)))


def _library():
  try:
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
  except ImportError:
    raise ValueError('signatures: expected the package cryptography, found '
                     "none; install it with: pip install 'statejax[sign]'"
                     ) from None
  return ec, serialization, hashes
