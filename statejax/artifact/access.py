"""Who may do what with an artifact. Imports no jax."""

import dataclasses
import time

from statejax.artifact import canonical, manifest
from statejax.artifact.outcome import Refused

RIGHTS = ('inspect', 'resume', 'fork', 'export', 'revoke', 'delete')
GRANTABLE = RIGHTS[:4]
# Which of them end when it is revoked, or its time is over.
USES = ('resume', 'fork', 'export')


@dataclasses.dataclass(frozen=True)
class Principal:
  """Whoever asks, as authenticated by the caller.

  Attributes:
    name: e.g. 'alice', without spaces; '' is nobody.
    org: organisation; '' is none.
    granted: rights of a grant to this holder, after its signature and times
      were checked.
    granted_for: id of the artifact that the grant is for; of any other one it
      gives nothing.
    grant_fault: why a grant that was shown does not count, '' where none was.
    uses: the grant's own id, and how often it may be used; see `grant.use`.
    times: first and last unix second of the grant; outside it gives nothing,
      however long the principal is held.

  Raises:
    ValueError: a name with spaces.
  """

  name: str
  org: str = ''
  granted: frozenset[str] = frozenset()
  grant_fault: str = ''
  granted_for: str = ''
  uses: tuple[str, int] = ('', 0)
  times: tuple[int, int] = (0, canonical.MAX_INT)

  def __post_init__(self):
    # Else 'alice of acme' could be two in the log and the accounts.
    if ''.join(self.name.split()) != self.name:
      raise ValueError('principal: expected a name without spaces, got '
                       f'{self.name[:80]!r}; write e.g. alice.smith.')

  def __str__(self):
    """The name in the log and the accounts, with the organisation."""
    return f'{self.name} of {self.org}' if self.org else self.name


@dataclasses.dataclass(frozen=True)
class Access:
  """What a principal may see and do.

  Attributes:
    allowed: whether the asked right holds.
    redacted: for 'inspect': without the list of files.
    code: why not, '' where allowed.
    detail: the same in words.
  """

  allowed: bool
  redacted: bool = False
  code: str = ''
  detail: str = ''


def decide(about: dict, principal: Principal, right: str, *,
           revoked: bool = False, now: int | None = None) -> Access:
  """Returns whether a principal has a right to an artifact.

  The owner has all; a member of the same organisation sees a redacted manifest
  and else has what the list says; a stranger looks at it by any grant for it,
  and else has what the grant says. What is
  revoked, its owner may only look at, revoke and delete. What is exported
  'never', nobody exports; 'listed', besides its owner only whom the list lets;
  'org', members by a grant too; 'any', whoever has a grant.

  Args:
    about: its manifest.
    principal: who asks.
    right: one of `RIGHTS`.
    revoked: whether a revocation names it.
    now: unix seconds; None is the clock.
  """
  if right not in RIGHTS:
    raise ValueError(f'right: expected one of {RIGHTS}, got {right!r}.')
  rules = about['governance']
  owner, member = owns(about, principal), _belongs(rules, principal)
  if revoked and right in USES:
    return Access(False, code='E_REVOKED', detail='the artifact is revoked')
  now = int(time.time()) if now is None else now
  if right in USES and 0 < rules['not_after'] <= now:
    return Access(False, code='E_EXPIRED', detail='expected a time before '
                  f'{rules["not_after"]}, got {now}')
  if right == 'export' and rules['export'] == 'never':
    return Access(False, code='E_ACL', detail='the artifact is never exported')
  shown, held = _shown(about, principal), lasts(principal, now)
  gives = principal.granted if shown and held else frozenset()
  if right == 'export' and rules['export'] != 'any' and not (
      member and rules['export'] == 'org'):
    gives = frozenset()
  if owner or right in GRANTABLE and right in gives:
    return Access(True)
  if right == 'inspect' and gives:  # whatever it is that it gives
    return Access(True)
  if member and right == 'inspect':
    return Access(True, redacted=True)
  if member and right in GRANTABLE and right in _listed(rules, principal):
    return Access(True)
  if principal.grant_fault:
    return Access(False, code='E_GRANT', detail=principal.grant_fault)
  if principal.granted and shown and not held:
    return Access(False, code='E_GRANT', detail=over(principal, now))
  if principal.granted and not shown:
    return Access(False, code='E_GRANT', detail='expected a grant for this '
                  f'artifact, got one for {principal.granted_for or "none"}')
  return Access(False, code='E_ACL', detail=f'{principal.name or "nobody"} of '
                f'{principal.org or "no organisation"} may not {right}')


def require(about: dict, principal: Principal, right: str, *,
            revoked: bool = False, now: int | None = None) -> Access:
  """As `decide`, but raises `Refused` where it is not allowed."""
  access = decide(about, principal, right, revoked=revoked, now=now)
  if not access.allowed:
    raise Refused(access.code, access.detail)
  return access


def owner(about: dict) -> str:
  """Returns the name of an artifact's owner, as `Principal` says it.

  Raises:
    Refused: E_MANIFEST: no principal can have that name.
  """
  rules = about['governance']
  try:
    return str(Principal(rules['owner'], rules['org']))
  except ValueError as error:
    raise Refused('E_MANIFEST', f'governance.owner: {error}') from None


def owns(about: dict, principal: Principal) -> bool:
  """Whether an artifact is a principal's own."""
  rules = about['governance']
  return bool(principal.name) and (
      (principal.name, principal.org) == (rules['owner'], rules['org']))


def lasts(principal: Principal, now: int) -> bool:
  """Whether the grant of a principal, if any, has begun and not ended."""
  return principal.times[0] <= now <= principal.times[1]


def over(principal: Principal, now: int) -> str:
  """Returns in words that the grant of a principal does not hold now."""
  return (f'expected a time of {principal.times[0]}..{principal.times[1]}, as '
          f'the grant says, got {now}')


def sees(about: dict, principal: Principal, now: int | None = None) -> bool:
  """Whether a principal may know that an artifact is there at all.

  Its owner, members of its organisation and who holds a grant for it that
  counts, or that is used up, may; to others it is told as one that is not
  there.

  Args:
    about: its manifest.
    principal: who asks.
    now: unix seconds; None is the clock.
  """
  now = int(time.time()) if now is None else now
  return owns(about, principal) or _belongs(about['governance'], principal) or (
      _shown(about, principal) and lasts(principal, now))


def redact(about: dict) -> dict:
  """Returns a manifest as a member sees it: without the list of files."""
  return {name: value for name, value in about.items() if name != 'files'}


def _shown(about, principal):
  """Whether the grant of a principal, if any, is for this artifact."""
  return bool(principal.granted_for) and principal.granted_for == (
      manifest.artifact_id(canonical.dumps(about)))


def _belongs(rules, principal):
  """Whether a principal is of the organisation, where there is one."""
  return bool(principal.name and rules['org']) and (
      principal.org == rules['org'])


def _listed(rules, principal):
  """Rights which the list of an artifact gives to a member."""
  names = (principal.name, f'org:{principal.org}')
  return {right for entry in rules['acl'] if entry['who'] in names
          for right in entry['may']}
