"""The table of rights of the specification, written once more: an oracle.

It knows nothing of `statejax.artifact.access`.
"""

RIGHTS = ('inspect', 'resume', 'fork', 'export', 'revoke', 'delete')
# In their order: y(es), r(edacted), l(ist), g(rant), n(o).
TABLE = {
    'owner': 'yyyyyy',
    'member': 'rlllnn',
    'granted': 'ygggnn',
    'stranger': 'nnnnnn',  # expired grant, wrong holder, other org, anonymous
    'owner, revoked': 'ynnnyy',
}


def rows(rules, name, org, granted):
  """The rows of the table that a principal is in."""
  found = set()
  if name and org == rules['org']:
    if name == rules['owner']:
      found.add('owner')
    elif org:
      found.add('member')
  if granted:
    found.add('granted')
  return found or {'stranger'}


def expected(rules, name, org, granted, right, *, revoked=False, now=0):
  """'y', 'r' or 'n'.

  Args:
    rules: group `governance` of a manifest.
    name, org: of the principal.
    granted: rights of a grant for this artifact that counts; else ().
    right: of `RIGHTS`.
    revoked: whether the artifact is.
    now: unix seconds.
  """
  at, best = RIGHTS.index(right), 'n'
  over = 0 < rules['not_after'] <= now
  for row in rows(rules, name, org, granted):
    if row == 'owner' and revoked:
      row = 'owner, revoked'
    letter = TABLE[row][at]
    if letter == 'l':
      listed = [e['may'] for e in rules['acl']
                if e['who'] == name or e['who'] == 'org:' + org]
      letter = 'y' if any(right in may for may in listed) else 'n'
    if letter == 'g':
      letter = 'y' if right in granted else 'n'
      if right == 'export' and (rules['export'] == 'listed' or (
          rules['export'] == 'org' and not (name and org == rules['org'] and
                                            org))):
        letter = 'n'  # a grant is no list, and makes nobody a member
    if right in ('resume', 'fork', 'export') and (revoked or over):
      letter = 'n'  # E_REVOKED, E_EXPIRED
    if right == 'export' and rules['export'] == 'never':
      letter = 'n'
    best = max(best, letter)  # n < r < y
  return best


def seen(rules, name, org, granted):
  """Whether a principal may know that the artifact is there."""
  return rows(rules, name, org, granted) != {'stranger'}
