"""All that is done to a store, again and again: nothing grows but its log.

Memory, descriptors, secrets and what lies in the store's directories are as
after the first rounds; the store is whole after each.
"""

import os
import resource

import bare
import pytest

pytest.importorskip('cryptography', reason='[sign] is not installed')

from statejax.artifact import (
  access,
  collect,
  desk,
  grant,
  keys,
  layout,
  mint,
  objects,
  revoked,
  transfer,
  trust,
)
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE, BOB = Principal('alice', 'acme'), Principal('bob', 'globex')
OPEN = {'governance': {'export': 'any'}, 'sealed': 'aes256gcm1'}
WARM, MIB = 10, 1 << 20


class Soak:
  """Two stores of one organisation, and a bucket."""

  def __init__(self, path):
    self.path, root = path, keys.Signer(keys.generate())
    self.signer, self.bob = keys.Signer(keys.generate()), keys.generate()
    secrets = objects.Secrets(path / 'secrets')
    self.here, self.there = (
        objects.Store(path / name, secrets, root=keys.public(root.private))
        for name in ('here', 'there'))
    document = root.document('trust', trust.extended(
        None, keys.public(self.signer.private), 'acme'))
    for shop in (self.here, self.there):
      trust.install(shop, document)
    revoked.install(self.there, 'acme', transfer.issue_revocations(
        self.here, self.signer))

  def round(self, number):
    """Every verb once; what is in the way is refused."""
    shop, file = self.here, self.path / 'out.tar'
    version = (shop.catalog.ref('chat') or ('', 0))[1]
    plain = bare.mint(shop, 2 * number, ref='chat', expect=version)
    sealed = bare.mint(shop, 2 * number + 1, **OPEN)
    for id in (plain.id, sealed.id):
      assert desk.examine(shop, id, ALICE, 'resume').id == id
    about = desk.examine(shop, sealed.id, ALICE, 'fork').about
    child = mint.fork(shop, mint.Parent(sealed.id, about), ALICE)
    desk.lineage(shop, child.id, ALICE)
    with pytest.raises(Refused, match='E_ACL'):
      desk.examine(shop, sealed.id, BOB, 'resume')
    data = grant.issue(shop, sealed.id, ALICE, keys.public(self.bob),
                       ['inspect'], self.signer)
    nonce = grant.challenge(shop)
    who = grant.present(shop, data, about, sealed.id, BOB, nonce,
                        grant.prove(self.bob, nonce, data))
    desk.examine(shop, sealed.id, who, 'inspect')
    sent = transfer.export(shop, sealed.id, ALICE, self.signer, file)
    transfer.receive(self.there, file, ALICE)
    desk.withdraw(self.there, sent, ALICE)
    file.unlink()
    # What is damaged is refused, and collected all the same.
    broken = shop.place(child.id) / 'manifest.json'
    broken.chmod(0o600)
    broken.write_bytes(layout.read(shop.place(child.id), 'manifest.json')[1:])
    with pytest.raises(Refused):
      desk.examine(shop, child.id, ALICE, 'resume')
    desk.withdraw(shop, sealed.id, ALICE)
    with pytest.raises(Refused, match='E_REVOKED'):
      desk.examine(shop, sealed.id, ALICE, 'resume')
    bare.files.cache_clear()
    for store in (shop, self.there):
      collect.collect(store, grace=0)
      collect.account(store)

  def size(self):
    """What must not grow: files and bytes but the catalogs', descriptors."""
    files = [p.stat().st_size for p in self.path.rglob('*')
             if p.is_file() and not p.name.startswith('index.db')]
    return len(files), sum(files), len(os.listdir('/proc/self/fd'))


def held():
  """Bytes of memory the process has now."""
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize('rounds', [
    20, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_grows(memory, rounds):
  soak = Soak(memory)
  for number in range(rounds):
    soak.round(number)
    if number == WARM - 1:
      start, before = soak.size(), held()
  grown = held() - before
  print(f'soak: {rounds} rounds of every verb, memory {grown / MIB:+.1f} MiB, '
        f'files {soak.size()[0] - start[0]:+d}, bytes '
        f'{soak.size()[1] - start[1]:+d}')
  assert soak.size() == start
  # What reads the whole log, as `account` does, holds it for a moment.
  assert grown < 2 * MIB + rounds * 40_000
  assert collect.check(soak.here) == collect.check(soak.there) == []
  assert access.owns(desk.examine(soak.here, 'chat', ALICE, 'inspect').about,
                     ALICE)
