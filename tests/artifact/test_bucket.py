"""Artifacts in a bucket: made only where nothing is, the manifest last."""

import dataclasses

import pytest
import small_store as small

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

import test_trust
from test_trust import ALICE, OPEN, code_of, private, signer  # noqa: F401

from statejax.artifact import (
  bucket,
  collect,
  keys,
  load,
  mint,
  objects,
  revoked,
  transfer,
  trust,
)
from statejax.artifact.access import Principal


@pytest.fixture(scope='module')
def shop(tmp_path_factory, private):  # noqa: F811
  return test_trust.make(tmp_path_factory.mktemp('bucket'), private)


@pytest.fixture(scope='module')
def kept(shop):
  return mint.mint(shop, small.state(), 0, small.host(),
                   dataclasses.replace(OPEN, export='any'), ref='open').id


@pytest.fixture
def url(tmp_path):
  return f'file://{tmp_path}/bucket/states'


class Failing:
  """A bucket whose connection breaks after so many writes."""

  def __init__(self, bucket, writes):
    self.bucket, self.writes, self.keys = bucket, writes, []

  def write(self, key, data, **options):
    if len(self.keys) == self.writes:
      raise OSError('connection lost')
    self.keys.append(key)
    return self.bucket.write(key, data, **options)

  def read(self, key):
    return self.bucket.read(key)


def test_pushed_deleted_pulled(shop, url):
  terms = dataclasses.replace(OPEN, export='any')
  id = mint.mint(shop, small.state(), 0, small.host(), terms).id
  assert transfer.push(shop, id, ALICE, url) == id
  assert transfer.push(shop, id, ALICE, url) == id  # nothing to do
  collect.delete(shop, id, 'alice')
  assert str(load.load(shop, id, ALICE, small.host()).decision) == (
      'refused(E_ACL)')
  for _ in range(2):
    assert transfer.pull(shop, url, id, ALICE).id == id
  found = load.load(shop, id, ALICE, small.host())
  assert str(found.decision) == 'resumed(11)'
  assert not collect.check(shop)
  mallory = Principal('mallory')
  assert code_of(transfer.pull, shop, url, id, mallory) == 'E_ACL'
  assert code_of(transfer.push, shop, id, mallory, url) == 'E_ACL'
  never = mint.mint(shop, small.state(), 0, small.host(), small.TERMS).id
  assert code_of(transfer.push, shop, never, ALICE, url) == 'E_ACL'


def test_the_manifest_comes_last(shop, kept, url, monkeypatch):
  sound, count = bucket.opened(url), 0
  for writes in range(1, 99):
    failing = Failing(sound, writes)
    monkeypatch.setattr(bucket, 'opened', lambda url, one=failing: one)
    try:
      transfer.push(shop, kept, ALICE, url)
    except ValueError as error:
      assert error.code == 'E_IO'
      assert code_of(transfer.pull, shop, url, kept, ALICE) == 'E_LAYOUT'
      count += 1
      continue
    break
  assert count >= 8 and failing.keys[-1].endswith('/manifest.json')
  assert len(failing.keys) == count + 1
  place = shop.path / 'tmp' / 'by_hand'
  place.mkdir()
  bucket.pull(url, kept, place)
  assert {p.read_bytes() for p in place.rglob('*') if p.is_file()} == {
      p.read_bytes() for p in shop.place(kept).rglob('*') if p.is_file()}


def test_nothing_is_overwritten(shop, kept, url):
  name = f'objects/{kept[4:6]}/{kept[4:]}/plain.json'
  store = bucket.opened(url)
  store.write(name, b'other').result()
  assert code_of(transfer.push, shop, kept, ALICE, url) == 'E_FILES'
  assert store.read(name).result().value == b'other'
  assert code_of(transfer.pull, shop, url, kept, ALICE) == 'E_LAYOUT'


@pytest.mark.parametrize('name, code', [
    ('plain.json', 'E_FILES'), ('manifest.mac', 'E_SIG'),
    ('manifest.json', 'E_ID')])
def test_changed_in_the_bucket(shop, kept, url, name, code):
  transfer.push(shop, kept, ALICE, url)
  store = bucket.opened(url)
  key = f'objects/{kept[4:6]}/{kept[4:]}/{name}'
  data = store.read(key).result().value
  # A digit of a digest: what it says stays well-formed.
  at = data.rindex(b'"sha256:') + 20 if name == 'manifest.json' else 5
  other = b'1' if data[at:at + 1] != b'1' else b'2'
  store.write(key, data[:at] + other + data[at + 1:]).result()
  assert code_of(transfer.pull, shop, url, kept, ALICE) == code
  store.write(key, None).result()
  assert code_of(transfer.pull, shop, url, kept, ALICE) in (
      'E_LAYOUT', 'E_FILES')


def test_to_another_store(shop, kept, url, signer, private,  # noqa: F811
                          tmp_path):
  id = transfer.export(shop, kept, ALICE, signer, url)
  assert id != kept
  theirs = objects.Store(
      tmp_path / 'theirs', shop.secrets, clock=shop.catalog.clock,
      root=keys.public(private['root']))
  trust.install(theirs, keys.Signer(private['root']).document(
      'trust', trust.extended(None, keys.public(private['acme']), 'acme')))
  revoked.install(theirs, 'acme',
                            transfer.issue_revocations(shop, signer))
  # Not its own: it has to be taken in as a stranger's.
  assert code_of(transfer.pull, theirs, url, id, ALICE) == 'E_UNSIGNED'
  assert transfer.receive(theirs, f'{url}/{id}', ALICE, ref='x').ref == 'x'
  assert str(load.load(theirs, 'x', ALICE, small.host()).decision) == (
      'resumed(11)')


@pytest.mark.parametrize('text, message', [
    ('nothing', 'expected a URL, "/" and the id'),
    ('gs://bucket/sj1-0', 'expected a URL, "/" and the id'),
    ('az://bucket/sj1-' + '0' * 64, 'tensorstore opens .*az')])
def test_what_is_no_url(shop, text, message):
  with pytest.raises(ValueError, match=message):
    url, id = bucket.split(text)
    transfer.pull(shop, url, id, ALICE)
  assert bucket.split('gs://b/a/sj1-' + 'f' * 64) == (
      'gs://b/a', 'sj1-' + 'f' * 64)
