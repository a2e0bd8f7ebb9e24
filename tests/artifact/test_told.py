"""The store's own lists: whose they are, how large, and what binds them.

Artifacts are of no model: what is asked is what a store says of them.
"""

import bare
import pytest

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

import test_trust
from test_installed import add, child, listed, parent_of, says
from test_trust import ALICE, code_of, private, signer  # noqa: F401

from statejax.artifact import (
  canonical,
  catalog,
  collect,
  desk,
  envelope,
  installed,
  keys,
  revoke,
  revoked,
  told,
  transfer,
  trust,
  withdraw,
)
from statejax.artifact.access import Principal

DAVE = Principal('dave', 'globex')


@pytest.fixture
def make(tmp_path, private):  # noqa: F811
  """Stores that trust a key of each of two organisations."""
  def made(name):
    shop = test_trust.make(tmp_path, private, name=name)
    trust.install(shop, keys.Signer(private['root']).document(
        'trust', trust.extended(trust.load(shop), keys.public(
            private['other']), 'globex')))
    return shop
  return made


def published(shop, signer, org=None):  # noqa: F811
  """What the list says that a store signs: {(kind, value)}."""
  data = transfer.issue_revocations(shop, signer, org)
  return {(e['kind'], e['value']) for e in revoke.parse(
      envelope.open_document('crl', data)[0])['entries']}


# How large.


def test_a_family_is_one_entry(make, signer):  # noqa: F811
  shop = make('one')
  id, other = add(shop, 1, scope='descendants'), add(shop, 2)
  below = child(shop, parent_of(shop, id), 3)
  many = 30_000  # more than a list has room for
  with shop.catalog.transaction():
    shop.catalog._base.executemany(
        'insert into kin values (?, ?)',
        ((f'sj1-{i:064x}', below) for i in range(many)))
  entries = {('artifact', id), ('root', id)}
  assert {*desk.withdraw(shop, id, ALICE)} == entries
  assert says(shop, below) == 'E_REVOKED' and says(shop, other) == ''
  assert published(shop, signer) == entries


def test_the_closure_of_what_is_no_root(make, signer):  # noqa: F811
  """Elsewhere nobody knows of what lies in between."""
  shop = make('one')
  ids = [add(shop, 1)]
  for i in range(3):
    ids.append(child(shop, parent_of(shop, ids[-1]), 2 + i))
  withdraw.withdraw(shop, ids[1], ALICE, 'descendants')
  assert [says(shop, id) for id in ids] == ['', *3 * ['E_REVOKED']]
  assert published(shop, signer) == {
      ('root', ids[1]), *(('artifact', id) for id in ids[1:])}


@pytest.mark.parametrize('by', ['artifact', 'descendants'])
def test_too_many(make, signer, monkeypatch, by):  # noqa: F811
  """Refused before anything is written; all goes on as before."""
  shop = make('one')
  first = add(shop, 1)
  id, other = child(shop, parent_of(shop, first), 2), add(shop, 3)
  withdraw.withdraw(shop, other, ALICE)
  crl, told_ = shop.catalog.revocations('acme'), published(shop, signer)
  crl = shop.catalog.revocations('acme')
  for i in range(9):
    shop.catalog._all('insert into kin values (?, ?)', (f'sj1-{i:064x}', id))
  monkeypatch.setattr(revoke, 'MAX_BYTES', 260 if by == 'artifact' else 900)
  before = shop.catalog.head()
  assert code_of(revoked.withdraw, shop, [('artifact', id)] if (
      by == 'artifact') else [('root', id)], 'alice', org='acme') == 'E_LIMIT'
  assert shop.catalog.head() == before
  assert shop.catalog.revocations('acme') == crl
  assert says(shop, id) == '' and says(shop, other) == 'E_REVOKED'
  assert published(shop, signer) == told_ and collect.check(shop) == []


def test_what_is_written_is_read(make, signer):  # noqa: F811
  """Up to the bound, here and elsewhere."""
  shop = make('here')
  size = len(canonical.dumps({'from': 1_700_000_000, 'kind': 'artifact',
                              'value': 'sj1-' + 64 * '0'})) + 1
  most = revoke.MAX_BYTES // size - 1
  body = {'number': 2, 'this_update': 5, 'next_update': 5, 'entries': [
      {'from': 1_700_000_000, 'kind': 'artifact', 'value': f'sj1-{i:064x}'}
      for i in range(most)]}
  shop.catalog.keep_revocations(body, 'acme')
  assert shop.catalog.revocations('acme') == body
  data = signer.document('crl', canonical.dumps(body))
  assert len(trust.signed_revocations(trust.load(shop), 'acme', data, now=5)[
      'entries']) == most > 20_000
  with pytest.raises(ValueError, match='E_LIMIT.*at most 31'):
    revoke.check(body | {'entries': body['entries'] + body['entries'][:9]})


# Whose.


@pytest.mark.parametrize('by, value', [('workflow', 'support'),
                                       ('epoch', '7')])
def test_nobody_revokes_for_another_organisation(
    make, signer, private, by, value):  # noqa: F811
  shop, far = make('one'), make('far')
  elsewhere = add(far, 1)
  withdraw.withdraw(shop, value, DAVE, by, signer=keys.Signer(private['other']))
  mine = add(shop, 2)
  theirs = bare.mint(shop, 3, governance={'owner': 'dave', 'org': 'globex'}).id
  assert says(shop, mine) == ''
  assert desk.obstacle(shop, shop.place(theirs), DAVE).code == 'E_REVOKED'
  # Nor in another store, nor do others see what one has revoked.
  assert published(shop, signer) == set()
  assert published(shop, keys.Signer(private['other'])) == {(by, value)}
  revoked.install(far, 'acme', transfer.issue_revocations(shop, signer))
  assert says(far, elsewhere) == ''
  assert far.secrets.find(sealing_name(far, elsewhere))


def sealing_name(shop, id):
  return parent_of(shop, id).about['seal']['kek']


def test_everybodys(make, signer):  # noqa: F811
  """What the host decides, and what a store has of an earlier release."""
  shop = make('one')
  id = add(shop, 1)
  body = revoke.extended(None, [('workflow', 'support')],
                         now=shop.catalog.clock())
  with shop.catalog.transaction():  # as it was written then
    shop.catalog._all('insert into crl values (7, ?)', (
        canonical.dumps(body | {'number': 7}).decode(),))
    shop.catalog.audit('alice', 'revoked', 'support', 'workflow')
  assert says(shop, id) == 'E_REVOKED' and collect.check(shop) == []
  assert published(shop, signer) == {('workflow', 'support')}
  revoked.withdraw(shop, [('epoch', '1')], 'the host', org=None)
  assert published(shop, signer) == {('workflow', 'support'), ('epoch', '1')}
  data = transfer.issue_revocations(shop, signer)
  assert revoke.parse(envelope.open_document('crl', data)[0])['number'] > 7


def test_whose_list_a_key_signs(make, signer, private):  # noqa: F811
  shop = make('one')
  stranger, root = keys.Signer(keys.generate()), keys.Signer(private['root'])
  for org in (None, 'acme'):
    assert code_of(transfer.issue_revocations, shop, stranger, org) == 'E_TRUST'
  trust.install(shop, root.document('trust', trust.extended(
      trust.load(shop), keys.public(private['acme']), 'globex')))
  with pytest.raises(ValueError, match='--org: expected the organisation'):
    transfer.issue_revocations(shop, signer)
  revoked.withdraw(shop, [('epoch', '1')], 'dave of globex', org='globex')
  assert published(shop, signer, 'acme') == set()
  assert published(shop, signer, 'globex') == {('epoch', '1')}


# What binds them.


@pytest.mark.parametrize('insert', [
    'insert into crl values (9, ?)',
    "insert into listed values ('acme', 9, ?)"])
def test_a_list_that_nobody_has_kept(make, insert):
  """It revokes nothing, and no key is destroyed for it."""
  shop = make('one')
  id = add(shop, 1)
  kept = shop.secrets.names('')
  shop.catalog._all(insert, (canonical.dumps(revoke.extended(
      None, [('org', 'acme')], now=shop.catalog.clock()) | {
          'number': 9}).decode(),))
  assert says(shop, id) == 'E_IO'
  assert code_of(collect.collect, shop) == 'E_IO'
  assert any('expected one that the log names' in text
             for text in collect.check(shop))
  assert len(told.mend(shop)) == 1 and collect.check(shop) == []
  assert says(shop, id) == '' and shop.secrets.names('') == kept


@pytest.mark.parametrize('change', [
    'delete from listed', "update listed set body = '{'",
    'update listed set body = replace(body, "sj1-", "sj2-")'])
def test_a_list_that_is_lost(make, signer, change):  # noqa: F811
  shop = make('one')
  id, other = add(shop, 1), add(shop, 2)
  desk.withdraw(shop, id, ALICE)
  withdraw.withdraw(shop, signer.name, ALICE, 'key', signer=signer, since=99)
  crl = shop.catalog.revocations('acme')
  old = shop.catalog._base.execute('select * from listed').fetchall()
  desk.withdraw(shop, other, ALICE)
  assert collect.check(shop) == []
  for damage in (change, 'put back'):
    if damage == 'put back':
      shop.catalog._base.execute('replace into listed values (?, ?, ?)', *old)
    else:
      shop.catalog._base.execute(damage)
    assert says(shop, other) == 'E_IO'
    assert code_of(desk.withdraw, shop, other, ALICE) == 'E_IO'
    wrong = collect.check(shop)
    assert 'the one that the log names last' in wrong[0] or (
        'expected a list' in wrong[0])
    assert len(told.mend(shop)) == 1 and told.mend(shop) == []
    assert says(shop, id) == says(shop, other) == 'E_REVOKED'
    assert collect.check(shop) == []
  new = shop.catalog.revocations('acme')
  assert revoke.covers(new, crl) and new['number'] > crl['number']


def test_nothing_is_made_of_a_changed_log(make):
  shop = make('one')
  desk.withdraw(shop, add(shop, 1), ALICE)
  shop.catalog._base.execute('delete from listed')
  shop.catalog._base.execute("update audit set hash = 'x' where seq = 2")
  assert told.mend(shop) == [] and 'audit row 2' in collect.check(shop)[0]


def test_an_entry_of_the_log_that_no_list_has(make):
  """As of an earlier release, whose log does not name the list."""
  shop = make('one')
  id = add(shop, 1)
  shop.catalog.audit('alice of acme', 'revoked', id, 'artifact')
  wrong, = collect.check(shop)
  assert f'expected artifact {id}, revoked by alice of acme in row' in wrong
  told.mend(shop)
  assert collect.check(shop) == [] and says(shop, id) == 'E_REVOKED'


def test_uses_of_a_grant_that_are_lost(make):
  shop = make('one')
  assert shop.catalog.use_grant('g', 2)
  old = shop.catalog._base.execute('select * from grant_seen').fetchall()
  assert shop.catalog.use_grant('g', 2) and collect.check(shop) == []
  for change, *values in (('delete from grant_seen',),
                          ('replace into grant_seen values (?, ?)', *old)):
    shop.catalog._base.execute(change, *values)
    assert 'expected 2 uses, as the audit log says' in collect.check(shop)[0]
    assert not shop.catalog.use_grant('g', 2)
  assert shop.catalog.grant_uses('h') == 0


def test_nobody_writes_what_binds_a_list(make):
  """Whatever somebody is called or asks for."""
  shop = make('one')
  id = add(shop, 1)
  desk.withdraw(shop, id, ALICE)
  for asked in ('"action":"listed"', 'of "acme"', 'x","action":"listed'):
    for who in (Principal('listed'), Principal('eve', asked)):
      assert code_of(desk.examine, shop, asked, who, 'inspect') == 'E_ACL'
  plan = shop.catalog._base.execute(
      f'explain query plan {catalog._TOLD}', ('listed', 'x')).fetchall()
  assert 'USING INDEX told' in plan[0][-1]
  assert collect.check(shop) == [] and says(shop, id) == 'E_REVOKED'


# Lists from elsewhere.


def test_a_list_that_nobody_has_installed(make, signer):  # noqa: F811
  shop = make('one')
  id = add(shop, 1)
  key, thief = sealing_name(shop, id), keys.Signer(keys.generate())
  body = revoke.extended(None, [('org', 'acme')], now=shop.catalog.clock())
  revoked.install(shop, 'acme', listed(signer, 1, 'a'))
  file = shop.path / 'trust' / (
      f'{installed._mark("acme")}-0-{installed.CRL}')
  for bad in (thief.document('crl', canonical.dumps(body)), b'{'):
    file.write_bytes(bad)
    assert says(shop, id) == '' and [file.name in text for text in
                                     collect.check(shop)] == [True]
    collect.collect(shop)
    assert shop.secrets.find(key)
    # For what others have signed it is to be looked at.
    about = parent_of(shop, id).about
    with pytest.raises(ValueError, match=f'{file.name}.*so remove it'):
      revoked.valid(shop, id, about, signer.name)
    # It is in nobody's way.
    revoked.install(shop, 'acme', listed(signer, 1, 'b', bad[:1].hex()))
  # Signed by one who may, it counts, and yet no key is destroyed.
  file.write_bytes(signer.document('crl', canonical.dumps(body)))
  assert says(shop, id) == 'E_REVOKED'
  collect.collect(shop)
  assert shop.secrets.find(key) and len(collect.check(shop)) == 1
  revoked.install(shop, 'acme', file.read_bytes())
  assert not shop.secrets.find(key)
  assert collect.check(shop) == [] and not file.exists()


def test_a_list_whose_key_was_retired(make, signer, private):  # noqa: F811
  shop, root = make('one'), keys.Signer(private['root'])
  id, other = add(shop, 1), keys.Signer(keys.generate())
  revoked.install(shop, 'acme', listed(signer, 1, 'a'))
  about = parent_of(shop, id).about
  revoked.valid(shop, id, about, signer.name)
  for change, key in ((trust.extended, other.private),
                      (trust.retired, private['acme'])):
    trust.install(shop, root.document('trust', change(
        trust.load(shop), keys.public(key), 'acme')))
  with pytest.raises(ValueError) as error:
    revoked.valid(shop, id, about, other.name)
  for text in ('E_TRUST', 'a revocation list of acme: key',
               'signed by another key, as state crl writes it'):
    assert text in str(error.value)
  revoked.install(shop, 'acme', transfer.issue_revocations(shop, other))
  revoked.valid(shop, id, about, other.name)
