"""Whose signatures count here: the trust document, and what follows from it.

It names the keys of every organisation, what each may sign and when. It is
signed by a root key which whoever runs the store has pinned; a newer document
replaces an older one and never the other way round. Needs the extra [sign].
"""

import dataclasses

from statejax.artifact import (
  canonical,
  envelope,
  installed,
  keys,
  layout,
  manifest,
  names,
  revoke,
  verify,
)
from statejax.artifact.grammar import Int, Items, OneOf, Record, Table, Text
from statejax.artifact.outcome import Refused

ROLES = ('mint', 'grant', 'revoke')
PEM = Text(1024, '[ -~\\n]+', empty=False, name='a PEM text')
GRAMMAR = Record({
    'number': Int(1), 'min_epoch': Int(),
    'classes': Items(OneOf(manifest.CLASSES), 4),
    'orgs': Table(manifest.text(128), Items(Record({
        'pem': PEM, 'status': OneOf(('active', 'retired')),
        'not_before': Int(), 'not_after': Int(),
        'may': Items(OneOf(ROLES), 3)}), 64), 1024)})
FILE = installed.TRUST


@dataclasses.dataclass(frozen=True)
class Trust:
  """A verified trust document.

  Attributes:
    number: it never decreases.
    min_epoch: oldest epoch of policies that is trusted.
    classes: of artifacts that may come from elsewhere.
    orgs: {organisation: keys}.
  """

  number: int
  min_epoch: int
  classes: tuple[str, ...]
  orgs: dict[str, list]

  def key(self, hint: str, org: str, role: str, when: int) -> str:
    """Returns the PEM of a key that may do something for an organisation.

    Raises:
      Refused: E_TRUST: unknown, of another organisation, retired, without that
        right, or not valid at the time.
    """
    for entry in self.orgs.get(org, ()):
      if keys.hint(entry['pem']) != hint:
        continue
      if entry['status'] != 'active' or role not in entry['may']:
        raise Refused('E_TRUST', f'key {hint[:16]}: expected an active key that'
                      f' may {role}, got {entry["status"]}, {entry["may"]}')
      if not entry['not_before'] <= when <= entry['not_after']:
        raise Refused('E_TRUST', f'key {hint[:16]}: expected a time of '
                      f'{entry["not_before"]}..{entry["not_after"]}, got '
                      f'{when}')
      return entry['pem']
    raise Refused('E_TRUST', f'key {hint[:16]}: expected a key of '
                  f'{org or "no organisation"} in the trust document, got none')


def parse(data: bytes, root: str) -> Trust:
  """Returns the trust of a signed document.

  Args:
    data: the document.
    root: PEM of the pinned key.

  Raises:
    Refused: E_SIG: not signed by it; E_TRUST: of another form.
  """
  payload, signature, hint = envelope.open_document('trust', data)
  if hint != keys.hint(root):
    raise Refused('E_SIG', f'trust: expected a signature of the pinned key '
                  f'{keys.hint(root)[:16]}, got one of {hint[:16]}')
  keys.check(root, envelope.media('trust'), payload, signature)
  return _of(parse_body(payload))


def _of(value):
  return Trust(value['number'], value['min_epoch'], tuple(value['classes']),
               value['orgs'])


def parse_body(payload: bytes) -> dict:
  """Returns what a trust document says, whoever has signed it.

  Raises:
    Refused: E_TRUST.
  """
  try:
    value = canonical.loads(payload)
    GRAMMAR(value, '')
  except (ValueError, RecursionError) as error:
    raise Refused('E_TRUST', f'trust: {error}') from None
  return value


FIRST = Trust(0, 0, manifest.CLASSES, {})


def extended(old: Trust | None, pem: str, org: str, *, may=ROLES, not_before=0,
             not_after=manifest.U.high) -> bytes:
  """Returns the document that follows `old` and trusts one key more, unsigned.

  Args:
    old: the present trust, None for the first.
    pem: the public key; if it is there already, this is what it may now.
    org: whose it is.
    may: of `ROLES`.
    not_before, not_after: unix seconds.

  Raises:
    ValueError: it is no public key.
  """
  return _with_key(old or FIRST, org, {
      'pem': keys.normal(pem), 'status': 'active', 'not_before': not_before,
      'not_after': not_after, 'may': list(may)})


def retired(old: Trust | None, pem: str, org: str) -> bytes:
  """Returns the document that follows `old` and trusts a key no more, unsigned.

  Nothing that it has signed counts then. Of a key that was stolen at a known
  time see the kind 'key' of `withdraw.withdraw`.

  Args:
    old: the present trust.
    pem: the public key.
    org: whose it is.

  Raises:
    ValueError: there is no such key, or it is no public key.
  """
  old, pem = old or FIRST, keys.normal(pem)
  for entry in old.orgs.get(org, ()):
    if entry['pem'] == pem:
      return _with_key(old, org, entry | {'status': 'retired'})
  raise ValueError(f'key {keys.hint(pem)[:16]}: expected one that is trusted '
                   f'for {org or "no organisation"}, got none; name its --org.')


def ruled(old: Trust | None, *, min_epoch: int | None = None,
          classes=None) -> bytes:
  """Returns the document that follows `old` with other rules, unsigned.

  Args:
    old: the present trust, None for the first.
    min_epoch: oldest epoch of policies that is trusted; None leaves it.
    classes: of artifacts that may come from elsewhere; None leaves them.

  Raises:
    ValueError: an epoch below the present one, or no such class.
  """
  old = old or FIRST
  if min_epoch is not None and min_epoch < old.min_epoch:
    raise ValueError(f'min_epoch: expected at least {old.min_epoch}, as it is '
                     f'now, got {min_epoch}; epochs never go back.')
  return _document(
      old, old.orgs, old.min_epoch if min_epoch is None else min_epoch,
      old.classes if classes is None else classes)


def _with_key(old, org, entry):
  others = [e for e in old.orgs.get(org, ()) if e['pem'] != entry['pem']]
  return _document(old, {**old.orgs, org: [*others, entry]}, old.min_epoch,
                   old.classes)


def _document(old, orgs, min_epoch, classes):
  value = {'number': old.number + 1, 'orgs': orgs, 'min_epoch': min_epoch,
           'classes': list(classes)}
  GRAMMAR(value, '')
  return canonical.dumps(value)


def install(shop, data: bytes) -> Trust:
  """Keeps a trust document in a store; returns it.

  Raises:
    Refused: E_SIG, E_TRUST; also where its number is not above the present one,
      or what it names is no public key.
  """
  new, note = parse(data, _root(shop)), shop.catalog.installed().get(FILE)
  present = installed.found(shop.path / 'trust' / FILE)
  try:
    old = load(shop) or FIRST
    last = old.number
  except Refused:
    if note is None or not installed.fault(FILE, note, present):
      raise
    # It was put back, or lost: the one that was noted may come again.
    old = _of(parse_body(note[2].encode()))
    last = old.number - (names.sha256(data) == note[1])
  if new.number <= last:
    raise Refused('E_TRUST', f'trust: expected a number above {last}, '
                  f'got {new.number}')
  had = {entry['pem'] for entries in old.orgs.values() for entry in entries}
  for org, entries in new.orgs.items():
    for entry in entries:
      if entry['pem'] not in had:  # by an earlier release, which took any
        _check_key(org, entry['pem'])
  installed.keep(shop, FILE, 'trust', new.number, data)
  return new


def _check_key(org, pem):
  try:
    if keys.normal(pem) == pem:
      return
    fault = 'expected a public key as state keygen writes it, got another text'
  except ValueError as error:
    fault = str(error)
  raise Refused('E_TRUST', f'trust: a key of {org or "no organisation"}: '
                f'{fault}')


def load(shop) -> Trust | None:
  """Returns the trust that is kept in a store; None where there is none.

  Raises:
    Refused: E_SIG; E_TRUST: no root key is pinned, or it is not the document
      that was installed last.
  """
  data, note = _present(shop)
  if data is None:
    return None
  known = parse(data, _root(shop))
  if note is not None and known.number <= note[0]:
    # Not so where a kill has left a newer one unnoted.
    if wrong := installed.fault(FILE, note, data):
      raise Refused('E_TRUST', wrong)
  return known


def believed(shop) -> Trust | None:
  """Returns the trust that `install` has verified; None where there is none.

  For what is the store's own no root key need be pinned again.

  Raises:
    Refused: E_TRUST: it is not the document that was installed last.
  """
  data, note = _present(shop)
  if data is None:
    return None
  known = _of(parse_body(envelope.open_document('trust', data)[0]))
  if note is None or not (wrong := installed.fault(FILE, note, data)):
    return known
  if known.number > note[0]:  # as above; nobody has verified it here
    return _of(parse_body(note[2].encode()))
  raise Refused('E_TRUST', wrong)


def _present(shop):
  """The document that is there, and what was noted; None for neither."""
  note = shop.catalog.installed().get(FILE)
  data = installed.found(shop.path / 'trust' / FILE)
  if data is None and note is not None:
    raise Refused('E_TRUST', installed.fault(FILE, note, None))
  return data, note


def oldest_epoch(shop) -> int:
  """Returns the oldest epoch that is trusted, 0 where nothing says."""
  known = believed(shop)
  return 0 if known is None else known.min_epoch


def _root(shop):
  if not shop.root:
    raise Refused('E_TRUST', 'expected a pinned root key, got none; open the '
                  'store with the public key of whoever decides on trust')
  try:
    return keys.normal(shop.root)
  except ValueError as error:
    raise Refused('E_TRUST', f'root: {error}') from None


def seen(shop, id: str) -> int:
  """Returns when the store first had an artifact; now where it has not."""
  came = shop.catalog.entered(id)
  return shop.catalog.clock() if came is None else came


def require(shop) -> Trust:
  """As `load`; raises E_UNSIGNED where there is none."""
  known = load(shop)
  if known is None:
    raise Refused('E_UNSIGNED', 'expected a trust document in this store, got '
                  'none, so that no signature counts')
  return known


def may_sign(shop, signer: keys.Signer, org: str, role: str):
  """Raises where the store's trust document does not let a key do something.

  What it signed for an organisation would count for nobody then. Where there is
  no such document, nobody here knows.

  Args:
    shop: `objects.Store`.
    signer: the key.
    org: the organisation.
    role: of `ROLES`.

  Raises:
    Refused: E_TRUST.
  """
  known = believed(shop)
  if known is not None:
    known.key(signer.name.removeprefix('key:'), org, role, shop.catalog.clock())


def signed_revocations(known: Trust, org: str, data: bytes, *,
                       now: int) -> dict:
  """Returns a signed revocation list of an organisation.

  Raises:
    Refused: E_SIG, E_TRUST.
  """
  payload, signature, hint = envelope.open_document('crl', data)
  pem = known.key(hint, org, 'revoke', now)
  keys.check(pem, envelope.media('crl'), payload, signature)
  return revoke.parse(payload)


def vouch(shop, folder, found: layout.Walk, data: bytes, about: dict) -> str:
  """V4 and V5: returns 'mac', or 'key:' and the hint of the key that signed.

  Args:
    shop: `objects.Store`.
    folder: the artifact.
    found: what lies in it.
    data: bytes of its manifest.
    about: the same, parsed.

  Raises:
    Refused: E_UNSIGNED: nobody is trusted here; E_SIG; E_TRUST.
  """
  if found.voucher == layout.MAC:
    return verify.vouch(folder, found, data, shop.secret)
  return signed(require(shop), folder, data, about,
                seen(shop, manifest.artifact_id(data)))


def signed(known: Trust, folder, data: bytes, about: dict,
           since: int) -> str:
  """As `vouch`, of a signed artifact, by a trust document at hand.

  When it was made is its producer's word, also of one whose key was stolen: so
  the key must be valid as well when the store first had it.

  Args:
    known: the trust document.
    folder, data, about: see `vouch`.
    since: unix seconds when the store first had it; now where there is none.
  """
  payload, signature, hint = verify.bundle(folder, data, about)
  pem = counts(known, hint, about, since)
  keys.check(pem, envelope.STATEMENT, payload, signature)
  if about['provenance']['producer'] != f'key:{hint}':
    raise Refused('E_TRUST', f'provenance.producer: expected key:{hint}, got '
                  f'{about["provenance"]["producer"]}')
  return f'key:{hint}'


def counts(known: Trust, hint: str, about: dict, since: int) -> str:
  """V5 of what a key has signed: returns the PEM of the key.

  Args:
    known: the trust document.
    hint: of the key.
    about: the manifest, or `foreign.FIELDS` of it.
    since: see `signed`.

  Raises:
    Refused: E_TRUST.
  """
  org = about['governance']['org']
  pem = known.key(hint, org, 'mint', about['created'])
  known.key(hint, org, 'mint', max(since, about['created']))
  if about['governance']['class'] not in known.classes:
    raise Refused('E_TRUST', f'expected a class of {known.classes}, got '
                  f'{about["governance"]["class"]}')
  return pem
