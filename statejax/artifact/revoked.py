"""What is revoked here: by the store's own lists and by those installed.

The store has a list for each organisation, and one for everybody, which is its
host's. `revoke` says what a list is and what it matches, `trust` who may sign
one.
"""

import contextlib
import functools

from statejax.artifact import (
  catalog,
  envelope,
  foreign,
  installed,
  layout,
  manifest,
  revoke,
  shred,
  trust,
)
from statejax.artifact.outcome import Refused


def install(shop, org: str, data: bytes) -> dict:
  """Keeps an organisation's signed revocation list; returns it.

  An organisation may have several stores, and a list of each comes here. Their
  numbers are each store's own, so that none tells which list is newer: an entry
  counts that any of them has. A list takes the place of those all of whose
  entries it has, as a store's next one does; others stay beside it, and all of
  them must be fresh for what comes from elsewhere, see `revoke.joined`. One
  that has no entry of its own is refused where it is not newer in any way.

  Destroys the keys of what it names; see `shred`.

  Raises:
    Refused: E_SIG, E_TRUST, E_LIMIT.
  """
  known = trust.require(shop)
  new = trust.signed_revocations(known, org, data, now=shop.catalog.clock())
  installed.check_newer(shop, org, new, data)
  # Written down first: a kill that leaves the old list loses no key that this
  # one, which is signed, would let live.
  shred.condemn(shop, lambda id, about: _hit(
      shop, id, about, lambda whose: (new,) if whose == org else ()))
  installed.add(shop, org, new, data)
  shop.shred()
  return new


def withdraw(shop, entries, principal: str, *, org: str | None,
             since: int | None = None):
  """Adds to a list of the store's own, with a row of the log for each entry.

  And destroys the keys of what the list names. Which ones is written down with
  it, so that a kill before the last one leaves nothing undone: the next open
  ends it; see `shred`.

  Args:
    shop: `objects.Store`.
    entries: (kind, value), decided on already; see `revoke.extended`.
    principal: who has decided.
    org: whose artifacts it is about; None is everybody's, which only the host
      of the store may decide.
    since: see `revoke.extended`.

  Raises:
    Refused: E_LIMIT: more than a list has room for, or than the signed one has
      that others get; nothing is revoked then.
    ValueError: it is revoked, but this is a copy of a store whose keys it has.
  """
  with shop.catalog.transaction():
    old, now = shop.catalog.revocations(org), shop.catalog.clock()
    new = revoke.extended(old, entries, now=now, since=since)
    for kind, value in entries:
      when = f' since {now if since is None else since}' if (
          kind == 'key') else ''
      shop.catalog.audit(principal, 'revoked', value,
                         f'{kind} {catalog.whose(org)}{when}')
      if kind == 'artifact':  # nobody resumes it by a grant any more
        shop.catalog.unpin(value)
    shop.catalog.keep_revocations(new, org, principal=principal)
    published(shop, org)
    stay = shred.condemn(shop, lambda id, about: _hit(
        shop, id, about, lambda its: (new,) if org in (None, its) else ()))
  try:
    shop.shred()
  except Refused as error:
    raise Refused(error.code, 'it is revoked, but keys are still to be '
                  f'destroyed, which state fsck does: {error.detail}'
                  ) from error
  if stay:
    raise ValueError(f'it is revoked here, but {stay}.')


def published(shop, org: str | None) -> list[dict]:
  """Returns the entries of an organisation's list as others need them.

  Those of everybody's too, and all that stems from what is revoked with its
  descendants: elsewhere nobody knows of what lies in between. Of a family's
  root each of its artifacts tells by itself.

  Raises:
    Refused: E_LIMIT: more than a signed list has room for.
  """
  lists = [shop.catalog.revocations()]
  lists += [] if org is None else [shop.catalog.revocations(org)]
  entries = revoke.together(filter(None, lists))
  below = [{'kind': 'artifact', 'value': child, 'from': entry['from']}
           for entry in entries
           if entry['kind'] == 'root' and _inside(shop, entry['value'])
           for child in shop.catalog.descendants(entry['value'])]
  entries = revoke.together([{'entries': entries}, {'entries': below}])
  revoke.check({'number': 1, 'this_update': 0, 'next_update': 0,
                'entries': entries})
  return entries


def _inside(shop, id):
  """Whether an artifact is not the first of its family, or nobody knows."""
  return bool(shop.catalog.parents(id)) or not shop.catalog.knows(id)


def destroy(shop):
  """Destroys what keys are left of all that is revoked here for sure.

  That is by the store's own lists and by those that were installed; not by a
  file that is noted nowhere, as it may be gone tomorrow and a key is gone for
  good.
  """
  lists = concerning(shop, noted=True)
  shred.condemn(shop, lambda id, about: _hit(shop, id, about, lists))
  shop.shred()


def why(shop, id: str, about: dict) -> str:
  """Returns what revokes an artifact here by any list, '' where nothing does.

  Also what revokes all from which it stems, as far as its manifest or those of
  what is or was here tell; and what revokes one of these that came from
  elsewhere, if it does not name that one alone.
  """
  return _hit(shop, id, about, concerning(shop))


def concerning(shop, *, noted=False):
  """Returns all lists that concern an organisation: org -> lists."""
  return functools.cache(lambda org: (
      *_own(shop, org), kept(shop, org, noted=noted)))


def _own(shop, org):
  """Those of the store's own, None where there is none."""
  return shop.catalog.revocations(), shop.catalog.revocations(org)


def refuse(shop, id: str, about: dict):
  """Raises E_REVOKED where an artifact is revoked here by any list."""
  if reason := why(shop, id, about):
    raise Refused('E_REVOKED', f'the revocation list names {reason}')


def _hit(shop, id, about, lists):
  """As `why`, by the lists that count for an organisation: `lists(org)`."""
  for one, facts, known in _subjects(shop, id, about, foreign.above(
      shop, about)):
    for crl in lists(facts['governance']['org']):
      if reason := revoke.match(crl, facts, one, known):
        return reason
  return ''


def _subjects(shop, id, about, stems):
  """(id, manifest, what is known) of an artifact, and of what it stems from
  that came from elsewhere.

  These without their names: an entry for one of them alone revokes that one and
  not what was made of it here. One for what it was exported from, which is the
  same in another store, does.
  """
  return [(id, about, _known(shop, id, about)), *(
      ('', one.about, revoke.Known(_same(shop, one.about), seen=one.seen))
      for one in stems)]


def _known(shop, id, about):
  """What the store knows of an artifact, which need not be here."""
  source = about['provenance']
  above = {parent['id'] for parent in source['parents']} | (
      {source['root']} - {'self'})
  for one in (id, *above):
    above |= {*shop.catalog.ancestors(one)}
  return revoke.Known(
      _same(shop, about), frozenset(above), trust.seen(shop, id))


def _same(shop, about):
  """What it was exported from, and what that was, as far as it is here."""
  same: set[str] = set()
  edge = [about]
  while edge:
    fresh = {parent['id'] for one in edge
             for parent in one['provenance']['parents']
             if parent['role'] == 'exported'} - same
    same |= fresh
    edge = []
    for id in fresh:
      try:
        edge.append(manifest.parse(layout.read(shop.place(id), manifest.NAME)))
      except (Refused, OSError):
        continue  # it is not here; its child names it all the same
  return frozenset(same)


def signed(shop, known: trust.Trust, org: str) -> dict | None:
  """Returns what the signed lists kept of an organisation say together, None
  for none.

  Raises:
    Refused: E_SIG, E_TRUST: of one of them, which it names.
  """
  now, sure, found = shop.catalog.clock(), shop.catalog.installed(), []
  for file, data in installed.lists(shop, org).items():
    try:
      found.append(trust.signed_revocations(known, org, data, now=now))
    except Refused as error:
      advice = ('install one that has its entries and is signed by another key,'
                ' as state crl writes it') if file in sure else (
                    'nobody has installed it here, so remove it')
      raise Refused(error.code, f'trust/{file}, a revocation list of '
                    f'{org or "no organisation"}: {error.detail}; {advice}'
                    ) from None
  return revoke.joined(found)


def kept(shop, org: str, *, noted: bool = False) -> dict | None:
  """The same, as they were when installed: their keys may have ended since.

  What lies there and is noted nowhere, as after a kill, counts where a key has
  signed it that may, and else says nothing; `installed.check` tells of it.

  Args:
    shop: `objects.Store`.
    org: the organisation.
    noted: only of what is noted.
  """
  sure, found = shop.catalog.installed(), []
  for file, data in installed.lists(shop, org).items():
    if file in sure:
      found.append(revoke.parse(envelope.open_document('crl', data)[0]))
    elif not noted and (known := trust.believed(shop)) is not None:
      with contextlib.suppress(Refused):
        found.append(trust.signed_revocations(
            known, org, data, now=shop.catalog.clock()))
  return revoke.joined(found)


def valid(shop, id: str, about: dict, vouched: str,
          stems: tuple[foreign.Foreign, ...] | None = None) -> tuple[str, ...]:
  """V5 and V6: clock, epoch and revocations; returns warnings.

  What another one vouches for needs a fresh list of its organisation; for what
  is the store's own a list counts too, but may be old. What stems from another
  one's counts as long as that does, by keys and lists.

  Args:
    shop: `objects.Store`.
    id: of the artifact.
    about: its manifest.
    vouched: by whom; see `trust.vouch`.
    stems: `foreign.above` of it; None asks for it.

  Raises:
    Refused: E_CLOCK, E_EPOCH, E_REVOKED, E_CRL_STALE; E_TRUST of what it stems
      from.
  """
  now, last = shop.catalog.clock(), shop.catalog.newest()
  if now < last:
    raise Refused('E_CLOCK', f'expected a time after {last}, the newest in the '
                  f'audit log, got {now}')
  stems = foreign.above(shop, about) if stems is None else stems
  oldest = trust.oldest_epoch(shop)
  def lists(facts, own):
    org = facts['governance']['org']
    for mine in _own(shop, org):
      yield mine, False
    yield (kept(shop, org), False) if own else (_fresh(shop, org), True)
  (_, _, known), *others = _subjects(shop, id, about, stems)
  warnings = holds(about, id, known, oldest=oldest, now=now,
                   lists=lists(about, vouched == 'mac'))
  for one, (name, facts, known) in zip(stems, others):
    try:
      trust.counts(trust.require(shop), facts['provenance']['producer']
                   .removeprefix('key:'), facts, one.seen)
      warnings += holds(facts, name, known, oldest=oldest, now=now,
                        lists=lists(facts, False))
    except Refused as error:
      raise Refused(error.code, f'it stems from {one}: {error.detail}'
                    ) from error
  return tuple(dict.fromkeys(warnings))


def holds(about: dict, id: str, known: revoke.Known, *, oldest: int, lists,
          now: int) -> tuple[str, ...]:
  """V5 and V6 of one artifact, with a store or without; returns warnings.

  Args:
    about: its manifest, or `foreign.FIELDS` of it.
    id: of the artifact.
    known: what is known besides; without a store it is first seen now.
    oldest: epoch of policies that is trusted.
    lists: of (revocation list or None, whether it must be fresh).
    now: unix seconds.

  Raises:
    Refused: E_EPOCH, E_REVOKED, E_CRL_STALE.
  """
  if about['policy']['epoch'] < oldest:
    raise Refused('E_EPOCH', f'policy.epoch: expected at least {oldest}, got '
                  f'{about["policy"]["epoch"]}')
  return tuple(warning for crl, fresh in lists for warning in revoke.require(
      crl, about, id, foreign=fresh, now=now, known=known))


def _fresh(shop, org):
  """The signed lists of an organisation, of which there must be one."""
  crl = signed(shop, trust.require(shop), org)
  if crl is None:
    raise Refused('E_CRL_STALE', f'expected a signed revocation list of '
                  f'{org or "no organisation"}, got none')
  return crl
