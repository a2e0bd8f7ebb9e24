"""Who may do what, through real stores, artifacts and keys; see `rights`.

  NAME: tried N, accepted wrongly 0, refused wrongly 0

Nobody gains a right by a fork, a resume, a migration or an export, and what one
may not see is told as what is not there.
"""

import dataclasses
import itertools
import random

import bare
import example
import pytest
import rights
import small_store as small

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

import test_trust
from test_trust import private, signer  # noqa: F401

from statejax import model as lm
from statejax.artifact import (
  access,
  background,
  canonical,
  collect,
  desk,
  grant,
  keys,
  layout,
  load,
  manifest,
  migrate,
  mint,
  portable,
  transfer,
  trust,
  withdraw,
)
from statejax.artifact.access import Principal
from statejax.artifact.compat import Ask
from statejax.artifact.outcome import Refused

ALICE, BOB = Principal('alice', 'acme'), Principal('bob', 'acme')
DAVE, EVE = Principal('dave', 'globex'), Principal('eve', 'globex')
NOBODY = Principal('')
OPEN = dataclasses.replace(small.TERMS, acl=(('bob', ('resume', 'export')),))
SEALED = dataclasses.replace(OPEN, export='any')
GRANTED = access.GRANTABLE


@pytest.fixture(scope='module')
def shop(tmp_path_factory, private):  # noqa: F811
  return test_trust.make(tmp_path_factory.mktemp('rights'), private)


def about_of(shop, id):
  return manifest.parse(layout.read(shop.place(id), manifest.NAME))


class Count:
  """What was tried, and where it did not end as the oracle says."""

  def __init__(self, name):
    self.name, self.tried = name, 0
    self.accepted, self.refused = [], []

  def compare(self, what, got, wanted):
    self.tried += 1
    if got != wanted:
      (self.refused if wanted != 'n' else self.accepted).append(
          (what, got, wanted))

  def end(self):
    print(f'{self.name}: tried {self.tried}, accepted wrongly '
          f'{len(self.accepted)}, refused wrongly {len(self.refused)}')
    assert not self.accepted and not self.refused


def attempt(shop, signer, right, id, who, file):  # noqa: F811
  """Does it; 'y', 'r' or 'n', and why not."""
  try:
    if right == 'inspect':
      found = desk.examine(shop, id, who, 'inspect')
      return ('y' if 'files' in found.about else 'r'), None
    if right in ('resume', 'fork'):
      found = load.load(shop, id, who, small.host(), Ask(right=right))
      if found.decision.outcome == 'refused':
        assert found.state is None and not found.about
        raise Refused(found.decision.code, found.decision.detail)
      assert found.state is not None
    if right == 'fork':
      desk.examine(shop, id, who, 'fork')
      mint.fork(shop, mint.Parent(id, found.about), who)
    if right == 'export':
      transfer.export(shop, id, who, signer, file)
    if right == 'revoke':
      withdraw.withdraw(shop, id, who)
    if right == 'delete':
      desk.delete(shop, id, who)
  except Refused as error:
    return 'n', error
  return 'y', None


def present(shop, data, id, who, key):
  nonce = grant.challenge(shop)
  return grant.present(shop, data, about_of(shop, id), id, who, nonce,
                       grant.prove(key, nonce, data))


def facts(shop):
  """All that a refused verb must leave as it is."""
  return (shop.catalog.objects(), shop.catalog.refs(),
          shop.catalog.revocations('acme'), shop.catalog.head('ledger'))


def test_the_table_through_stores(shop, signer, private, tmp_path):  # noqa: F811
  """8 principals x 6 rights x {open, sealed}."""
  mine, numbers = private['other'], itertools.count()
  count, rows = Count('authorisation'), 0
  for terms in (OPEN, SEALED):
    first = mint.mint(shop, small.state(), 0, small.host(), terms).id
    def one(first=first):
      """An artifact of its own: some verbs end it."""
      return mint.fork(shop, mint.Parent(first, about_of(shop, first)),
                       ALICE).id
    def granted(id, seconds):
      return grant.issue(shop, id, ALICE, keys.public(mine), GRANTED, signer,
                         seconds=seconds, max_uses=9)
    def given(who, key=mine, later=0):
      id = one()
      data = granted(id, 60)
      shop.catalog.clock.now += later
      return id, present(shop, data, id, who, key), who.name == 'dave' and (
          not later) and GRANTED or ()
    def revoked():
      id = one()
      withdraw.withdraw(shop, id, ALICE)
      return id, ALICE, ()
    for name, make in {
        'owner': lambda: (one(), ALICE, ()), 'member': lambda: (one(), BOB, ()),
        'granted': lambda: given(DAVE),
        'expired grant': lambda: given(DAVE, later=61),
        'wrong holder': lambda: given(EVE, private['acme']),
        'other org': lambda: (one(), Principal('alice', 'globex'), ()),
        'anonymous': lambda: (one(), NOBODY, ()), 'revoked': revoked}.items():
      id, who, gives = make()
      rules = about_of(shop, id)['governance']
      for right in access.RIGHTS:
        before, start = facts(shop), shop.catalog.head().seq
        got, why = attempt(shop, signer, right, id, who,
                           tmp_path / f'{next(numbers)}.tar')
        count.compare((terms.export, name, right, str(why)), got,
                      rights.expected(rules, who.name, who.org, gives, right,
                                      revoked=name == 'revoked'))
        last = shop.catalog.rows()[start:]
        assert last and {row['principal'] for row in last} == {str(who)}
        rows += 1
        if got == 'n':
          assert facts(shop) == before and len(last) == 1
          assert (last[0]['outcome'] != 'allowed') and last[0]['code']
          hidden = not rights.seen(rules, who.name, who.org, gives)
          assert hidden == ('expected an artifact or name' in str(why))
  assert count.tried == rows == 96
  assert not collect.check(shop)
  count.end()


# No gain.

WIDE = small.host(lm.LanguageModel(dataclasses.replace(
    small.CONFIG, store_dtype='float32')))
LISTS = (('bob', ('resume', 'fork', 'export')), ('carol', ('fork',)),
         ('org:acme', ('resume',)), ('dave', ('export',)))
ACTORS = {
    'owner': ALICE, 'all': BOB, 'fork': Principal('carol', 'acme'),
    'member': Principal('erin', 'acme'),
    'granted': dataclasses.replace(DAVE, granted=frozenset(access.GRANTABLE)),
    'granted member': dataclasses.replace(
        Principal('frank', 'acme'), granted=frozenset(access.GRANTABLE)),
    'namesake': Principal('alice', 'globex'), 'nobody': NOBODY}


def holding(who, about):
  """Whoever has a grant, with one for this artifact."""
  return who if not who.granted else dataclasses.replace(
      who, granted_for=manifest.artifact_id(canonical.dumps(about)))


def may(about, who, now):
  return {right for right in access.RIGHTS
          if access.decide(about, who, right, now=now).allowed}


def gains(about, child, now):
  """Rights to a child that somebody has and had not to its parent."""
  found = []
  for who in ACTORS.values():
    who = holding(who, about)
    # A grant names the parent alone.
    alone = dataclasses.replace(who, granted=frozenset())
    found += [(who.name, right) for right in may(child, alone, now)
              - may(about, who, now)]
  return found


def resumed(shop, id, who, **changes):
  """As the command: loads it, and mints what came of it."""
  found = load.load(shop, id, who, small.host())
  if found.decision.outcome == 'refused':
    raise Refused(found.decision.code, found.decision.detail)
  terms = mint.Terms.of(found.about, **changes)
  return mint.mint(shop, found.state, 0, small.host(), terms, principal=who,
                   stands=found.stands,
                   parent=mint.Parent(found.id, found.about)).id


@pytest.mark.parametrize('export', [
    'any', pytest.param('never', marks=pytest.mark.slow)])
def test_nobody_gains_by_a_child(shop, signer, tmp_path, export):  # noqa: F811
  terms = dataclasses.replace(small.TERMS, acl=LISTS, export=export,
                              not_after=shop.catalog.clock() + 50)
  parent = mint.mint(shop, small.state(), 0, small.host(), terms).id
  about = about_of(shop, parent)
  def forked(who):
    found = desk.examine(shop, parent, who, 'fork')
    return mint.fork(shop, mint.Parent(parent, found.about), who).id
  def migrated(who):
    return migrate.migrate(shop, parent, who, small.host(), WIDE,
                           cast=True).id
  def exported(who):
    file = tmp_path / f'{who.name}{who.org}.tar'
    transfer.export(shop, parent, who, signer, file)
    portable.unpack(file, tmp_path / who.name / who.org)
    return about_of_folder(tmp_path / who.name / who.org)
  verbs = {'fork': forked, 'resume': lambda who: resumed(shop, parent, who),
           'migrate': migrated, 'export': exported}
  tried, made, wrong = 0, {}, []
  for (verb, act), (name, who) in itertools.product(verbs.items(),
                                                    ACTORS.items()):
    tried, who = tried + 1, holding(who, about)
    right = {'migrate': 'fork'}.get(verb, verb)
    try:
      child = act(who)
    except Refused as error:
      assert right not in may(about, who, shop.catalog.clock()), error
      continue
    assert right in may(about, who, shop.catalog.clock())
    made.setdefault(verb, []).append(name)
    child = child if isinstance(child, dict) else about_of(shop, child)
    assert child['governance'] == about['governance']
    for later in (0, 100):
      wrong += gains(about, child, shop.catalog.clock() + later)
  print(f'gains: tried {tried}, children {sum(map(len, made.values()))}, '
        f'gained wrongly {len(wrong)}')
  assert not wrong and tried == 32
  assert made['fork'] == made['migrate'] == [
      'owner', 'all', 'fork', 'granted', 'granted member']
  assert len(made['resume']) == 6 and len(made.get('export', ())) == (
      0 if export == 'never' else 4)


def about_of_folder(folder):
  return manifest.parse(layout.read(folder, manifest.NAME))


def test_other_terms_only_by_the_owner(shop):
  terms = dataclasses.replace(small.TERMS, acl=LISTS, sealed=True)
  parent = mint.mint(shop, small.state(), 0, small.host(), terms).id
  changes = dict(
      owner='bob', org='globex', sensitivity='public', export='any',
      acl=(('bob', ('export',)),), not_after=1 << 40,
      revoke_scope='descendants',
      workflow='mine', sealed=False)
  for name, value in changes.items():
    before = shop.catalog.objects()
    with pytest.raises(Refused, match='E_ACL.*which only its owner may change'):
      resumed(shop, parent, BOB, **{name: value})
    row = shop.catalog.rows()[-1]
    assert shop.catalog.objects() == before
    assert (row['principal'], row['action'], row['id'], row['code']) == (
        'bob of acme', 'mint', parent, 'E_ACL')
  about = about_of(shop, resumed(shop, parent, ALICE, workflow='mine'))
  assert about['governance']['workflow'] == 'mine'
  assert about_of(shop, resumed(shop, parent, BOB))['sealed'] != 'none'


def test_a_grant_of_the_parent_gives_nothing_of_a_child(
    shop, signer, private):  # noqa: F811
  parent = mint.mint(shop, small.state(), 0, small.host(), OPEN).id
  data = grant.issue(shop, parent, ALICE, keys.public(private['other']),
                     GRANTED, signer, max_uses=9)
  child = mint.fork(shop, mint.Parent(parent, about_of(shop, parent)), ALICE).id
  for id, gives in ((parent, set(GRANTED)), (child, set())):
    assert present(shop, data, id, DAVE, private['other']).granted == gives


# Who acted, and whose the bytes are.


def test_the_log_names_who_acts(tmp_path):
  shop = small.store(tmp_path)
  chat = mint.mint(shop, small.state(), 0, small.host(), dataclasses.replace(
      small.TERMS, acl=LISTS, workflow='demo')).id
  start, spent = shop.catalog.head().seq, shop.catalog.head('ledger').seq
  one = resumed(shop, chat, BOB)
  two = mint.fork(shop, mint.Parent(chat, about_of(shop, chat)), BOB).id
  three = migrate.migrate(shop, chat, BOB, small.host(), WIDE, cast=True).id
  with background.Minter(shop, small.state()) as minter:
    four = minter.start(small.state(), 0, small.host(), mint.Terms.of(
        about_of(shop, chat)), principal=BOB, parent=mint.Parent(
            chat, about_of(shop, chat))).result().id
  rows = shop.catalog.rows()[start:]
  assert [(row['principal'], row['action']) for row in rows] == [
      ('bob of acme', verb) for verb in (
          'resume', 'mint', 'fork', 'fork', 'mint', 'mint')]
  ledger = shop.catalog.rows('ledger')[spent:]
  for id in (one, two, three, four):
    assert about_of(shop, id)['governance']['owner'] == 'alice'
    who = {row['unit']: row['principal'] for row in ledger if row['id'] == id}
    assert who.pop('live_bytes') == str(ALICE) == 'alice of acme'
    assert set(who.values()) == {str(BOB)}
  sums = {row['principal']: row for row in collect.account(shop)}
  bob = sums[str(BOB)]
  assert (bob['tokens_skipped'], bob['forks']) == (11, 1)
  assert 'live_bytes' not in bob and sums[str(ALICE)]['live_bytes'] == (
      sum(size for size, *_ in shop.catalog.objects().values()))


# 404.


@pytest.mark.parametrize('step', [
    7, pytest.param(1, marks=pytest.mark.slow)])
def test_what_one_may_not_see_is_not_there(tmp_path, signer,  # noqa: F811
                                           private, step):  # noqa: F811
  """The same words, whatever the verb, the key and the reason."""
  shop = test_trust.make(tmp_path, private)
  id = mint.mint(shop, small.state(), 0, small.host(), dataclasses.replace(
      OPEN, not_after=shop.catalog.clock() + 5), ref='hidden').id
  ended = mint.mint(shop, small.state(), 0, small.host(), OPEN, ref='ended').id
  withdraw.withdraw(shop, ended, ALICE)
  shop.catalog.clock.now += 9
  fault = dataclasses.replace(DAVE, grant_fault='it was used 1 times')
  who = (EVE, NOBODY, fault, Principal('alice', 'globex'))
  there = (id, id[:20], 'hidden', ended, ended[:30], 'ended')
  absent = ('sj1-' + '0' * 64, 'sj1-' + '0' * 16, 'nothing')
  def loaded(key, who, right='resume'):
    found = load.load(shop, key, who, small.host(), Ask(right=right))
    assert not found.id and not found.about and found.state is None
    raise Refused(found.decision.code, found.decision.detail)
  pem = keys.public(private['other'])
  verbs = [
      loaded, lambda key, who: loaded(key, who, 'fork'),
      *(lambda key, who, right=right: desk.examine(shop, key, who, right)
        for right in access.RIGHTS),
      lambda key, who: desk.lineage(shop, key, who),
      lambda key, who: desk.delete(shop, key, who),
      lambda key, who: grant.issue(shop, key, who, pem, GRANTED, signer),
      lambda key, who: transfer.export(shop, key, who, signer, tmp_path / 'x'),
      lambda key, who: transfer.push(shop, key, who, f'file://{tmp_path}/b'),
      lambda key, who: migrate.migrate(shop, key, who, small.host(), WIDE),
      *(lambda key, who, by=by: withdraw.withdraw(shop, key, who, by)
        for by in withdraw.NAMED)]
  heard, tried = set(), 0
  # Of nine keys every seventh: each verb and principal meets each of them.
  for verb, one, key in itertools.islice(itertools.product(
      verbs, who, (*there, *absent)), 0, None, step):
    before = shop.catalog.head().seq
    with pytest.raises(Refused) as error:
      verb(key, one)
    row = shop.catalog.rows()[before]
    tried += 1
    heard.add(str(error.value).replace(repr(key), 'KEY'))
    assert error.value.__cause__ is None
    if key in there:  # the log knows better
      assert row['id'] == (id if key in there[:3] else ended)
      assert row['code'] in {'E_ACL', 'E_GRANT', 'E_REVOKED', 'E_EXPIRED'}
  print(f'not there: tried {tried}, told otherwise {len(heard) - 1}')
  assert len(heard) == 1 and tried == -(-len(verbs) * 36 // step)
  codes = {row['code'] for row in shop.catalog.rows()
           if row['principal'] == 'dave of globex' and row['id'] == id}
  assert codes == {'E_GRANT', 'E_EXPIRED'}
  # Who may see it hears the truth.
  assert str(load.load(shop, 'hidden', BOB, small.host()).decision) == (
      'refused(E_EXPIRED)')
  assert str(load.load(shop, 'ended', BOB, small.host()).decision) == (
      'refused(E_REVOKED)')


# A policy that was bad, for what is the store's own too.


def test_an_old_epoch_ends_own_artifacts(tmp_path, private):  # noqa: F811
  shop = test_trust.make(tmp_path, private)
  id = mint.mint(shop, small.state(), 0, small.host(), OPEN).id
  about = about_of(shop, id)
  assert about['policy']['epoch'] == 0
  root = keys.Signer(private['root'])
  trust.install(shop, root.document('trust', trust.ruled(
      trust.load(shop), min_epoch=5, classes=['public'])))
  known = trust.load(shop)
  assert (known.number, known.min_epoch, known.classes) == (2, 5, ('public',))
  for who in (ALICE, BOB):
    assert str(load.load(shop, id, who, small.host()).decision) == (
        'refused(E_EPOCH)')
  for right in ('fork', 'export'):
    with pytest.raises(Refused, match='E_EPOCH|E_ACL'):
      desk.examine(shop, id, ALICE, right)
  assert desk.obstacle(shop, shop.place(id), ALICE).code == 'E_EPOCH'
  assert desk.examine(shop, id, ALICE, 'inspect').vouched == 'mac'
  # Also where no root key is pinned, so that nothing else could be verified.
  shop.root = ''
  assert str(load.load(shop, id, ALICE, small.host()).decision) == (
      'refused(E_EPOCH)')
  assert not collect.check(shop)


# At length.

NAMES, ORGS = ('alice', 'bob', 'carol', 'org:acme', ''), ('acme', 'globex', '')


def drawn(rng):
  """(governance, principal) of a small world, so that they often meet."""
  acl = [{'who': rng.choice([*NAMES[:4], 'org:globex']), 'may': sorted(
      rng.sample(manifest.RIGHTS, rng.randint(1, 4)))}
         for _ in range(rng.randrange(4))]
  rules = {'org': rng.choice(ORGS), 'owner': rng.choice(NAMES[:4]), 'acl': acl,
           'export': rng.choice(manifest.EXPORT),
           'not_after': rng.choice((0, 0, 99, 100, 101))}
  gives = frozenset(rng.sample(access.GRANTABLE, rng.randint(1, 4))
                    if rng.random() < .4 else ())
  return rules, Principal(rng.choice(NAMES), rng.choice(ORGS), gives,
                          '' if gives else rng.choice(('', 'used up')))


def given(rng, who, about):
  """(principal, rights of their grant), whose grant may be for another one."""
  if not who.granted or rng.random() < .3:
    return dataclasses.replace(
        who, granted_for=example.OTHER if who.granted else ''), ()
  return holding(who, about), who.granted


def decisions(count, rng, tries):
  about = example.make()
  for _ in range(tries):
    rules, who = drawn(rng)
    right, revoked = rng.choice(access.RIGHTS), rng.random() < .3
    about = about | {'governance': about['governance'] | rules}
    who, gives = given(rng, who, about)
    found = access.decide(about, who, right, revoked=revoked, now=100)
    got = 'n' if not found.allowed else 'r' if found.redacted else 'y'
    assert (got == 'n') == bool(found.code)
    count.compare((rules, who, right, revoked), got, rights.expected(
        rules, who.name, who.org, gives, right, revoked=revoked, now=100))
    assert access.sees(about, who) == rights.seen(
        rules, who.name, who.org, gives)


class World:
  """A store of artifacts of no model, on which verbs are real."""

  def __init__(self, path, rng):
    self.shop = bare.store(path, clock=small.Clock())
    self.rng, self.number, self.ids, self.revoked = rng, 0, [], set()
    self.origin = {}

  def grow(self):
    self.number += 1
    rules, _ = drawn(self.rng)
    rules |= {'export': 'never', 'not_after': self.shop.catalog.clock() + (
        -1 if self.rng.random() < .2 else 100)}
    id = bare.mint(self.shop, self.number, governance=rules).id
    self.ids.append(id)
    self.origin[id] = about_of(self.shop, id)['governance']

  def one(self, count):
    """A random verb by a random principal on a random artifact."""
    while len(self.ids) < 6:
      self.grow()
    id, (_, who) = self.rng.choice(self.ids), drawn(self.rng)
    right = self.rng.choice(access.RIGHTS)
    about = about_of(self.shop, id)
    rules = about['governance']
    assert rules == self.origin[id]
    who, gives = given(self.rng, who, about)
    wanted = rights.expected(
        rules, who.name, who.org, gives, right,
        revoked=id in self.revoked, now=self.shop.catalog.clock())
    try:
      found = desk.examine(self.shop, id, who, right)
      got = 'y' if 'files' in found.about else 'r'
      if right == 'fork':
        child = mint.fork(self.shop, mint.Parent(id, found.about), who).id
        self.ids.append(child)
        self.origin[child] = rules
        # Whose parent is revoked by its family is not; this one is by its id.
      if right == 'revoke':
        self.revoked |= {value for _, value in withdraw.withdraw(
            self.shop, id, who)}
      if right == 'delete':
        desk.delete(self.shop, id, who)
        self.ids.remove(id)
    except Refused as error:
      got = 'n'
      if not rights.seen(rules, who.name, who.org, gives):
        assert 'expected an artifact or name' in str(error)
    count.compare((rules, who, right, id in self.revoked), got, wanted)


def test_some_random_operations(tmp_path):
  rng, count = random.Random(0), Count('authorisation, random')
  decisions(count, rng, 3000)
  world = World(tmp_path, rng)
  for _ in range(40):
    world.one(count)
  count.end()


@pytest.mark.slow
def test_random_operations(tmp_path):
  rng, count = random.Random(1), Count('authorisation, at length')
  decisions(count, rng, 97_000)
  world = World(tmp_path, rng)
  for _ in range(3000):
    world.one(count)
  assert count.tried == 100_000 and not collect.check(world.shop)
  count.end()
