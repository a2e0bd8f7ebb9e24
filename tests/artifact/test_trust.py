"""Signatures, trust, sealing, and one file from store to store."""

import dataclasses
import json
import os
import random
import tarfile

import pytest
import small_store as small

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

from statejax.artifact import (
  canonical,
  collect,
  desk,
  envelope,
  keys,
  layout,
  load,
  manifest,
  mint,
  names,
  objects,
  portable,
  revoked,
  sealing,
  transfer,
  trust,
  verify,
)
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE = Principal('alice', 'acme')
OPEN = dataclasses.replace(small.TERMS, export='org')


@pytest.fixture(scope='module')
def private():
  return {name: keys.generate() for name in ('root', 'acme', 'other')}


@pytest.fixture(scope='module')
def signer(private):
  return keys.Signer(private['acme'])


def make(path, private, name='store', **changes):
  """A store that trusts acme; all of them share the organisation's secrets."""
  shop = objects.Store(path / name, objects.Secrets(path / 'secrets'),
                       clock=small.Clock(), root=keys.public(private['root']))
  data = trust.extended(None, keys.public(private['acme']), 'acme', **changes)
  trust.install(shop, keys.Signer(private['root']).document('trust', data))
  return shop


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  return tmp_path_factory.mktemp('trust')


@pytest.fixture(scope='module')
def shop(place, private):
  return make(place, private)


@pytest.fixture(scope='module')
def kept(shop):
  return mint.mint(shop, small.state(), 0, small.host(), OPEN, ref='open',
                   transcript=small.transcript()).id


@pytest.fixture(scope='module')
def file(shop, kept, signer, place):
  """The artifact as one file."""
  transfer.export(shop, kept, ALICE, signer, place / 'one.tar')
  return place / 'one.tar'


@pytest.fixture
def other(place, private, shop, signer, tmp_path):
  """Another store of the organisation, with its revocation list."""
  other = make(place, private, name=tmp_path.name)
  revoked.install(other, 'acme',
                            transfer.issue_revocations(shop, signer))
  return other


def code_of(call, *args, **options):
  with pytest.raises(Refused) as error:
    call(*args, **options)
  return error.value.code


# Sealing.


@pytest.mark.parametrize('size', [0, 1, sealing.CHUNK, sealing.CHUNK + 1])
def test_sealed_files(size):
  key, nonce, data = bytes(32), '0' * 32, os.urandom(size)
  sealed = sealing.seal(key, nonce, 'a/b', data)
  assert sealing.unseal(key, nonce, 'a/b', sealed) == data
  assert len(sealed) == size + 16 * max(1, -(-size // sealing.CHUNK))
  for args in ((bytes(31) + b'1', nonce, 'a/b', sealed),
               (key, '1' * 32, 'a/b', sealed), (key, nonce, 'a/c', sealed),
               (key, nonce, 'a/b', sealed[:-1]), (key, nonce, 'a/b', b''),
               (key, nonce, 'a/b', sealed + b'0'),
               (key, nonce, 'a/b', bytes([sealed[0] ^ 1]) + sealed[1:])):
    assert code_of(sealing.unseal, *args) == 'E_SEALED'
  if size > sealing.CHUNK:
    step = sealing.CHUNK + 16  # a whole chunk cut off, or two exchanged
    for cut in (sealed[:step], sealed[step:], sealed[step:] + sealed[:step]):
      assert code_of(sealing.unseal, key, nonce, 'a/b', cut) == 'E_SEALED'


def test_sealed_artifacts_resume_and_say_nothing(shop, kept):
  about = manifest.parse(layout.read(shop.place(kept), manifest.NAME))
  assert about['sealed'] == 'aes256gcm1'  # as it may be exported
  found = load.load(shop, kept, ALICE, small.host())
  assert str(found.decision) == 'resumed(11)'
  assert found.tokens[:11] == small.TOKENS
  needles = [names.pack(small.TOKENS), names.witness(small.TOKENS).encode()]
  bare = mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                   transcript=small.transcript()).id
  def holds(id):
    whole = b''.join(p.read_bytes() for p in shop.place(id).rglob('*')
                     if p.is_file())
    return [needle in whole for needle in needles]
  assert holds(bare) == [True, True] and holds(kept) == [False, False]
  child = mint.fork(shop, mint.Parent(kept, found.about), ALICE)
  assert str(load.load(shop, child.id, ALICE, small.host()).decision) == (
      'resumed(11)')
  assert not list((shop.path / 'tmp').iterdir())


def test_what_must_be_sealed():
  for change, must in (
      ({'export': 'any'}, True), ({'class': 'restricted'}, True),
      ({'class': 'confidential'}, True), ({}, False)):
    about = {'governance': {'export': 'never', 'class': 'internal'} | change}
    assert manifest.must_seal(about) == must


def test_a_destroyed_key_destroys_the_content(tmp_path, private):
  shop = make(tmp_path, private)
  one = mint.mint(shop, small.state(), 0, small.host(), OPEN).id
  name = load.load(shop, one, ALICE, small.host()).about['seal']['kek']
  shop.secrets.destroy(name)
  assert str(load.load(shop, one, ALICE, small.host()).decision) == (
      'refused(E_SEALED)')
  # A new key of that name does not open it either.
  shop.secrets.get(name)
  assert str(load.load(shop, one, ALICE, small.host()).decision) == (
      'refused(E_SEALED)')
  shop.scratch = '/nowhere'
  assert code_of(mint.mint, shop, small.state(), 0, small.host(), OPEN) == (
      'E_SEALED')


# Signatures.


def test_signed_artifacts(tmp_path, private, signer):
  shop = make(tmp_path, private)
  one = mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                  vouch=signer).id
  # Like anything that is not this store's own it needs a fresh list.
  assert str(load.load(shop, one, ALICE, small.host()).decision) == (
      'refused(E_CRL_STALE)')
  revoked.install(shop, 'acme',
                            transfer.issue_revocations(shop, signer))
  assert str(load.load(shop, one, ALICE, small.host()).decision) == (
      'resumed(11)')
  assert collect.check(shop) == []
  shop.catalog.clock.now += 8 * 86400
  assert str(load.load(shop, one, ALICE, small.host()).decision) == (
      'refused(E_CRL_STALE)')


def signed(tmp_path, private, signer):
  shop = make(tmp_path, private)
  one = mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                  vouch=signer).id
  folder = shop.place(one)
  for path in (folder, *folder.rglob('*')):
    path.chmod(0o700)
  return shop, folder


def test_changed_signatures(tmp_path, private, signer):
  shop, folder = signed(tmp_path, private, signer)
  sig = folder / layout.SIG
  good = sig.read_bytes()
  data = layout.read(folder, manifest.NAME)
  about = manifest.parse(data)
  def vouch():
    return trust.vouch(shop, folder, layout.walk(folder), data, about)
  assert vouch() == signer.name
  value = json.loads(good)
  payload, raw, hint = envelope.open_bundle(good)
  forged = keys.Signer(private['other'])
  resigned = envelope.bundle(payload, keys.sign(
      forged.private, envelope.STATEMENT, payload), hint)
  cases = {
      'E_SIG': [
          b'{}', good + b' ', canonical.dumps(value | {'mediaType': 'x'}),
          canonical.dumps(value | {'surplus': 1}), resigned,
          envelope.bundle(payload + b' ', raw, hint),
          envelope.bundle(payload, raw[:-1], hint),
          canonical.dumps(value | {'verificationMaterial': {
              'publicKey': {'hint': hint}, 'tlogEntries': [1]}})],
      'E_TRUST': [envelope.bundle(payload, raw, 'f' * 64)]}
  double = json.loads(good)
  double['dsseEnvelope']['signatures'] *= 2
  cases['E_SIG'].append(canonical.dumps(double))
  for code, contents in cases.items():
    for content in contents:
      sig.write_bytes(content)
      assert code_of(vouch) == code
  rng = random.Random(0)
  for _ in range(100):
    at = rng.randrange(len(good))
    sig.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)])
                    + good[at + 1:])
    assert code_of(vouch) in ('E_SIG', 'E_TRUST')
  # Of a manifest that lists other files.
  sig.write_bytes(good)
  about['files'][0][2] = '0' * 64
  assert code_of(vouch) == 'E_SIG'


@pytest.mark.parametrize('changes', [
    dict(may=['grant']), dict(not_after=1_600_000_000),
    dict(not_before=1_800_000_000)])
def test_keys_that_may_not(tmp_path, private, signer, changes):
  shop = make(tmp_path, private, **changes)
  one = mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                  vouch=signer).id
  assert str(load.load(shop, one, ALICE, small.host()).decision) == (
      'refused(E_TRUST)')


def test_keys_of_another_organisation(tmp_path, private, signer):
  shop = make(tmp_path, private)
  theirs = dataclasses.replace(small.TERMS, org='globex')
  one = mint.mint(shop, small.state(), 0, small.host(), theirs, vouch=signer).id
  assert str(load.load(shop, one, Principal('alice', 'globex'),
                       small.host()).decision) == 'refused(E_TRUST)'


def test_trust_only_grows_and_only_by_the_root(shop, private):
  known = trust.load(shop)
  data = trust.extended(known, keys.public(private['other']), 'globex')
  root = keys.Signer(private['root'])
  assert code_of(trust.install, shop, keys.Signer(private['acme']).document(
      'trust', data)) == 'E_SIG'
  assert code_of(trust.install, shop, root.document('crl', data)) == 'E_SIG'
  old = canonical.loads(data) | {'number': 1}
  assert code_of(trust.install, shop, root.document(
      'trust', canonical.dumps(old))) == 'E_TRUST'
  assert code_of(trust.install, shop, root.document('trust', b'{}')) == (
      'E_TRUST')
  nobody = objects.Store(shop.path, shop.secrets, clock=small.Clock())
  assert code_of(trust.load, nobody) == 'E_TRUST'  # no root is pinned


def test_curves():
  from cryptography.hazmat.primitives import serialization
  from cryptography.hazmat.primitives.asymmetric import ec, ed25519
  def pem(key):
    return key.private_bytes(serialization.Encoding.PEM,
                             serialization.PrivateFormat.PKCS8,
                             serialization.NoEncryption())
  for curve in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()):
    private = pem(ec.generate_private_key(curve))
    signature = keys.sign(private, 'a', b'x')
    keys.check(keys.public(private), 'a', b'x', signature)
    assert code_of(keys.check, keys.public(private), 'b', b'x',
                   signature) == 'E_SIG'
  with pytest.raises(ValueError, match='key: expected one on a curve'):
    keys.sign(pem(ed25519.Ed25519PrivateKey.generate()), 'a', b'x')


# One file.


def test_from_store_to_store(file, other, shop, kept):
  kept_there = transfer.receive(other, file, ALICE, host=small.host(),
                                ref='here')
  found = load.load(other, 'here', ALICE, small.host())
  assert str(found.decision) == 'resumed(11)' and found.tokens is None
  assert found.about['provenance']['how'] == 'exported'
  assert found.about['provenance']['parents'] == [
      {'id': kept, 'role': 'exported'}]
  assert kept_there.id == found.id and collect.check(other) == []
  # Again: the same bytes are the same artifact.
  assert transfer.receive(other, file, ALICE).id == found.id
  # Deleted, it may come again.
  collect.delete(other, found.id, 'alice')
  assert transfer.receive(other, file, ALICE, ref='again').ref == 'again'
  assert other.find('again') == found.id and collect.check(other) == []
  units = {row['unit'] for row in shop.catalog.rows('ledger')}
  assert 'exports' in units


def test_what_is_not_taken(file, other, place, private, tmp_path, shop, kept):
  def receive(*args, **options):
    return code_of(transfer.receive, *args, **options)
  assert receive(other, file, Principal('eve', 'globex')) == 'E_ACL'
  stranger = objects.Store(tmp_path / 's', objects.Secrets(tmp_path / 'k'),
                           clock=small.Clock())
  assert receive(stranger, file, ALICE) == 'E_UNSIGNED'
  nolist = make(place, private, name='nolist')
  assert receive(nolist, file, ALICE) == 'E_CRL_STALE'
  keyless = make(tmp_path, private, name='keyless')
  revoked.install(keyless, 'acme', transfer.issue_revocations(
      shop, keys.Signer(private['acme'])))
  assert receive(keyless, file, ALICE) == 'E_SEALED'
  wrong = small.host(small.lm.LanguageModel(dataclasses.replace(
      small.CONFIG, groups=2 * small.CONFIG.groups)))
  assert receive(other, file, ALICE, host=wrong) == 'E_SCHEMA'
  portable.pack(shop.place(kept), tmp_path / 'mac.tar')
  assert receive(other, tmp_path / 'mac.tar', ALICE) == 'E_UNSIGNED'
  assert other.catalog.objects() == {}
  assert not list((other.path / 'tmp').iterdir())
  assert [row['code'] for row in other.catalog.rows()] == [
      '', '', 'E_ACL', 'E_SCHEMA', 'E_UNSIGNED']  # first its trust and its list


def test_what_may_not_leave(shop, signer, tmp_path):
  mint.mint(shop, small.state(), 0, small.host(), small.TERMS, ref='stays')
  assert code_of(transfer.export, shop, 'stays', ALICE, signer,
                 tmp_path / 'x') == 'E_ACL'
  assert code_of(transfer.export, shop, 'open', Principal('bob', 'acme'),
                 signer, tmp_path / 'x') == 'E_ACL'
  (tmp_path / 'x').write_bytes(b'')
  with pytest.raises(ValueError, match='exists already'):
    transfer.export(shop, 'open', ALICE, signer, tmp_path / 'x')


def test_revoked_before_it_arrives(file, other, shop, kept, signer):
  transfer.receive(other, file, ALICE, ref='here')
  one = load.load(other, 'here', ALICE, small.host()).id
  from statejax.artifact import revoke
  shop.catalog.keep_revocations(revoke.extended(
      shop.catalog.revocations(), [('artifact', one)],
      now=shop.catalog.clock()))
  old = transfer.issue_revocations(shop, signer)
  revoked.install(other, 'acme', old)
  assert str(load.load(other, 'here', ALICE, small.host()).decision) == (
      'refused(E_REVOKED)')
  assert code_of(transfer.receive, other, file, ALICE) == 'E_REVOKED'
  newer = transfer.issue_revocations(shop, signer)
  revoked.install(other, 'acme', newer)
  assert code_of(revoked.install, other, 'acme', old) == 'E_TRUST'


def hostile(data, rng):
  """Archives that are not quite right."""
  yield data[:-1]
  yield data + b'\0'
  yield data[:512] + data
  yield data[1024:]
  yield b''
  yield data.replace(b'plain.json', b'../ain.json', 1)
  yield data.replace(b'plain.json', b'/etc/xjson', 1)
  at = data.index(b'plain.json')
  yield data[:at + 156] + b'2' + data[at + 157:]  # a symbolic link
  odd = tarfile.TarInfo.frombuf(data[:512], 'ascii', 'strict')
  odd.mtime = 5  # a header that is valid, and not the one that it can have
  yield odd.tobuf(tarfile.USTAR_FORMAT, 'ascii', 'strict') + data[512:]
  for _ in range(60):
    at = rng.randrange(len(data))
    yield data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def test_hostile_files(file, other, tmp_path):
  tried = 0
  for bad in hostile(file.read_bytes(), random.Random(0)):
    (tmp_path / 'bad').write_bytes(bad)
    assert code_of(transfer.receive, other, tmp_path / 'bad', ALICE)
    tried += 1
  print(f'hostile archives, sealed: tried {tried}, accepted wrongly '
        f'{len(other.catalog.objects())}')
  assert other.catalog.objects() == {} and tried > 60
  assert not list((other.path / 'tmp').iterdir())


def test_looking_at_a_file(file):
  with verify.opened(file) as folder:
    found = verify.verify(folder)
  text = '\n'.join(desk.describe(found))
  assert 'whose: alice of acme' in text and 'sealed: aes256gcm1' in text
  assert 'vouched for by: nobody asked' in text
