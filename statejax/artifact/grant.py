"""Short-lived grants: what an owner allows somebody of another organisation.

A grant is a signed document that names one artifact, or the root of a family,
the rights, the holder's public key, an end within 24 hours and how often it may
be used. It is for what was exported from the artifact as well, which is the
same. Whoever shows it must sign a nonce of the store with the holder's key, so
that a copy is worth nothing; it cannot be passed on. It may carry the key of a
sealed artifact and that of its exports, sealed to the holder. Needs the extra
[sign].
"""

import base64
import dataclasses
from secrets import token_hex

from statejax.artifact import (
  access,
  canonical,
  envelope,
  grammar,
  keys,
  layout,
  manifest,
  sealing,
  trust,
)
from statejax.artifact.access import Principal
from statejax.artifact.desk import examine
from statejax.artifact.outcome import Refused

LONGEST = 24 * 3600
ANSWER = 300  # seconds within which a nonce must be answered
SCOPES = ('id', 'root')
CHALLENGE = 'application/vnd.statejax.challenge'
_SECRET = grammar.Text(1024, '[A-Za-z0-9+/]+=*', name='base64')
GRAMMAR = grammar.Record({
    'id': manifest.X16, 'target': manifest.ID, 'org': manifest.text(128),
    'scope': grammar.OneOf(SCOPES),
    'rights': grammar.Items(grammar.OneOf(access.GRANTABLE), 4, 1),
    'holder': trust.PEM, 'not_before': manifest.U, 'not_after': manifest.U,
    'max_uses': grammar.Int(1, 10 ** 6),
    'key': _SECRET, 'exports': _SECRET})


def issue(shop, key: str, owner: Principal, holder: str, rights,
          signer: keys.Signer, *, seconds: int = LONGEST,
          max_uses: int = 1, scope: str = 'id') -> bytes:
  """Returns a signed grant; what it names stays here until it ends.

  Args:
    shop: `objects.Store`.
    key: id, beginning of one, or name.
    owner: of the artifact.
    holder: PEM of the public key of whoever may use it.
    rights: of `access.GRANTABLE`.
    signer: a key of the organisation that may grant.
    seconds: until it ends, at most a day.
    max_uses: how often it may be used, see `use`.
    scope: 'id', or 'root': also for all that stems from the root of its family,
      which must be here and the owner's.

  Raises:
    Refused: E_ACL: not the owner; E_TRUST: nobody here trusts the key to grant.
    ValueError: longer than a day, no such right or scope, or the holder's is no
      public key.
  """
  holder = keys.normal(holder)
  if not 0 < seconds <= LONGEST:
    raise ValueError(f'seconds: expected 1..{LONGEST}, got {seconds}.')
  # Which only its owner may.
  found = examine(shop, key, owner, 'revoke', action='grant')
  if scope == 'root' and found.about['provenance']['root'] != 'self':
    found = examine(shop, found.about['provenance']['root'], owner, 'revoke',
                    action='grant')
  now, about = shop.catalog.clock(), found.about
  with shop.catalog.refusals(str(owner), 'grant', found.id):
    trust.may_sign(shop, signer, about['governance']['org'], 'grant')
    key, exports = '', ''
    if about['sealed'] != 'none':
      key = _sealed(holder, sealing.data_key(shop, found.id, about))
      exports = _sealed(holder, (
          sealing.seed if scope == 'id' else sealing.family_seed)(
              shop, found.id, about))
  body = {'id': token_hex(16), 'target': found.id, 'scope': scope,
          'org': about['governance']['org'], 'rights': sorted(rights),
          'holder': holder, 'not_before': now, 'not_after': now + seconds,
          'max_uses': max_uses, 'key': key, 'exports': exports}
  GRAMMAR(body, '')
  with shop.catalog.transaction():
    shop.catalog.audit(str(owner), 'grant', found.id, body['id'])
    shop.catalog.pin(found.id, f'grant {body["id"]}', now + seconds + 1)
  return signer.document('grant', canonical.dumps(body))


def _sealed(holder, secret):
  return base64.b64encode(keys.encrypt(holder, secret)).decode()


def challenge(shop) -> str:
  """Returns a nonce of the store, which one answer takes, within `ANSWER`."""
  nonce = token_hex(16)
  shop.catalog.ask(nonce, ANSWER)
  return nonce


def prove(private: bytes, nonce: str, data: bytes) -> bytes:
  """Returns the holder's answer to a nonce, for one grant."""
  return keys.sign(private, CHALLENGE, _asked(nonce, data))


def present(shop, data: bytes, about: dict, id: str, who: Principal,
            nonce: str, proof: bytes) -> Principal:
  """Returns the principal with what a grant gives, or with why it gives none.

  Counts no use: what is done by it does, see `use`. Of a grant that is used up
  the holder, and nobody else, hears that it is.

  Args:
    shop: `objects.Store`.
    data: the grant.
    about: the artifact's manifest.
    id: its name.
    who: whoever shows it.
    nonce: of `challenge`; taken by this, also where the proof is wrong.
    proof: of `prove`.
  """
  try:
    if not shop.catalog.answered(nonce):
      raise Refused('E_GRANT', 'nonce: expected one that this store has asked '
                    f'for within {ANSWER} s and nobody has answered yet, got '
                    'another one')
    body = read(shop, data, about, id)
    keys.check(body['holder'], CHALLENGE, _asked(nonce, data), proof)
  except Refused as error:
    return dataclasses.replace(who, granted=frozenset(), granted_for='',
                               grant_fault=error.detail, uses=('', 0))
  over = shop.catalog.grant_uses(body['id']) >= body['max_uses']
  return dataclasses.replace(
      who, granted=frozenset(() if over else body['rights']), granted_for=id,
      grant_fault=_used_up(body['max_uses']) if over else '',
      uses=(body['id'], body['max_uses']),
      times=(body['not_before'], body['not_after']))


def use(shop, principal: Principal, id: str):
  """Counts a use of the grant by which somebody got an artifact, if by one.

  A resume, a fork or an export that has come to its end is a use; to look at an
  artifact, to bring it here and to be refused is none.

  Args:
    shop: `objects.Store`.
    principal: who got it.
    id: of the artifact.

  Raises:
    Refused: E_GRANT: it was used up since it was shown.
  """
  grant, most = principal.uses
  if not access.lasts(principal, shop.catalog.clock()):
    return  # it has given nothing; what is allowed is so without it
  if principal.granted and principal.granted_for == id and grant and (
      not shop.catalog.use_grant(grant, most, str(principal))):
    raise Refused('E_GRANT', _used_up(most))


def _used_up(most):
  return f'it was used {most} times'


def read(shop, data: bytes, about: dict, id: str) -> dict:
  """Returns a grant, after all but its holder and its uses were checked.

  Raises:
    Refused: E_SIG, E_TRUST, E_GRANT.
  """
  payload, signature, hint = envelope.open_document('grant', data)
  now, org = shop.catalog.clock(), about['governance']['org']
  pem = trust.require(shop).key(hint, org, 'grant', now)
  keys.check(pem, envelope.media('grant'), payload, signature)
  body = parse(payload)
  try:
    fault = keys.normal(body['holder']) != body['holder'] and 'another text'
  except ValueError as error:
    fault = str(error)
  if fault:
    raise Refused('E_GRANT', 'holder: expected a public key as state keygen '
                  f'writes it, got {fault}')
  if body['org'] != org or not _fits(body, about, id):
    raise Refused('E_GRANT', f'expected a grant for {id} of {org}, got one for '
                  f'{body["target"]} of {body["org"]}')
  if not body['not_before'] <= now <= body['not_after'] or (
      body['not_after'] - body['not_before'] > LONGEST):
    raise Refused('E_GRANT', f'expected a time of {body["not_before"]}..'
                  f'{body["not_after"]}, at most a day, got {now}')
  return body


def _fits(body, about, id):
  """Whether a grant is for an artifact: it, what it was exported from, or with
  the scope 'root' their root.
  """
  source = about['provenance']
  names = {id, *(parent['id'] for parent in source['parents']
                 if parent['role'] == 'exported')}
  return body['target'] in names or (
      body['scope'] == 'root' and body['target'] == source['root'])


def describe(shop, data: bytes) -> list[str]:
  """Returns in lines what a grant says, and whether it counts here and now.

  Args:
    shop: `objects.Store`.
    data: the grant.

  Raises:
    Refused: E_SIG, E_GRANT: it is no grant at all.
  """
  payload, _, hint = envelope.open_document('grant', data)
  body = parse(payload)
  try:
    read(shop, data, {'governance': {'org': body['org']}, 'provenance': {
        'parents': [], 'root': 'self'}}, body['target'])
    counts = 'yes'
  except Refused as error:
    counts = f'no, {error}'
  return [
      body['target'] + (
          ' and all that stems from it' if body['scope'] == 'root' else ''),
      f'  grant: {body["id"]} of {body["org"]}, signed by key {hint[:16]}',
      f'  holder: key {keys.hint(body["holder"])[:16]}',
      f'  rights: {", ".join(body["rights"])}; {body["max_uses"]} uses',
      f'  time: {body["not_before"]} to {body["not_after"]}',
      f'  brings the key of a sealed artifact: '
      f'{"yes" if body["key"] else "no"}',
      f'  does it count here: {counts}']


def parse(payload: bytes) -> dict:
  """Returns what a grant says, of which nothing was checked but its form.

  Raises:
    Refused: E_GRANT.
  """
  try:
    body = canonical.loads(payload)
    GRAMMAR(body, '')
    for name in ('key', 'exports'):
      base64.b64decode(body[name], validate=True)
  except (ValueError, RecursionError) as error:
    raise Refused('E_GRANT', f'grant: {error}') from None
  return body


def keep_key(shop, private: bytes, body: dict, about: dict, id: str, folder):
  """Keeps the key of a sealed artifact, which a grant has brought.

  Args:
    shop: `objects.Store` of the holder.
    private: the holder's key.
    body: of `read`.
    about: manifest of the artifact.
    id: its name.
    folder: the artifact, its files checked.

  Raises:
    Refused: E_SEALED: it does not open the artifact, so that none is kept.
  """
  def opened(name):
    return keys.decrypt(private, base64.b64decode(body[name]))
  if body['key'] and body['target'] == id:
    key = opened('key')
  elif body['exports']:
    seed = opened('exports')
    if body['scope'] == 'root':
      seed = sealing.member_seed(seed, id, about)
    key = sealing.export_key(seed, about['nonce'])
  else:
    return
  sealing.unseal(key, about['nonce'], manifest.PLAIN,
                 layout.read(folder, manifest.PLAIN))
  sealing.keep_granted(shop, id, key)


def _asked(nonce, data):
  return f'{nonce} '.encode() + data
