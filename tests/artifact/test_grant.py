"""Grants to another organisation: shown, used up, expired, stolen, forged."""

import base64
import dataclasses

import pytest
import small_store as small

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

import test_trust
from test_trust import ALICE, OPEN, code_of, private, signer  # noqa: F401

from statejax import model as lm
from statejax.artifact import (
  access,
  canonical,
  collect,
  desk,
  grant,
  identity,
  keys,
  layout,
  load,
  manifest,
  migrate,
  mint,
  names,
  objects,
  revoked,
  sealing,
  transfer,
  trust,
  verify,
)
from statejax.artifact.access import Principal

DAVE = Principal('dave', 'globex')


@pytest.fixture(scope='module')
def shop(tmp_path_factory, private):  # noqa: F811
  return test_trust.make(tmp_path_factory.mktemp('grant'), private)


@pytest.fixture(scope='module')
def kept(shop):
  return mint.mint(shop, small.state(), 0, small.host(),
                   dataclasses.replace(OPEN, export='any'), ref='open').id


@pytest.fixture(scope='module')
def about(shop, kept):
  return load.load(shop, kept, ALICE, small.host()).about


def issue(shop, signer, private, rights=('inspect', 'resume'),  # noqa: F811
          **options):
  return grant.issue(shop, 'open', ALICE, keys.public(private['other']),
                     rights, signer, **options)


def present(shop, data, about, id, private, who=DAVE):  # noqa: F811
  nonce = grant.challenge(shop)
  return grant.present(shop, data, about, id, who, nonce,
                       grant.prove(private['other'], nonce, data))


def about_of(shop, id):
  return manifest.parse(layout.read(shop.place(id), manifest.NAME))


def test_a_proof_is_taken_once(shop, kept, about, signer,  # noqa: F811
                               private):  # noqa: F811
  data = issue(shop, signer, private, max_uses=9)
  nonce = grant.challenge(shop)
  proof = grant.prove(private['other'], nonce, data)
  def shown(who, nonce=nonce):
    return grant.present(shop, data, about, kept, who, nonce, proof)
  assert shown(DAVE).granted and shop.catalog.challenges() == 0
  eve = shown(Principal('eve', 'globex'))
  assert not eve.granted and 'nonce: expected one' in eve.grant_fault
  # Nor is one answered that the store has not asked for, or too late.
  assert 'nonce' in shown(DAVE, '5' * 32).grant_fault
  nonce = grant.challenge(shop)
  proof = grant.prove(private['other'], nonce, data)
  shop.catalog.clock.now += grant.ANSWER
  assert 'nonce' in shown(DAVE, nonce).grant_fault


def test_it_ends_also_for_who_holds_it(shop, kept, about, signer,  # noqa: F811
                                       private):  # noqa: F811
  data = issue(shop, signer, private, access.GRANTABLE, seconds=10, max_uses=9)
  who = present(shop, data, about, kept, private)
  found = load.load(shop, kept, who, small.host())
  assert str(found.decision) == 'resumed(11)'
  def late():
    return str(load.load(shop, kept, who, small.host()).decision), (
        shop.catalog.rows()[-1]['code'])
  shop.catalog.clock.now += 11
  # As a stranger, to whom it is not there; the log knows why.
  assert late() == ('refused(E_ACL)', 'E_GRANT')
  for right in access.GRANTABLE:
    assert code_of(desk.examine, shop, kept, who, right) == 'E_ACL'
  assert code_of(mint.mint, shop, found.state, 0, found.host, mint.Terms.of(
      found.about), principal=who, stands=found.stands, parent=mint.Parent(
          found.id, found.about)) == 'E_GRANT'
  early = dataclasses.replace(who, times=(shop.catalog.clock() + 1,) * 2)
  assert code_of(access.require, about, early, 'resume',
                 now=shop.catalog.clock()) == 'E_GRANT'
  # Whoever has the right without it has it still.
  alice = dataclasses.replace(who, name='alice', org='acme')
  assert str(load.load(shop, kept, alice, small.host()).decision) == (
      'resumed(11)')


def test_a_fork_is_a_use(shop, kept, about, signer, private):  # noqa: F811
  data = issue(shop, signer, private, ('fork',))
  who = present(shop, data, about, kept, private)
  child = mint.fork(shop, mint.Parent(kept, about), who)
  rules = about_of(shop, child.id)['governance']
  assert rules == about['governance']  # its owner's, not the holder's
  assert shop.catalog.rows()[-1]['principal'] == 'dave of globex'
  there = shop.catalog.objects()
  assert code_of(mint.fork, shop, mint.Parent(kept, about), who) == 'E_GRANT'
  assert shop.catalog.objects() == there
  # The grant gives nothing of the child; one for the family does.
  assert not present(shop, data, about_of(shop, child.id), child.id,
                     private).granted
  wide = issue(shop, signer, private, scope='root')
  assert present(shop, wide, about_of(shop, child.id), child.id,
                 private).granted == {'inspect', 'resume'}


def test_what_it_names_stays(shop, signer, private):  # noqa: F811
  def add(**options):
    return mint.mint(shop, small.state(), 0, small.host(), OPEN, **options).id
  one, other = add(ref='moves'), add()
  grant.issue(shop, 'moves', ALICE, keys.public(private['other']), ['resume'],
              signer, seconds=9000)
  shop.catalog.drop('moves')
  shop.catalog.clock.now += 8000
  gone = collect.collect(shop).objects
  assert other in gone and one not in gone
  shop.catalog.clock.now += 1001
  assert one in collect.collect(shop).objects


def test_who_signs_must_be_trusted(shop, kept, signer, private):  # noqa: F811
  k = keys.Signer(private['other'])
  pem = keys.public(k.private)
  def issue(key):
    return grant.issue(shop, kept, ALICE, pem, ['resume'], key)
  start = shop.catalog.head().seq
  assert code_of(issue, k) == 'E_TRUST'
  assert code_of(transfer.issue_revocations, shop, k) == 'E_TRUST'
  assert [(row['principal'], row['action'], row['outcome'])
          for row in shop.catalog.rows()[start:]] == [
              ('alice of acme', 'grant', 'allowed'),
              ('alice of acme', 'grant', 'refused')]
  issue(signer)
  row = shop.catalog.rows()[-1]
  assert (row['principal'], row['action'], row['id']) == (
      'alice of acme', 'grant', kept)


def test_shown_and_used_up(shop, kept, about, signer, private):  # noqa: F811
  data = issue(shop, signer, private, max_uses=2)
  def shown(key='other', nonce='', given=data):
    asked = grant.challenge(shop)
    return grant.present(shop, given, about, kept, DAVE, nonce or asked,
                         grant.prove(private[key], asked, data))
  who = shown()
  assert who.granted == {'inspect', 'resume'} and not who.grant_fault
  assert str(load.load(shop, kept, who, small.host()).decision) == (
      'resumed(11)')
  assert access.decide(about, who, 'fork',
                       now=shop.catalog.clock()).code == 'E_ACL'
  # A copy without the holder's key, or an old answer, is worth nothing.
  for bad in (shown(key='acme'), shown(nonce=grant.challenge(shop))):
    assert not bad.granted and bad.grant_fault
    # They hear of no artifact; the log knows why.
    assert str(load.load(shop, kept, bad, small.host()).decision) == (
        'refused(E_ACL)')
    assert shop.catalog.rows()[-1]['code'] == 'E_GRANT'
  # To show it, to look and to be refused is no use; a resume is one.
  assert desk.examine(shop, kept, who, 'inspect').plain
  other = small.host(params='1' * 64)
  assert str(load.load(shop, kept, who, other).decision) == (
      'refused(E_WEIGHTS)')
  last = shown()
  assert last.granted and load.load(shop, kept, last, small.host()).state
  # Also where it was shown in time: another one was faster.
  for late in (last, shown()):
    found = load.load(shop, kept, late, small.host())
    assert (found.decision.code, found.state, found.about) == (
        'E_GRANT', None, {}) and 'used 2 times' in found.decision.detail
  assert 'used 2 times' in shown().grant_fault and not shown().granted
  # Beyond its time.
  late = issue(shop, signer, private, seconds=10)
  shop.catalog.clock.now += 11
  assert code_of(grant.read, shop, late, about, kept) == 'E_GRANT'


def test_what_is_no_grant(shop, kept, about, signer, private):  # noqa: F811
  data = issue(shop, signer, private)
  body = grant.read(shop, data, about, kept)
  def read(given, id=kept):
    return code_of(grant.read, shop, given, about, id)
  def signed(key=signer, kind='grant', **changes):
    return key.document(kind, canonical.dumps(body | changes))
  assert read(signed(key=keys.Signer(private['other']))) == 'E_TRUST'
  assert read(signed(kind='crl')) == 'E_SIG'
  assert read(signed(target='sj1-' + '0' * 64)) == 'E_GRANT'
  assert read(signed(org='globex')) == 'E_GRANT'
  assert read(signed(not_after=body['not_after'] + 1)) == 'E_GRANT'
  assert read(signed(surplus=1)) == 'E_GRANT'
  assert read(signed(rights=['delete'])) == 'E_GRANT'
  assert read(data[:-9] + data[-8:]) == 'E_SIG'
  with pytest.raises(ValueError, match='seconds: expected'):
    issue(shop, signer, private, seconds=90000)
  assert code_of(grant.issue, shop, 'open', Principal('bob', 'acme'),
                 keys.public(private['other']), ['resume'], signer) == 'E_ACL'


def test_to_another_organisation(shop, kept, signer, private,  # noqa: F811
                                 tmp_path):
  """Their store has none of our secrets; the grant brings the keys of one.

  It is for the artifact, and so for what is exported of it, then and later.
  """
  data = issue(shop, signer, private)
  one = transfer.export(shop, kept, ALICE, signer, tmp_path / 'one.tar')
  theirs = objects.Store(
      tmp_path / 'theirs', objects.Secrets(tmp_path / 'keys'),
      clock=shop.catalog.clock, root=keys.public(private['root']))
  trust.install(theirs, keys.Signer(private['root']).document(
      'trust', trust.extended(None, keys.public(private['acme']), 'acme')))
  revoked.install(theirs, 'acme',
                            transfer.issue_revocations(shop, signer))
  assert code_of(transfer.receive, theirs, tmp_path / 'one.tar', DAVE) == (
      'E_ACL')
  transfer.receive(theirs, tmp_path / 'one.tar', DAVE, host=small.host(),
                   granted=(data, private['other']))
  about = manifest.parse((theirs.place(one) / manifest.NAME).read_bytes())
  who = present(theirs, data, about, one, private)
  assert str(load.load(theirs, one, who, small.host()).decision) == (
      'resumed(11)')
  assert str(load.load(theirs, one, DAVE, small.host()).decision) == (
      'refused(E_ACL)')
  # One that does not open it takes the place of no key that does.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sealing, 'seed', lambda *_: bytes(32))
    bad = issue(shop, signer, private)
  assert code_of(transfer.receive, theirs, tmp_path / 'one.tar', DAVE,
                 granted=(bad, private['other'])) == 'E_SEALED'
  assert sealing.data_key(theirs, one, about) == sealing.data_key(
      shop, one, about)
  # The key for one artifact opens no other: nothing else of the family.
  assert len(list((tmp_path / 'keys').glob('data-*'))) == 1
  found = load.load(shop, kept, ALICE, small.host())
  mint.mint(shop, found.state, 0, found.host, mint.Terms.of(found.about),
            parent=mint.Parent(kept, found.about), ref='child')
  two = transfer.export(shop, 'child', ALICE, signer, tmp_path / 'two.tar')
  def receive(data):
    return transfer.receive(theirs, tmp_path / 'two.tar', DAVE,
                            granted=(data, private['other'])).id
  assert code_of(receive, data) == 'E_GRANT'
  assert receive(issue(shop, signer, private, scope='root')) == two
  assert verify.verify(theirs.place(two)).id == two


def test_texts_are_compared_abroad(shop, signer, private,  # noqa: F811
                                   tmp_path):
  """By who can open an export; the organisation's own digest is not in it."""
  def host(place, org='acme', **changes):
    return small.host(texts=identity.Texts(
        place.secrets.org(org), **{'system': 'be kind', 'tools': {
            'a': 'b', 'c': 'd'}, 'assumptions': {'e': 'f'},
                                   'persona': 'g'} | changes))
  id = mint.mint(shop, small.state(), 0, host(shop), dataclasses.replace(
      OPEN, export='any'), ref='texts').id
  one = transfer.export(shop, 'texts', ALICE, signer, tmp_path / 'one.tar',
                        texts=host(shop).texts)
  data = grant.issue(shop, 'texts', ALICE, keys.public(private['other']),
                     ['inspect', 'resume'], signer, max_uses=9)
  theirs = objects.Store(
      tmp_path / 'theirs', objects.Secrets(tmp_path / 'keys'),
      clock=shop.catalog.clock, root=keys.public(private['root']))
  trust.install(theirs, keys.Signer(private['root']).document(
      'trust', trust.extended(None, keys.public(private['acme']), 'acme')))
  crl = transfer.issue_revocations(shop, signer)
  for place in (shop, theirs):
    revoked.install(place, 'acme', crl)
  transfer.receive(theirs, tmp_path / 'one.tar', DAVE,
                   granted=(data, private['other']))
  about = about_of(theirs, one)
  before, after = (canonical.dumps(about_of(place, id)).decode().count(
      f'hmac:{names.key_id(shop.secrets.org("acme"))}:')
      for place, id in ((shop, id), (theirs, one)))
  assert (before, after) == (6, 0)
  def end(**changes):
    return str(load.load(theirs, one, present(
        theirs, data, about, one, private), host(
            theirs, 'globex', **changes)).decision)
  assert end() == 'resumed(11)'
  # What comes of it has the persona under the old key, all else under its own.
  mine = host(shop, persona='')
  transfer.receive(shop, tmp_path / 'one.tar', ALICE, ref='on')
  for _ in range(2):
    found = load.load(shop, 'on', ALICE, mine)
    assert str(found.decision) == 'resumed(11)', found.decision.detail
    mint.mint(shop, found.state, 0, found.host, mint.Terms.of(found.about),
              principal=ALICE, parent=mint.Parent(found.id, found.about),
              edited=found.edited, ref='on',
              expect=shop.catalog.ref('on')[1])
  # Another layout of it is made under the names that it has.
  wide = small.host(lm.LanguageModel(dataclasses.replace(
      small.CONFIG, store_dtype='float32')), texts=host(shop).texts)
  transfer.receive(shop, tmp_path / 'one.tar', ALICE, ref='wide')
  assert migrate.migrate(shop, 'wide', ALICE, host(shop), wide, cast=True).id
  assert end(system='be cruel') == 'refused(E_POLICY)'
  assert end(tools={'a': 'x'}) == 'refused(E_TOOLS)'
  # In the organisation's other stores it is as it was, of a fork as well.
  transfer.receive(shop, tmp_path / 'one.tar', ALICE, ref='back')
  child = mint.fork(shop, mint.Parent(one, about_of(shop, one)), ALICE).id
  for key in ('texts', 'back', child):
    assert str(load.load(shop, key, ALICE, host(shop)).decision) == (
        'resumed(11)')
  # Of texts that are not given the organisation's own digests stay.
  two = transfer.export(shop, 'texts', ALICE, signer, tmp_path / 'two.tar')
  assert transfer.receive(theirs, tmp_path / 'two.tar', DAVE, granted=(
      data, private['other'])).id == two
  about, one = about_of(theirs, two), two
  assert end() == 'refused(E_KEYED)'


def test_a_grant_is_for_one_artifact(shop, kept, about, signer,  # noqa: F811
                                     private, tmp_path):  # noqa: F811
  """Also where the name it was asked by names another one by then."""
  secret = mint.mint(shop, small.state(), 0, small.host(),
                     dataclasses.replace(OPEN, export='any'), ref='chat').id
  data = grant.issue(shop, 'chat', ALICE, keys.public(private['other']),
                     access.GRANTABLE, signer)
  who = present(shop, data, manifest.parse(layout.read(
      shop.place(secret), manifest.NAME)), secret, private)
  assert who.granted_for == secret
  mint.mint(shop, small.state(), 0, small.host(), OPEN, ref='chat', expect=1)
  for key in ('chat', kept):
    assert str(load.load(shop, key, who, small.host()).decision) == (
        'refused(E_ACL)')
    assert shop.catalog.rows()[-1]['code'] == 'E_GRANT'
    for right in ('inspect', 'fork', 'export'):
      assert code_of(desk.examine, shop, key, who, right) == 'E_ACL'
  assert code_of(transfer.export, shop, kept, who, signer,
                 tmp_path / 'no.tar') == 'E_ACL'
  # An export is a use as well.
  transfer.export(shop, secret, who, signer, tmp_path / 'yes.tar')
  assert code_of(transfer.export, shop, secret, who, signer,
                 tmp_path / 'again.tar') == 'E_GRANT'
  assert not (tmp_path / 'again.tar').exists()


def test_keys_sealed_to_a_holder(private):  # noqa: F811
  pem = keys.public(private['other'])
  sealed = keys.encrypt(pem, b'x' * 32)
  assert keys.decrypt(private['other'], sealed) == b'x' * 32
  assert sealed != keys.encrypt(pem, b'x' * 32)
  for at in (0, 5, len(sealed) - 1):
    bad = sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1:]
    assert code_of(keys.decrypt, private['other'], bad) == 'E_SEALED'
  assert code_of(keys.decrypt, private['acme'], sealed) == 'E_SEALED'
  assert code_of(keys.decrypt, private['other'], b'') == 'E_SEALED'
  assert base64.b64encode(sealed)
