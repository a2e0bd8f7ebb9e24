"""Every call of the system fails, with every error; see `faults`.

Each time the caller gets E_NOSPACE, E_IO or a plain OSError, nothing is half
there, what was kept before is still there, and a retry succeeds.
"""

import os
import random
import shutil

import bare
import faults
import pytest

from statejax.artifact import collect, desk, portable, revoke
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE = Principal('alice', 'acme')
ROUNDS = 20


def descriptors():
  return len(os.listdir('/proc/self/fd'))


def cleaned(shop, kept):
  """Collects; raises unless all is whole and what was kept is there."""
  for folder in (shop.path / 'objects').glob('*/*'):
    os.utime(folder, (0, 0))
  collect.collect(shop, grace=0)
  assert collect.check(shop) == []
  assert not [*(shop.path / 'tmp').iterdir(), *(shop.path / 'trash').iterdir()]
  assert {id for id, _ in shop.catalog.refs().values()} >= kept


class Case:
  """One thing done to a store, and how to see that it is done or is not.

  Attributes:
    shop: the store.
    kept: ids that have names, and must stay.
    closes: whether every descriptor is closed after a fault.
  """

  closes = True

  def __init__(self, path):
    self.path, self.shop = path, bare.store(path)
    self.kept = {bare.mint(self.shop, n, ref=f'pin/{n}').id for n in (0, 1)}
    self.number = 1

  def next(self):
    self.number += 1
    return self.number

  def prepare(self):
    """Before each fault."""

  def act(self):
    """What the fault falls into."""
    raise NotImplementedError

  def undone(self):
    """After it has failed: it must not have happened."""

  def done(self):
    """After it has succeeded."""


class Mint(Case):
  def prepare(self):
    self.next()
    self.version = (self.shop.catalog.ref('chat') or ('', 0))[1]

  def act(self):
    self.id = bare.mint(self.shop, self.number, ref='chat',
                        expect=self.version).id

  def undone(self):
    assert (self.shop.catalog.ref('chat') or ('', 0))[1] == self.version
    assert bare.minted(self.shop, self.number) is None

  def done(self):
    assert self.shop.catalog.ref('chat') == (self.id, self.version + 1)
    assert bare.read(self.shop, self.id) == self.number


class Read(Case):
  def act(self):
    # A lease that could not be given back runs out by itself.
    assert {bare.read(self.shop, id) for id in self.kept} == {0, 1}


class Look(Case):
  def act(self):
    assert {bare.number_of(desk.examine(self.shop, id, ALICE, 'resume').about)
            for id in self.kept} == {0, 1}


class Import(Case):
  def prepare(self):
    if not hasattr(self, 'id'):
      self.id = bare.mint(self.shop, self.next()).id
      shutil.copytree(self.shop.place(self.id), self.path / 'sent')
    if self.id in self.shop.catalog.objects():
      collect.delete(self.shop, self.id, 'alice')

  def act(self):
    bare.take_in(self.shop, self.path / 'sent', self.id)

  def undone(self):
    assert self.id not in self.shop.catalog.objects()

  def done(self):
    assert bare.read(self.shop, self.id) == self.number


class Collect(Case):
  def prepare(self):
    self.id = bare.mint(self.shop, self.next()).id
    lost = bare.mint(self.shop, self.next()).id  # an orphan
    self.shop.catalog._base.execute('delete from art where id = ?', (lost,))
    self.shop.catalog.charge('alice', lost, live_bytes=-sum(
        p.stat().st_size for p in self.shop.place(lost).rglob('*')
        if p.is_file()))
    (self.shop.path / 'tmp' / '.new.tmp-1-1-00000000').mkdir(exist_ok=True)

  def act(self):
    collect.collect(self.shop, grace=0)

  def done(self):
    assert self.id not in self.shop.catalog.objects()
    assert not self.shop.place(self.id).exists()


class Delete(Collect):
  def act(self):
    if self.id in self.shop.catalog.objects():
      collect.delete(self.shop, self.id, 'alice')


class Revoke(Case):
  def prepare(self):
    self.id = bare.mint(self.shop, self.next()).id
    found = self.shop.catalog.revocations('acme') or {'entries': ()}
    self.listed = len(found['entries'])

  def act(self):
    desk.withdraw(self.shop, self.id, ALICE)

  def undone(self):
    if 'it is revoked, but' in str(self.told):
      return
    found = self.shop.catalog.revocations('acme') or {'entries': ()}
    assert len(found['entries']) == self.listed

  def done(self):
    found = self.shop.catalog.revocations('acme')
    assert revoke.match(found, {**bare.about(0)}, self.id)


class Pack(Case):
  def prepare(self):
    self.file = self.path / 'one.tar'
    self.file.unlink(missing_ok=True)

  def act(self):
    portable.pack(self.shop.place(min(self.kept)), self.file)

  def undone(self):
    if 'unlink' in self.fell:
      self.file.unlink(missing_ok=True)  # nobody could
    assert not self.file.exists()

  def done(self):
    shutil.rmtree(self.path / 'out', ignore_errors=True)
    (self.path / 'out').mkdir()
    portable.unpack(self.file, self.path / 'out')


class Open(Case):
  """A new store, then the same one again."""

  def prepare(self):
    self.new = self.path / f'new{self.next()}'
    self.new.mkdir()

  def act(self):
    for _ in range(2):
      bare.store(self.new).catalog.close()

  def done(self):
    shop = bare.store(self.new)
    assert len(shop.secret) == 32
    assert {p.name for p in self.new.iterdir() if not p.name.startswith('.')
            } == {'store', 'secrets'}


class Secret(Case):
  def prepare(self):
    self.name = f'data-{self.next()}'

  def act(self):
    secrets = self.shop.secrets
    secrets.get(self.name)
    secrets.put(self.name, b'k' * 32)
    assert secrets.find(self.name) == b'k' * 32
    secrets.destroy(self.name)

  def done(self):
    assert self.shop.secrets.find(self.name) is None
    assert not list(self.shop.secrets.path.glob('.*'))


CASES = (Mint, Read, Look, Import, Collect, Delete, Revoke, Pack, Open, Secret)


def attempt(case, system):
  """Does it while a call fails; returns what the caller gets."""
  with system.running(), system.catalog(case.shop.catalog):
    try:
      case.act()
    except (Refused, OSError) as error:
      return error
  return None


def every_call(cases, draws):
  """Lets every call fail; returns how many faults were tried.

  Args:
    cases: `Case` of one kind, each for one round over all calls.
    draws: function of (round, number of a call): [(error, how long it lasts),
      ..].
  """
  tried = told = calls = 0
  # 'half done': it is there although it failed, or not although it was not; or
  # a retry fails. 'lost': what was there before, or the books are wrong.
  # 'aborts': the caller gets anything but what it is promised.
  wrong = {'half done': [], 'lost': [], 'aborts': []}
  for turn, case in enumerate(cases):
    case.prepare()
    warm = faults.System()
    assert attempt(case, warm) is None
    case.done()
    calls, before = calls + warm.count, descriptors()
    for number in range(warm.count):
      for error, lasts in draws(turn, number):
        system = faults.System(number, error, lasts)
        failed, got = one_fault(case, system, error, before)
        tried, told = tried + bool(system.failed), told + (got is not None)
        for kind, found in failed:
          wrong[kind].append(
              f'{type(case).__name__}: call {number}, {system.failed}: {error} '
              f'({lasts}); the caller got {got!r}: {found!r}')
  print(f'{type(case).__name__}: {turn + 1} rounds, {calls} calls, faults '
        f'tried {tried}, told {told}, ' + ', '.join(
            f'{kind} {len(found)}' for kind, found in wrong.items()))
  assert not any(wrong.values()), [one for found in wrong.values()
                                   for one in found[:3]]
  return tried


def one_fault(case, system, error, before):
  """Returns ([(what is wrong, the exception)], what the caller got)."""
  case.prepare()
  got, kind = None, 'aborts'
  try:
    got = attempt(case, system)
    if got is not None:
      case.told, case.fell = got, system.fell
      code = getattr(got, 'code', 'E_IO')
      assert code in ('E_NOSPACE', 'E_IO'), got
      assert code == 'E_IO' or error in faults.FULL, got
      kind = 'half done'
      case.undone()
      again = attempt(case, faults.System())
      assert again is None, again
    kind = 'half done'
    case.done()
    kind = 'lost'
    cleaned(case.shop, case.kept)
    assert not case.closes or descriptors() <= before, 'a file is left open'
  except Exception as found:
    return [(kind, found)], got
  return [], got


@pytest.mark.parametrize('kind', CASES)
def test_a_call_fails(memory, kind):
  rng = random.Random(0)
  assert every_call([kind(memory)], lambda turn, number: [
      (rng.choice(faults.ERRORS), 'once')])


def fresh(kind, path, rounds):
  """Yields a case in a new store; logs that grow make each call slower."""
  for turn in range(rounds):
    (path / f'{turn}').mkdir()
    case = kind(path / f'{turn}')
    yield case
    case.shop.catalog.close()
    shutil.rmtree(path / f'{turn}')


@pytest.mark.slow
@pytest.mark.parametrize('kind', CASES)
def test_every_call_fails(memory, kind):
  """Each call twenty times: with each error, then with any, for any time."""
  rng = random.Random(1)
  def draws(turn, number):
    if turn < len(faults.ERRORS):
      return [(faults.ERRORS[turn], 'once')]
    return [(rng.choice(faults.MORE_ERRORS), rng.choice(faults.LASTS))]
  assert every_call(fresh(kind, memory, ROUNDS), draws)
