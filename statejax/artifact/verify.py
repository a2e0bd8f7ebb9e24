"""Verifies an artifact without JAX, before anything of its payload is read.

    python -m statejax.artifact.verify PATH [--secret=FILE]
        [--root=PEM --trust=FILE [--crl=FILE]] [--leaves]

Steps V1 to V3, V9 and V11 of a load: names and sizes, manifest, name, every
file's digest, plain.json, and where the transcript is kept its witness. Of V4
that a signature is over just these files; that it is valid and by whom needs
the pinned root key and a trust document (V4, V5, with a revocation list V6, and
of V7 the expiry), or the secret of its store. `--leaves` reads the arrays, too
(V14). The output says of each what was not checked. Whoever has a right to it
is not asked. PATH is a directory, or the file of a transfer. Needs the standard
library; signatures the extra [sign], leaves numpy and tensorstore.
"""

import argparse
import contextlib
import dataclasses
import hmac
import json
import pathlib
import re
import sys
import tempfile
import time

from statejax.artifact import envelope, layout, manifest, names, portable
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
    vouched: by whom: 'mac', 'key:' and the hint of who has signed, or '' where
      nobody was asked, or nobody does.
    why: why nobody does, '' where nobody was asked.
    stems: in words, what it stems from that others have signed; as long as they
      count, it does.
  """

  id: str
  about: dict
  plain: dict | None
  tokens: list[int] | None
  vouched: str
  why: str = ''
  stems: tuple[str, ...] = ()


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


def bundle(folder, data: bytes, about: dict) -> tuple[bytes, bytes, str]:
  """The part of V4 that needs no key: returns (payload, signature, hint).

  Raises:
    Refused: E_SIG: no bundle, or one over other files.
  """
  found = envelope.open_bundle(layout.read(folder, layout.SIG))
  if found[0] != envelope.statement(data, about):
    raise Refused('E_SIG', f'{layout.SIG}: expected a statement over exactly '
                  'the files of the manifest, got another one')
  return found


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
  salts(folder, about)
  if about['state']['transcript'] == 'none':
    return plain, None
  data = layout.read(folder, manifest.TOKENS)
  return plain, parse_tokens(data, about, plain)


def salts(folder, about) -> dict[str, str]:
  """Returns the salts of `slots.json`, of a directory as above; {} of none."""
  path = pathlib.Path(folder) / manifest.SLOTS
  if all(name != manifest.SLOTS for name, _, _ in about['files']):
    return {}
  if path.stat().st_size > 1 << 20:
    raise Refused('E_LIMIT', f'{manifest.SLOTS}: expected at most 1 MiB, got '
                  f'{path.stat().st_size}')
  return manifest.parse_slots(layout.read(folder, manifest.SLOTS))


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
  if found.voucher == layout.SIG:
    bundle(folder, data, about)
  vouched = '' if secret is None else vouch(folder, found, data, secret)
  plain, tokens = content(folder, found, about)
  return Verified(got, about, plain, tokens, vouched)


def said(vouched: str, why: str = '') -> dict:
  """Returns in words who vouches for an artifact, for a line of output.

  Args:
    vouched, why: see `Verified`.
  """
  nobody = f'does not count here: {why}' if why else 'not checked'
  return {'signature': 'none, its store vouches' if vouched == 'mac' else
          vouched or nobody}


@contextlib.contextmanager
def opened(path):
  """Yields the directory of an artifact given as a directory or as a file.

  Raises:
    Refused: E_LAYOUT, E_LIMIT: a file that is none of an artifact.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    portable.unpack(path, folder)
    yield pathlib.Path(folder)


def _by_trust(given, folder, found) -> dict:
  """V4 to V7 without a store: returns in words what was checked.

  Nobody can tell when it came to be but its producer, whose key may be stolen:
  so it is first seen now.
  """
  from statejax.artifact import revoke, revoked, trust
  data = layout.read(folder, manifest.NAME)
  if layout.walk(folder).voucher != layout.SIG:
    raise Refused('E_UNSIGNED', f'expected {layout.SIG}, got {layout.MAC}, '
                  'which needs the --secret of its store')
  root, now = pathlib.Path(given.root).read_text(), int(time.time())
  known = trust.parse(pathlib.Path(given.trust).read_bytes(), root)
  about = found.about
  words, lists = said(trust.signed(known, folder, data, about, now)), []
  if given.crl:
    lists = [(trust.signed_revocations(
        known, about['governance']['org'], pathlib.Path(given.crl).read_bytes(),
        now=now), True)]
    words['revoked'] = 'no'
  revoked.holds(about, found.id, revoke.Known(seen=now),
                oldest=known.min_epoch, lists=lists, now=now)
  end = about['governance']['not_after']
  if 0 < end <= now:
    raise Refused('E_EXPIRED', f'expected a time until {end}, got {now}')
  return words | {'expired': 'no'}


def _check_arrays(folder, found):
  from statejax.artifact import leaves
  if found.plain is None:
    raise Refused('E_SEALED', '--leaves: expected arrays in clear, got a '
                  'sealed artifact; load it in a store that has its key')
  leaves.check(folder, found.about, found.plain)


def _secret(path) -> bytes:
  text = pathlib.Path(path).read_text()
  if not re.fullmatch(r'[0-9a-f]{64}\s*', text):
    raise ValueError(f'--secret={path}: expected 64 hex digits, the secret of '
                     'its store, got something else')
  return bytes.fromhex(text)


def main(argv=None) -> int:
  """Command: prints one JSON line of what was checked and what was not.

  It is verified where all files match and who vouches for them was checked.

  Returns:
    0 where all that was asked for holds and somebody vouches, 1 where it is
    refused, 2 where it cannot be asked: flags that do not go together, a
    missing package; 3 where all that was asked for holds, but nobody was asked
    who vouches: anybody can make such files.
  """
  parser = argparse.ArgumentParser(prog='python -m statejax.artifact.verify')
  parser.add_argument('path', help='directory of an artifact, or a file')
  parser.add_argument('--secret', help='file with the secret of its store')
  parser.add_argument('--root', help='file of the pinned public key')
  parser.add_argument('--trust', help='trust document, signed by --root')
  parser.add_argument('--crl', help="its organisation's revocation list")
  parser.add_argument('--leaves', action='store_true', help='read the arrays')
  given = parser.parse_args(argv)
  if bool(given.root) != bool(given.trust) or given.crl and not given.root:
    parser.error('--root, --trust: expected both; --crl needs them')
  if given.secret and given.root:
    parser.error('--secret, --root: expected one of them: an artifact has the '
                 'code of its store or a signature')
  words = {'revoked': 'not checked', 'expired': 'not checked',
           'rights': 'not checked', 'arrays': 'not checked'}
  try:
    secret = _secret(given.secret) if given.secret else None
    with opened(given.path) as folder:
      found = verify(folder, secret=secret)
      words = said(found.vouched) | words
      if given.root:
        words |= _by_trust(given, folder, found)
      if given.leaves:
        _check_arrays(folder, found)
        words['arrays'] = 'match their digests'
  except (Refused, OSError) as error:
    code = error.code if isinstance(error, Refused) else 'E_IO'
    print(json.dumps({'verified': False, 'code': code, 'why': str(error)}))
    return 1
  except ImportError as error:
    parser.error(f'--leaves: expected numpy and tensorstore, got: {error}')
  except ValueError as error:  # no key, or nothing to check it with
    parser.error(str(error))
  verified = words['signature'] != 'not checked'
  print(json.dumps({
      'verified': verified, 'id': found.id,
      'files': 'match their digests', **words,
      'length': found.about['state']['length'],
      'owner': found.about['governance']['owner'],
      'sealed': found.about['sealed']}))
  return 0 if verified else 3


if __name__ == '__main__':
  sys.exit(main())
