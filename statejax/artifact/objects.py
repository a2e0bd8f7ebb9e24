"""A store of artifacts: a directory of immutable objects and their catalog.

    STORE.json   {format, version, id}
    index.db     the catalog
    objects/ab/<64 hex>/   the artifacts, by name
    tmp/         being written; locked by its writer
    trash/       being deleted

Secrets lie elsewhere: one for the store, by which it knows its own manifests,
and one for each organisation. Imports no jax.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
from secrets import token_hex

from statejax.artifact import (
  access,
  canonical,
  catalog,
  commit,
  foreign,
  head,
  home,
  layout,
  manifest,
  names,
  sealing,
  verify,
)
from statejax.artifact.outcome import Receipt, Refused, absent

FORMAT, VERSION = 'statejax-store', 1
_ID = re.compile(r'sj1-[0-9a-f]{64}')
# The end of a name that was made beside one which is somebody else's.
BESIDE = re.compile(r'(~[0-9a-f]{8})+$')
_NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9._~/-]{0,127}')


@dataclasses.dataclass(frozen=True)
class Kept:
  """What `Store.keep` has done.

  Attributes:
    id: of the artifact.
    receipt: of the audit log.
    ref: the name that points to it, '' for none.
    conflict: whether somebody else had moved the name in the meantime, or it
      is not of whoever asked.
  """

  id: str
  receipt: Receipt
  ref: str
  conflict: bool


def _check(ref, about):
  """Raises unless what is to be kept can have its name and its owner."""
  if ref:
    check_ref(ref)
  access.owner(about)


def request(principal: str, mint_key: str) -> str:
  """Returns what a store knows a request by: nobody else's is the same."""
  return json.dumps([principal, mint_key])


@contextlib.contextmanager
def said():
  """A disk that is full or broken becomes a refusal: E_NOSPACE or E_IO."""
  try:
    yield
  except commit.AlreadyPublished:
    raise
  except OSError as error:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    raise Refused('E_NOSPACE' if full else 'E_IO', str(error)) from error


def check_ref(name: str):
  """Raises ValueError unless a text can name an artifact."""
  if not _NAME.fullmatch(name) or name.startswith('sj1-'):
    raise ValueError('ref: expected at most 128 letters, digits, "_", ".", "-" '
                     f'and "/", and no id, got {len(name)}: {name[:80]!r}.')


def _secret(file):
  """The 32 bytes in a file; half of them, or none, would be a key as well."""
  data = file.read_bytes()
  if not re.fullmatch(b'[0-9a-f]{64}', data):
    raise Refused('E_IO', f'{file}: expected 64 hex digits, got {len(data)} '
                  'bytes; put a copy of it there')
  return bytes.fromhex(data.decode())


class Secrets:
  """A directory of secrets, readable by its owner only; never in a store."""

  def __init__(self, path):
    self.path = pathlib.Path(path)

  def get(self, name: str) -> bytes:
    """Returns 32 bytes, made at the first use of a name.

    Raises:
      Refused: E_IO: the file is damaged.
    """
    file = self.path / f'{name}.secret'
    try:
      return _secret(file)
    except FileNotFoundError:
      pass
    self._make()
    with self._written(name, token_hex(32)) as new:
      try:
        os.link(new, file)  # of two that make it at once, one wins
      except FileExistsError:
        pass
    commit.sync(self.path)
    return _secret(file)

  def _make(self):
    """Makes the directory, so that no crash takes it away again."""
    missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
    for path in reversed(missing):
      path.mkdir(mode=0o700, exist_ok=True)
    # Also if it was there: who made it may not have come so far.
    for path in (self.path, *missing):
      commit.sync(path.absolute().parent)

  @contextlib.contextmanager
  def _written(self, name, text):
    """Yields a file of this text, closed to others and on the disk."""
    new = self.path / f'.{name}.{token_hex(8)}'
    try:
      with open(new, 'x', opener=lambda path, flags: os.open(
          path, flags, 0o600)) as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
      yield new
    finally:
      new.unlink(missing_ok=True)

  def find(self, name: str) -> bytes | None:
    """Returns what is kept under a name, None for nothing; makes nothing.

    Raises:
      Refused: E_IO: the file is damaged.
    """
    file = self.path / f'{name}.secret'
    if not re.fullmatch('[a-z0-9-]{1,64}', name) or not file.exists():
      return None
    return _secret(file)

  def put(self, name: str, value: bytes):
    """Keeps 32 bytes that came from elsewhere; raises E_SEALED of others."""
    if len(value) != 32:
      raise Refused('E_SEALED', f'expected a key of 32 bytes, got {len(value)}')
    self._make()
    with self._written(name, value.hex()) as new:
      new.replace(self.path / f'{name}.secret')
    commit.sync(self.path)

  def note(self, name: str, text: str):
    """Keeps a text that is no secret, in place of an earlier one."""
    self._make()
    with self._written(name, text) as new:
      new.replace(self.path / f'{name}.json')
    commit.sync(self.path)

  def names(self, beginning: str) -> set[str]:
    """Returns the names of what is kept, or half made, that begin like this."""
    return {file.name.removeprefix('.').partition('.')[0] for mark in ('', '.')
            for file in self.path.glob(f'{mark}{beginning}*.*')}

  def destroy(self, name: str):
    """Overwrites and removes a secret; what it alone opens is gone."""
    # Also where a kill has left it half made.
    for file in (self.path / f'{name}.secret', *self.path.glob(f'.{name}.*')):
      # Another process may be at it, and faster.
      with contextlib.suppress(FileNotFoundError):
        # In place: new blocks would leave the old ones as they are.
        with open(file, 'r+') as out:
          out.write('0' * 64)
        commit.sync(file)
        file.unlink()
        commit.sync(self.path)

  def org_name(self, org: str, use: str) -> str:
    """Returns the name of an organisation's secret for a use."""
    return f'org-{hashlib.sha256(org.encode()).hexdigest()[:16]}-{use}'

  def org(self, org: str) -> bytes:
    """Returns the secret of an organisation, for keyed digests."""
    return self.get(self.org_name(org, 'keyed'))


class Store:
  """An open store.

  Attributes:
    path: its directory.
    id: 32 hex digits.
    secrets: see `Secrets`.
    catalog: see `catalog.Catalog`.
    quota: bytes that all its artifacts together may have.
    root: PEM of the public key that signs the trust document; '' trusts nobody.
    scratch: directory in memory, where sealed artifacts are opened.
    notary: `keys.Signer` that signs heads of the audit log, see `head`; None
      signs none.
  """

  def __init__(self, path, secrets, *, quota: int = 1 << 44, clock=None,
               root: str = '', scratch: str = '/dev/shm', notary=None):
    """Opens a store, or makes an empty one where nothing is.

    Raises:
      Refused: E_VERSION of a newer store.
      ValueError: something else lies there, or its parent is missing.
    """
    self.path = pathlib.Path(os.path.abspath(path))
    self.secrets, self.quota = secrets, quota
    self.root, self.scratch, self.notary = root, scratch, notary
    about = self.path / 'STORE.json'
    new = not self.path.exists()
    if new:
      self._make()
    try:
      facts = canonical.loads(about.read_bytes())
      self.id, version = facts['id'], facts['version']
      if facts['format'] != FORMAT or not re.fullmatch('[0-9a-f]{32}', self.id):
        raise ValueError('another format')
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError,
            TypeError) as error:
      raise ValueError(f'{self.path}: expected a store, got something else '
                       f'({error}); name another directory, or a new one.'
                       ) from error
    if version != VERSION:
      raise Refused('E_VERSION', f'{about}: expected version {VERSION}, got '
                    f'{version}')
    self.catalog = catalog.Catalog(
        self.path / 'index.db', **({'clock': clock} if clock else {}))
    try:
      if new:
        home.elsewhere(self)  # noted before there is a copy
      self.shred()  # what a kill has cut short
      foreign.recall(self)
    except BaseException:
      self.catalog.close()
      raise
    if notary is not None:
      self.catalog.noted = self._sign

  def close(self):
    """Signs the head of the log, where there is a key for it, and closes.

    Raises:
      Refused: see `head.sign`; it is closed all the same.
    """
    try:
      head.sign(self)
    finally:
      self.catalog.close()

  def _sign(self):
    # What was written down is done; `close` and `state audit` tell of it.
    with contextlib.suppress(Refused, OSError):
      head.sign(self)

  def shred(self):
    """Destroys the secrets that the catalog has condemned; see `shred`.

    Not from a copy of the store, which has them too, nor by secrets that are
    not its own: there they wait.
    """
    names = self.catalog.condemned()
    if not names or not home.have(self) or home.elsewhere(self):
      return
    for name in names:
      self.secrets.destroy(name)
      self.catalog.settle(name)

  def again(self):
    """Returns the same store opened once more: what another thread needs."""
    return Store(self.path, self.secrets, quota=self.quota,
                 clock=self.catalog.clock, root=self.root,
                 scratch=self.scratch, notary=self.notary)

  def _make(self):
    with commit.stage(self.path) as folder:
      for name in ('objects', 'tmp', 'trash', 'trust'):
        (folder / name).mkdir(mode=0o700)
      (folder / 'STORE.json').write_bytes(canonical.dumps({
          'format': FORMAT, 'version': VERSION, 'id': token_hex(16)}))
      try:
        commit.place(folder, self.path)
      except commit.AlreadyPublished:
        pass  # another process was faster; it is as good

  @property
  def secret(self) -> bytes:
    """By which the store knows its own manifests.

    Raises:
      Refused: E_IO: it is not among these secrets.
    """
    return home.secret(self)

  def place(self, id: str) -> pathlib.Path:
    """Returns the directory of an artifact.

    Raises:
      ValueError: no id.
    """
    if not _ID.fullmatch(id):
      raise ValueError(f'id: expected sj1- and 64 hex digits, got {id[:80]!r}.')
    return self.path / 'objects' / id[4:6] / id[4:]

  def find(self, key: str) -> str:
    """Returns the id of an artifact by id, beginning of an id, or name.

    Raises:
      Refused: E_ACL: there is none; `desk.examine` and a load say the same of
        one that is not to be seen.
    """
    there = self.catalog.objects()
    named = self.catalog.ref(key)
    if named:
      key = named[0]
    found = [key] if key in there else [
        id for id in there if key.startswith('sj1-') and len(key) >= 12
        and id.startswith(key)]
    if len(found) != 1:
      raise absent(key)
    return found[0]

  def stage(self):
    """Yields a fresh directory to fill, see `commit.stage`."""
    return commit.stage(self.path / 'tmp' / 'new')

  def room(self, nbytes: int):
    """M1: raises unless there is quota and disk for so many bytes.

    Raises:
      Refused: E_NOSPACE.
    """
    used = sum(row[0] for row in self.catalog.objects().values())
    if used + nbytes > self.quota:
      raise Refused('E_NOSPACE', f'expected at most {self.quota} bytes in the '
                    f'store, got {used} and {nbytes} more')
    need = 2 * nbytes + (64 << 20)
    free = shutil.disk_usage(self.path).free
    if free < need:
      raise Refused('E_NOSPACE', f'expected {need} bytes free, got {free}')

  def keep(self, folder, about: dict, *, mint_key: str, principal: str,
           action: str, ref: str = '', expect: int = 0, vouch=None,
           charges=None, code: str = '') -> Kept:
    """M7 to M13: gives a filled directory its manifest and its place, durably.

    Args:
      folder: of `stage`, holding all but the manifest.
      about: the manifest but for `files`.
      mint_key: of this request; where the same principal repeats it, they get
        what the first one made, under the name asked for now.
      principal: who does it, as text.
      action: for the audit log.
      ref: name that shall point to it, '' for none.
      expect: version the name has, 0 for a new one. If it has another one, or
        names what is not the principal's, the artifact gets a name of its own
        beside it: a fork.
      vouch: `keys.Signer`, which writes `manifest.sig`; None writes the
        store's own code.
      charges: further units for the ledger.
      code: for the audit log, of what is known to be wrong with it.

    Raises:
      Refused: E_MANIFEST, E_NOSPACE, E_IO; nothing is kept then.
      ValueError: the key of a request for another state, or for what was
        deleted.
    """
    _check(ref, about)
    mint_key = request(principal, mint_key)
    with said():
      id = self._settle(folder, about, vouch)
      nbytes = self._install(folder, id)
    return self._enter(id, nbytes, about, mint_key, principal, action, ref,
                       expect, charges, code)

  def take_in(self, folder, id: str, about: dict, principal: str,
              ref: str = '') -> Kept:
    """M9 to M13 of an artifact from elsewhere, verified, as it is.

    Args:
      folder: of `stage`, holding it.
      id: its name.
      about: its manifest.
      principal: who brought it.
      ref: a new name that shall point to it, '' for none.
    """
    _check(ref, about)
    with said():
      try:
        nbytes = self._install(folder, id)
      except commit.AlreadyPublished:  # the same bytes, as the name says
        nbytes = sum(layout.walk(self.place(id)).files.values())
        # Whoever has put them there may not have come so far.
        commit.sync(self.place(id).parent)
    return self._enter(id, nbytes, about, f'import-{id}', principal, 'import',
                       ref, 0, None)

  def _enter(self, id, nbytes, about, mint_key, principal, action, ref, expect,
             charges, code=''):
    with self.catalog.transaction():
      earlier, there = self.catalog.minted(mint_key), self.catalog.objects()
      if earlier not in (None, id):
        if earlier not in there:
          raise ValueError(f'mint_key: expected one not used yet, got that of '
                           f'{earlier}, which was deleted; choose another one.')
        with said():
          same = self._tree(earlier) == self._tree(id)
        if not same:
          raise ValueError(f'mint_key: expected one not used yet, got that of '
                           f'{earlier}, another state; choose another one.')
        # A retry of what was done: gc takes the second copy.
        return Kept(earlier, self.catalog.head(),
                    *self._name(ref, earlier, expect, principal))
      if not self.place(id).exists():
        raise Refused('E_IO', f'{id}: expected it where it was put, got '
                      'nothing: a collection took it for abandoned')
      receipt = self.catalog.audit(principal, action, id, 'allowed',
                                   code=code)
      foreign.remember(self, id, about)
      if id not in there:  # as what is imported may be
        self.catalog.add(id, mint_key, nbytes, about['kind'],
                         about['governance']['workflow'],
                         [p['id'] for p in about['provenance']['parents']])
        # Who acts has used tokens; bytes are the owner's.
        self.catalog.charge(access.owner(about), id,
                            live_bytes=nbytes)
        self.catalog.charge(principal, id, **(charges or {}))
      self.catalog.came(sealing.own_name(self, about['nonce']), id)
      name, conflict = self._name(ref, id, expect, principal)
    return Kept(id, receipt, name, conflict)

  def _name(self, ref, id, expect, principal):
    """Moves a name, '' for none; (the name it has now, whether another one).
    """
    found = self.catalog.ref(ref) if ref else None
    if not ref or found and found[0] == id:
      return ref, False
    # A name moves with its owner only, one beside it also with its maker.
    mine = found is None or self.owned(found[0], principal) or (
        BESIDE.search(ref) and self.catalog.maker(found[0]) == principal)
    if mine and (
        self.catalog.move(ref, id, expect)):
      return ref, False
    beside = f'{BESIDE.sub("", ref)[:119]}~'  # a name has 128 at most
    for name, (target, _) in self.catalog.refs().items():
      if target == id and name.startswith(beside):  # of the first try
        return name, True
    name = beside + token_hex(4)
    self.catalog.move(name, id, 0)
    return name, True

  def owned(self, id: str, principal: str) -> bool:
    """Whether an artifact is a principal's; of one that is damaged or lost the
    ledger knows.
    """
    try:
      with said():
        data = layout.read(self.place(id), manifest.NAME)
      if manifest.artifact_id(data) == id:
        return access.owner(manifest.parse(data)) == principal
    except Refused:
      pass
    return bool(principal) and self.catalog.owner(id) == principal

  def _tree(self, id):
    """Digest of an artifact's state."""
    about = manifest.parse(layout.read(self.place(id), manifest.NAME))
    return manifest.parse_plain(sealing.read(
        self, self.place(id), about, manifest.PLAIN), about)['tree']

  def _settle(self, folder, about, vouch):
    about = about | {'files': layout.listing(folder)}
    data = manifest.dumps(about)
    (folder / manifest.NAME).write_bytes(data)
    if vouch is None:
      (folder / layout.MAC).write_bytes(verify.mac(self.secret, data))
    else:
      vouch(folder, data)
    return manifest.artifact_id(data)

  def _install(self, folder, id):
    nbytes = sum(layout.walk(folder).files.values())
    for here, _, files in os.walk(folder, onerror=commit.failed):
      for name in files:
        os.chmod(os.path.join(here, name), 0o400)
    place = self.place(id)
    place.parent.mkdir(mode=0o700, exist_ok=True)
    commit.sync(place.parent.parent)
    commit.place(folder, place)
    return nbytes

  def keyed(self, org: str, field: str, text: str) -> str:
    """Returns the keyed digest of a text of an organisation."""
    return names.keyed(self.secrets.org(org), field, text)
