"""The catalog of a store: what is there, who did what, what it cost.

One SQLite file, in WAL mode, synced at every commit. Two of its tables are
append-only chains, which nothing can change or shorten unseen by whoever keeps
an earlier head:

    hash = H("statejax.audit.v1\0" + previous + u32 length + CJ row)

What the store has revoked, and how often grants were used, stand in tables of
their own; rows of the log, "listed" and "used", bind them, so that one that was
lost or put back does not count. The rest can be rebuilt from the objects, but
for what is remembered of those from elsewhere that are gone; see `foreign`.
Imports no jax.
"""

import contextlib
import json
import re

from statejax.artifact import canonical, chains, names, revoke
from statejax.artifact.outcome import Refused, absent

# The newest such row of an action on something; of the index.
_TOLD = f'''
select body from audit where {chains.BINDS}
  and json_extract(body, '$.action') = ? and json_extract(body, '$.id') = ?
  order by seq desc limit 1'''


class Catalog(chains.Chains):
  """An open catalog; of one thread: all that it knows beside its chains."""

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
    with self.transaction():
      self._all('delete from lease where until <= ?', (self.clock(),))
      self._all('replace into lease values (?, ?, ?)', (id, f'pin {owner}',
                                                        until))

  def unpin(self, id: str):
    """Undoes all `pin` of an object; whoever reads it still does."""
    self._all("delete from lease where id = ? and owner like 'pin %'", (id,))

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

  def revocations(self, org: str | None = None) -> dict | None:
    """Returns the store's own newest revocation list, None where there is none.

    Args:
      org: whose artifacts it is about; None is everybody's.

    Raises:
      Refused: E_IO: it is damaged, or not the one that was kept last.
    """
    newest = 'select body from crl order by number desc limit 1' if (
        org is None) else 'select body from listed where org = ?'
    # At once: another one may come in between.
    (body, told), = self._all(f'select ({newest}), ({_TOLD})', (
        *(() if org is None else (org,)), 'listed', whose(org)))
    last = _outcome(told)
    wrong = '' if not last or last == _noted(body) else (
        f'the one that the log names last, {last}, got '
        f'{_noted(body) if body else "none"}; state fsck makes it anew')
    found = None
    try:
      if body is not None:
        found = canonical.loads(body.encode(), max_bytes=revoke.MAX_BYTES)
    except (ValueError, AttributeError, RecursionError) as error:
      wrong = wrong or f'a list, got {error}'
    if found and not last and (org is not None or not self._logged(found)):
      wrong = wrong or ('one that the log names, got none of which it knows; '
                        'state fsck makes it anew')
    if wrong:
      raise Refused('E_IO', f'{self.path}: crl {whose(org)}: expected {wrong}')
    return found

  def _logged(self, crl):
    """Whether each entry is in the log: a list of an earlier release, which no
    row names.
    """
    rows = self._all("select json_extract(body, '$.outcome'), "
                     "json_extract(body, '$.id') from audit "
                     "where json_extract(body, '$.action') = 'revoked'")
    return {(e['kind'], e['value']) for e in crl['entries']} <= {
        (kind.split(' ')[0], value) for kind, value in rows}

  def keep_revocations(self, body: dict, org: str | None = None, *,
                       principal: str = 'host', anew: bool = False):
    """Keeps a newer list; raises ValueError if it is not newer.

    Args:
      body: the list.
      org: see `revocations`.
      principal: who acts.
      anew: in place of one that is not there as it was.
    """
    with self.transaction():
      old = None if anew else self.revocations(org)
      if old and body['number'] <= old['number']:
        raise ValueError(f'crl: expected a number above {old["number"]}, got '
                         f'{body["number"]}; lists never go back.')
      text = canonical.dumps(body).decode()
      # What is in an older one is in this one, and in the log.
      if org is None:
        self._all('delete from crl')
        self._all('insert into crl values (?, ?)', (body['number'], text))
      else:
        self._all('replace into listed values (?, ?, ?)',
                  (org, body['number'], text))
      self.audit(principal, 'listed', whose(org), _noted(text))

  def last_number(self, org: str | None) -> int:
    """Returns the number of a list that was kept last, 0 for none."""
    (told,), = self._all(f'select ({_TOLD})', ('listed', whose(org)))
    return int((_outcome(told) or '0').split()[0])

  def listing(self) -> list[str]:
    """Returns the organisations that have a list of their own here."""
    return [row[0] for row in self._all('select org from listed order by org')]

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
      self._all('delete from secret where name = ?', (name,))

  def expect(self, name: str, id: str = '', about: str = ''):
    """Writes down whose a secret is, before it is made.

    Args:
      name: of the secret.
      id: of the artifact that it opens; '' where that is still to be minted.
      about: its manifest, where that outlives the artifact.
    """
    with self.transaction():
      self._all('replace into secret values (?, ?, ?, ?)',
                (name, id, self.clock(), about))

  def came(self, name: str, id: str):
    """What an expected secret was made for is here now."""
    self._all("update secret set id = ? where name = ? and id = ''", (id, name))

  def expected(self) -> dict[str, tuple[str, int, str]]:
    """Returns {name: (id, when it was made, manifest)}, see `expect`."""
    return {row[0]: tuple(row[1:]) for row in self._all(
        'select name, id, made, about from secret order by name')}

  def forget_expected(self):
    """Nobody knows any more of secrets whose artifacts are not here, but of
    those that come with a manifest.
    """
    with self.transaction():
      self._all("delete from secret where about = '' and id not in ("
                'select id from art where not gone)')

  def knows(self, id: str) -> bool:
    """Whether an artifact is or was here."""
    return self._one('select 1 from art where id = ?', (id,)) is not None

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
    """Returns how often a grant was used, also where only the log knows."""
    (uses, told), = self._all(
        f'select (select uses from grant_seen where id = ?), ({_TOLD})',
        (id, 'used', id))
    return max(uses or 0, int(_outcome(told) or 0))

  def use_grant(self, id: str, most: int, principal: str = 'host') -> bool:
    """Counts a principal's use of a grant; False where it had `most` already.
    """
    with self.transaction():
      uses = self.grant_uses(id)
      if uses >= most:
        return False
      self._all('replace into grant_seen values (?, ?)', (id, uses + 1))
      self.audit(principal, 'used', id, str(uses + 1))
    return True

  def grants(self) -> dict[str, int]:
    """Returns {grant: uses} as the table has it."""
    return dict(self._all('select id, uses from grant_seen'))


def whose(org: str | None) -> str:
  """Returns how the log says whose artifacts a list is about."""
  return 'of all' if org is None else f'of "{org}"'.encode(
      'ascii', 'replace').decode()


def _outcome(told):
  """How a row of the log ends that binds something, '' for no such row."""
  found = re.search('"outcome":"([0-9]+[^"]*)"', told or '')
  return found[1] if found else ''


def _noted(text):
  """How the log knows a list."""
  raw = text.encode() if isinstance(text, str) else text or b''
  found = re.search(rb'"number":(\d+)', raw)
  return f'{found[1].decode() if found else 0} {names.sha256(raw)}'
