"""What stems from elsewhere, and what an owner may do with what does not count.

Artifacts are of no model, but where they are loaded.
"""

import dataclasses

import bare
import pytest
import small_store as small

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

from test_installed import add, give, make, parent_of, says  # noqa: F401
from test_trust import ALICE, code_of, private, signer  # noqa: F401

from statejax.artifact import (
  collect,
  desk,
  foreign,
  keys,
  layout,
  load,
  manifest,
  mint,
  transfer,
  trust,
  withdraw,
)
from statejax.artifact.access import Principal
from statejax.artifact.compat import Ask
from statejax.artifact.outcome import Refused

BOB, DAY = Principal('bob', 'acme'), 86400


def child(shop, parent, number, role='state'):
  """As `mint.mint` makes it of a parent."""
  source = parent_of(shop, parent).about['provenance']
  root = parent if source['root'] == 'self' else source['root']
  return add(shop, number, provenance={
      'root': root, 'depth': source['depth'] + 1,
      'parents': [{'id': parent, 'role': role}]})


@pytest.fixture
def came(make, signer, tmp_path):  # noqa: F811
  """(home, the artifact there, the store that took it in, its id there)."""
  home, here = make('home'), make('here')
  id = add(home, 1)
  transfer.export(home, id, ALICE, signer, tmp_path / 'a.tar')
  for shop in (home, here):  # it comes later than it says that it was made
    shop.catalog.clock.now += 1000
  give(home, here, signer)
  return home, id, here, transfer.receive(
      here, tmp_path / 'a.tar', ALICE, ref='here').id


def family(shop, id):
  """What is made of it: forked, resumed, migrated, merged, and of that again.
  """
  made = [mint.fork(shop, parent_of(shop, id), ALICE).id,
          *(child(shop, id, 10 + i, role) for i, role in enumerate(
              ('state', 'migrated', 'slots')))]
  return made + [child(shop, made[0], 20), child(
      shop, child(shop, made[1], 21), 22)]


def ruled(shop, private, **changes):  # noqa: F811
  """Installs a trust document that says something else of the key."""
  trust.install(shop, keys.Signer(private['root']).document(
      'trust', trust.extended(trust.load(shop), keys.public(private['acme']),
                              'acme', **changes)))


def retire(home, here, id, private, signer):  # noqa: F811
  trust.install(here, keys.Signer(private['root']).document(
      'trust', trust.retired(trust.load(here), keys.public(private['acme']),
                             'acme')))


def classes(home, here, id, private, signer):  # noqa: F811
  trust.install(here, keys.Signer(private['root']).document(
      'trust', trust.ruled(trust.load(here), classes=['public'])))


def role(home, here, id, private, signer):  # noqa: F811
  ruled(here, private, may=['grant', 'revoke'])


def ended(home, here, id, private, signer):  # noqa: F811
  """Before it came here, whatever date it says."""
  here.catalog._base.execute('update foreign_art set seen = seen + 5')
  ruled(here, private, not_after=here.catalog.clock() + 2)


def stolen(home, here, id, private, signer):  # noqa: F811
  withdraw.withdraw(home, signer.name, ALICE, 'key', signer=signer,
                    since=home.catalog.clock() - 5)
  give(home, here, signer)


def at_home(home, here, id, private, signer):  # noqa: F811
  withdraw.withdraw(home, id, ALICE)
  give(home, here, signer)


def late(home, here, id, private, signer):  # noqa: F811
  here.catalog.clock.now += 30 * DAY


def nothing(home, here, id, private, signer):  # noqa: F811
  here.catalog.clock.now += 60


@pytest.mark.parametrize('change, code', [
    (retire, 'E_TRUST'), (classes, 'E_TRUST'), (role, 'E_TRUST'),
    (ended, 'E_TRUST'), (stolen, 'E_REVOKED'), (at_home, 'E_REVOKED'),
    (late, 'E_CRL_STALE'), (nothing, '')])
def test_what_stems_from_elsewhere(
    came, private, signer, change, code):  # noqa: F811
  home, id, here, there = came
  mine, made = add(here, 2), family(here, there)
  assert [says(here, one) for one in made] == [''] * len(made)
  change(home, here, id, private, signer)
  got = [says(here, one) for one in made]
  # It is remembered where it is gone, with what lies between.
  for one in (there, made[0], here.catalog.parents(made[-1])[0]):
    collect.delete(here, one, 'alice of acme')
  got += [says(here, one) for one in made[1:]]
  print(f'{change.__name__}: tried {len(got)}, accepted wrongly '
        f'{sum(one != code for one in got)}')
  assert got == [code] * len(got)
  assert says(here, mine) == ''  # which is this store's own
  assert collect.check(here) == []


def test_its_own_name_revokes_it_alone(came, signer):  # noqa: F811
  _, _, here, there = came
  made = family(here, there)
  withdraw.withdraw(here, there, ALICE)
  for _ in range(2):
    assert says(here, there) == 'E_REVOKED'
    assert [says(here, one) for one in made] == [''] * len(made)
    give(here, here, signer)  # which installs the same list once more


def test_it_came_when_it_first_came(
    came, private, signer, tmp_path):  # noqa: F811
  home, _, here, there = came
  made = family(here, there)
  collect.delete(here, there, 'alice of acme')
  for shop in (home, here):
    shop.catalog.clock.now += 100
  assert transfer.receive(here, tmp_path / 'a.tar', ALICE).id == there
  withdraw.withdraw(home, signer.name, ALICE, 'key', signer=signer,
                    since=home.catalog.clock() - 50)
  give(home, here, signer)
  assert says(here, there) == 'E_REVOKED'
  assert [says(here, one) for one in made] == [''] * len(made)


def test_a_store_of_an_earlier_release(came, private, signer):  # noqa: F811
  home, id, here, there = came
  made = family(here, there)
  was = here.catalog.foreign([there])
  retire(home, here, id, private, signer)
  here.catalog._base.execute('delete from foreign_art')
  assert says(here, made[0]) == ''
  assert any('signed elsewhere: expected' in text
             for text in collect.check(here)) is False  # its key is no use
  ruled(here, private)
  assert [text for text in collect.check(here) if 'signed elsewhere' in text]
  # It had no such table.
  here.catalog._base.execute('pragma user_version = 0')
  again = here.again()
  assert again.catalog.foreign([there]) == was and collect.check(again) == []
  retire(home, again, id, private, signer)
  assert [says(again, one) for one in made] == ['E_TRUST'] * len(made)
  # Once: what is forgotten later is a fault.
  again.catalog._base.execute('delete from foreign_art')
  assert not here.again().catalog.foreign([there])


def test_what_is_told_of_it(came, signer):  # noqa: F811
  _, _, here, there = came
  fork = mint.fork(here, parent_of(here, there), ALICE).id
  text = '\n'.join(desk.describe(desk.examine(here, fork, ALICE, 'inspect')))
  assert 'vouched for by: mac\n' in text
  assert f'  as long as counts: {there} of acme, signed by {signer.name}' in (
      text)
  assert foreign.above(here, parent_of(here, there).about) == ()
  assert 'as long as' not in '\n'.join(desk.describe(
      desk.examine(here, there, ALICE, 'inspect')))


def test_other_weights(make, signer, tmp_path):  # noqa: F811
  home, here = make('home'), make('here')
  terms = dataclasses.replace(small.TERMS, export='org')
  one = mint.mint(home, small.state(), 0, small.host(), terms).id
  transfer.export(home, one, ALICE, signer, tmp_path / 'a.tar')
  give(home, here, signer)
  there = transfer.receive(here, tmp_path / 'a.tar', ALICE).id
  found = load.load(here, there, ALICE, small.host())
  parent = mint.Parent(there, found.about)
  made = [mint.fork(here, parent, ALICE).id, mint.mint(
      here, found.state, 0, found.host, mint.Terms.of(found.about),
      stands=found.stands, parent=parent).id]
  made.append(mint.mint(
      here, found.state, 0, found.host, small.TERMS, parent=mint.Parent(
          made[1], parent_of(here, made[1]).about)).id)
  mine = mint.mint(here, small.state(), 0, small.host(), terms).id
  other, ask = small.host(params='1' * 64), Ask(unsafe_cross_weights=True)
  assert [str(load.load(here, one, ALICE, other, ask).decision)
          for one in (there, *made, mine)] == 4 * ['refused(E_WEIGHTS)'] + [
              'resumed(11)']


# What does not count, or is damaged, is its owner's all the same.


@pytest.mark.parametrize('change', [retire, stolen, late])
def test_what_does_not_count_can_be_ended(
    came, private, signer, change):  # noqa: F811
  home, id, here, there = came
  change(home, here, id, private, signer)
  assert says(here, there)
  for right in ('resume', 'fork', 'export'):
    assert code_of(desk.examine, here, 'here', ALICE, right) == says(
        here, there)
  for right in ('inspect', 'revoke', 'delete'):
    assert desk.examine(here, 'here', ALICE, right).id == there
    with pytest.raises(Refused, match='E_ACL'):
      desk.examine(here, 'here', Principal('eve', 'globex'), right)
  assert desk.examine(here, 'here', BOB, 'inspect').plain is None
  for right in ('revoke', 'delete'):
    assert code_of(desk.examine, here, 'here', BOB, right) == 'E_ACL'
  assert desk.withdraw(here, 'here', ALICE) == [('artifact', there)]
  assert desk.delete(here, 'here', ALICE) == there
  assert collect.check(here) == [] and here.catalog.ref('here') is None


def flip(shop, id, name):
  file = shop.place(id) / name
  file.chmod(0o600)
  data = bytearray(file.read_bytes())
  data[40] ^= 1
  file.write_bytes(data)


def cut(shop, id):
  (shop.place(id) / 'surplus').symlink_to('/')


def lose(shop, id):
  shop.place(id).rename(shop.path.parent / 'elsewhere')


def replace(shop, id, put):
  """By what is no directory of its own."""
  lose(shop, id)
  put(shop.place(id))


@pytest.mark.parametrize('harm, code', [
    (lambda shop, id: replace(shop, id, lambda p: p.write_bytes(b'')),
     'E_LAYOUT'),
    (lambda shop, id: replace(shop, id, lambda p: p.symlink_to(
        shop.path.parent / 'elsewhere')), 'E_LAYOUT'),
    (lambda shop, id: flip(shop, id, manifest.NAME), 'E_MANIFEST|E_ID'),
    (lambda shop, id: flip(shop, id, layout.MAC), 'E_SIG'),
    (lambda shop, id: flip(shop, id, manifest.PLAIN), 'E_FILES'),
    (cut, 'E_LAYOUT'), (lose, 'E_LAYOUT')])
def test_what_is_damaged_is_deleted_by_its_owner(tmp_path, harm, code):
  shop = bare.store(tmp_path)
  id, other = bare.mint(shop, 1, ref='chat').id, bare.mint(shop, 2).id
  harm(shop, id)
  with pytest.raises(Refused, match=code):
    desk.examine(shop, 'chat', ALICE, 'inspect')
  assert len(collect.check(shop)) == 1
  for who in (BOB, Principal('alice'), Principal('')):
    with pytest.raises(Refused):
      desk.delete(shop, 'chat', who)
    assert not shop.owned(id, str(who))
  assert shop.catalog.ref('chat') == (id, 1)
  # Its name is still its owner's to move.
  assert shop.owned(id, 'alice of acme')
  moved = bare.mint(shop, 3, ref='chat', expect=1)
  assert moved.ref == 'chat' and not moved.conflict
  assert desk.delete(shop, id, ALICE) == id
  assert [(row['action'], row['outcome']) for row in shop.catalog.rows()[-2:]
          ] == [('delete', 'allowed'), ('deleted', 'allowed')]
  assert collect.check(shop) == [] and not list((shop.path / 'trash').iterdir())
  assert desk.delete(shop, 'chat', ALICE) == moved.id
  assert shop.catalog.ref('chat') is None
  assert collect.check(shop) == [] and [*shop.catalog.objects()] == [other]


def test_one_row_is_read_for_one_artifact(tmp_path, monkeypatch):
  """The table of all is read so many times, however many there are."""
  shop, reads = bare.store(tmp_path), []
  real = shop.catalog.objects
  monkeypatch.setattr(shop.catalog, 'objects', lambda **options: (
      reads.append(1), real(**options))[1])
  def cost(call):
    del reads[:]
    call()
    return len(reads)
  costs = []
  for number in (1, 4):
    for i in range(number):
      bare.mint(shop, 10 * number + i)
    costs.append((cost(lambda: collect.check(shop)),
                  cost(lambda: collect.collect(shop, grace=0))))
    assert not real()
  assert costs[0] == costs[1]
