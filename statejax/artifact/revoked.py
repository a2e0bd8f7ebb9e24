"""What is revoked here: by the store's own list and by those installed.

`revoke` says what a list is and what it matches, `trust` who may sign one.
"""

import functools

from statejax.artifact import (
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


def withdraw(shop, entries, principal: str, *, since: int | None = None):
  """Adds to the store's own list, with a row of the log for each entry.

  And destroys the keys of what the list names. Which ones is written down with
  it, so that a kill before the last one leaves nothing undone: the next open
  ends it; see `shred`.

  Args:
    shop: `objects.Store`.
    entries: (kind, value), decided on already; see `revoke.extended`.
    principal: who has decided.
    since: see `revoke.extended`.
  """
  with shop.catalog.transaction():
    new = revoke.extended(
        shop.catalog.revocations(), entries, now=shop.catalog.clock(),
        since=since)
    shop.catalog.keep_revocations(new)
    for kind, value in entries:
      shop.catalog.audit(principal, 'revoked', value, kind)
    shred.condemn(shop, lambda id, about: _hit(
        shop, id, about, lambda _: (new,)))
  try:
    shop.shred()
  except Refused as error:
    raise Refused(error.code, 'it is revoked, but keys are still to be '
                  f'destroyed, which state fsck does: {error.detail}'
                  ) from error


def destroy(shop):
  """Destroys what keys are left of all that is revoked here, by any list."""
  shred.condemn(shop, lambda id, about: why(shop, id, about))
  shop.shred()


def why(shop, id: str, about: dict) -> str:
  """Returns what revokes an artifact here by any list, '' where nothing does.

  Also what revokes all from which it stems, as far as its manifest or those of
  what is or was here tell; and what revokes one of these that came from
  elsewhere, if it does not name that one alone.
  """
  own = shop.catalog.revocations()
  return _hit(shop, id, about, functools.cache(
      lambda org: (own, kept(shop, org))))


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
    Refused: E_SIG, E_TRUST: of one of them.
  """
  now = shop.catalog.clock()
  return revoke.joined([trust.signed_revocations(known, org, data, now=now)
                        for data in installed.lists(shop, org).values()])


def kept(shop, org: str) -> dict | None:
  """The same, as they were when installed: their keys may have ended since."""
  return revoke.joined([revoke.parse(envelope.open_document('crl', data)[0])
                        for data in installed.lists(shop, org).values()])


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
  mine, oldest = shop.catalog.revocations(), trust.oldest_epoch(shop)
  def lists(facts, own):
    yield mine, False
    org = facts['governance']['org']
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
