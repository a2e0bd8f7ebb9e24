"""The catalog of a store: what is there, who did what, what it cost.

One SQLite file, in WAL mode, synced at every commit. Two of its tables are
append-only chains, which nothing can change or shorten unseen by whoever keeps
an earlier head:

    hash = H("statejax.audit.v1\0" + previous + u32 length + CJ row)

The rest can be rebuilt from the objects, but for what is remembered of those
from elsewhere that are gone; see `foreign`. Imports no jax.
"""

import contextlib
import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Callable

from statejax.artifact import canonical
from statejax.artifact.outcome import Receipt, Refused, absent

_GENESIS = '0' * 64
EVERY = 256  # rows of the audit log
_TABLES = '''
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
create table if not exists condemned (name text primary key);
create table if not exists installed (
  file text primary key, number integer not null, digest text not null,
  body text not null);
create table if not exists audit (
  seq integer primary key, body text not null, hash text not null);
create table if not exists ledger (
  seq integer primary key, body text not null, hash text not null);
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


class Catalog:
  """An open catalog; of one thread.

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
      raise Refused('E_IO', f'{path}: expected a catalog, got {error}'
                    ) from error

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

  def code(self, id: str) -> str:
    """Returns the code under which an object was made here, '' for none."""
    for seq, body in self._all(
        'select seq, body from audit where instr(body, ?) order by seq', (id,)):
      row = self._parsed('audit', seq, body)
      if row['id'] == id and row['outcome'] == 'allowed' and (
          row['action'] in ('mint', 'fork')):
        return row['code']
    return ''

  # Objects and names.

  def add(self, id: str, mint_key: str, nbytes: int, kind: str, workflow: str,
          parents=()):
    """Enters an object; raises sqlite3.IntegrityError if its key is taken, or
    if it is there.
    """
    if self._one('select 1 from art where id = ? and gone', (id,)):
      # What was deleted has come back, and keeps the key of its mint.
      self._all('update art set gone = 0, created = ? where id = ?',
                (self.clock(), id))
    else:
      self._all('insert into art values (?, ?, ?, ?, ?, ?, 0)', (
          id, mint_key, nbytes, kind, workflow, self.clock()))
    for parent in parents:
      self._all('insert or ignore into kin values (?, ?)', (id, parent))

  def minted(self, mint_key: str) -> str | None:
    """Returns the id that was minted under a key, None for none."""
    row = self._one('select id from art where mint_key = ?', (mint_key,))
    return row and row[0]

  def maker(self, id: str) -> str:
    """Returns who has made an object here, '' where that is not known."""
    row = self._one('select mint_key from art where id = ?', (id,))
    try:
      who, _ = json.loads(row[0] if row else '')
    except (ValueError, TypeError):  # it was made elsewhere, and taken in
      return ''
    return str(who)

  def objects(self, *, gone: bool = False) -> dict[str, tuple]:
    """Returns {id: (bytes, kind, workflow, created)} of what is there, in the
    order in which it came.
    """
    return {row[0]: tuple(row[1:]) for row in self._all(
        'select id, bytes, kind, workflow, created from art where gone = ? '
        'order by created, rowid', (int(gone),))}

  def object(self, id: str) -> tuple | None:
    """Returns an object's row of `objects`, None where it is not here."""
    return self._one('select bytes, kind, workflow, created from art '
                     'where id = ? and not gone', (id,))

  def owner(self, id: str) -> str:
    """Returns whom the ledger holds an object's bytes against, as it was
    entered; '' where it never was.
    """
    rows = (self._parsed('ledger', *row) for row in self._all(
        'select seq, body from ledger where instr(body, ?) order by seq',
        (id,)))
    return next((row['principal'] for row in rows
                 if row['id'] == id and row['unit'] == 'live_bytes'), '')

  def remember(self, id: str, facts: dict, seen: int | None = None):
    """Keeps what is said of an object from elsewhere; the first time counts.

    Args:
      id: of the object.
      facts: what `foreign` returns, also when it is gone.
      seen: unix seconds when it came; None is now.
    """
    self._all('insert or ignore into foreign_art values (?, ?, ?)', (
        id, self.clock() if seen is None else seen,
        canonical.dumps(facts).decode()))

  def foreign(self, ids) -> dict[str, tuple[int, dict]]:
    """Returns {id: (when it first came, facts)} of what is remembered among
    some objects and all from which they stem.
    """
    rows = self._all('''
        with recursive above(id) as (
          select value from json_each(?)
          union select parent from kin join above on kin.child = above.id)
        select foreign_art.id, seen, body from above
        join foreign_art on foreign_art.id = above.id order by 1''',
        (json.dumps(sorted(ids)),))
    try:
      return {id: (int(seen), canonical.loads(body.encode()))
              for id, seen, body in rows}
    except (ValueError, AttributeError, RecursionError) as error:
      raise Refused('E_IO', f'{self.path}: foreign_art: expected what a '
                    f'manifest says, got {error}') from error

  def remembers(self) -> bool:
    """Whether what came from elsewhere is remembered, as since some release."""
    return self._one('pragma user_version') != (0,)

  def remembering(self):
    """From now on it is."""
    self._all('pragma user_version = 1')

  def bury(self, id: str):
    """Marks an object as deleted; its history stays."""
    self._all('update art set gone = 1 where id = ?', (id,))

  def parents(self, id: str) -> list[str]:
    """Returns the parents of an object."""
    return [row[0] for row in self._all(
        'select parent from kin where child = ? order by parent', (id,))]

  def children(self, id: str) -> list[str]:
    """Returns the children of an object."""
    return [row[0] for row in self._all(
        'select child from kin where parent = ? order by child', (id,))]

  def descendants(self, id: str) -> list[str]:
    """Returns an object's children and theirs, without itself."""
    return [row[0] for row in self._all('''
        with recursive below(id) as (
          select child from kin where parent = ?
          union select child from kin join below on kin.parent = below.id)
        select id from below order by id''', (id,))]

  def ancestors(self, id: str) -> list[str]:
    """Returns an object's parents and theirs, as far as they are known; of one
    that is not here its parents' are not.
    """
    return [row[0] for row in self._all('''
        with recursive above(id) as (
          select parent from kin where child = ?
          union select parent from kin join above on kin.child = above.id)
        select id from above order by id''', (id,))]

  def entered(self, id: str) -> int | None:
    """Returns when an object came, unix seconds; None where it is not here."""
    row = self._one('select created from art where id = ? and not gone', (id,))
    return row and row[0]

  def ref(self, name: str) -> tuple[str, int] | None:
    """Returns (id, version) of a name, None where it is free."""
    return self._one('select id, version from ref where name = ?', (name,))

  def refs(self) -> dict[str, tuple[str, int]]:
    """Returns {name: (id, version)}."""
    return {row[0]: (row[1], row[2]) for row in self._all(
        'select name, id, version from ref order by name')}

  def named(self, id: str) -> list[str]:
    """Returns the names that point to an object."""
    return [row[0] for row in self._all(
        'select name from ref where id = ? order by name', (id,))]

  def move(self, name: str, id: str, expect: int) -> bool:
    """Moves a name if it has the expected version, 0 for none yet."""
    with self.transaction():
      found = self.ref(name)
      if (found[1] if found else 0) != expect:
        return False
      self._all('replace into ref values (?, ?, ?)', (name, id, expect + 1))
    return True

  def drop(self, name: str):
    """Frees a name."""
    with self.transaction():
      self._all('delete from ref where name = ?', (name,))

  @contextlib.contextmanager
  def lease(self, id: str, owner: str, seconds: int = 600):
    """Keeps an object from being collected while it is read.

    Raises:
      Refused: E_ACL: it has been collected already.
    """
    with self.transaction():
      if not self._one('select 1 from art where id = ? and not gone', (id,)):
        raise absent(id)
      self._all('replace into lease values (?, ?, ?)',
                (id, owner, self.clock() + seconds))
    try:
      yield
    finally:
      # One that cannot be given back runs out by itself; what was done is done.
      with contextlib.suppress(Refused), self.transaction():
        self._all('delete from lease where id = ? and owner = ?', (id, owner))

  def pin(self, id: str, owner: str, until: int):
    """Keeps an object from being collected until some unix second."""
    self._all('replace into lease values (?, ?, ?)', (id, owner, until))

  def leased(self) -> set[str]:
    """Returns the objects under a lease that has not run out."""
    return {row[0] for row in self._all(
        'select id from lease where until > ?', (self.clock(),))}

  def held(self, id: str) -> bool:
    """Whether a name points to an object, or somebody reads it."""
    return bool(self._one(
        'select 1 from ref where id = ? union all '
        'select 1 from lease where id = ? and until > ?',
        (id, id, self.clock())))

  # Revocations and grants.

  def revocations(self) -> dict | None:
    """Returns the newest revocation list, None where there is none."""
    row = self._one('select body from crl order by number desc limit 1')
    try:
      return row and canonical.loads(row[0].encode())
    except (ValueError, AttributeError, RecursionError) as error:
      raise Refused('E_IO', f'{self.path}: crl: expected a list, got {error}'
                    ) from error

  def keep_revocations(self, body: dict):
    """Keeps a newer list; raises ValueError if it is not newer."""
    with self.transaction():
      old = self.revocations()
      if old and body['number'] <= old['number']:
        raise ValueError(f'crl: expected a number above {old["number"]}, got '
                         f'{body["number"]}; lists never go back.')
      # What is in an older one is in this one, and in the log.
      self._all('delete from crl')
      self._all('insert into crl values (?, ?)', (
          body['number'], canonical.dumps(body).decode()))

  def install(self, file: str, number: int, digest: str, body: str):
    """Notes a document that is to be there, in place of an earlier one.

    Args:
      file: its name.
      number: its own.
      digest: of its bytes.
      body: what it says, which so outlives the file.
    """
    self._all('replace into installed values (?, ?, ?, ?)',
              (file, number, digest, body))

  def installed(self) -> dict[str, tuple[int, str, str]]:
    """Returns {file: (number, digest, body)} of the documents noted."""
    return {row[0]: tuple(row[1:]) for row in self._all(
        'select file, number, digest, body from installed order by file')}

  def uninstall(self, file: str):
    """Notes that a document need not be there any more."""
    self._all('delete from installed where file = ?', (file,))

  def condemn(self, names):
    """Writes down secrets to be destroyed, before any of them is."""
    with self.transaction():
      for name in names:
        self._all('insert or ignore into condemned values (?)', (name,))

  def condemned(self) -> list[str]:
    """Returns the secrets that are still to be destroyed."""
    return [row[0] for row in self._all(
        'select name from condemned order by name')]

  def settle(self, name: str):
    """A condemned secret is destroyed."""
    with self.transaction():
      self._all('delete from condemned where name = ?', (name,))

  def ask(self, nonce: str, seconds: int):
    """Notes a nonce that is to be answered once, within so many seconds."""
    with self.transaction():
      self._all('delete from challenge where until <= ?', (self.clock(),))
      self._all('insert into challenge values (?, ?)',
                (nonce, self.clock() + seconds))

  def challenges(self) -> int:
    """Returns how many nonces are still to be answered."""
    return self._all('select count(*) from challenge')[0][0]

  def answered(self, nonce: str) -> bool:
    """Takes a nonce for answered; False where it was, or was never asked."""
    with self.transaction():
      row = self._one('select until from challenge where nonce = ?', (nonce,))
      self._all('delete from challenge where nonce = ?', (nonce,))
    return row is not None and self.clock() < row[0]

  def grant_uses(self, id: str) -> int:
    """Returns how often a grant was used."""
    row = self._one('select uses from grant_seen where id = ?', (id,))
    return row[0] if row else 0

  def use_grant(self, id: str, most: int) -> bool:
    """Counts a use of a grant; False where it had `most` already."""
    with self.transaction():
      uses = self.grant_uses(id)
      if uses >= most:
        return False
      self._all('replace into grant_seen values (?, ?)', (id, uses + 1))
    return True


def _link(table, previous, body):
  return hashlib.sha256(
      b'statejax.%s.v1\0' % table.encode() + bytes.fromhex(previous)
      + len(body).to_bytes(4, 'little') + body).hexdigest()
