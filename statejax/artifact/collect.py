"""What is deleted, and whether what is there is whole. Imports no jax."""

import dataclasses
import os
import re
import shutil
import time
from secrets import token_hex

from statejax.artifact import (
  access,
  commit,
  foreign,
  home,
  installed,
  layout,
  manifest,
  objects,
  revoked,
  sealing,
  shred,
  told,
  trust,
  verify,
)
from statejax.artifact.outcome import LOOK, Refused, absent

# How a load that has saved or spent tokens stands in the audit log, and the
# unit of the ledger that it is charged in.
_ENDS = re.compile(r'(resumed|reprefilled)\((\d+)(?:, \w+)?\)')
_REPLIED = {'resumed': 'tokens_skipped', 'reprefilled': 'tokens_reprefilled'}


@dataclasses.dataclass(frozen=True)
class Collected:
  """What a collection has removed.

  Attributes:
    objects: ids of artifacts that nothing points to any more.
    orphans: ids of directories that no catalog knows: their mint was killed.
    leftovers: directories of dead writers and of deletions cut short.
  """

  objects: tuple[str, ...]
  orphans: tuple[str, ...]
  leftovers: tuple[str, ...]


def roots(shop, generations: int = 1) -> set[str]:
  """Returns the artifacts that must stay.

  They are those which a name points to, those under a lease, and of both the
  parents, so many generations back. A pin is a name like any other.
  """
  there = shop.catalog.objects()
  marked = {id for id, _ in shop.catalog.refs().values()}
  marked |= shop.catalog.leased()
  edge = marked
  for _ in range(generations):
    edge = {parent for id in edge for parent in shop.catalog.parents(id)}
    marked = marked | edge
  return marked & there.keys()


def collect(shop, *, grace: int = 3600, generations: int = 1, last: int = 8,
            principal: str = 'gc') -> Collected:
  """Deletes what no name, lease or child within `generations` needs.

  Of the names that somebody has left beside another's, as whoever resumes a
  state that is not theirs does each time, the last few stay.

  Args:
    shop: `objects.Store`.
    grace: seconds for which everything stays; longer than any mint takes.
    generations: see `roots`.
    last: how many names of each who has made some beside the same one.
    principal: for the audit log.
  """
  leftovers = [p.name for p in (
      *commit.sweep(shop.path / 'tmp'),
      *commit.sweep(shop.scratch, sealing.scratch_name(shop)))]
  leftovers += _finish(shop)
  _forget(shop, grace, last, principal)
  now, marked = shop.catalog.clock(), roots(shop, generations)
  gone = [id for id, (_, _, _, created) in shop.catalog.objects().items()
          if id not in marked and created + grace <= now]
  # Asked again, each in one transaction with its removal: since then somebody
  # may have begun to read it, or have given it a name.
  gone = [id for id in gone if _take(
      shop, id, principal, 'gc', lambda id: not _needed(shop, id, generations))]
  lost = [id for id in orphans(shop) if _take_orphan(shop, id, principal,
                                                     grace)]
  _finish(shop)
  shred.sweep(shop, grace)
  revoked.destroy(shop)
  return Collected(tuple(gone), tuple(lost), tuple(leftovers))


def _forget(shop, grace, last, principal):
  """Frees all but the last names that others have left beside an owner's."""
  there, sessions = shop.catalog.objects(), {}
  refs = shop.catalog.refs()
  order = {id: n for n, id in enumerate(there)}
  for name, (id, version) in refs.items():
    base, maker = objects.BESIDE.sub('', name), shop.catalog.maker(id)
    if base != name and id in there and maker not in ('', _owner(shop, id)):
      sessions.setdefault((base, maker), []).append((order[id], name, id,
                                                     version))
  for names in sessions.values():
    for _, name, id, version in sorted(names)[:max(0, len(names) - last)]:
      with shop.catalog.transaction():
        # Since then somebody may have moved it.
        if there[id][3] + grace <= shop.catalog.clock() and (
            shop.catalog.ref(name) == (id, version)):
          shop.catalog.drop(name)
          shop.catalog.audit(principal, 'gc', id, f'unnamed {name}')


def _owner(shop, id):
  """Whose an artifact is; '' of one that cannot be read."""
  try:
    return access.owner(manifest.parse(layout.read(shop.place(id),
                                                   manifest.NAME)))
  except (Refused, OSError):
    return ''


def delete(shop, id: str, principal: str, *, action: str = 'delete'):
  """Deletes an artifact; whether it may be is for the caller to ask.

  And the key that it is sealed under; see `shred`.

  Renamed first, so that a kill leaves nothing half: the catalog follows, here
  or in the next collection.

  Raises:
    Refused: E_ACL: there is none; E_IO: the catalog does not know of it yet,
      and the next collection ends it, or no artifact at all is where it was.
    ValueError: it is deleted, but this is a copy of a store whose keys it has.
  """
  there = shop.catalog.objects()
  if len(there) > 1 and not any(shop.place(one).exists() for one in there):
    raise Refused('E_IO', f'{shop.path}/objects: expected {len(there)} '
                  'artifacts, got none of them; see whether the disk is there')
  if not _take(shop, id, principal, action, lambda id: True):
    raise absent(id)
  stay: list[str] = []
  _finish(shop, stay)
  if stay:
    raise ValueError(f'{id}: it is deleted here, but {stay[0]}.')


def orphans(shop) -> list[str]:
  """Returns artifacts' directories that the catalog does not know."""
  found = ['sj1-' + path.name
           for path in (shop.path / 'objects').glob('??/' + '?' * 64)]
  # Read after them: what comes in between is known.
  return sorted(set(found) - shop.catalog.objects().keys())


def adopt(shop, id: str, principal: str) -> str:
  """Enters an orphan of this store into its catalog, after verifying it.

  Raises:
    Refused: it is not whole, or another store vouches for it.
  """
  found = verify.verify(shop.place(id), name=id, secret=shop.secret)
  nbytes = sum(layout.walk(shop.place(id)).files.values())
  with shop.catalog.transaction():
    if not shop.place(id).exists():
      raise Refused('E_IO', f'{id}: expected an orphan, got nothing: a '
                    'collection took it')
    shop.catalog.audit(principal, 'adopt', id, 'allowed')
    shop.catalog.add(id, f'adopted-{id}', nbytes, found.about['kind'],
                     found.about['governance']['workflow'],
                     [p['id'] for p in found.about['provenance']['parents']])
    shop.catalog.charge(access.owner(found.about), id,
                        live_bytes=nbytes)
    shop.catalog.came(sealing.own_name(shop, found.about['nonce']), id)
  return id


def check(shop) -> list[str]:
  """Returns all that is wrong with a store, in words; empty if nothing is.

  The chains of audit and ledger, every artifact's bytes, and that the ledger
  accounts for exactly the bytes on the disk and the tokens of all replies.
  """
  wrong = []
  for table in ('audit', 'ledger'):
    try:
      shop.catalog.rows(table)
    except Refused as error:
      wrong.append(str(error))
  wrong += [] if wrong else installed.check(shop) + told.check(shop)
  total = 0
  try:
    home.require(shop)
  except Refused as error:  # told once, and not of each artifact
    return [*wrong, str(error)]
  for id in shop.catalog.objects():
    try:
      place = shop.place(id)
      found, data, about, _ = verify.head(place, name=id)
      if found.voucher == layout.MAC or shop.root:  # else see `unasked`
        trust.vouch(shop, place, found, data, about)
      layout.check(place, found, about)
      size = sum(found.files.values())
      total += size
      wrong += _unlike(shop, id, about, size)
    except (Refused, OSError) as error:
      wrong.append(f'{id}: {error}')
  wrong += [f'{id}: in no catalog; its mint was cut short' for id in
            orphans(shop)]
  if not wrong:
    live = sum(row['delta'] for row in shop.catalog.rows('ledger')
               if row['unit'] == 'live_bytes')
    if live != total:
      wrong.append(f'ledger: expected {total} live bytes, as on the disk, got '
                   f'{live}')
    wrong += _unaccounted(shop)
  return wrong


def _unlike(shop, id, about, size):
  """Where the catalog's row of an artifact is not what it is."""
  nbytes, kind, workflow, _ = shop.catalog.object(id)
  parents = sorted({p['id'] for p in about['provenance']['parents']})
  _, told = shop.catalog.foreign([id]).get(id, (0, None))
  return [f'{id}: catalog: {name}: expected {expected!r}, as the artifact has '
          f'it, got {got!r}' for name, expected, got in (
              ('bytes', size, nbytes), ('kind', about['kind'], kind),
              ('workflow', about['governance']['workflow'], workflow),
              ('parents', parents, shop.catalog.parents(id)),
              ('signed elsewhere', foreign.facts(about), told))
          if expected != got]


def unasked(shop) -> list[str]:
  """Returns what is here and signed, where no root key is pinned.

  `check` then does not know whose signatures count; all else is checked.
  """
  there = [] if shop.root else shop.catalog.objects()
  return [id for id in there if (shop.place(id) / layout.SIG).exists()]


def _unaccounted(shop):
  """Where units of the ledger are not the sums of what the log replied."""
  replied = dict.fromkeys(_REPLIED.values(), 0) | {'resumes': 0}
  for row in shop.catalog.rows():
    found = _ENDS.fullmatch(row['outcome'])
    if found and row['action'] != LOOK:
      replied[_REPLIED[found[1]]] += int(found[2])
      replied['resumes'] += found[1] == 'resumed'
  charged = dict.fromkeys(replied, 0)
  for row in shop.catalog.rows('ledger'):
    if row['unit'] in charged:
      charged[row['unit']] += row['delta']
  return [f'ledger: expected {replied[unit]} {unit}, as the replies in the '
          f'audit log say, got {charged[unit]}'
          for unit in replied if replied[unit] != charged[unit]]


def _needed(shop, id, generations):
  """As `roots`, of one artifact."""
  edge = {id}
  for _ in range(generations + 1):
    if any(map(shop.catalog.held, edge)):
      return True
    edge = {child for id in edge for child in shop.catalog.children(id)}
  return False


def _take(shop, id, principal, action, wanted):
  """Moves an artifact to the trash if it is there and `wanted(id)`."""
  with shop.catalog.transaction():
    if shop.catalog.object(id) is None or not wanted(id):
      return False
    # Whatever a kill cuts short now, whoever opens the store destroys its key.
    if (trash := _to_trash(shop, id)) is not None:
      shred.condemn_one(shop, trash)
    _note(shop, id, principal, action)
  return True


def _take_orphan(shop, id, principal, grace):
  place = shop.place(id)
  try:
    if os.stat(place).st_mtime + grace > time.time():
      return False
    with shop.catalog.transaction():
      # Its mint may have ended since, or be just about to.
      if commit.living(place) or shop.catalog.object(id):
        return False
      _to_trash(shop, id)
      shop.catalog.audit(principal, 'gc', id, 'orphan')
  except FileNotFoundError:  # another collection was faster
    return False
  return True


def _to_trash(shop, id):
  """Moves what is there of an artifact; returns where it is now, or None."""
  trash = shop.path / 'trash' / f'{id}-{token_hex(8)}'
  place = shop.place(id)
  try:
    os.rename(place, trash)
  except FileNotFoundError:
    # As after a crash that kept its catalog only: nothing is left of it.
    return None
  commit.sync(trash.parent)
  commit.sync(place.parent)
  return trash


def _note(shop, id, principal, action):
  size = shop.catalog.object(id)[0]
  shop.catalog.audit(principal, action, id, 'allowed')
  shop.catalog.charge(principal, id, live_bytes=-size)
  shop.catalog.bury(id)
  for name in shop.catalog.named(id):
    shop.catalog.drop(name)


def _finish(shop, stay=None):
  """Ends deletions that were cut short; returns the directories removed.

  Why keys stay, see `shred.condemn`, goes into a list.
  """
  done, stay = [], [] if stay is None else stay
  for trash in sorted((shop.path / 'trash').iterdir()):
    id = trash.name[:68]
    with shop.catalog.transaction():
      if shop.catalog.object(id) and not shop.place(id).exists():
        _note(shop, id, 'gc', 'gc')
      stay += filter(None, [shred.condemn_one(shop, trash)])
    shop.shred()
    # What cannot be removed now, the next collection removes.
    if trash.is_symlink() or trash.is_file():  # what damage has put there
      trash.unlink()
    else:
      shutil.rmtree(trash, ignore_errors=True)
    if not trash.exists():
      done.append(trash.name)
  return done


def account(shop) -> list[dict]:
  """Returns one row of sums for each principal and workflow.

  Bytes times seconds follow from when bytes came and went, and are nowhere
  stored. `tokens_skipped` are those which a resume has saved from being
  absorbed again, `mflop_avoided` and `device_us_avoided` the operations and the
  measured time that absorbing them took.

  Returns:
    dicts of principal, workflow, byte_seconds and the units of the ledger.
  """
  now = shop.catalog.clock()
  workflow = {id: row[2] for gone in (False, True)
              for id, row in shop.catalog.objects(gone=gone).items()}
  # Bytes are the owner's, whoever deletes them.
  owner: dict[str, str] = {}
  sums: dict[tuple[str, str], dict[str, int]] = {}
  for row in shop.catalog.rows('ledger'):
    id, who = row['id'], row['principal']
    if row['unit'] == 'live_bytes':
      who = owner.setdefault(id, who)
    entry = sums.setdefault((who, workflow.get(id, '')), {'byte_seconds': 0})
    entry[row['unit']] = entry.get(row['unit'], 0) + row['delta']
    if row['unit'] == 'live_bytes':
      entry['byte_seconds'] += row['delta'] * (now - row['time'])
  return [{'principal': who, 'workflow': name, **entry}
          for (who, name), entry in sorted(sums.items())]
