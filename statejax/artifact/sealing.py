"""Sealed files: AES-256-GCM in chunks of 1 MiB. Needs the extra [sign].

    wrapped  = nonce + GCM(KEK, nonce, data key, aad = manifest nonce)
    file key = HKDF-SHA256(data key, info = path)
    chunk i  = GCM(file key, nonce = i as 96 bits, aad = "statejax.seal.v1\\0" +
               manifest nonce + u32 length + path + u64 i + u8 last)

A chunk moved, cut off or taken from another file or artifact does not open.

The manifest names the secret that wraps the data key, KEK. What a store keeps
has one of its own, so that destroying it destroys this content and no other:

    art-<store>-<nonce>    of one artifact of one store; made with it
    data-<store>-<id>      a data key that a grant has brought to a store
    pushed-<store>-<id>    a data key of what a store has pushed to a bucket
    org-<org>-kek          the organisation's: of what was exported, which its
                           other stores must open, and of older artifacts

`shred` destroys the first three when an artifact is revoked or deleted. An
earlier release kept data-<id> and pushed-<id> for all stores of these secrets.
"""

import base64
import contextlib
import hmac
import os
import pathlib
import struct

from statejax.artifact import commit, home, layout, manifest
from statejax.artifact.outcome import Refused

CHUNK = 1 << 20
OWN = 'art-'
_TAG = 16


def wrap(kek: bytes, key: bytes, nonce: str) -> str:
  """Returns the data key as the manifest holds it, base64.

  Args:
    kek: 32 bytes.
    key: 32 bytes.
    nonce: of the manifest, 32 hex.
  """
  gcm, _, _ = _library()
  salt = os.urandom(12)
  return base64.b64encode(salt + gcm(kek).encrypt(
      salt, key, bytes.fromhex(nonce))).decode()


def unwrap(kek: bytes, wrapped: str, nonce: str) -> bytes:
  """Undoes `wrap`.

  Raises:
    Refused: E_SEALED: another key, or other content.
  """
  gcm, _, _ = _library()
  from cryptography import exceptions
  try:
    raw = base64.b64decode(wrapped, validate=True)
    return gcm(kek).decrypt(raw[:12], raw[12:], bytes.fromhex(nonce))
  except (exceptions.InvalidTag, ValueError):
    raise Refused('E_SEALED', 'expected the key that wraps this artifact, got '
                  'another one') from None


def seal(key: bytes, nonce: str, path: str, data: bytes) -> bytes:
  """Returns the ciphertext of a file."""
  gcm = _file_key(key, path)
  count = max(1, -(-len(data) // CHUNK))
  return b''.join(
      gcm.encrypt(_counter(i), data[i * CHUNK:(i + 1) * CHUNK],
                  _aad(nonce, path, i, i == count - 1)) for i in range(count))


def unseal(key: bytes, nonce: str, path: str, data: bytes) -> bytes:
  """Undoes `seal`.

  Raises:
    Refused: E_SEALED.
  """
  gcm, step = _file_key(key, path), CHUNK + _TAG
  from cryptography import exceptions
  count = max(1, -(-len(data) // step))
  try:
    return b''.join(
        gcm.decrypt(_counter(i), data[i * step:(i + 1) * step],
                    _aad(nonce, path, i, i == count - 1))
        for i in range(count))
  except (exceptions.InvalidTag, ValueError):
    raise Refused('E_SEALED', f'{path}: expected a file sealed under this key '
                  'and name, got another one') from None


def own_name(shop, nonce: str) -> str:
  """Returns the name of the secret that wraps one artifact's key alone."""
  return f'{OWN}{shop.id[:16]}-{nonce}'


def new_key(shop, about: dict, kek: str,
            key: bytes | None = None) -> tuple[bytes, dict]:
  """Returns a data key, and the group `seal` that wraps it.

  Args:
    shop: `objects.Store`.
    about: the manifest, with its nonce.
    kek: name of the secret that wraps it, made where it is new: of `own_name`
      for what stays in the store, the organisation's for what leaves it.
    key: see `export_key`; None is a fresh one.
  """
  key = os.urandom(32) if key is None else key
  if kek == own_name(shop, about['nonce']):
    home.secret(shop)
    home.elsewhere(shop)  # where the store lies, while there is but one
    shop.catalog.expect(kek)
  return key, {'kek': kek, 'chunk': CHUNK, 'wrapped': wrap(
      shop.secrets.get(kek), key, about['nonce'])}


def original(id: str, about: dict) -> str:
  """Returns what an artifact was first exported from; itself where it was not.
  """
  return [id, *(parent['id'] for parent in about['provenance']['parents']
                if parent['role'] == 'exported')][-1]


def family_seed(shop, id: str, about: dict) -> bytes:
  """Returns the secret from which those of all of a family follow."""
  root, org = about['provenance']['root'], about['governance']['org']
  return _derived(shop.secrets.get(shop.secrets.org_name(org, 'kek')), 'family',
                  id if root == 'self' else root)


def seed(shop, id: str, about: dict) -> bytes:
  """Returns the secret from which the keys of all exports of an artifact
  follow, so that a grant of it fits each of them.
  """
  return member_seed(family_seed(shop, id, about), id, about)


def member_seed(family: bytes, id: str, about: dict) -> bytes:
  """Returns the `seed` of one of a family, by that of `family_seed`."""
  return _derived(family, 'member', original(id, about))


def export_key(seed: bytes, nonce: str) -> bytes:
  """Returns the data key of an export, which the manifest also wraps."""
  return _derived(seed, 'export', nonce)


def exchange_key(key: bytes) -> bytes:
  """Returns the secret under which an export names texts.

  It follows from the data key: whoever can open the export can compare texts of
  their own with it, and nobody else can guess at them.
  """
  return _derived(key, 'exchange', '')


def _derived(secret, use, name):
  return hmac.digest(secret, f'statejax.{use}.v1\0{name}'.encode(), 'sha256')


def seal_tree(source, target, nonce: str, key: bytes):
  """Writes the files of a directory, sealed, into another one."""
  source, target = pathlib.Path(source), pathlib.Path(target)
  for file in sorted(p for p in source.rglob('*') if p.is_file()):
    name = str(file.relative_to(source))
    (target / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    (target / name).write_bytes(seal(key, nonce, name, file.read_bytes()))


def data_name(shop, id: str) -> str:
  """Returns the name of the secret that a grant has brought."""
  return f'data-{shop.id[:16]}-{id[4:36]}'


def pushed_name(shop, id: str) -> str:
  """Returns the name of the secret of what was pushed to a bucket."""
  return f'pushed-{shop.id[:16]}-{id[4:36]}'


def shared_names(id: str) -> tuple[str, str]:
  """Returns the names of both in an earlier release, the same in all stores."""
  return f'data-{id[4:36]}', f'pushed-{id[4:36]}'


def keep_granted(shop, id: str, key: bytes):
  """Keeps a data key that a grant has brought."""
  home.secret(shop)
  shop.catalog.expect(data_name(shop, id), id)
  shop.secrets.put(data_name(shop, id), key)


def keep_pushed(shop, id: str, about: dict):
  """Keeps the data key of what is pushed, as its own goes when it is deleted.

  With its manifest, by which it can be revoked later.

  Raises:
    Refused: as `data_key`.
  """
  key, name = data_key(shop, id, about), pushed_name(shop, id)
  home.secret(shop)
  shop.catalog.expect(name, id, manifest.dumps(about).decode())
  shop.secrets.put(name, key)


def data_key(shop, id: str, about: dict) -> bytes:
  """Returns the key of a sealed artifact, kept bare or wrapped.

  Raises:
    Refused: E_SEALED: neither is here, or it is another one.
  """
  for name in (data_name(shop, id), pushed_name(shop, id), *shared_names(id)):
    bare = shop.secrets.find(name)
    if bare is not None:
      return bare
  kek = shop.secrets.find(about['seal']['kek'])
  if kek is None:
    raise Refused('E_SEALED', f'expected key {about["seal"]["kek"]}, got none')
  return unwrap(kek, about['seal']['wrapped'], about['nonce'])


def check_foreign(about: dict):
  """Raises where an artifact from elsewhere names a store's own secret.

  Else its deletion would destroy the key of whom it imitates.

  Raises:
    Refused: E_SEALED.
  """
  if about['sealed'] != 'none' and about['seal']['kek'].startswith(OWN):
    raise Refused('E_SEALED', "expected a key of an organisation, got a store's"
                  ' own; have it exported from there')


@contextlib.contextmanager
def opened(shop, folder, about: dict):
  """V10: yields a directory with an artifact's files in clear.

  That is the artifact itself where it is not sealed; else a private directory
  in memory, gone at the end.

  Raises:
    Refused: E_SEALED: the key is not here, or is another one.
  """
  if about['sealed'] == 'none':
    yield pathlib.Path(folder)
    return
  key = data_key(shop, manifest.artifact_id(manifest.dumps(about)), about)
  with scratch(shop) as clear:
    for name, _, _ in about['files']:
      (clear / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
      (clear / name).write_bytes(unseal(
          key, about['nonce'], name, layout.read(folder, name)))
    yield clear


def read(shop, folder, about: dict, name: str) -> bytes:
  """Returns one file of an artifact in clear.

  Raises:
    Refused: as `opened`.
  """
  data = layout.read(pathlib.Path(folder), name)
  if about['sealed'] == 'none':
    return data
  id = manifest.artifact_id(manifest.dumps(about))
  return unseal(data_key(shop, id, about), about['nonce'], name, data)


@contextlib.contextmanager
def scratch(shop):
  """Yields a private directory in memory, for what must not reach a disk."""
  if not pathlib.Path(shop.scratch).is_dir():
    raise Refused('E_SEALED', f'expected a file system in memory at '
                  f'{shop.scratch}, got none; name one as scratch of the store')
  # Locked: what a killed process leaves in clear there, a collection finds.
  with commit.stage(pathlib.Path(shop.scratch) / scratch_name(shop)) as folder:
    folder.chmod(0o700)
    yield folder


def scratch_name(shop) -> str:
  """Returns what `commit.sweep` knows a store's directories in memory by."""
  return f'statejax-{shop.id}'


def _file_key(key, path):
  gcm, hkdf, hashes = _library()
  return gcm(hkdf(algorithm=hashes.SHA256(), length=32, salt=None,
                  info=path.encode()).derive(key))


def _counter(i):
  return i.to_bytes(12, 'big')


def _aad(nonce, path, i, last):
  raw = path.encode()
  return (b'statejax.seal.v1\0' + bytes.fromhex(nonce)
          + struct.pack('<I', len(raw)) + raw + struct.pack('<QB', i, last))


def require():
  """Raises ValueError unless the packages are there by which one seals."""
  _library()


def _library():
  try:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
  except ImportError:
    raise ValueError('sealing: expected the package cryptography, found none; '
                     "install it with: pip install 'statejax[sign]'") from None
  return AESGCM, HKDF, hashes
