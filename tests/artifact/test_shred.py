"""Destroyed keys: nothing that is left opens what was revoked or deleted."""

import base64
import contextlib
import dataclasses
import os
import re
import shutil

import pytest
import small_store as small

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

from test_trust import ALICE, OPEN, code_of, make, private, signer  # noqa: F401

from statejax.artifact import (
  canonical,
  collect,
  desk,
  grant,
  keys,
  layout,
  load,
  manifest,
  mint,
  objects,
  revoke,
  revoked,
  sealing,
  transfer,
  trust,
)
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

FAMILY = dataclasses.replace(OPEN, revoke_scope='descendants')


class Killed(BaseException):
  """What no code may catch."""


@pytest.fixture
def shop(tmp_path, private):  # noqa: F811
  return make(tmp_path, private)


def add(shop, terms=OPEN, **options):
  return mint.mint(shop, small.state(), 0, small.host(), terms, **options).id


def opens(shop, id):
  return str(load.load(shop, id, ALICE, small.host()).decision)


def about_of(folder):
  return manifest.parse(layout.read(folder, manifest.NAME))


class Copy:
  """A copy of an artifact, and the keys that open it as long as any does."""

  def __init__(self, shop, id, path):
    self.id, self.path, self.about = id, path, about_of(shop.place(id))
    wrapping = shop.secrets.find(self.about['seal']['kek'])
    self.forms = [form for key in (
        sealing.data_key(shop, id, self.about), wrapping) if key
        for form in (key, key.hex().encode(), base64.b64encode(key))]
    shutil.copytree(shop.place(id), path)

  def opened_by(self, folders):
    """How often anything that lies in directories opens it: (tried, opened)."""
    whole = [p.read_bytes() for folder in folders
             for p in sorted(folder.rglob('*')) if p.is_file()]
    opened = sum(form in data for form in self.forms for data in whole)
    # Whatever could be a key: each text of 32 bytes in hex, and each run of
    # them in what is as short as a file of keys.
    found = {bytes.fromhex(text.decode()) for data in whole
             for text in re.findall(rb'(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])',
                                    data)}
    found |= {data[i:i + 32] for data in whole if len(data) <= 80
              for i in range(len(data) - 31)}
    seal, nonce = self.about['seal'], self.about['nonce']
    first = self.about['files'][0][0]
    for key in found:
      for call, args in (
          (sealing.unwrap, (key, seal['wrapped'], nonce)),
          (sealing.unseal, (key, nonce, first,
                            layout.read(self.path, first)))):
        with contextlib.suppress(Refused):
          call(*args)
          opened += 1
    return len(self.forms) * len(whole) + 2 * len(found), opened


def test_revoked_and_nothing_left_opens_it(shop, tmp_path):
  one = add(shop, FAMILY, ref='chat')
  other = add(shop)
  child = mint.fork(shop, mint.Parent(one, about_of(shop.place(one))), ALICE,
                    ref='fork').id
  copies = [Copy(shop, id, tmp_path / f'copy-{id[4:8]}')
            for id in (one, child)]
  everything = [tmp_path]
  # It would see a key that is there.
  before = [copy.opened_by(everything) for copy in copies]
  desk.withdraw(shop, one, ALICE)
  after = [copy.opened_by(everything) for copy in copies]
  print(f'shredded: tried {sum(n for n, _ in after)}, accepted wrongly '
        f'{sum(n for _, n in after)}, before it '
        f'{sum(n for _, n in before)}')
  assert all(n for _, n in before) and not any(n for _, n in after)
  assert opens(shop, one) == opens(shop, child) == 'refused(E_REVOKED)'
  assert opens(shop, other) == 'resumed(11)'
  # Its owner may still look at it, and delete it.
  assert desk.examine(shop, one, ALICE, 'inspect').plain is None
  for copy in copies:
    assert code_of(sealing.data_key, shop, copy.id, copy.about) == 'E_SEALED'
    with pytest.raises(Refused, match='E_SEALED'):
      with sealing.opened(shop, copy.path, copy.about):
        pass


@pytest.mark.parametrize('moment', [0, 1])
def test_killed_between_the_list_and_the_keys(shop, monkeypatch, moment):
  one = add(shop, FAMILY, ref='chat')
  child = mint.fork(shop, mint.Parent(one, about_of(shop.place(one))), ALICE,
                    ref='fork').id
  names = [about_of(shop.place(id))['seal']['kek'] for id in (one, child)]
  destroy, done = shop.secrets.destroy, []
  def killed(name):
    if len(done) == moment:
      raise Killed
    done.append(destroy(name))
  monkeypatch.setattr(shop.secrets, 'destroy', killed)
  with pytest.raises(Killed):
    desk.withdraw(shop, one, ALICE)
  monkeypatch.undo()
  left = [name for name in names if shop.secrets.find(name)]
  assert len(left) == 2 - moment and shop.catalog.condemned()
  again = shop.again()
  assert not any(map(again.secrets.find, names))
  assert not again.catalog.condemned()


def test_a_collection_destroys_what_a_list_names(shop):
  one, other = add(shop, ref='a'), add(shop, ref='b')
  name = about_of(shop.place(one))['seal']['kek']
  shop.catalog.keep_revocations(revoke.extended(
      None, [('artifact', one)], now=shop.catalog.clock()))
  assert shop.secrets.find(name)
  collect.collect(shop)
  assert not shop.secrets.find(name) and opens(shop, other) == 'resumed(11)'


def test_deleted(shop, tmp_path):
  one, two, three = (add(shop) for _ in range(3))
  copies = [Copy(shop, id, tmp_path / id[4:8]) for id in (one, two, three)]
  collect.delete(shop, one, 'alice')
  assert copies[0].opened_by([tmp_path])[1] == 0
  shop.catalog.move('keep', three, 0)
  collect._take(shop, two, 'gc', 'gc', lambda id: True)  # and then a kill
  assert copies[1].opened_by([tmp_path])[1]
  shop.again().close()
  assert copies[1].opened_by([tmp_path])[1] == 0
  collect.collect(shop)
  assert opens(shop, three) == 'resumed(11)'
  # A mint that was killed leaves a key that nothing needs.
  left = sealing.own_name(shop, '5' * 32)
  sealing.new_key(shop, {'nonce': '5' * 32}, left)
  there = {copies[2].about['seal']['kek']}
  collect.collect(shop)
  assert shop.secrets.names(sealing.OWN) == {left, *there}
  shop.catalog.clock.now += 3600
  collect.collect(shop)
  assert shop.secrets.names(sealing.OWN) == there
  assert shop.catalog.expected().keys() == there


def test_pushed_opens_again_until_it_is_revoked(shop, tmp_path):
  one = add(shop)
  url = f'file://{tmp_path}/bucket'
  transfer.push(shop, one, ALICE, url)
  copy = Copy(shop, one, tmp_path / 'copy')
  collect.delete(shop, one, 'alice')
  transfer.pull(shop, url, one, ALICE)
  assert opens(shop, one) == 'resumed(11)'
  desk.withdraw(shop, one, ALICE)
  assert copy.opened_by([tmp_path])[1] == 0


def test_an_installed_list_destroys_a_granted_copy(
    tmp_path, private, signer):  # noqa: F811
  shop = make(tmp_path, private)
  one = add(shop, dataclasses.replace(OPEN, export='any'))
  there = objects.Store(tmp_path / 'there', objects.Secrets(
      tmp_path / 'elsewhere'), clock=small.Clock(), root=shop.root)
  trust.install(there, (shop.path / 'trust' / trust.FILE).read_bytes())
  revoked.install(there, 'acme',
                            transfer.issue_revocations(shop, signer))
  transfer.export(shop, one, ALICE, signer, tmp_path / 'one.tar')
  # The owner keeps what was exported, too, so as to grant it.
  revoked.install(shop, 'acme',
                            transfer.issue_revocations(shop, signer))
  sent = transfer.receive(shop, tmp_path / 'one.tar', ALICE, ref='sent').id
  given = grant.issue(shop, sent, ALICE, keys.public(private['other']),
                      ('inspect', 'resume'), signer)
  transfer.receive(there, tmp_path / 'one.tar', Principal('dave', 'globex'),
                   granted=(given, private['other']))
  assert there.secrets.find(sealing.data_name(there, sent))
  copy = Copy(there, sent, tmp_path / 'copy')
  destroy = there.secrets.destroy
  def killed(name):
    raise Killed
  there.secrets.destroy = killed
  body = revoke.extended(shop.catalog.revocations(), [('artifact', sent)],
                         now=shop.catalog.clock())
  with pytest.raises(Killed):
    revoked.install(there, 'acme', signer.document(
        'crl', canonical.dumps(body)))
  there.secrets.destroy = destroy
  assert there.secrets.find(sealing.data_name(there, sent))
  there = there.again()
  assert not there.secrets.find(sealing.data_name(there, sent))
  assert copy.opened_by([there.path, tmp_path / 'elsewhere'])[1] == 0


def test_no_stranger_names_the_key_of_another(shop, signer):  # noqa: F811
  about = about_of(shop.place(add(shop)))
  assert code_of(sealing.check_foreign, about) == 'E_SEALED'
  theirs = about | {'seal': about['seal'] | {'kek': shop.secrets.org_name(
      'acme', 'kek')}}
  sealing.check_foreign(theirs)


def test_destroyed_by_two_at_once(shop, monkeypatch):
  """Whoever is faster; nothing comes back."""
  shop.secrets.put('data-0', b'k' * 32)
  path = shop.secrets.path / 'data-0.secret'
  sync = objects.commit.sync
  monkeypatch.setattr(objects.commit, 'sync', lambda p: (
      os.path.exists(path) and path.unlink(), sync(path.parent)))
  shop.secrets.destroy('data-0')
  assert not path.exists()
