"""Grants to another organisation: shown, used up, expired, stolen, forged."""

import base64
import dataclasses

import pytest
import small_store as small

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

import test_trust
from test_trust import ALICE, OPEN, code_of, private, signer  # noqa: F401

from statejax.artifact import (
  access,
  canonical,
  desk,
  grant,
  keys,
  layout,
  load,
  manifest,
  mint,
  objects,
  revoked,
  transfer,
  trust,
)
from statejax.artifact.access import Principal

DAVE = Principal('dave', 'globex')
NONCE = '5' * 32


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


def test_shown_and_used_up(shop, kept, about, signer, private):  # noqa: F811
  data = issue(shop, signer, private, max_uses=2)
  def shown(key='other', nonce=NONCE, answered=NONCE, given=data):
    return grant.present(shop, given, about, kept, DAVE, nonce,
                         grant.prove(private[key], answered, data))
  who = shown()
  assert who.granted == {'inspect', 'resume'} and not who.grant_fault
  assert str(load.load(shop, kept, who, small.host()).decision) == (
      'resumed(11)')
  assert access.decide(about, who, 'fork').code == 'E_ACL'
  # A copy without the holder's key, or an old answer, is worth nothing.
  for bad in (shown(key='acme'), shown(nonce='6' * 32)):
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
  """Their store has none of our secrets; the grant brings the key of one."""
  transfer.export(shop, kept, ALICE, signer, tmp_path / 'one.tar')
  # The exported artifact is what is granted: take it in here, to name it.
  revoked.install(shop, 'acme',
                            transfer.issue_revocations(shop, signer))
  one = transfer.receive(shop, tmp_path / 'one.tar', ALICE, ref='sent').id
  data = grant.issue(shop, 'sent', ALICE, keys.public(private['other']),
                     ['inspect', 'resume'], signer)
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
  who = grant.present(theirs, data, about, one, DAVE, NONCE, grant.prove(
      private['other'], NONCE, data))
  assert str(load.load(theirs, one, who, small.host()).decision) == (
      'resumed(11)')
  assert str(load.load(theirs, one, DAVE, small.host()).decision) == (
      'refused(E_ACL)')
  # The key for one artifact opens no other.
  assert len(list((tmp_path / 'keys').glob('data-*'))) == 1


def test_a_grant_is_for_one_artifact(shop, kept, about, signer,  # noqa: F811
                                     private, tmp_path):  # noqa: F811
  """Also where the name it was asked by names another one by then."""
  secret = mint.mint(shop, small.state(), 0, small.host(),
                     dataclasses.replace(OPEN, export='any'), ref='chat').id
  data = grant.issue(shop, 'chat', ALICE, keys.public(private['other']),
                     access.GRANTABLE, signer)
  who = grant.present(
      shop, data, manifest.parse(layout.read(shop.place(secret), manifest.NAME)
                                 ), secret, DAVE, NONCE,
      grant.prove(private['other'], NONCE, data))
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
