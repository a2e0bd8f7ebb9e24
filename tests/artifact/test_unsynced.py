"""A power cut at every moment of a store's life; see `crash` for the model.

Whatever is lost, nothing acknowledged is, nothing that is not whole is
accepted, and a collection makes the store clean.
"""

import os
import random
import shutil

import bare
import crash
import pytest

from statejax.artifact import (
  catalog,
  collect,
  commit,
  installed,
  revoke,
  trust,
)
from statejax.artifact.outcome import Refused


class Clock:
  now = 1_700_000_000

  def __call__(self):
    return self.now


def life(recorder, elsewhere):
  """All that changes a store; what it has acknowledged is written down."""
  say, clock = recorder.acknowledged.append, Clock()
  shop = bare.store(recorder.root, clock=clock)
  shop.catalog._base.set_trace_callback(lambda text: recorder.look('catalog'))
  assert shop.catalog._base.execute('pragma synchronous').fetchone() == (2,)
  say(('store', shop.id))
  def mint(number, **options):
    kept = bare.mint(shop, number, **options)
    say(('kept', kept.id, number))
    if kept.ref:
      version = 0 if kept.conflict else options.get('expect', 0)
      say(('ref', kept.ref, version + 1))
    return kept.id
  first = mint(1, ref='chat')
  mint(2, ref='chat', expect=1)
  mint(3, ref='chat', expect=1)  # a conflict, so a fork
  mint(4, ref='pin', parents=(first,))
  there, back = elsewhere / 'there', elsewhere / 'back'
  shutil.copytree(shop.place(first), there)
  condemned = mint(5)
  again = mint(6)
  shutil.copytree(shop.place(again), back)
  clock.now += 10
  say(('condemned', condemned))
  say(('condemned', again))
  assert collect.collect(shop, grace=5).objects
  say(('gone', condemned))
  bare.take_in(shop, back, again, ref='back')
  say(('kept', again, 6))
  bare.take_in(shop, there, first)
  shop.secrets.put('data-0', b'k' * 32)
  say(('secret', 'data-0', 'is'))
  shop.catalog.keep_revocations(revoke.extended(None, [('org', 'x')],
                                                now=clock.now))
  say(('revoked', 'org'))
  installed.replace(shop.path / 'trust' / trust.FILE, b'one')
  say(('trust', b'one'))
  say(('trust', b'two'))  # from here on it may be either
  installed.replace(shop.path / 'trust' / trust.FILE, b'two')
  say(('secret', 'data-0', 'any'))  # while it is being destroyed
  shop.secrets.destroy('data-0')
  say(('secret', 'data-0', 'is not'))
  shop.catalog.close()


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
  return record(tmp_path_factory.mktemp('unsynced'))


def record(path):
  (path / 'root').mkdir()
  recorder = crash.Recorder(path / 'root')
  with recorder.recording():
    life(recorder, path)
  return recorder


def faults(point, recorder, path, rng, **options):
  """Opens a store from an image of a point; returns what is wrong with it."""
  image = path / 'image'
  image.mkdir()
  crash.image(point, recorder.root, image, rng, **options)
  facts, kept, condemned = {}, {}, set()
  for what, *value in point.acknowledged:
    facts.setdefault(what, []).append(value)
    if what == 'kept':
      kept[value[0]] = value[1]
    condemned -= {value[0]} if what == 'kept' else set()
    condemned |= {value[0]} if what == 'condemned' else set()
  wrong, clock = [], Clock()
  clock.now += 1000
  shop = bare.store(image, clock=clock)
  if [shop.id] not in facts.get('store', [[shop.id]]):
    wrong.append('another store')
  there = shop.catalog.objects()
  for id, number in kept.items():
    if id not in there and id not in condemned:
      wrong.append(f'{number} is lost')
  for name, version in facts.get('ref', ()):
    found = shop.catalog.ref(name)
    if found is None or found[1] < version:
      wrong.append(f'{name} fell back')
  for id, in facts.get('gone', ()):
    if id in there:
      wrong.append('what was deleted is back')
  if facts.get('revoked') and shop.catalog.revocations() is None:
    wrong.append('the revocations are lost')
  if facts.get('trust'):
    file = shop.path / 'trust' / trust.FILE
    if not file.exists() or [file.read_bytes()] not in facts['trust']:
      wrong.append('the trust document is lost')
  for name, key in facts.get('secret', ())[-1:]:
    if key != 'any' and (shop.secrets.find(name) == b'k' * 32) != (key == 'is'):
      wrong.append('the secret is wrong')
  for id in collect.orphans(shop):
    try:
      collect.adopt(shop, id, 'alice')
    except Refused:
      pass
  for id in shop.catalog.objects():
    try:
      bare.read(shop, id)  # which compares it with what was written
    except (Refused, AssertionError) as error:
      if id not in condemned:
        wrong.append(f'{id} is not whole: {error}')
  for folder in (shop.path / 'objects').glob('*/*'):
    os.utime(folder, (0, 0))
  collect.collect(shop, grace=0)
  wrong += collect.check(shop)
  wrong += [p.name for n in ('tmp', 'trash') for p in (shop.path / n).iterdir()]
  shop.catalog.close()
  shutil.rmtree(image)
  return wrong


def replay(recorder, path, tries, rng, **options):
  """Returns {what is wrong: how often} over images of random points."""
  wrong, points = {}, []
  for _ in range(tries):
    # Every point is met before any is met again.
    points = points or rng.sample(recorder.points, len(recorder.points))
    point = points.pop()
    try:
      found = faults(point, recorder, path, rng, **options)
    except Exception as error:  # where nothing may be raised
      found = [f'{type(error).__name__}: {error}']
      shutil.rmtree(path / 'image')
    for text in found:
      wrong[f'{point.call}: {text}'] = wrong.get(f'{point.call}: {text}', 0) + 1
  print(f'unsynced: {len(recorder.points)} points, tried {tries}, lost or '
        f'accepted wrongly {sum(wrong.values())}')
  return wrong


def test_power_cuts(recorded, memory):
  assert replay(recorded, memory, 200, random.Random(0)) == {}


@pytest.mark.slow
def test_power_cuts_at_length(recorded, tmp_path):
  assert replay(recorded, tmp_path, 4000, random.Random(1)) == {}


@pytest.mark.slow
def test_kills_between_calls(recorded, tmp_path):
  """Nothing is lost of the disk, only of the process."""
  assert replay(recorded, tmp_path, len(recorded.points), random.Random(2),
                kill=True) == {}


def only(which):
  """A sync that leaves some paths out."""
  sync = commit.sync
  return lambda path: None if which(str(path)) else sync(path)


MUTANTS = {
    'no file is synced': lambda p: os.path.isfile(p),
    'what is staged is not': lambda p: '/tmp/' in p and '.tmp-' in p,
    'its place is not': lambda p: '/objects/' in p,
    'objects is not': lambda p: p.endswith('/objects'),
    'the store is not': lambda p: p.endswith('/root'),
    'trust is not': lambda p: '/trust' in p,
    'secrets are not': lambda p: p.endswith('/secrets')}


@pytest.mark.slow
@pytest.mark.parametrize('name', MUTANTS)
def test_a_missing_sync_is_seen(tmp_path, monkeypatch, name):
  monkeypatch.setattr(commit, 'sync', only(MUTANTS[name]))
  recorder = record(tmp_path)
  monkeypatch.undo()
  wrong = {}
  for seed in range(20):
    wrong = replay(recorder, tmp_path, 50, random.Random(seed))
    if wrong:
      return
  raise AssertionError('nothing was seen')


def test_the_catalog_syncs(tmp_path):
  book = catalog.Catalog(tmp_path / 'index.db')
  assert book._base.execute('pragma synchronous').fetchone() == (2,)
  assert book._base.execute('pragma journal_mode').fetchone() == ('wal',)
  book.close()
