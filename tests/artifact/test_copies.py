"""No key is destroyed that another copy of a store, or another store, needs."""

import os
import shutil

import bare
import pytest

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

import test_trust
from test_installed import add, child, parent_of
from test_trust import ALICE, code_of, private, signer  # noqa: F401

from statejax.artifact import (
  collect,
  desk,
  home,
  objects,
  sealing,
  transfer,
  withdraw,
)

HOUR = 3600


@pytest.fixture
def shop(tmp_path, private):  # noqa: F811
  return test_trust.make(tmp_path, private)


def copied(shop, path, secrets=None):
  """A copy of a store, opened with the same secrets or with others."""
  shutil.copytree(shop.path, path)
  return objects.Store(path, secrets or shop.secrets, clock=shop.catalog.clock,
                       root=shop.root)


def opens(shop, id):
  """Whether an artifact's key is there."""
  about = bare.verify.head(shop.place(id))[2]
  try:
    return len(sealing.data_key(shop, id, about)) == 32
  except bare.objects.Refused:
    return False


def test_a_collection_of_an_older_copy(shop, tmp_path):
  old = add(shop, 1)
  copy = copied(shop, tmp_path / 'copy')
  new = add(shop, 2)
  # What was copied later than the catalog is in no catalog there.
  shutil.copytree(shop.place(new), copy.place(new))
  os.utime(copy.place(new), (0, 0))
  shop.catalog.clock.now += 2 * HOUR
  assert collect.collect(copy).orphans == (new,)
  assert opens(shop, new) and opens(shop, old)
  # Also where the store itself is not to be seen.
  shutil.copytree(shop.place(new), copy.place(new))
  os.utime(copy.place(new), (0, 0))
  shop.path.rename(tmp_path / 'unmounted')
  assert collect.collect(copy).orphans == (new,)
  (tmp_path / 'unmounted').rename(shop.path)
  assert opens(shop, new)


def test_a_mint_under_way_while_it_was_copied(shop, tmp_path):
  about = bare.about(1, sealed='aes256gcm1')
  sealing.new_key(shop, about, sealing.own_name(shop, about['nonce']))
  copy = copied(shop, tmp_path / 'copy')
  for path in (shop.path, tmp_path / 'unmounted'):
    if path != shop.path:
      shop.path.rename(path)
    shop.catalog.clock.now += 2 * HOUR
    collect.collect(copy, grace=0)
    assert shop.secrets.find(sealing.own_name(shop, about['nonce']))


def test_deleted_or_revoked_in_a_copy(shop, tmp_path):
  one, two = add(shop, 1), add(shop, 2)
  copy = copied(shop, tmp_path / 'copy')
  with pytest.raises(ValueError, match=f'a copy of {shop.path}, which opens'):
    desk.delete(copy, one, ALICE)
  with pytest.raises(ValueError, match='it is revoked here, but 1 keys stay'):
    withdraw.withdraw(copy, two, ALICE)
  copy.catalog.move('keep', two, 0)
  collect.collect(copy.again(), grace=0)
  assert opens(shop, one) and opens(shop, two)
  assert collect.check(shop) == collect.check(copy) == []
  # Once the copy is the only one, what was revoked is destroyed.
  shop.path.rename(tmp_path / 'away')
  shop.catalog.clock.now += 2 * HOUR
  collect.collect(copy.again())
  (tmp_path / 'away').rename(shop.path)
  assert opens(shop, one) and not opens(shop, two)


def test_without_its_secrets(shop, tmp_path):
  """What is revoked or deleted there is told to wait."""
  one, two, three = (add(shop, i) for i in range(3))
  others = objects.Secrets(tmp_path / 'others')
  blind = objects.Store(shop.path, others, clock=shop.catalog.clock)
  with pytest.raises(ValueError, match='deleted here, but 1 keys stay until'):
    desk.delete(blind, one, ALICE)
  with pytest.raises(ValueError, match='it is revoked here, but 1 keys stay'):
    withdraw.withdraw(blind, two, ALICE)
  shop.catalog.move('keep', three, 0)
  collect.collect(blind.again(), grace=0)
  assert len(shop.secrets.names(sealing.OWN)) == 3
  assert [text.count('--secrets') for text in collect.check(blind)] == [1]
  assert code_of(lambda: blind.secret) == 'E_IO'
  assert not others.names('store-') and not others.names('home-')
  # Whoever opens it with them ends it.
  shop = shop.again()
  assert len(shop.secrets.names(sealing.OWN)) == 1 and opens(shop, three)
  assert not shop.catalog.condemned() and collect.check(shop) == []


def test_a_first_mint_that_was_killed(shop, monkeypatch):
  """After its key was written down, before it was made."""
  get = objects.Secrets.get
  def killed(self, name):
    if name.startswith(sealing.OWN):
      raise KeyboardInterrupt
    return get(self, name)
  with monkeypatch.context() as patch:
    patch.setattr(objects.Secrets, 'get', killed)
    with pytest.raises(KeyboardInterrupt):
      add(shop, 1)
  assert shop.catalog.expected()
  shop = shop.again()
  assert home.have(shop) and opens(shop, add(shop, 2))


def test_a_copy_that_mints_first(shop, tmp_path):
  copy = copied(shop, tmp_path / 'copy')
  theirs, mine = add(copy, 1), add(shop, 2)
  with pytest.raises(ValueError, match='this is a copy of'):
    desk.delete(copy, theirs, ALICE)
  desk.delete(shop, mine, ALICE)
  assert len(shop.secrets.names(sealing.OWN)) == 1


def test_a_store_that_was_moved(shop, tmp_path):
  ids = [add(shop, i) for i in range(4)]
  where = tmp_path / 'verlegt nach Köln'
  shop.path.rename(where)
  def opened(path, secrets=shop.secrets):
    return objects.Store(path, secrets, clock=shop.catalog.clock)
  def deletes(there, id):
    desk.delete(there, id, ALICE)
    return not there.secrets.find(sealing.own_name(there, nonces[id]))
  nonces = {id: parent_of(opened(where), id).about['nonce'] for id in ids}
  assert deletes(opened(where), ids[0])
  # Under another name of the same directory.
  (tmp_path / 'link').symlink_to(where)
  assert deletes(opened(tmp_path / 'link'), ids[1])
  # A copy that has secrets of its own is a store of its own.
  shutil.copytree(shop.secrets.path, tmp_path / 'others')
  shutil.copytree(where, tmp_path / 'copy')
  assert deletes(opened(tmp_path / 'copy', objects.Secrets(
      tmp_path / 'others')), ids[2])
  assert all(opens(opened(where), id) for id in ids[2:])
  # What says where it lies must be whole.
  note, = shop.secrets.path.glob('home-*')
  note.write_text('[]')
  assert code_of(home.elsewhere, opened(where)) == 'E_IO'


def test_objects_that_are_not_to_be_seen(shop, tmp_path):
  one, three = add(shop, 1), add(shop, 3)
  about = bare.about(2, sealed='aes256gcm1')
  left = sealing.own_name(shop, about['nonce'])
  sealing.new_key(shop, about, left)
  (shop.path / 'objects').rename(tmp_path / 'elsewhere')
  (shop.path / 'objects').mkdir()
  shop.catalog.clock.now += 2 * HOUR
  shop.catalog.move('keep', one, 0)
  shop.catalog.move('also', three, 0)
  collect.collect(shop)
  assert shop.secrets.find(left)  # nobody knows now
  assert code_of(collect.delete, shop, one, 'alice') == 'E_IO'
  (shop.path / 'objects').rmdir()
  (tmp_path / 'elsewhere').rename(shop.path / 'objects')
  assert opens(shop, one)
  collect.collect(shop)
  assert opens(shop, one) and not shop.secrets.find(left)


def test_an_orphan_keeps_its_key(shop):
  """Until it is adopted, or collected."""
  ids = [add(shop, i) for i in range(2)]
  names = [parent_of(shop, id).about['seal']['kek'] for id in ids]
  with shop.catalog.transaction():  # as where both mints were killed
    shop.catalog._all('delete from art')
    shop.catalog._all('delete from ledger')
    shop.catalog._all("update secret set id = ''")
  shop.catalog.clock.now += 2 * HOUR
  collect.collect(shop, grace=HOUR)
  assert all(map(shop.secrets.find, names))
  collect.adopt(shop, ids[0], 'alice')
  shop.catalog.move('keep', ids[0], 0)
  os.utime(shop.place(ids[1]), (0, 0))
  assert collect.collect(shop).orphans == (ids[1],)
  assert opens(shop, ids[0]) and not shop.secrets.find(names[1])


def test_a_damaged_manifest_frees_its_key(shop):
  """The catalog knows whose it was."""
  one = add(shop, 1)
  file = shop.place(one) / 'manifest.json'
  file.chmod(0o600)
  file.write_bytes(b'{')
  collect.delete(shop, one, 'alice')
  shop.catalog.clock.now += 2 * HOUR
  collect.collect(shop)
  assert shop.secrets.names(sealing.OWN) == set()


def test_a_granted_key_is_of_one_store(shop, tmp_path, private):  # noqa: F811
  other = test_trust.make(tmp_path, private, name='other')
  id = 'sj1-' + 'a' * 64
  for one in (shop, other):
    sealing.keep_granted(one, id, b'k' * 32)
  # The artifact did not come to one of them.
  shop.catalog.clock.now += 2 * HOUR
  collect.collect(shop)
  about = bare.about(1)
  assert code_of(sealing.data_key, shop, id, about | {'seal': {
      'kek': 'org-x'}}) == 'E_SEALED'
  assert sealing.data_key(other, id, about) == b'k' * 32
  # One that an earlier release has kept for all of them is found by all.
  for name in sealing.shared_names(id):
    shop.secrets.put(name, b'o' * 32)
    assert sealing.data_key(shop, id, about) == b'o' * 32
    shop.secrets.destroy(name)


def test_what_an_earlier_release_has_kept(shop):
  """It stays with a deletion, which others do not know of; not revoked."""
  one, two = add(shop, 1), add(shop, 2)
  names = [sealing.shared_names(id)[0] for id in (one, two)]
  for name in names:
    shop.secrets.put(name, b'o' * 32)
  desk.delete(shop, one, ALICE)
  desk.withdraw(shop, two, ALICE)
  assert shop.secrets.names('data-') == {names[0]}


@pytest.mark.parametrize('by, what', [('workflow', 'support'), ('root', '')])
def test_pushed_deleted_and_then_revoked(shop, signer, tmp_path,  # noqa: F811
                                         by, what):
  first = add(shop, 1, scope='descendants')
  one = child(shop, parent_of(shop, first), 2)
  name = sealing.pushed_name(shop, one)
  transfer.push(shop, one, ALICE, f'file://{tmp_path}/bucket')
  desk.delete(shop, one, ALICE)
  assert shop.secrets.find(name)
  if by == 'root':
    desk.withdraw(shop, first, ALICE)
  else:
    withdraw.withdraw(shop, what, ALICE, by, signer=signer)
  assert not shop.secrets.find(name)
  assert code_of(transfer.pull, shop, f'file://{tmp_path}/bucket', one,
                 ALICE) == 'E_REVOKED'
