"""Verifies an artifact without JAX, before anything of its payload is read.

    python -m statejax.artifact.verify DIRECTORY [--secret=FILE]

Steps V1 to V3, V4 with the secret of its store, V9 and V11 of a load: names
and sizes, manifest, name, voucher, every file's digest, plain.json, and where
the transcript is kept its witness. Needs the standard library only.
"""

import argparse
import dataclasses
import hmac
import json
import pathlib
import sys

from statejax.artifact import layout, manifest, names
from statejax.artifact.outcome import Refused


@dataclasses.dataclass(frozen=True)
class Verified:
  """What stands after the checks that need no arrays.

  Attributes:
    id: of the artifact.
    about: its manifest.
    plain: digests of its leaves; None where it is sealed and stays so.
    tokens: its transcript, absorbed tokens then pending ones; None where it is
      not kept, or sealed.
    vouched: by whom: 'mac', 'signature', or '' where nobody was asked.
  """

  id: str
  about: dict
  plain: dict | None
  tokens: list[int] | None
  vouched: str


def mac(secret: bytes, data: bytes) -> bytes:
  """Returns the code by which a store knows its own manifests, 64 hex."""
  return hmac.new(secret, b'statejax.mac.v1\0' + data,
                  'sha256').hexdigest().encode()


def head(folder, *, name: str | None = None, max_bytes: int = 1 << 40,
         foreign: bool = False):
  """V1 to V3: returns (walk, manifest bytes, manifest, id).

  Args:
    folder: the artifact.
    name: the id it was asked by; None takes what it has.
    max_bytes: of all its files, and of its arrays.
    foreign: see `layout.walk`.

  Raises:
    Refused: E_LAYOUT, E_LIMIT, E_MANIFEST, E_VERSION, E_ID.
  """
  found = layout.walk(folder, max_bytes=max_bytes, foreign=foreign)
  data = layout.read(folder, manifest.NAME)
  about = manifest.parse(data)
  if about['state']['logical_bytes'] > max_bytes:
    raise Refused('E_LIMIT', f'expected at most {max_bytes} bytes of state, '
                  f'got {about["state"]["logical_bytes"]}')
  got = manifest.artifact_id(data)
  if name is not None and got != name:
    raise Refused('E_ID', f'expected {name}, got {got}')
  return found, data, about, got


def vouch(folder, found, data: bytes, secret: bytes | None) -> str:
  """V4 for a store's own code: returns 'mac'.

  Raises:
    Refused: E_UNSIGNED: no secret, or vouched for by a signature; E_SIG.
  """
  if found.voucher != layout.MAC or secret is None:
    raise Refused('E_UNSIGNED', f'expected {layout.MAC} and the secret of the '
                  f'store that made it, got {found.voucher}'
                  f'{" without a secret" if secret is None else ""}')
  stored = layout.read(folder, layout.MAC)
  if not hmac.compare_digest(mac(secret, data), stored):
    raise Refused('E_SIG', f'{layout.MAC}: expected the code of this manifest '
                  'under this secret, got another one')
  return 'mac'


def content(folder, found, about):
  """V9 and V11: returns (plain, tokens), None where sealed or not kept.

  Raises:
    Refused: E_FILES, E_PLAIN, E_LIMIT, E_WITNESS.
  """
  layout.check(folder, found, about)
  if about['sealed'] != 'none':
    return None, None
  return unsealed(folder, about)


def unsealed(folder, about):
  """V11: returns (plain, tokens) of a directory whose files are in clear."""
  size = (pathlib.Path(folder) / manifest.PLAIN).stat().st_size
  if size > 1 << 20:
    raise Refused('E_LIMIT', f'{manifest.PLAIN}: expected at most 1 MiB, got '
                  f'{size}')
  plain = manifest.parse_plain(layout.read(folder, manifest.PLAIN), about)
  if about['state']['transcript'] == 'none':
    return plain, None
  data = layout.read(folder, manifest.TOKENS)
  return plain, parse_tokens(data, about, plain)


def parse_tokens(data: bytes, about: dict, plain: dict) -> list[int]:
  """Returns the kept tokens, if they give the witness and the chain.

  Raises:
    Refused: E_PLAIN, E_WITNESS.
  """
  try:
    tokens = names.unpack(data)
  except ValueError as error:
    raise Refused('E_PLAIN', f'{manifest.TOKENS}: {error}') from None
  length = about['state']['length']
  if len(tokens) != length + about['state']['n_pending'] or any(
      token >= names.MAX_TOKEN for token in tokens):
    raise Refused('E_PLAIN', f'{manifest.TOKENS}: expected ids below 2^30, as '
                  f'many as absorbed and pending, got {len(tokens)}')
  absorbed = tokens[:length]
  got = names.witness(absorbed, plain['edits'])
  if got != plain['witness']:
    raise Refused('E_WITNESS', f'expected witness {plain["witness"]}, got {got}'
                  f' of the {length} kept tokens')
  space = names.namespace(about, about['governance']['owner'])
  chain = names.chain(space, absorbed)
  if plain['token_chain'] not in ('', chain):
    raise Refused('E_WITNESS', f'expected chain {plain["token_chain"]}, got '
                  f'{chain} of the kept tokens')
  return tokens


def verify(folder, *, name: str | None = None, secret: bytes | None = None,
           max_bytes: int = 1 << 40, foreign: bool = False) -> Verified:
  """Verifies all of an artifact that needs no arrays.

  Args:
    folder: the artifact.
    name: the id it was asked by; None takes what it has.
    secret: of its store; None asks nobody who vouches for it.
    max_bytes: of all its files.
    foreign: see `layout.walk`.

  Raises:
    Refused: the first check that fails.
  """
  found, data, about, got = head(folder, name=name, max_bytes=max_bytes,
                                 foreign=foreign)
  vouched = '' if secret is None else vouch(folder, found, data, secret)
  plain, tokens = content(folder, found, about)
  return Verified(got, about, plain, tokens, vouched)


def main(argv=None) -> int:
  """Command: prints one JSON line; returns 0, or 1 where refused."""
  parser = argparse.ArgumentParser(prog='python -m statejax.artifact.verify')
  parser.add_argument('directory')
  parser.add_argument('--secret', help='file with the secret of its store')
  given = parser.parse_args(argv)
  try:
    secret = (bytes.fromhex(pathlib.Path(given.secret).read_text())
              if given.secret else None)
    found = verify(given.directory, secret=secret)
  except (Refused, OSError) as error:
    code = error.code if isinstance(error, Refused) else 'E_IO'
    print(json.dumps({'verified': False, 'code': code, 'why': str(error)}))
    return 1
  print(json.dumps({
      'verified': True, 'id': found.id, 'vouched': found.vouched or 'not asked',
      'length': found.about['state']['length'],
      'owner': found.about['governance']['owner'],
      'sealed': found.about['sealed']}))
  return 0


if __name__ == '__main__':
  sys.exit(main())
