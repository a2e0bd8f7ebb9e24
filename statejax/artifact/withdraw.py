"""Revoking by more than one artifact's name. Imports no jax.

    by             revokes
    artifact       it, and all that stems from it if its scope says so
    descendants    it and all that stems from it
    family         its root and all that stems from that
    key, org, params, persona, workflow, epoch
                   what names it and is the principal's, here and now; with a
                   signer all of the organisation that names it, also what will
                   come

Every entry concerns artifacts of the principal's organisation alone. One for
what will come concerns those of other members too: so it needs a key that the
trust document lets revoke for the organisation.
"""

from statejax.artifact import (
  access,
  desk,
  grammar,
  keys,
  layout,
  manifest,
  revoke,
  revoked,
  trust,
)
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

NAMED = ('artifact', 'descendants', 'family')
# What the other kinds name; `epoch`: all policies older than it.
VALUES = {
    'key': grammar.Text(68, 'key:[0-9a-f]{64}', empty=False,
                        name='key:+64 hex'),
    'org': manifest.word(128), 'params': manifest.HASH,
    'persona': grammar.Text(78, manifest.KEYED.pattern, empty=False,
                            name=manifest.KEYED.name),
    'workflow': grammar.Text(64, '[a-z0-9._-]+', empty=False),
    'epoch': revoke.EPOCH}
BY = (*NAMED, *VALUES)


def withdraw(shop, what: str, principal: Principal, by: str = 'artifact', *,
             signer: keys.Signer | None = None,
             since: int | None = None) -> list[tuple[str, str]]:
  """Revokes an artifact, or all of some kind.

  Args:
    shop: `objects.Store`.
    what: id, beginning of one, or name, where `by` is of `NAMED`; else the
      value: 'key:' and a hint, an organisation, a digest of parameters, a
      persona's keyed digest, a workflow, an epoch.
    principal: who revokes.
    by: of `BY`.
    signer: a key that may revoke for the principal's organisation; not where
      `by` is of `NAMED`, which is for the owner alone.
    since: unix seconds from which on a key is bad; None is now.

  Returns:
    The entries added to the revocation list: (kind, value).

  Raises:
    Refused: the principal or the signer may not, or nothing is theirs.
    ValueError: no such `by`, a value of another form, or what does not belong
      to it.
  """
  if by not in BY:
    raise ValueError(f'by: expected one of {BY}, got {by!r}.')
  if since is not None and by != 'key':
    raise ValueError(f'since: expected none where by is {by!r}: only keys have '
                     'a time from which on they are bad.')
  if signer is not None and by in NAMED:
    raise ValueError(f'signer: expected none where by is {by!r}: its owner '
                     'alone decides on it.')
  if by == 'artifact':
    return desk.withdraw(shop, what, principal)
  if by in VALUES:
    VALUES[by](what, by)
  with shop.catalog.refusals(str(principal), 'revoke', f'{by} {what}'):
    if by in NAMED:
      entries = _named(shop, what, principal, by)
    elif signer is None:
      entries = _own(shop, by, what, principal)
    else:
      entries = _signed(shop, by, what, principal, signer, since)
    revoked.withdraw(shop, entries, str(principal), org=principal.org,
                     since=since)
  return entries


def hits(shop, kind: str, value: str) -> dict[str, dict]:
  """Returns {id: manifest} of what an entry of a list would revoke here.

  What cannot be read cannot be resumed either, and is left out.
  """
  entry = {'entries': [{'kind': kind, 'value': value, 'from': 0}]}
  found = {}
  for id in shop.catalog.objects():
    try:
      about = manifest.parse(layout.read(shop.place(id), manifest.NAME))
    except (Refused, OSError):
      continue
    if revoke.match(entry, about, id):
      found[id] = about
  return found


def _named(shop, key, principal, by):
  found = desk.examine(shop, key, principal, 'revoke')
  if by == 'descendants':
    return [('artifact', found.id), ('root', found.id)]
  root = found.about['provenance']['root']
  root = found.id if root == 'self' else root
  if root in shop.catalog.objects():
    desk.examine(shop, root, principal, 'revoke')
  elif not all(access.owns(about, principal)
               for about in hits(shop, 'root', root).values()):
    # Its root, whose owner could decide, is not here any more.
    raise Refused('E_ACL', 'expected a family all of which belongs to '
                  f'{principal.name}, got artifacts of others among it')
  return [('root', root)]


def _own(shop, by, value, principal):
  mine = {id: about for id, about in hits(shop, by, value).items()
          if access.owns(about, principal)}
  if not mine:
    raise Refused('E_ACL', f'{by} {value[:80]}: expected an artifact of '
                  f'{principal.name} here, got none; for those of others, and '
                  'those to come, sign with a key that may revoke')
  return [('artifact', id) for id in mine] + _wide(mine)


def _signed(shop, by, value, principal, signer, since):
  known = trust.require(shop)
  known.key(signer.name.removeprefix('key:'), principal.org, 'revoke',
            shop.catalog.clock())
  if by == 'key' and value.removeprefix('key:') not in {
      keys.hint(entry['pem']) for entry in known.orgs.get(principal.org, ())}:
    # Else a mistake in it would look as if the key could do nothing any more.
    raise Refused('E_TRUST', f'{value[:20]}: expected a key that the trust '
                  f'document names for {principal.org or "no organisation"}, '
                  'also one that is retired, got none; name the file of the '
                  'public key')
  if by == 'org' and value != principal.org:
    raise Refused('E_TRUST', f'org: expected {principal.org or "none"}, whose '
                  f'artifacts alone an entry concerns, got {value[:80]}')
  found = {id: about for id, about in hits(shop, by, value).items()
           if about['governance']['org'] == principal.org}
  return [(by, value)] + _elsewhere(shop, by, found, since) + _wide(found)


def _elsewhere(shop, by, found, since):
  """The entries for what was exported of it, or of what stems from it.

  That has another signer, and its persona under another key: other stores know
  it by the name of what it was made of.
  """
  if by == 'key':
    since = shop.catalog.clock() if since is None else since
    return [(kind, id) for id, about in found.items()
            if max(about['created'], trust.seen(shop, id)) >= since
            for kind in ('artifact', 'root')]
  return [('artifact', id) for id in found] if by == 'persona' else []


def _wide(found):
  """The entries for all that stems from those whose scope says so."""
  return [('root', id) for id, about in found.items()
          if about['governance']['revoke_scope'] == 'descendants']
