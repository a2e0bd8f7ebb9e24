"""Lists of several stores, and what was installed: put back, lost, cut short.

Artifacts are of no model: what is asked is what a store says of them.
"""

import bare
import pytest

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

import test_trust
from test_trust import ALICE, code_of, private, signer  # noqa: F401

from statejax.artifact import (
  canonical,
  collect,
  desk,
  envelope,
  grant,
  installed,
  keys,
  manifest,
  mint,
  names,
  objects,
  revoke,
  revoked,
  transfer,
  trust,
  withdraw,
)

DAY = 86400


@pytest.fixture
def make(tmp_path, private):  # noqa: F811
  return lambda name: test_trust.make(tmp_path, private, name=name)


def add(shop, number, *, scope='self', **changes):
  return bare.mint(shop, number, parents=(), sealed='aes256gcm1', governance={
      'owner': 'alice', 'org': 'acme', 'export': 'org',
      'revoke_scope': scope}, **changes).id


def parent_of(shop, id):
  found = desk.examine(shop, id, ALICE, 'inspect')
  return mint.Parent(id, found.about)


def child(shop, parent, number):
  source = parent.about['provenance']
  return add(shop, number, scope=parent.about['governance']['revoke_scope'],
             provenance={
                 'root': parent.id if source['root'] == 'self' else
                 source['root'], 'depth': source['depth'] + 1, 'parents': [
                     {'id': parent.id, 'role': 'state'}]})


def says(shop, id):
  """Code of what stands in the way of resuming it, '' for nothing."""
  fault = desk.obstacle(shop, shop.place(id), ALICE)
  return '' if fault is None else fault.code


def give(source, target, signer):  # noqa: F811
  """The list of one store for another one."""
  return revoked.install(
      target, 'acme', transfer.issue_revocations(source, signer))


def listed(signer, number, *values, now=1_700_000_000, valid=DAY):  # noqa: F811
  return signer.document('crl', canonical.dumps({
      'number': number, 'this_update': now, 'next_update': now + valid,
      'entries': [{'kind': 'workflow', 'value': value, 'from': now}
                  for value in values]}))


def values(shop):
  crl = revoked.kept(shop, 'acme')
  return sorted(entry['value'] for entry in crl['entries'])


# Several stores of one organisation.


def test_the_list_of_another_store_revives_nothing(
    make, signer, tmp_path):  # noqa: F811
  one, two, here = make('one'), make('two'), make('here')
  add(one, 1)
  id, = one.catalog.objects()
  transfer.export(one, id, ALICE, signer, tmp_path / 'a.tar')
  withdraw.withdraw(one, id, ALICE)
  give(one, here, signer)
  assert code_of(transfer.receive, here, tmp_path / 'a.tar', ALICE) == (
      'E_REVOKED')
  # The other one's has a higher number and no entry.
  for _ in range(4):
    last = transfer.issue_revocations(two, signer)
    two.catalog.clock.now += 1
  assert revoked.install(here, 'acme', last)['entries'] == []
  assert code_of(transfer.receive, here, tmp_path / 'a.tar', ALICE) == (
      'E_REVOKED')
  # Both go on, whichever is first, and no file is left of what is covered.
  for shop, value in ((two, 'b'), (one, 'c'), (two, 'd')):
    revoked.withdraw(shop, [('workflow', value)], 'alice', org=None)
    give(shop, here, signer)
  assert values(here) == sorted(['b', 'c', 'd', id])
  assert len(installed.lists(here, 'acme')) == 2 and collect.check(here) == []


def test_what_is_not_newer_in_any_way(make, signer):  # noqa: F811
  here = make('here')
  def take(*args, **options):
    return revoked.install(here, 'acme', listed(
        signer, *args, **options))
  take(3, 'a', 'b')
  take(3, 'a', 'b')  # the same bytes
  for old in ((2, 'a', 'b'), (3,), (3, 'a'), (1, 'b')):
    assert code_of(take, *old) == 'E_TRUST', old
  take(1, 'c')  # of another store
  take(2, 'c', valid=2 * DAY)
  assert values(here) == ['a', 'b', 'c']
  assert len(installed.lists(here, 'acme')) == 2
  # An entry counts since the earliest time.
  take(9, 'a', now=1_699_999_000)
  for times in ((5, 7), (7, 5)):
    lists = [{'entries': [{'kind': 'org', 'value': 'a', 'from': time}]}
             for time in times]
    assert revoke.together(lists)[0]['from'] == 5
  crl = revoked.kept(here, 'acme')
  assert {e['value']: e['from'] for e in crl['entries']} == {
      'a': 1_699_999_000, 'b': 1_700_000_000, 'c': 1_700_000_000}


def test_the_list_of_every_store_must_be_fresh(
    make, signer, tmp_path):  # noqa: F811
  one, two, here = make('one'), make('two'), make('here')
  transfer.export(one, add(one, 1), ALICE, signer, tmp_path / 'a.tar')
  for shop, value in ((one, 'x'), (two, 'y')):
    revoked.withdraw(shop, [('workflow', value)], 'alice', org=None)
    give(shop, here, signer)
  id = transfer.receive(here, tmp_path / 'a.tar', ALICE).id
  assert says(here, id) == ''
  for shop in (two, here):
    shop.catalog.clock.now += 8 * DAY
  give(two, here, signer)
  assert says(here, id) == 'E_CRL_STALE'  # what the first has revoked since?
  # Of a store that is no more another one can take over the list.
  revoked.install(two, 'acme', [
      data for data in installed.lists(here, 'acme').values()
      if b'x' in _payload(data)][0])
  give(two, here, signer)
  assert says(here, id) == '' and values(here) == ['x', 'y']


def _payload(data):
  return canonical.dumps([entry['value'] for entry in revoke.parse(
      envelope.open_document('crl', data)[0])['entries']])


def test_too_many_stores(make, signer, monkeypatch):  # noqa: F811
  here = make('here')
  monkeypatch.setattr(installed, 'MOST', 2)
  for value in 'ab':
    revoked.install(here, 'acme', listed(signer, 1, value))
  more = listed(signer, 1, 'c')
  assert code_of(revoked.install, here, 'acme', more) == 'E_LIMIT'
  revoked.install(here, 'acme', listed(signer, 1, 'a', 'b'))
  revoked.install(here, 'acme', more)
  assert values(here) == ['a', 'b', 'c']


# What stems from what was revoked elsewhere.


def test_exported_twice(make, signer, tmp_path):  # noqa: F811
  one, two, here = make('one'), make('two'), make('here')
  id = add(one, 1)
  other = add(one, 2)
  give(one, two, signer)
  for name, of in (('a', id), ('b', other)):
    transfer.export(one, of, ALICE, signer, tmp_path / f'{name}.tar')
    found = transfer.receive(two, tmp_path / f'{name}.tar', ALICE)
    transfer.export(two, found.id, ALICE, signer, tmp_path / f'{name}2.tar')
  withdraw.withdraw(one, id, ALICE)
  give(one, here, signer)
  for name, code in (('a', 'E_REVOKED'), ('a2', 'E_REVOKED')):
    assert code_of(transfer.receive, here, tmp_path / f'{name}.tar', ALICE) == (
        code)
  last = transfer.receive(here, tmp_path / 'b2.tar', ALICE)
  assert says(here, last.id) == ''
  source = parent_of(here, last.id).about['provenance']['parents']
  assert [parent['role'] for parent in source] == 2 * ['exported']
  assert source[1]['id'] == other


def test_exported_twice_by_an_earlier_release(make, signer):  # noqa: F811
  """It names only what it was exported from last, which is here."""
  here, ids = make('here'), ['sj1-' + 'a' * 64]
  for i in range(2):
    ids.append(add(here, i, provenance={
        'root': ids[0], 'depth': i + 1, 'how': 'exported',
        'parents': [{'id': ids[-1], 'role': 'exported'}]}))
  body = revoke.extended(None, [('artifact', ids[0])],
                         now=here.catalog.clock())
  assert says(here, ids[2]) == ''
  revoked.install(here, 'acme', signer.document(
      'crl', canonical.dumps(body)))
  assert says(here, ids[1]) == says(here, ids[2]) == 'E_REVOKED'


def test_exported_very_often():
  def found(i, parents):
    about = {'provenance': {'parents': parents}}
    return type('F', (), {'id': f'sj1-{i}', 'about': about})
  parents = [{'id': 'sj1-x', 'role': 'state'}]
  for i in range(12):
    parents = transfer._exported(found(i, parents))
  assert len(parents) == 8 and parents[0]['id'] == 'sj1-11'
  assert parents[-1] == {'id': 'sj1-0', 'role': 'exported'}


@pytest.mark.parametrize('scope', ['self', 'descendants'])
def test_what_stems_from_an_export(make, signer, tmp_path,  # noqa: F811
                                   scope):
  """In the store that took it in: loads, forks and mints ask the same."""
  one, here = make('one'), make('here')
  above = parent_of(one, add(one, 1, scope=scope))
  id = child(one, above, 2)
  transfer.export(one, id, ALICE, signer, tmp_path / 'a.tar')
  give(one, here, signer)
  came = parent_of(here, transfer.receive(here, tmp_path / 'a.tar', ALICE).id)
  below = child(here, parent_of(here, child(here, came, 3)), 4)
  mint.may_fork(here, came, ALICE)
  withdraw.withdraw(one, id, ALICE)
  give(one, here, signer)
  assert says(here, came.id) == 'E_REVOKED'
  assert says(here, below) == 'E_REVOKED'
  # A parent that somebody still holds.
  assert code_of(mint.may_fork, here, came, ALICE) == 'E_REVOKED'
  assert code_of(revoked.refuse, here, came.id, came.about) == 'E_REVOKED'
  assert says(one, above.id) == ''


def test_a_mint_asks_the_installed_list_too(
    make, signer, tmp_path):  # noqa: F811
  import small_store as small
  shop = make('one')
  id = mint.mint(shop, small.state(), 0, small.host(), small.TERMS).id
  held = parent_of(shop, id)
  body = revoke.extended(None, [('artifact', id)], now=shop.catalog.clock())
  revoked.install(shop, 'acme', signer.document(
      'crl', canonical.dumps(body)))
  assert code_of(mint.mint, shop, small.state(), 0, small.host(), small.TERMS,
                 parent=held) == 'E_REVOKED'


# What was put back.


def test_an_older_list_that_was_put_back(make, signer):  # noqa: F811
  here = make('here')
  first, second = listed(signer, 1, 'a'), listed(signer, 2, 'a', 'new')
  id = add(here, 1)  # its workflow is another one
  revoked.install(here, 'acme', first)
  revoked.install(here, 'acme', second)
  file, = (here.path / 'trust').glob('*-crl.*')
  assert says(here, id) == '' and collect.check(here) == []
  for name, data in ((file, first), (file.with_name('x' + file.name), second)):
    file.unlink(missing_ok=True)
    name.write_bytes(data)
    assert says(here, id) == 'E_TRUST'
    assert code_of(desk.examine, here, id, ALICE, 'fork') == 'E_TRUST'
    wrong, = collect.check(here)
    assert 'number 2' in wrong and 'put back, changed or lost' in wrong
    name.unlink()
  # What was lost does not make an older one good.
  assert code_of(revoked.install, here, 'acme', first) == 'E_TRUST'
  revoked.install(here, 'acme', second)
  assert says(here, id) == '' and collect.check(here) == []
  # Or a newer one.
  file.unlink()
  revoked.install(here, 'acme', listed(signer, 3, 'a', 'new', 'b'))
  assert says(here, id) == '' and values(here) == ['a', 'b', 'new']


def test_an_older_trust_document_that_was_put_back(
    make, signer, private):  # noqa: F811
  here, root = make('here'), keys.Signer(private['root'])
  file = here.path / 'trust' / trust.FILE
  first, id = file.read_bytes(), add(here, 1)
  second = root.document('trust', trust.ruled(
      trust.load(here), min_epoch=9))
  trust.install(here, second)
  assert says(here, id) == 'E_EPOCH'
  for pinned in (here.root, ''):
    here.root = pinned
    for put in (lambda: file.write_bytes(first), file.unlink):
      put()
      assert says(here, id) == 'E_TRUST' and len(collect.check(here)) == 1
    here.root = keys.public(private['root'])
    assert code_of(trust.install, here, first) == 'E_TRUST'
    trust.install(here, second)
    assert says(here, id) == 'E_EPOCH' and collect.check(here) == []
  assert code_of(trust.install, here, second) == 'E_TRUST'  # it is there
  # The catalog alone cannot be changed unseen either.
  here.catalog._base.execute('delete from installed')
  assert 'the last one in the audit log' in collect.check(here)[0]
  here.catalog.install(trust.FILE, 1, names.sha256(first), '{}')
  file.write_bytes(first)
  assert 'the last one in the audit log' in collect.check(here)[0]


def test_killed_while_it_is_installed(
    make, signer, private, monkeypatch):  # noqa: F811
  here, root = make('here'), keys.Signer(private['root'])
  revoked.install(here, 'acme', listed(signer, 1, 'a'))
  class Killed(BaseException):
    pass
  def killed(*args):
    raise Killed
  monkeypatch.setattr(here.catalog, 'install', killed)
  body = trust.ruled(trust.load(here), min_epoch=1)
  with pytest.raises(Killed):
    trust.install(here, root.document('trust', body))
  with pytest.raises(Killed):
    revoked.install(here, 'acme', listed(signer, 2, 'a', 'b'))
  monkeypatch.undo()
  # It counts, and what comes next is installed as always.
  assert trust.load(here).min_epoch == 1 and values(here) == ['a', 'b']
  here.root = ''
  assert trust.believed(here).min_epoch == 0  # nobody has verified it here
  here.root = keys.public(private['root'])
  trust.install(here, root.document('trust', trust.ruled(
      trust.load(here), min_epoch=2)))
  revoked.install(here, 'acme', listed(signer, 3, 'a', 'b', 'c'))
  assert trust.load(here).min_epoch == 2 and values(here) == ['a', 'b', 'c']
  assert collect.check(here) == []
  assert len(list((here.path / 'trust').iterdir())) == 2


def test_installed_by_an_earlier_release(make, signer):  # noqa: F811
  here = make('here')
  here.catalog.uninstall(trust.FILE)
  old = here.path / 'trust' / f'{installed._mark("acme")}-{installed.CRL}'
  old.write_bytes(listed(signer, 1, 'a'))
  assert values(here) == ['a'] and trust.load(here).number == 1
  revoked.install(here, 'acme', listed(signer, 2, 'a', 'b'))
  assert values(here) == ['a', 'b'] and not old.exists()


def test_what_was_installed_is_in_the_log(make, signer, private):  # noqa: F811
  here = make('here')
  data = listed(signer, 4, 'a')
  revoked.install(here, 'acme', data)
  rows = [(row['principal'], row['action'], row['id'], row['outcome'])
          for row in here.catalog.rows()]
  root = keys.Signer(private['root']).name
  assert rows == [
      (root, 'trust', names.sha256((
          here.path / 'trust' / trust.FILE).read_bytes()), 'installed 1'),
      (signer.name, 'crl', names.sha256(data), 'installed 4')]


# Times that a thief writes.


@pytest.mark.parametrize('how', ['revoked', 'ended'])
def test_a_stolen_key_writes_no_earlier_time(
    make, signer, private, tmp_path, how):  # noqa: F811
  here, late = make('here'), make('late')
  now = here.catalog.clock()
  good, thief = make('good'), make('thief')
  good.catalog.clock.now = now - 2000
  early = add(good, 1, created=now - 2000)
  transfer.export(good, early, ALICE, signer, tmp_path / 'good.tar')
  thief.catalog.clock.now = now - 2000
  transfer.export(thief, add(thief, 2, created=now - 2000), ALICE, signer,
                  tmp_path / 'thief.tar')
  # One that was here in time stays good.
  here.catalog.clock.now = now - 1500
  give(good, here, signer)
  id = transfer.receive(here, tmp_path / 'good.tar', ALICE).id
  other, root = keys.generate(), keys.Signer(private['root'])
  for shop in (here, late):
    trust.install(shop, root.document('trust', trust.extended(
        trust.load(shop), keys.public(other), 'acme')))
    shop.catalog.clock.now = now
    entries = [('key', signer.name)] if how == 'revoked' else []
    body = revoke.extended(None, entries, now=now, since=now - 1000) | {
        'number': 7}
    revoked.install(shop, 'acme', keys.Signer(other).document(
        'crl', canonical.dumps(body)))
    if how == 'ended':
      trust.install(shop, root.document('trust', trust.extended(
          trust.load(shop), keys.public(private['acme']), 'acme',
          not_after=now - 1000)))
  code = {'revoked': 'E_REVOKED', 'ended': 'E_TRUST'}[how]
  for shop in (here, late):
    assert code_of(transfer.receive, shop, tmp_path / 'thief.tar', ALICE) == (
        code)
  assert code_of(transfer.receive, late, tmp_path / 'good.tar', ALICE) == code
  assert says(here, id) == ''


# Keys from elsewhere.


def test_what_is_no_public_key(make, signer, private):  # noqa: F811
  shop = make('one')
  id = add(shop, 1)
  pem = keys.public(private['other'])
  known = trust.load(shop)
  for bad in (private['other'].decode(), pem + private['other'].decode(),
              'garbage', '', pem.replace('M', 'N', 1)):
    for call, *args in ((keys.normal, bad),
                        (trust.extended, known, bad, 'acme'),
                        (trust.retired, known, bad, 'acme'),
                        (trust_of_root, shop, private, bad),
                        (grant.issue, shop, id, ALICE, bad, ['inspect'],
                         signer)):
      with pytest.raises(ValueError, match='key: '):
        call(*args)
  # What an earlier release has taken in stands in the way of nothing.
  legacy = make('legacy')
  (legacy.path / 'trust' / trust.FILE).unlink()
  legacy.catalog.uninstall(trust.FILE)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trust, '_check_key', lambda *_: None)
    trust_of_root(legacy, private, 'garbage')
  trust.install(legacy, keys.Signer(private['root']).document(
      'trust', trust.ruled(trust.load(legacy), min_epoch=1)))
  # A copy that says the same is the same key.
  odd = 'A remark.\n' + pem.replace('\n', '\r\n')
  assert keys.normal(odd) == keys.normal(odd.encode()) == pem
  assert trust.extended(known, odd, 'acme') == trust.extended(
      known, pem, 'acme')
  data = grant.issue(shop, id, ALICE, odd, ['inspect'], signer)
  about = parent_of(shop, id).about
  body = grant.read(shop, data, about, id)
  assert body['holder'] == pem
  for holder in (odd.replace('\r', ' '), private['other'].decode()):
    bad = signer.document('grant', canonical.dumps(body | {'holder': holder}))
    assert code_of(grant.read, shop, bad, about, id) == 'E_GRANT'
    assert 'count here: no' in grant.describe(shop, bad)[-1]


def trust_of_root(shop, private, pem):  # noqa: F811
  """Installs a document that the root has signed all the same."""
  body = {'number': 9, 'min_epoch': 0, 'classes': list(manifest.CLASSES),
          'orgs': {'acme': [{'pem': pem or 'x', 'status': 'active',
                             'not_before': 0, 'not_after': 5, 'may': []}]}}
  trust.install(shop, keys.Signer(private['root']).document(
      'trust', canonical.dumps(body)))


def test_a_pinned_key_of_another_text(make, private):  # noqa: F811
  shop = make('one')
  shop.root = shop.root.replace('\n', '\r\n')
  assert trust.load(shop).number == 1
  shop.root = private['root'].decode()
  assert code_of(trust.load, shop) == 'E_TRUST'


def test_a_key_that_nobody_has_is_not_revoked(
    make, signer, private):  # noqa: F811
  shop = make('one')
  wrong = 'key:' + keys.hint(keys.public(private['acme']).replace('\n', '\r\n'))
  assert code_of(withdraw.withdraw, shop, wrong, ALICE, 'key',
                 signer=signer) == 'E_TRUST'
  assert shop.catalog.revocations() is None
  assert withdraw.withdraw(shop, signer.name, ALICE, 'key', signer=signer) == [
      ('key', signer.name)]


def test_exports_are_signed_by_a_key_that_may(
    make, signer, private, tmp_path):  # noqa: F811
  shop = make('one')
  id = add(shop, 1)
  other = keys.Signer(private['other'])
  for pinned in (shop.root, ''):
    shop.root = pinned
    assert code_of(transfer.export, shop, id, ALICE, other,
                   tmp_path / 'x') == 'E_TRUST'
  assert not (tmp_path / 'x').exists()
  assert shop.catalog.rows()[-1]['code'] == 'E_TRUST'
  transfer.export(shop, id, ALICE, signer, tmp_path / 'x')
  # Where nobody has said whose signatures count, any key does.
  free = objects.Store(tmp_path / 'free', shop.secrets,
                       clock=shop.catalog.clock)
  transfer.export(free, add(free, 2), ALICE, other, tmp_path / 'y')


def test_a_check_without_a_root_key(make, signer, tmp_path):  # noqa: F811
  one, here = make('one'), make('here')
  transfer.export(one, add(one, 1), ALICE, signer, tmp_path / 'a.tar')
  give(one, here, signer)
  id = transfer.receive(here, tmp_path / 'a.tar', ALICE).id
  assert collect.check(here) == collect.unasked(here) == []
  here.root = ''
  assert collect.check(here) == [] and collect.unasked(here) == [id]
  file = here.place(id) / 'plain.json'
  file.chmod(0o600)
  file.write_bytes(b'{}')
  assert len(collect.check(here)) == 1


