"""Revoking by family, key, organisation, model, persona, workflow, epoch."""

import bare
import pytest

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

import example
import test_trust
from test_trust import ALICE, code_of, private, signer  # noqa: F401

from statejax.artifact import (
  canonical,
  desk,
  keys,
  revoke,
  revoked,
  transfer,
  trust,
  withdraw,
)
from statejax.artifact.access import Principal

BOB, ERIN = Principal('bob', 'acme'), Principal('erin', 'globex')
K2 = example.K[:-4] + 'beef'
OLD, NEW = 'sha256:' + '1' * 64, 'sha256:' + '2' * 64


@pytest.fixture
def shop(tmp_path, private):  # noqa: F811
  return test_trust.make(tmp_path, private)


class Family:
  """Artifacts of no model: of alice a, b of a, c of b, and d; e of bob's; f of
  another organisation.
  """

  def __init__(self, shop, scope='self'):
    self.shop, self.number = shop, 0
    self.a = self.make(scope=scope, params=OLD, workflow='old', epoch=3,
                       persona=K2)
    self.b = self.make(self.a)
    self.c = self.make(self.b, root=self.a)
    self.d = self.make(params=OLD, workflow='old', epoch=3, persona=K2)
    self.e = self.make(params=OLD, workflow='old', epoch=3, persona=K2,
                       owner='bob')
    self.f = self.make(owner='erin', org='globex', workflow='theirs')

  def make(self, parent='', *, root='', owner='alice', org='acme', params=NEW,
           workflow='new', epoch=9, persona='', scope='self'):
    self.number += 1
    source = {} if not parent else {'provenance': {
        'root': root or parent, 'depth': 2 if root else 1,
        'parents': [{'id': parent, 'role': 'state'}]}}
    return bare.mint(
        self.shop, self.number, policy={'epoch': epoch},
        model={'params': params}, governance={
            'owner': owner, 'org': org, 'workflow': workflow,
            'persona': persona, 'revoke_scope': scope}, **(
                {'parents': ()} | source)).id

  def gone(self):
    """Letters of those that are revoked now."""
    crl, found = self.shop.catalog.revocations('acme'), ''
    for letter in 'abcdef':
      id = getattr(self, letter)
      about = desk.examine(self.shop, id, Principal(
          'erin' if letter == 'f' else 'bob' if letter == 'e' else 'alice',
          'globex' if letter == 'f' else 'acme'), 'inspect').about
      found += letter if revoke.match(crl, about, id) else ''
    return found


VALUES = {'params': OLD, 'workflow': 'old', 'epoch': '4', 'persona': K2}


@pytest.mark.parametrize('by, what, gone', [
    ('artifact', 'b', 'b'), ('descendants', 'b', 'bc'),
    ('family', 'b', 'abc'), ('family', 'a', 'abc'), ('artifact', 'a', 'a')])
def test_named(shop, by, what, gone):
  family = Family(shop)
  assert code_of(withdraw.withdraw, shop, getattr(family, what), BOB, by) == (
      'E_ACL')
  assert family.gone() == ''
  withdraw.withdraw(shop, getattr(family, what), ALICE, by)
  assert family.gone() == gone
  # A family also has what will come.
  more = family.make(family.c, root=family.a)
  about = desk.examine(shop, more, ALICE, 'inspect').about
  assert bool(revoke.match(shop.catalog.revocations('acme'), about, more)) == (
      by == 'family')


@pytest.mark.parametrize('scope', ['self', 'descendants'])
def test_what_was_exported_before(shop, scope):
  """Elsewhere it has a name of its own, and the list names the one of here."""
  family = Family(shop, scope)
  away = bare.mint(shop, 99, provenance={
      'root': family.a, 'depth': 1, 'how': 'exported',
      'parents': [{'id': family.a, 'role': 'exported'}]}, parents=()).id
  child = family.make(family.a)
  withdraw.withdraw(shop, family.a, ALICE)
  for id, gone in ((away, True), (child, scope == 'descendants'),
                   (family.d, False)):
    about = desk.examine(shop, id, ALICE, 'inspect').about
    found = revoke.match(shop.catalog.revocations('acme'), about, id)
    assert bool(found) == gone, id


def exported(number, parent, root):
  """Manifest and id of what was exported, which another store alone has."""
  return bare.about(number, provenance={
      'root': root, 'depth': 1, 'how': 'exported',
      'parents': [{'id': parent, 'role': 'exported'}]}), f'sj1-{number:064x}'


def test_a_persona_follows_into_exports(shop, signer):  # noqa: F811
  """There it stands under the key of the file."""
  family = Family(shop)
  withdraw.withdraw(shop, K2, ALICE, 'persona', signer=signer)
  shop.catalog.bury(family.d)
  for number, (id, gone) in enumerate(
      ((family.a, True), (family.d, True), (family.f, False))):
    about, away = exported(90 + number, id, id)
    assert bool(revoke.match({'entries': revoked.published(shop, 'acme')},
                             about, away)) == gone


def test_a_family_of_several_owners(shop):
  """Its root's owner decides; where that is gone, whoever has all of it."""
  family = Family(shop)
  mine = family.make(family.a, owner='bob')
  assert code_of(withdraw.withdraw, shop, mine, BOB, 'family') == 'E_ACL'
  desk.delete(shop, family.a, ALICE)
  assert code_of(withdraw.withdraw, shop, mine, BOB, 'family') == 'E_ACL'
  for id in (family.b, family.c):
    desk.delete(shop, id, ALICE)
  assert withdraw.withdraw(shop, mine, BOB, 'family') == [('root', family.a)]


@pytest.mark.parametrize('by, scope, gone', [
    *((by, 'self', 'ad') for by in VALUES), ('params', 'descendants', 'abcd')])
def test_ones_own(shop, by, scope, gone):
  """Without a key that may revoke: what is one's own, here and now."""
  family = Family(shop, scope)
  entries = withdraw.withdraw(shop, VALUES[by], ALICE, by)
  assert {kind for kind, _ in entries} == {'artifact', *(
      ('root',) if scope == 'descendants' else ())}
  assert family.gone() == gone
  assert code_of(withdraw.withdraw, shop, VALUES[by], ERIN, by) == 'E_ACL'
  row = shop.catalog.rows()[-1]
  assert (row['principal'], row['action'], row['code']) == (
      str(ERIN), 'revoke', 'E_ACL') and row['id'].startswith(by)


@pytest.mark.parametrize('by, scope, gone', [
    *((by, 'self', 'ade') for by in VALUES),
    ('params', 'descendants', 'abcde')])
def test_by_a_key_that_may(shop, signer, private, by, scope,  # noqa: F811
                           gone):
  family, start = Family(shop, scope), shop.catalog.head().seq
  other = keys.Signer(private['other'])
  assert code_of(withdraw.withdraw, shop, VALUES[by], ALICE, by,
                 signer=other) == 'E_TRUST'
  assert code_of(withdraw.withdraw, shop, VALUES[by], ERIN, by,
                 signer=signer) == 'E_TRUST'
  entries = withdraw.withdraw(shop, VALUES[by], BOB, by, signer=signer)
  assert entries[0] == (by, VALUES[by]) and family.gone() == gone
  # A row for each entry, and one for each refusal.
  rows = shop.catalog.rows()[start:start + 2 + len(entries)]
  assert [row['code'] for row in rows[:2]] == 2 * ['E_TRUST']
  assert [(row['principal'], row['action'], row['outcome'], row['id'])
          for row in rows[2:]] == [
              (str(BOB), 'revoked', f'{kind} of "acme"', value)
              for kind, value in entries]
  # Also what comes later.
  more = family.make(params=OLD, workflow='old', epoch=3, persona=K2)
  about = desk.examine(shop, more, ALICE, 'inspect').about
  assert revoke.match(shop.catalog.revocations('acme'), about, more)
  # Not what is another organisation's, now or later.
  for _ in range(2):
    theirs = family.make(owner='erin', org='globex', params=OLD, epoch=3,
                         workflow='old', persona=K2)
    assert desk.obstacle(shop, shop.place(theirs), ERIN) is None
    withdraw.withdraw(shop, VALUES[by], BOB, by, signer=signer)


def test_an_organisation(shop, signer):  # noqa: F811
  family = Family(shop)
  assert code_of(withdraw.withdraw, shop, 'globex', ALICE, 'org',
                 signer=signer) == 'E_TRUST'
  withdraw.withdraw(shop, 'acme', ALICE, 'org', signer=signer)
  assert family.gone() == 'abcde'


def test_a_key_since_some_time(shop, signer, private):  # noqa: F811
  bad = keys.Signer(private['other'])
  root = keys.Signer(private['root'])
  trust.install(shop, root.document('trust', trust.extended(
      trust.load(shop), keys.public(bad.private), 'acme')))
  made = 1_700_000_000  # when all artifacts of the example were
  id = bare.mint(shop, 1, vouch=bad, provenance={'producer': bad.name}).id
  about = desk.examine(shop, id, ALICE, 'inspect').about
  def hit():
    return bool(revoke.match(shop.catalog.revocations('acme'), about, id))
  shop.catalog.clock.now += 100
  assert withdraw.withdraw(shop, bad.name, ALICE, 'key', signer=signer,
                           since=made + 1) == [('key', bad.name)]
  assert not hit()
  # An earlier time counts, a later one does not.
  withdraw.withdraw(shop, bad.name, ALICE, 'key', signer=signer, since=made)
  assert hit()
  withdraw.withdraw(shop, bad.name, ALICE, 'key', signer=signer)
  entries = shop.catalog.revocations('acme')['entries']
  assert hit() and [(e['kind'], e['value'], e['from']) for e in entries] == [
      (kind, value, made) for kind, value in (
          ('key', bad.name), ('artifact', id), ('root', id))]
  # Also what was exported of it, or of what was made of it: signed by others.
  child = bare.mint(shop, 2, provenance={'root': id, 'depth': 1, 'parents': [
      {'id': id, 'role': 'state'}]}, parents=()).id
  for number, parent in enumerate((id, child)):
    about, away = exported(90 + number, parent, id)
    assert revoke.match({'entries': revoked.published(shop, 'acme')}, about,
                        away)


def test_what_is_not_said_rightly(shop, signer):  # noqa: F811
  for by, what in (('planet', 'x'), ('key', 'local'), ('params', 'abc'),
                   ('epoch', '-1'), ('epoch', ''), ('workflow', ''),
                   ('persona', 'a pirate'), ('org', '')):
    with pytest.raises(ValueError, match='expected') as error:
      withdraw.withdraw(shop, what, ALICE, by)
    assert not hasattr(error.value, 'code')
  with pytest.raises(ValueError, match='since: expected none'):
    withdraw.withdraw(shop, 'x', ALICE, 'workflow', since=5)
  for by in withdraw.NAMED:
    with pytest.raises(ValueError, match='signer: expected none'):
      withdraw.withdraw(shop, 'x', ALICE, by, signer=signer)
  assert shop.catalog.revocations('acme') is None


# The trust document.


def test_a_retired_key(tmp_path, private, signer):  # noqa: F811
  shop = test_trust.make(tmp_path, private)
  id = bare.mint(shop, 1, vouch=signer, provenance={
      'producer': signer.name}).id
  pem, root = keys.public(private['acme']), keys.Signer(private['root'])
  assert desk.examine(shop, id, ALICE, 'inspect').vouched == signer.name
  for org, key in (('globex', pem), ('acme', keys.public(private['other']))):
    with pytest.raises(ValueError, match='expected one that is trusted'):
      trust.retired(trust.load(shop), key, org)
  trust.install(shop, root.document('trust', trust.retired(
      trust.load(shop), pem, 'acme')))
  known = trust.load(shop)
  assert known.number == 2 and [e['status'] for e in known.orgs['acme']] == [
      'retired']
  assert code_of(desk.examine, shop, id, ALICE, 'fork') == 'E_TRUST'
  # Its owner may still look at it.
  found = desk.examine(shop, id, ALICE, 'inspect')
  assert not found.vouched and 'got retired' in found.why
  assert code_of(withdraw.withdraw, shop, 'new', ALICE, 'workflow',
                 signer=signer) == 'E_TRUST'
  # The key that follows it goes on with the lists.
  other = keys.public(private['other'])
  trust.install(shop, root.document('trust', trust.extended(
      trust.load(shop), other, 'acme')))
  revoked.install(shop, 'acme', transfer.issue_revocations(
      shop, keys.Signer(private['other'])))
  known = trust.load(shop)
  # Trusted again, it counts again; the rest of the document is as it was.
  trust.install(shop, root.document('trust', trust.extended(
      known, pem, 'acme', may=['mint'])))
  assert desk.examine(shop, id, ALICE, 'inspect').vouched == signer.name


def test_rules_go_forward(shop, private):  # noqa: F811
  def body(**changes):
    return trust.parse_body(trust.ruled(trust.load(shop), **changes))
  assert body(min_epoch=7)['min_epoch'] == 7
  assert body(classes=['public']) == {
      'number': 2, 'min_epoch': 0, 'classes': ['public'],
      'orgs': trust.load(shop).orgs}
  first = trust.parse_body(trust.ruled(None, min_epoch=1))
  assert (first['number'], first['orgs']) == (1, {})
  root = keys.Signer(private['root'])
  trust.install(shop, root.document('trust', trust.ruled(
      trust.load(shop), min_epoch=7)))
  with pytest.raises(ValueError, match='min_epoch: expected at least 7'):
    body(min_epoch=6)
  with pytest.raises(ValueError, match='classes'):
    body(classes=['secret'])
  # A key more leaves the rules.
  more = trust.parse_body(trust.extended(
      trust.load(shop), keys.public(private['other']), 'globex'))
  assert (more['number'], more['min_epoch']) == (3, 7)


def test_a_list_counts_for_own_artifacts_too(shop, signer):  # noqa: F811
  """One's own child of what its organisation has revoked elsewhere."""
  family = Family(shop)
  body = revoke.extended(None, [('root', family.a)], now=shop.catalog.clock())
  revoked.install(shop, 'acme', signer.document(
      'crl', canonical.dumps(body)))
  for id in (family.a, family.b, family.c):
    assert desk.obstacle(shop, shop.place(id), ALICE).code == 'E_REVOKED'
    assert code_of(desk.examine, shop, id, ALICE, 'fork') == 'E_REVOKED'
    assert desk.examine(shop, id, ALICE, 'inspect')
  assert desk.obstacle(shop, shop.place(family.d), ALICE) is None
  # Old, it warns.
  shop.catalog.clock.now += 8 * 86400
  about = desk.examine(shop, family.d, ALICE, 'inspect').about
  assert revoked.valid(shop, family.d, about, 'mac') == ('W_CRL',)
