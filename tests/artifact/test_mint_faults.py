"""As `test_faults`, of what needs arrays: mints, loads, forks, files from store
to store. Calls of Orbax's own threads fail too; it must be told as well.
"""

import random
import resource

import faults
import pytest
import small_store as small
from test_faults import Case, cleaned, every_call, fresh

from statejax import state as st
from statejax.artifact import digest, keys, load, mint, revoked, transfer, trust
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE = Principal('alice', 'acme')

# What Orbax leaves behind of a save or load that has failed.
pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(text) for text in (
    'ignore::RuntimeWarning', 'ignore::ResourceWarning',
    'ignore::pytest.PytestUnraisableExceptionWarning',
    'ignore::pytest.PytestUnhandledThreadExceptionWarning'))]


ROUNDS = 20  # of a full disk, at every 20th call; another one in each


class Arrays(Case):
  """A store of the small model, in which `chat` points to an artifact."""

  closes = False  # Orbax does not
  terms = small.TERMS

  def __init__(self, path):
    self.path, self.shop, self.number = path, small.store(path), 0
    self.state = small.state()
    self.digest = digest.tree_digest(self.state)
    self.id = self.mint('first').id
    self.kept = {self.id}

  def mint(self, ref):
    return mint.mint(self.shop, self.state, 0, small.host(), self.terms,
                     ref=ref, transcript=small.transcript())

  def load(self, key):
    found = load.load(self.shop, key, ALICE, small.host())
    if found.decision.outcome != 'resumed':
      assert found.state is None
      raise Refused(found.decision.code, found.decision.detail)
    assert st.diff(found.state, self.state) is None

  def prepare(self):
    self.name = f'new/{self.next()}'

  def undone(self):
    assert self.shop.catalog.ref(self.name) is None
    # The session goes on.
    assert digest.tree_digest(self.state) == self.digest

  def done(self):
    self.load(self.name)
    self.shop.catalog.drop(self.name)


class Mint(Arrays):
  def act(self):
    self.mint(self.name)


class Load(Arrays):
  def act(self):
    self.load('first')

  def done(self):
    self.load('first')


class Fork(Arrays):
  def act(self):
    about = load.load(self.shop, 'first', ALICE, small.host()).about
    if not about:
      raise Refused('E_IO', 'the parent could not be read')
    mint.fork(self.shop, mint.Parent(self.id, about), ALICE, ref=self.name)


class Sealed(Arrays):
  """Minted, written to a file and taken in by a store of the same secrets."""

  terms = mint.Terms('alice', 'acme', export='org')

  def __init__(self, path):
    root = keys.generate()
    self.signer = keys.Signer(keys.generate())
    super().__init__(path)
    self.shop.root = keys.public(root)
    trust.install(self.shop, keys.Signer(root).document('trust', trust.extended(
        None, keys.public(self.signer.private), 'acme')))
    revoked.install(self.shop, 'acme', transfer.issue_revocations(
        self.shop, self.signer))

  def prepare(self):
    super().prepare()
    self.file = self.path / f'{self.number}.tar'

  def undone(self):
    super().undone()
    self.file.unlink(missing_ok=True)  # of an export that came through

  def act(self):
    transfer.export(self.shop, 'first', ALICE, self.signer, self.file)
    transfer.receive(self.shop, self.file, ALICE, host=small.host(),
                     ref=self.name)


@pytest.fixture(params=[Mint, Load, Fork, Sealed])
def kind(request):
  if request.param is Sealed:
    pytest.importorskip('cryptography', reason='the extra [sign] is missing')
  return request.param


def test_every_call_fails(tmp_path, kind):
  rng = random.Random(0)
  assert every_call([kind(tmp_path)], lambda turn, number: [
      (rng.choice(faults.ERRORS), 'once')])


def test_the_disk_is_full(memory, kind):
  """At every call that is made, over all rounds."""
  tried = every_call(
      fresh(kind, memory, ROUNDS), lambda turn, number: [
          ('ENOSPC', 'once')] * (number % ROUNDS == turn))
  print(f'{kind.__name__}, the disk is full: {ROUNDS} rounds, tried {tried}')
  assert tried >= 5 * ROUNDS


def test_files_may_not_grow(memory):
  """What C code writes fails too: no file may have more than so many bytes.

  Of the least the payload has nothing, of more a part, then it fails of the
  catalog.
  """
  tried = told = lost = 0
  case = Mint(memory)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  for limit in (1, 300, 600, 900, 1000, 1500, 2000, 3000, 100_000, 1_000_000):
    case.prepare()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
      case.act()
      error = None
    except (Refused, OSError) as found:
      error = found
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tried, told = tried + 1, told + (error is not None)
    if error is not None:
      case.undone()
      case.act()
    try:
      case.done()
    except Refused:
      lost += 1
    cleaned(case.shop, case.kept)
  print(f'files that may not grow: tried {tried}, told {told}, lost {lost}')
  assert tried > told > 0 and not lost
