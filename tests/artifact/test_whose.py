"""In whose name an artifact is made, whose a name is, and whose a request."""

import dataclasses
import json

import bare
import jax.numpy as jnp
import pytest
import small_store as small

from statejax.artifact import access, collect, load, manifest, mint
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE, BOB = Principal('alice', 'acme'), Principal('bob', 'acme')
MALLORY = Principal('mallory', 'globex')


@pytest.fixture
def shop(tmp_path):
  return small.store(tmp_path)


def add(shop, who=ALICE, state=None, **options):
  terms = mint.Terms('mallory', 'globex') if who is MALLORY else small.TERMS
  return mint.mint(shop, state or small.state(), 0, small.host(), terms,
                   **{'principal': who} | options)


def test_a_name_moves_with_its_owner_only(shop):
  one = add(shop, ref='chat')
  two = add(shop, MALLORY, ref='chat', expect=1)
  assert two.conflict and two.ref.startswith('chat~')
  assert shop.catalog.ref('chat') == (one.id, 1)
  found = load.load(shop, 'chat', ALICE, small.host())
  # A member who goes on makes what is its owner's, but moves no name.
  rights = dataclasses.replace(small.TERMS, acl=(('bob', ('resume',)),))
  listed = mint.mint(shop, small.state(), 0, small.host(), rights, ref='team')
  about = load.load(shop, 'team', BOB, small.host()).about
  three = mint.mint(shop, small.state(), 0, small.host(), mint.Terms.of(about),
                    principal=BOB, parent=mint.Parent(listed.id, about),
                    ref='team', expect=1)
  assert three.conflict and shop.catalog.ref('team') == (listed.id, 1)
  assert not add(shop, ref='chat', expect=1).conflict
  assert found.id == one.id and collect.check(shop) == []


def test_names_beside_one_are_their_makers(shop):
  """Resumed again and again by a member, who moves what is theirs."""
  listed = dataclasses.replace(small.TERMS, acl=(('org:acme', ('resume',)),))
  mint.mint(shop, small.state(), 0, small.host(), listed, ref='chat')
  carol = Principal('carol', 'acme')
  def go_on(who, name):
    found = load.load(shop, name, who, small.host())
    _, version = shop.catalog.ref(name)
    return mint.mint(shop, found.state, 0, small.host(), mint.Terms.of(
        found.about), principal=who, parent=mint.Parent(found.id, found.about),
                     ref=name, expect=version).ref
  mine = go_on(BOB, 'chat')
  assert mine.startswith('chat~') and go_on(BOB, mine) == mine
  # Not another member's; nor does the name grow.
  hers = go_on(carol, mine)
  assert hers not in (mine, 'chat') and len(hers) == len('chat~') + 8
  names = [go_on(BOB, 'chat') for _ in range(4)]
  shop.catalog.clock.now += 4000
  late = go_on(BOB, 'chat')  # within the grace whatever stays
  found = collect.collect(shop, last=2)
  assert {*shop.catalog.refs()} == {'chat', hers, names[-1], late}
  assert len(found.objects) == 4 and not collect.check(shop)
  rows = [row for row in shop.catalog.rows() if row['action'] == 'gc']
  assert f'unnamed {mine}' in {row['outcome'] for row in rows}
  # Its owner's are not collected: they are told to whom they are a conflict.
  own = [add(shop, ref='chat').ref for _ in range(3)]
  shop.catalog.clock.now += 4000
  collect.collect(shop, last=0)
  assert {*shop.catalog.refs()} == {'chat', *own}


def test_a_damaged_target_is_nobodys(shop):
  one = add(shop, ref='chat')
  file = shop.place(one.id) / manifest.NAME
  file.chmod(0o600)
  file.write_bytes(file.read_bytes().replace(b'"alice"', b'"mallory"').replace(
      b'"acme"', b'"globex"'))
  assert add(shop, MALLORY, ref='chat', expect=1).conflict


@pytest.mark.parametrize('who', [MALLORY, BOB, Principal(''),
                                 Principal('alice', 'globex')])
def test_nobody_mints_in_the_name_of_another(shop, who):
  mine = add(shop, MALLORY)
  about = load.load(shop, mine.id, MALLORY, small.host()).about
  hers = load.load(shop, add(shop).id, ALICE, small.host())
  before = shop.catalog.objects()
  for parent in (None, mint.Parent(mine.id, about),
                 mint.Parent(hers.id, hers.about)):
    with pytest.raises(Refused, match='E_ACL'):
      mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                principal=who, parent=parent)
    row = shop.catalog.rows()[-1]
    assert (row['principal'], row['code']) == (str(who), 'E_ACL')
  assert shop.catalog.objects() == before and not collect.orphans(shop)


def test_a_request_is_of_its_principal(shop):
  one = add(shop, mint_key='once')
  two = add(shop, MALLORY, mint_key='once', ref='hers')
  assert two.id != one.id and shop.catalog.ref('hers') == (two.id, 1)
  # Nor can one be made to look like a row of the store's own.
  odd = add(shop, MALLORY, mint_key=json.dumps([str(ALICE), 'once']))
  assert odd.id not in (one.id, two.id)


def test_a_retry_moves_the_name(shop):
  one = add(shop, mint_key='once')
  named = add(shop, mint_key='once', ref='chat')
  assert (named.id, named.ref, named.conflict) == (one.id, 'chat', False)
  assert add(shop, mint_key='once', ref='chat').ref == 'chat'
  assert shop.catalog.ref('chat') == (one.id, 1)
  # Where another one has it, every retry finds the same name beside it.
  other = add(shop, mint_key='twice', ref='chat')
  assert add(shop, mint_key='twice', ref='chat') == dataclasses.replace(
      other, receipt=shop.catalog.head())
  assert other.conflict and len(shop.catalog.refs()) == 2


@pytest.mark.parametrize('sealed', [False, True])
def test_a_key_is_for_one_state(shop, sealed):
  if sealed:
    pytest.importorskip('cryptography')
  terms = dataclasses.replace(small.TERMS, sealed=sealed)
  def once(state):
    return mint.mint(shop, state, 0, small.host(), terms, mint_key='once').id
  one = once(small.state())
  with pytest.raises(ValueError, match=f'mint_key: .*{one}, another state'):
    once(dataclasses.replace(small.state(), pending=jnp.full(1, 6, jnp.int32)))
  assert once(small.state()) == one and len(shop.catalog.objects()) == 1


@pytest.mark.parametrize('spent', [
    {'live_bytes': -10}, {'resumes': 1}, {'x': 1}, {'tokens_absorbed': 1},
    {'device_us': -1}, {'device_us': 1.5}, {'device_us': True},
    {'device_us': 2 ** 53}])
def test_what_is_spent_is_what_the_meter_gives(shop, spent):
  with pytest.raises(ValueError, match='spent: expected integers'):
    add(shop, spent=spent)
  assert not collect.orphans(shop) and not shop.catalog.rows('ledger')


def test_names_are_unambiguous(tmp_path):
  for name in ('alice of acme', 'a b', ' a', 'a\n', 'a\tb'):
    with pytest.raises(ValueError, match='principal: expected a name without'):
      Principal(name)
  about = bare.about(1, governance={'owner': 'alice of acme', 'org': ''})
  with pytest.raises(Refused, match='E_MANIFEST: governance.owner'):
    access.owner(about)
  shop = bare.store(tmp_path)
  with shop.stage() as folder:
    bare.fill(folder, 1)
    with pytest.raises(Refused, match='E_MANIFEST: governance.owner'):
      shop.keep(folder, about, principal='eve', mint_key='k', action='mint')
  assert not collect.orphans(shop) and not list((shop.path / 'tmp').iterdir())
