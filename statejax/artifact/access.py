"""Who may do what with an artifact. Imports no jax."""

import dataclasses
import time

from statejax.artifact.outcome import Refused

RIGHTS = ('inspect', 'resume', 'fork', 'export', 'revoke', 'delete')
GRANTABLE = RIGHTS[:4]
# Which of them end when it is revoked, or its time is over.
USES = ('resume', 'fork', 'export')


@dataclasses.dataclass(frozen=True)
class Principal:
  """Whoever asks, as authenticated by the caller.

  Attributes:
    name: e.g. 'alice'; '' is nobody.
    org: organisation; '' is none.
    granted: rights of a grant that names this artifact and this holder, after
      its signature and times were checked.
    grant_fault: why a grant that was shown does not count, '' where none was.
  """

  name: str
  org: str = ''
  granted: frozenset[str] = frozenset()
  grant_fault: str = ''

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
  and else has what the list says; a stranger looks at it by any grant, and else
  has what the grant says. What is
  revoked, its owner may only look at, revoke and delete. Export needs besides
  that the artifact may be exported at all.

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
  if owner or right in GRANTABLE and right in principal.granted:
    return Access(True)
  if right == 'inspect' and principal.granted:  # whatever it is that it gives
    return Access(True)
  if member and right == 'inspect':
    return Access(True, redacted=True)
  if member and right in GRANTABLE and right in _listed(rules, principal):
    return Access(True)
  if principal.grant_fault:
    return Access(False, code='E_GRANT', detail=principal.grant_fault)
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
  """Returns the name of an artifact's owner, as `Principal` says it."""
  rules = about['governance']
  return str(Principal(rules['owner'], rules['org']))


def owns(about: dict, principal: Principal) -> bool:
  """Whether an artifact is a principal's own."""
  rules = about['governance']
  return bool(principal.name) and (
      (principal.name, principal.org) == (rules['owner'], rules['org']))


def sees(about: dict, principal: Principal) -> bool:
  """Whether a principal may know that an artifact is there at all.

  Its owner, members of its organisation and who holds a grant that counts may;
  to others it is told as one that is not there.
  """
  return owns(about, principal) or bool(principal.granted) or _belongs(
      about['governance'], principal)


def redact(about: dict) -> dict:
  """Returns a manifest as a member sees it: without the list of files."""
  return {name: value for name, value in about.items() if name != 'files'}


def _belongs(rules, principal):
  """Whether a principal is of the organisation, where there is one."""
  return bool(principal.name and rules['org']) and (
      principal.org == rules['org'])


def _listed(rules, principal):
  """Rights which the list of an artifact gives to a member."""
  names = (principal.name, f'org:{principal.org}')
  return {right for entry in rules['acl'] if entry['who'] in names
          for right in entry['may']}
