"""The file of a catalog, and its two chains: the audit log and the ledger.

See `catalog`. Imports no jax.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import sqlite3
import time
from collections.abc import Callable

from statejax.artifact import canonical
from statejax.artifact.outcome import Receipt, Refused

_GENESIS = '0' * 64
# Whether a row of the log binds another table. No text in a row can say so.
BINDS = '''(instr(body, '"action":"listed"') > 0
  or instr(body, '"action":"used"') > 0)'''
EVERY = 256  # rows of the audit log
_TABLES = f'''
create table if not exists art (
  id text primary key, mint_key text not null unique, bytes integer not null,
  kind text not null, workflow text not null, created integer not null,
  gone integer not null default 0);
create table if not exists kin (
  child text not null, parent text not null, primary key (child, parent));
create table if not exists foreign_art (
  id text primary key, seen integer not null, body text not null);
create table if not exists ref (
  name text primary key, id text not null, version integer not null);
create table if not exists lease (
  id text not null, owner text not null, until integer not null,
  primary key (id, owner));
create table if not exists grant_seen (
  id text primary key, uses integer not null);
create table if not exists challenge (
  nonce text primary key, until integer not null);
create table if not exists crl (number integer primary key, body text not null);
create table if not exists listed (
  org text primary key, number integer not null, body text not null);
create table if not exists secret (
  name text primary key, id text not null, made integer not null,
  about text not null);
create table if not exists condemned (name text primary key);
create table if not exists installed (
  file text primary key, number integer not null, digest text not null,
  body text not null);
create table if not exists audit (
  seq integer primary key, body text not null, hash text not null);
create table if not exists ledger (
  seq integer primary key, body text not null, hash text not null);
create index if not exists told on audit (
  json_extract(body, '$.action'), json_extract(body, '$.id'))
  where {BINDS};
'''
UNITS = ('live_bytes', 'tokens_absorbed', 'tokens_skipped',
         'tokens_reprefilled', 'device_us', 'device_us_avoided',
         'mflop_avoided', 'resumes', 'forks', 'exports')


def _write_ahead(base, patience=60.):
  """Sets WAL mode; here SQLite gives up at once where others open it too."""
  until = time.monotonic() + patience
  while True:
    try:
      return base.execute('pragma journal_mode=wal')
    except sqlite3.OperationalError as error:
      busy = getattr(error, 'sqlite_errorname', '').startswith('SQLITE_BUSY')
      if not busy or time.monotonic() > until:
        raise
    time.sleep(.01)


class Chains:
  """An open catalog; of one thread. Its file, and its two chains.

  Attributes:
    path: of the file.
    clock: () -> unix seconds.
    noted: () -> None, called once every `EVERY`th row of the audit log is
      durable; None calls nobody.
  """

  def __init__(self, path, *, clock=lambda: int(time.time())):
    """Opens a catalog, or makes an empty one.

    Raises:
      Refused: E_IO: no such catalog can be opened there.
    """
    self.path, self.clock, self._inside = path, clock, False
    self.noted: Callable[[], None] | None = None
    self._due = False
    try:
      # Whichever thread collects it may close it.
      self._base = sqlite3.connect(path, timeout=60, isolation_level=None,
                                   check_same_thread=False)
      _write_ahead(self._base)
      self._base.execute('pragma synchronous=full')
      self._base.executescript(_TABLES)
    except sqlite3.Error as error:
      if hasattr(self, '_base'):
        self.close()
      raise _unopened(pathlib.Path(path), error) from error

  def close(self):
    """Closes the file."""
    self._base.close()

  def __del__(self):
    if hasattr(self, '_base'):  # else it could not be opened
      self.close()

  @contextlib.contextmanager
  def transaction(self):
    """All that is done inside is done or not done together, and durable.

    Raises:
      Refused: E_NOSPACE or E_IO; then nothing was done.
    """
    if self._inside:
      yield
      return
    with self._said():
      if self._base.in_transaction:  # one whose end has failed
        self._base.execute('rollback')
      self._base.execute('begin immediate')
      self._inside, self._due = True, False
      try:
        yield
        self._base.execute('commit')
      except BaseException:
        if self._base.in_transaction:
          self._base.execute('rollback')
        raise
      finally:
        self._inside = False
    if self._due and self.noted:
      self.noted()

  @contextlib.contextmanager
  def _said(self):
    """What the file cannot do becomes a refusal."""
    try:
      yield
    except sqlite3.IntegrityError:
      raise
    except sqlite3.Error as error:
      full = getattr(error, 'sqlite_errorname', '') == 'SQLITE_FULL'
      raise Refused('E_NOSPACE' if full else 'E_IO',
                    f'{self.path}: {error}') from error

  def _all(self, statement, values=()):
    """Runs a statement; returns all its rows."""
    with self._said():
      return self._base.execute(statement, values).fetchall()

  def _one(self, statement, values=()):
    """Runs a statement; returns its first row, None without one."""
    return next(iter(self._all(statement, values)), None)

  # The chains.

  def audit(self, principal: str, action: str, id: str, outcome: str, *,
            code: str = '', promise: str = '') -> Receipt:
    """Writes down a decision, allow or deny; returns the receipt of it."""
    # Whatever was asked for can be written down.
    principal, id = (text.encode('ascii', 'replace').decode()
                     for text in (principal, id))
    return self._append('audit', {
        'principal': principal, 'action': action, 'id': id,
        'outcome': outcome, 'code': code, 'promise': promise})

  @contextlib.contextmanager
  def refusals(self, principal: str, action: str, id: str):
    """Writes down that what is done inside was refused, where it was."""
    try:
      yield
    except Refused as error:
      # What has failed is told even if it is the disk, which takes no row.
      with contextlib.suppress(Refused):
        self.audit(principal, action, id, 'refused', code=error.code)
      raise

  def charge(self, principal: str, id: str, **deltas: int):
    """Adds to the ledger, one row per unit of `UNITS`."""
    for unit, delta in deltas.items():
      if unit not in UNITS:
        raise ValueError(f'unit: expected one of {UNITS}, got {unit!r}.')
      self._append('ledger', {'principal': principal, 'id': id, 'unit': unit,
                              'delta': int(delta)})

  def head(self, table: str = 'audit') -> Receipt:
    """Returns the last row's number and hash; 0 and zeros where empty."""
    row = self._one(
        f'select seq, hash from {table} order by seq desc limit 1')
    if not row:
      return Receipt(0, _GENESIS)
    seq, mark = int(row[0]), str(row[1])
    if not re.fullmatch('[0-9a-f]{64}', mark):
      raise Refused('E_IO', f'{self.path}: {table} row {seq}: expected a hash '
                    f'of 64 hex digits, got {mark[:80]!r}')
    return Receipt(seq, mark)

  def _append(self, table, row):
    with self.transaction():
      last = self.head(table)
      row = {'seq': last.seq + 1, 'time': self.clock(), **row}
      body = canonical.dumps(row)
      found = _link(table, last.head, body)
      self._all(f'insert into {table} values (?, ?, ?)',
                (row['seq'], body.decode(), found))
      self._due |= table == 'audit' and row['seq'] % EVERY == 0
    return Receipt(row['seq'], found)

  def newest(self) -> int:
    """Returns the time of the last row of the audit log, 0 where empty."""
    found = self._one('select seq, body from audit order by seq desc limit 1')
    return self._parsed('audit', *found)['time'] if found else 0

  def rows(self, table: str = 'audit') -> list[dict]:
    """Returns the rows of a chain, oldest first, after checking all of it.

    Raises:
      Refused: E_IO: a row was changed, lost or inserted; says which.
    """
    rows, last = [], _GENESIS
    for seq, body, found in self._all(
        f'select seq, body, hash from {table} order by seq'):
      row = self._parsed(table, seq, body)
      if (seq != len(rows) + 1 or row['seq'] != seq
          or found != _link(table, last, body.encode())):
        raise Refused('E_IO', f'{self.path}: {table} row {seq}: expected a row '
                      'that follows the one before it, got a changed, lost or '
                      'inserted one')
      rows.append(row)
      last = found
    return rows

  def _parsed(self, table, seq, body):
    """A row of a chain by its text; raises E_IO where it cannot be one."""
    try:
      row = json.loads(body.encode())  # text, and no blob
      if isinstance(row['seq'], int) and isinstance(row['time'], int):
        return row
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
      pass
    raise Refused('E_IO', f'{self.path}: {table} row {seq}: expected a row, got'
                  f' {body[:80]!r}')

  def holds(self, receipt: Receipt) -> bool:
    """Whether the audit log still has the row of a receipt, unchanged."""
    row = self._one('select hash from audit where seq = ?', (receipt.seq,))
    return row is not None and row[0] == receipt.head


def _unopened(path, error):
  """Why a catalog cannot be opened: SQLite calls all of it an error of the
  disk."""
  try:
    room = os.statvfs(path.parent)
  except OSError:
    room = None
  if room and room.f_bavail * room.f_frsize < 65536:
    return Refused('E_NOSPACE', f'{path}: expected room for a row of the log, '
                   f'which every verb adds, got none ({error})')
  if room and not os.access(path if path.exists() else path.parent, os.W_OK):
    return Refused('E_IO', f'{path}: expected a log that can be written to, as '
                   'every verb adds a row, got none; to show or verify an '
                   'artifact by its own directory or file needs no store')
  return Refused('E_IO', f'{path}: expected a catalog, got {error}')


def _link(table, previous, body):
  return hashlib.sha256(
      b'statejax.%s.v1\0' % table.encode() + bytes.fromhex(previous)
      + len(body).to_bytes(4, 'little') + body).hexdigest()
