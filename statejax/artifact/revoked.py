"""What is revoked here: by the store's own list and by those installed.

`revoke` says what a list is and what it matches, `trust` who may sign one.
"""

from statejax.artifact import (
  envelope,
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
  shred.condemn(shop, lambda id, about: about['governance']['org'] == org and (
      revoke.match(new, about, id, _known(shop, id, about))))
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
    shred.condemn(shop, lambda id, about: revoke.match(
        new, about, id, _known(shop, id, about)))
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
  what is or was here tell.
  """
  known = _known(shop, id, about)
  theirs = kept(shop, about['governance']['org'])
  return revoke.match(shop.catalog.revocations(), about, id, known) or (
      revoke.match(theirs, about, id, known))


def refuse(shop, id: str, about: dict):
  """Raises E_REVOKED where an artifact is revoked here by any list."""
  if reason := why(shop, id, about):
    raise Refused('E_REVOKED', f'the revocation list names {reason}')


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


def valid(shop, id: str, about: dict, vouched: str) -> tuple[str, ...]:
  """V5 and V6: clock, epoch and revocations; returns warnings.

  What another one vouches for needs a fresh list of its organisation; for what
  is the store's own a list counts too, but may be old.

  Raises:
    Refused: E_CLOCK, E_EPOCH, E_REVOKED, E_CRL_STALE.
  """
  now, last = shop.catalog.clock(), shop.catalog.newest()
  if now < last:
    raise Refused('E_CLOCK', f'expected a time after {last}, the newest in the '
                  f'audit log, got {now}')
  org, own = about['governance']['org'], vouched == 'mac'
  oldest = trust.oldest_epoch(shop)
  if about['policy']['epoch'] < oldest:
    raise Refused('E_EPOCH', f'policy.epoch: expected at least {oldest}, got '
                  f'{about["policy"]["epoch"]}')
  known = _known(shop, id, about)
  warnings = revoke.require(shop.catalog.revocations(), about, id,
                            foreign=False, now=now, known=known)
  crl = kept(shop, org) if own else signed(shop, trust.require(shop), org)
  if crl is None and not own:
    raise Refused('E_CRL_STALE', f'expected a signed revocation list of '
                  f'{org or "no organisation"}, got none')
  return tuple(dict.fromkeys(warnings + revoke.require(
      crl, about, id, foreign=not own, now=now, known=known)))
