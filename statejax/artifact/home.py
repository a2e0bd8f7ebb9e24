"""Which of the copies of a store is the one whose keys lie among the secrets.

A copy has the id of its store. Where it is opened with the same secrets, a key
that it destroyed would be missing there. So a note beside the secrets says
where the store lies, and another one with its id destroys none while that one
is there. A store that was moved, or put back at its place, is the store. So is
a copy that has secrets of its own. Imports no jax.
"""

import json
import os
import pathlib

from statejax.artifact import layout
from statejax.artifact.outcome import Refused


def elsewhere(shop) -> str:
  """Returns where the store lies of which this is a copy, '' if it is none.

  Takes a note of this one where there is none, or nothing where it says.

  Raises:
    Refused: E_IO: the note is damaged.
  """
  if not have(shop):
    return ''  # these secrets are not to be noted as its own
  here = {'store': str(shop.path),
          'secrets': os.path.abspath(shop.secrets.path)}
  noted = _noted(shop)
  if noted == here:
    return ''
  if noted is not None:
    copied = _same(noted['secrets'], here['secrets']) is False
    if not copied and _is(noted['store'], shop.id):
      if not _same(noted['store'], here['store']):
        return noted['store']
    else:
      # It may be a copy all the same, of one that is not to be seen now: there
      # may be what was deleted here, or what was being minted.
      shop.catalog.forget_expected()
  shop.secrets.note(_name(shop), json.dumps(here))
  return ''


def have(shop) -> bool:
  """Whether the secrets are those of the store, or it needs none yet."""
  made = lambda: shop.secrets.find(f'store-{shop.id}') is not None
  # Made with the first artifact; another one would know none of them.
  if made():
    return True
  if any(shop.path.glob(f'objects/*/*/{layout.MAC}')):
    return made()  # another process may have begun meanwhile
  # One that has only taken in what others have made has keys to that.
  return any(shop.secrets.names(f'{kind}-{shop.id[:16]}-')
             for kind in ('art', 'data', 'pushed')) or not (
                 shop.catalog.expected() or shop.catalog.condemned()) or made()


def require(shop):
  """Raises E_IO unless the secrets are those of the store."""
  if not have(shop):
    raise Refused('E_IO', f'{shop.secrets.path}: expected the secret of the '
                  f'store {shop.path}, got none; name the directory of its '
                  'secrets (--secrets)')


def secret(shop) -> bytes:
  """Returns by what a store knows its own manifests, made at the first use.

  Before any key is expected: else a kill in between would leave a store whose
  secrets seem to be elsewhere.

  Raises:
    Refused: E_IO: it is not among these secrets.
  """
  require(shop)
  return shop.secrets.get(f'store-{shop.id}')


def _name(shop):
  return f'home-{shop.id}'


def _noted(shop):
  file = pathlib.Path(shop.secrets.path) / f'{_name(shop)}.json'
  try:
    found = json.loads(file.read_bytes())
    if {name: type(value) for name, value in found.items()} == {
        'store': str, 'secrets': str}:
      return found
  except FileNotFoundError:
    return None
  except (ValueError, AttributeError, RecursionError):
    pass
  raise Refused('E_IO', f'{file}: expected where the store lies, got something '
                'else; remove the file, and open the store itself, not a copy')


def _same(one, other):
  """Whether two paths are of one directory; None where the first is none."""
  try:
    return os.path.samefile(one, other)
  except OSError:
    return None


def _is(path, id):
  """Whether the store of an id lies at a path."""
  try:
    return json.loads((pathlib.Path(path) / 'STORE.json').read_bytes())[
        'id'] == id
  except (OSError, ValueError, TypeError, KeyError):
    return False
