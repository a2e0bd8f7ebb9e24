"""A journal of edits: who did what to which slot, and never what it said.

    entry = H("statejax.memjournal.v1\0" + previous + u32 length + CJ{...})
    commitment = H("statejax.slot.v1\0" + salt + CJ{row})

A commitment proves later what a slot held, to whoever has its salt. Salts lie
beside the journal, one for each object, and go when the object is purged: a
short value can be guessed from a hash without one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import secrets

from statejax.artifact import digest

LOG, SALTS = 'journal.jsonl', 'slots.json'
_GENESIS = '0' * 64


class Journal:
  """An append-only chain of entries in a directory.

  A journal belongs to one serving state whose rows keep their places: objects
  are named by layer, row and id. That its last entries were cut off shows only
  against a `head` which was kept elsewhere.

  Attributes:
    path: directory of `journal.jsonl` and `slots.json`.
    entries: dicts, oldest first; see `statejax.memory`.
    gone: names of the objects whose salts were destroyed, a set.
  """

  def __init__(self, path):
    """Opens a journal, or begins one; its parent must exist.

    A last line that a crash has torn was never acknowledged, and is cut off.

    Raises:
      ValueError: the chain is broken: an entry was changed, lost or inserted;
        salts are damaged or lost; or there is no place for the directory.
    """
    self.path = pathlib.Path(path)
    if not self.path.absolute().parent.is_dir() or (
        self.path.exists() and not self.path.is_dir()):
      raise ValueError(f'{path}: expected a directory, or the name of a new one'
                       f' in {self.path.parent}; make that first.')
    self.path.mkdir(exist_ok=True)
    _sync(self.path.absolute().parent)
    self._log, self._salts = self.path / LOG, self.path / SALTS
    with self._locked():
      text = self._log.read_bytes()
      self.entries, self._head, self._size = _chain(self._log, text)
      self.gone = {e['forgets'] for e in self.entries if e.get('forgets')}
      self._salt = _read_salts(self._salts)
      self._require_salts()
      if self._size < len(text):
        os.truncate(self._log, self._size)
      # A crash may fall between an entry and what it says.
      if self.gone & set(self._salt):
        self._write_salts()

  def _require_salts(self):
    """Raises where salts are lost: edits would no longer follow each other."""
    lost = sorted({object_name(e) for e in self.entries if e.get('after')}
                  - self.gone - set(self._salt))
    if lost:
      raise ValueError(
          f'{self._salts}: expected the salt of each object that was not '
          f'forgotten, {len(lost)} of them are lost, e.g. that of {lost[0]}; '
          'bring back a copy of the file, or begin another journal.')

  @property
  def head(self):
    """Hash of the last entry, 64 hex digits."""
    return self._head

  def append(self, entry):
    """Adds an entry of integers, strings and dicts of them; on disk when it
    returns. Where it has a name `forgets`, that object's salt is destroyed, and
    the entry says which one it was, as `forgot`, a hash.

    Raises:
      ValueError: another process has appended since this one opened it.
    """
    entry = json.loads(digest.canonical(entry))
    if entry.get('forgets') in self._salt:
      entry['forgot'] = _told_apart(self._salt[entry['forgets']])
    with self._alone() as f:
      link = _link(self._head, entry)
      line = json.dumps(entry | {'hash': link}, sort_keys=True) + '\n'
      f.write(line.encode())
      f.flush()
      os.fsync(f.fileno())
      _sync(self.path)
      self._size += len(line.encode())
      self.entries.append(entry)
      self._head = link
      if entry.get('forgets'):
        self.gone.add(entry['forgets'])
      # Also what could not be written when it went.
      if self.gone & self._salt.keys():
        self._write_salts()

  def commitment(self, name, row):
    """Returns the commitment to a slot's row, 64 hex digits.

    Args:
      name: of the object; its salt is made at first use.
      row: dict without floats.

    Raises:
      ValueError: as of `append`.
    """
    if name not in self._salt:
      with self._alone():
        self._write_salts({name: secrets.token_hex(16)})
    return commitment(self._salt[name], row)

  def salts(self, row):
    """Returns the salts of a row's objects, as an artifact of it keeps them,
    'layer/number' -> 32 hex digits."""
    names = {name: name.rsplit('/', 2) for name in self._salt}
    return {f'{layer}/{oid}': self._salt[name]
            for name, (layer, of, oid) in names.items() if of == str(row)}

  def forgotten(self, row):
    """Returns the names 'layer/number' of a row's objects that are gone."""
    names = (name.rsplit('/', 2) for name in self.gone)
    return {f'{layer}/{oid}' for layer, of, oid in names if of == str(row)}

  def adopt(self, row, salts):
    """Takes the salts that an artifact has kept of a row, so that what is
    written down goes on from there; not those of what was forgotten here.

    Raises:
      ValueError: the journal has others: it is another state's.
    """
    # Entries of before 2026-11-29 do not say which salt it was.
    theirs, forgot = {}, {e['forgets']: e['forgot'] for e in self.entries
                          if 'forgot' in e}
    for name, salt in salts.items():
      layer, _, oid = name.rpartition('/')
      name = object_name({'layer': layer, 'row': row, 'oid': oid})
      mark = _told_apart(salt)
      if self._salt.get(name, salt) != salt or forgot.get(name, mark) != mark:
        raise ValueError(f'{self.path}: expected a journal of this state, got '
                         f'one that knows {name} otherwise; name that which '
                         'its edits are written down in, or a new one.')
      if name not in self.gone:
        theirs[name] = salt
    if theirs.keys() - self._salt:
      with self._alone():
        self._write_salts(theirs)

  def forget(self, name, reason=''):
    """Destroys the salt of an object that has no slot any more, as `PURGE` does
    of one that has: what was said of it cannot be guessed then, nor proved.

    Args:
      name: 'layer/row/oid', see `object_name`.
      reason: what it is for; must not hold content.

    Raises:
      ValueError: no entry is about such an object, or it is forgotten; see
        `checked_reason`.
    """
    if name not in self._salt:
      raise ValueError(f'forget: expected LAYER/ROW/OID of an object that this '
                       f'journal knows, got {name!r}.')
    layer, row, oid = name.rsplit('/', 2)
    self.append({'op': 'forget', 'outcome': 'committed', 'layer': layer,
                 'row': int(row), 'oid': int(oid), 'before': '', 'after': '',
                 'reason': checked_reason(reason), 'forgets': name})

  def salt(self, name):
    """Returns the salt of an object, 32 hex digits, or None where forgotten."""
    return self._salt.get(name)

  @contextlib.contextmanager
  def _locked(self):
    """The log, open for more, and no other process in here."""
    with open(self._log, 'ab') as f:
      fcntl.flock(f, fcntl.LOCK_EX)
      yield f

  @contextlib.contextmanager
  def _alone(self):
    """The same, where no other process has appended."""
    with self._locked() as f:
      if os.fstat(f.fileno()).st_size != self._size:
        raise ValueError(f'{self._log}: expected to be the only writer, but '
                         'another one has appended; open the journal anew.')
      yield f

  def _write_salts(self, more=None):
    """Replaces the file of salts by what is known and more, but for what is
    gone; to be called under the lock.

    What is in the file already stays: who has made it may not have appended the
    entry of it yet.
    """
    known = self._salt | (more or {}) | _read_salts(self._salts)
    known = {n: salt for n, salt in known.items() if n not in self.gone}
    new = self._salts.with_suffix('.new')
    with open(new, 'w') as f:
      json.dump(known, f, sort_keys=True)
      f.flush()
      os.fsync(f.fileno())
    os.replace(new, self._salts)
    _sync(self.path)
    self._salt = known


def read(path):
  """Returns (entries, head) of a journal, which stays as it is.

  Raises:
    ValueError: there is none, or its chain is broken or torn.
  """
  log = pathlib.Path(path) / LOG
  if not log.is_file():
    raise ValueError(f'{log}: expected a journal of edits, got nothing.')
  text = log.read_bytes()
  entries, head, size = _chain(log, text)
  if size < len(text):
    raise ValueError(f'{log}: expected whole lines, got {len(text) - size} '
                     'bytes of one behind the last; the next edit that is '
                     'written down cuts them off.')
  return entries, head


def checked_reason(text):
  """Returns a reason as it may stand in a journal.

  Raises:
    ValueError: it is not one line of at most 200 characters.
  """
  if not isinstance(text, str) or len(text) > 200 or not text.isprintable():
    raise ValueError('reason: expected one line of at most 200 characters, got '
                     f'{text!r}.')
  return text


def object_name(entry) -> str:
  """Returns the name by which an object has its salt, of an entry about it."""
  return f'{entry["layer"]}/{entry["row"]}/{entry["oid"]}'


def commitment(salt, row):
  """Returns the commitment to a row under a salt, both as `Journal` has them.

  >>> commitment('00' * 16, {'value': [1, 2]})[:16]
  '64840eef1c941e7d'
  """
  return hashlib.sha256(b'statejax.slot.v1\0' + bytes.fromhex(salt)
                        + digest.canonical(row)).hexdigest()


def _told_apart(salt):
  """16 hex digits by which a salt is known again, and not found."""
  return hashlib.sha256(
      b'statejax.salt.v1\0' + bytes.fromhex(salt)).hexdigest()[:16]


def _chain(log, text):
  """Returns (entries, hash of the last, bytes of whole lines) of a log."""
  entries, head = [], _GENESIS
  whole = text[:text.rfind(b'\n') + 1]
  for number, line in enumerate(whole.splitlines()):
    try:
      entry = json.loads(line)
      found = entry.pop('hash')
    except (ValueError, KeyError, AttributeError):
      entry, found = None, None
    if entry is None or found != _link(head, entry):
      raise ValueError(f'{log}:{number + 1}: expected an entry that '
                       'follows the one before it, got a changed, lost or '
                       'inserted one; what stands above it is intact.')
    entries.append(entry)
    head = found
  return entries, head, len(whole)


def _read_salts(path):
  """Returns {name: 32 hex digits} of a file, which need not be there."""
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_bytes())
    if all(len(bytes.fromhex(salt)) == 16 for salt in found.values()):
      return found
  except (ValueError, TypeError, AttributeError):
    pass
  raise ValueError(f'{path}: expected salts of 32 hex digits, got a damaged '
                   'file; bring back a copy of it.')


def _link(previous, entry):
  body = digest.canonical(entry)
  return hashlib.sha256(
      b'statejax.memjournal.v1\0' + bytes.fromhex(previous)
      + len(body).to_bytes(4, 'little') + body).hexdigest()


def _sync(folder):
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
