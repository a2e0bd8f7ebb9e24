"""Documents that a store has installed: its trust document, and signed lists.

They are files below `trust/`. Whoever can write there could put back an older
one, by which what was revoked since would be valid again. So number and digest
of each stand in the audit log, with who has signed it, and in the catalog,
which is asked whenever one is read. Documents that an earlier release has
installed, or whose installing a kill has cut short, are noted nowhere; such a
list counts where a key has signed it that may, see `revoked.kept`. Imports no
jax.
"""

import contextlib
import pathlib
import re

from statejax.artifact import commit, envelope, names, revoke
from statejax.artifact.outcome import Refused

TRUST, CRL = 'trust.dsse.json', 'crl.dsse.json'
_LIST = re.compile(f'[0-9a-f]{{16}}-.*{re.escape(CRL)}')
MOST = 64  # lists of an organisation that are kept beside each other


def keep(shop, file: str, kind: str, number: int, data: bytes, *, instead=()):
  """Writes a document, and what was installed.

  Killed in between, it leaves the new one, which then counts unnoted.

  Args:
    shop: `objects.Store`.
    file: its name.
    kind: of `envelope.KINDS`.
    number: its own.
    data: its bytes.
    instead: files whose place it takes, beside `file`.
  """
  replace(shop.path / 'trust' / file, data)
  mark = names.sha256(data)
  body, _, signer = envelope.open_document(kind, data)
  with shop.catalog.transaction():
    shop.catalog.audit(f'key:{signer}', kind, mark, f'installed {number}')
    shop.catalog.install(file, number, mark, body.decode())
    for other in instead:
      shop.catalog.uninstall(other)
  for other in instead:
    (shop.path / 'trust' / other).unlink(missing_ok=True)


def found(path: pathlib.Path) -> bytes | None:
  """A file's content, None for no such file; what cannot be read is no such
  answer.
  """
  try:
    return path.read_bytes()
  except FileNotFoundError:
    return None


def fault(file: str, note: tuple[int, str, str], data: bytes | None) -> str:
  """Says how a file is not the document that was noted; '' if it is."""
  number, mark, _ = note
  if data is not None and names.sha256(data) == mark:
    return ''
  return (f'trust/{file}: expected number {number}, {mark[:23]}, as it was '
          f'installed, got {"another document" if data else "nothing"}: it was '
          'put back, changed or lost; install that one again, or a newer one')


def lists(shop, org: str) -> dict[str, bytes]:
  """Returns {file: signed list} of an organisation.

  Raises:
    Refused: E_TRUST: one that was installed is not there as it was.
  """
  notes = _notes(shop, org)
  there = {file: data for file in {*notes, *_files(shop, org)}
           if (data := found(shop.path / 'trust' / file)) is not None}
  for file, note in notes.items():
    if wrong := fault(file, note, there.get(file)):
      if _notes(shop, org) != notes:  # another one has just taken its place
        return lists(shop, org)
      raise Refused('E_TRUST', wrong)
  return there


def check_newer(shop, org: str, new: dict, data: bytes):
  """Raises where a signed list says nothing that is not kept already.

  Args:
    shop: `objects.Store`.
    org: the organisation.
    new: the list, verified.
    data: its document.

  Raises:
    Refused: E_TRUST: it is older than one that is kept; E_LIMIT: too many.
  """
  file, kept = _name(org, data), _noted(shop, org)
  for other, body in kept.items():
    if other != file and body != new and revoke.covers(body, new) and (
        new['number'] <= body['number']
        and new['next_update'] <= body['next_update']):
      raise Refused('E_TRUST', f'crl: expected a number above {body["number"]},'
                    ' a later end or an entry that is not known, got '
                    f'{new["number"]}')
  if len([body for other, body in kept.items()
          if other != file and not revoke.covers(new, body)]) >= MOST:
    raise Refused('E_LIMIT', f'expected lists of at most {MOST} stores of '
                  f'{org}, got one more; install all of them in one store, and '
                  'here the list that it then writes')


def add(shop, org: str, new: dict, data: bytes):
  """Keeps a signed list, in place of those which it covers."""
  file = _name(org, data)
  keep(shop, file, 'crl', new['number'], data, instead=[
      other for other, body in (
          _noted(shop, org) | _unnoted(shop, org)).items()
      if other != file and revoke.covers(new, body)])


def _noted(shop, org) -> dict[str, dict]:
  """Returns {file: list} of an organisation as it was installed, also of what
  is not there any more.
  """
  return {file: revoke.parse(note[2].encode())
          for file, note in _notes(shop, org).items()}


def _unnoted(shop, org):
  """The same of what is there and noted nowhere, if it is a list at all."""
  bodies = {}
  for file in _files(shop, org) - _notes(shop, org).keys():
    with contextlib.suppress(Refused, FileNotFoundError):
      bodies[file] = revoke.parse(envelope.open_document(
          'crl', (shop.path / 'trust' / file).read_bytes())[0])
  return bodies


def check(shop) -> list[str]:
  """Returns in words which documents are not those that were installed."""
  notes = shop.catalog.installed()
  wrong = [text for file, note in notes.items() if (
      text := fault(file, note, found(shop.path / 'trust' / file)))]
  wrong += [f'trust/{path.name}: expected a list that was installed, got one '
            'that is noted nowhere; install it again where it is right, else '
            'remove it' for path in sorted((shop.path / 'trust').iterdir())
            if _LIST.fullmatch(path.name) and path.name not in notes]
  told: dict[str, dict[str, str]] = {'trust': {}, 'crl': {}}
  for row in shop.catalog.rows():
    if row['action'] in told and row['outcome'].startswith('installed '):
      told[row['action']][row['id']] = row['outcome']
  for file, (number, mark, _) in notes.items():
    kind = 'trust' if file == TRUST else 'crl'
    if told[kind].get(mark) != f'installed {number}':
      wrong.append(f'trust/{file}: expected a row of the audit log that says '
                   f'of {mark[:23]}: installed {number}, got none')
  newest = list(told['trust'])[-1:]
  if newest and newest != [notes.get(TRUST, (0, '', ''))[1]]:
    wrong.append(f'trust/{TRUST}: expected {newest[0][:23]}, the last one in '
                 'the audit log, got another one in the catalog')
  return wrong


def replace(path: pathlib.Path, data: bytes):
  """Writes a file in place of an earlier one, durably."""
  new = path.with_suffix('.new')
  new.write_bytes(data)
  commit.sync(new)
  new.replace(path)
  commit.sync(path.parent)


def _mark(org):
  return names.sha256(org.encode())[7:23]


def _name(org, data):
  return f'{_mark(org)}-{names.sha256(data)[7:23]}-{CRL}'


def _files(shop, org):
  """Names of an organisation's lists, also as an earlier release had one."""
  return {path.name for path in (shop.path / 'trust').glob(
      f'{_mark(org)}-*{CRL}')}


def _notes(shop, org):
  return {file: note for file, note in shop.catalog.installed().items()
          if file.startswith(f'{_mark(org)}-')}
