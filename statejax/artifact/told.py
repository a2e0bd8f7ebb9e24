"""What the audit log says of revocations and of uses of grants.

The tables of the catalog that hold them are beside the hash chain: whoever
empties one brings back what was revoked, or a grant that was used up. A list
must be the one that the log names last, or nothing that it concerns is loaded;
of the uses of a grant the larger number counts. Imports no jax.
"""

import re

from statejax.artifact import catalog, revoke
from statejax.artifact.outcome import Refused

# Kind, whose and since when; of an earlier release the kind alone.
_REVOKED = re.compile(r'([a-z]+)(?: (of all|of ".*"))?(?: since (\d+))?')


def check(shop) -> list[str]:
  """Returns in words where the tables are not as the log says."""
  wrong, listed, used = [], set(), {}
  for org in (None, *_orgs(shop)):
    try:
      listed |= _entries(shop.catalog.revocations(org))
    except Refused as error:
      wrong.append(str(error))
  for row in shop.catalog.rows():
    entry = _entry(row)
    if entry and entry[1] not in listed and not wrong:
      wrong.append(f'crl: expected {" ".join(entry[1])}, revoked by '
                   f'{row["principal"]} in row {row["seq"]} of the audit log, '
                   'got no such entry; state fsck makes the list anew')
    if row['action'] == 'used':
      used[row['id']] = int(row['outcome'])
  have = shop.catalog.grants()
  return wrong + [
      f'grant {id}: expected {uses} uses, as the audit log says, got '
      f'{have.get(id, 0)}; those of the log count'
      for id, uses in used.items() if have.get(id, 0) < uses]


def mend(shop) -> list[str]:
  """Makes lists anew from the log that are lost or damaged; says which.

  A list that is there keeps what else it has. Rows of an earlier release do not
  say whose artifacts they are about, and become everybody's. From a log that is
  itself changed nothing is made; `collect.check` tells of that.
  """
  with shop.catalog.transaction():
    told: dict[str, list] = {}
    try:
      rows = shop.catalog.rows()
    except Refused:
      return []
    for row in rows:
      if entry := _entry(row):
        told.setdefault(entry[0], []).append(entry[1:])
    return [text for org in (None, *_orgs(shop)) if (
        text := _mend(shop, org, told.get(catalog.whose(org), [])))]


def _mend(shop, org, said):
  try:
    old, lost = shop.catalog.revocations(org), False
  except Refused:
    old, lost = None, True
  if not lost and {entry for entry, _ in said} <= _entries(old):
    return ''
  since = [{'entries': [{'kind': kind, 'value': value, 'from': when}]}
           for (kind, value), when in said]
  entries = revoke.together([*filter(None, [old]), *since])
  shop.catalog.keep_revocations(
      revoke.extended(old, (), now=shop.catalog.clock()) | {
          'number': shop.catalog.last_number(org) + 1, 'entries': entries},
      org, anew=True)
  return (f'crl {catalog.whose(org)}: made anew from the audit log, '
          f'{len(entries)} entries')


def _orgs(shop):
  """Organisations that have or had a list of their own here."""
  return sorted({*shop.catalog.listing(), *(
      row['id'][4:-1] for row in shop.catalog.rows()
      if row['action'] == 'listed' and row['id'] != catalog.whose(None))})


def _entries(crl):
  return {(e['kind'], e['value']) for e in crl['entries']} if crl else set()


def _entry(row):
  """(whose, (kind, value), since) of a row that says what was revoked, else
  None.
  """
  found = row['action'] == 'revoked' and _REVOKED.fullmatch(row['outcome'])
  return (found[2] or catalog.whose(None), (found[1], row['id']),
          int(found[3] or row['time'])) if found else None
