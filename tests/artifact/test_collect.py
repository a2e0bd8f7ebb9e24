"""Collection, deletion, the check of a whole store, accounts; by kills too."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import bare
import pytest
import small_store as small

from statejax.artifact import collect, mint, objects, verify
from statejax.artifact.outcome import Refused


def add(shop, **options):
  return mint.mint(shop, small.state(), 0, small.host(), small.TERMS, **options)


@pytest.fixture
def shop(tmp_path):
  return small.store(tmp_path)


def test_what_stays_and_what_goes(shop):
  old = add(shop)
  chain = [add(shop).id]  # three generations; only the last has a name
  for ref in ('', 'chat'):
    parent = mint.Parent(chain[-1], verify.verify(shop.place(chain[-1])).about)
    chain.append(add(shop, parent=parent, ref=ref).id)
  assert collect.collect(shop).objects == ()  # within the grace
  shop.catalog.clock.now += 3600
  with shop.catalog.lease(old.id, 'reader', 9999):
    assert collect.collect(shop, generations=2).objects == ()
    assert collect.collect(shop).objects == (chain[0],)
  assert set(shop.catalog.objects()) == {old.id, *chain[1:]}
  assert collect.collect(shop).objects == (old.id,)
  assert collect.check(shop) == []
  assert sorted(p.name for p in (shop.path / 'objects').glob('??/*')) == sorted(
      id[4:] for id in chain[1:])
  with pytest.raises(Refused, match='E_ACL'):
    shop.find(old.id)


def test_deletion_cut_short_is_finished(shop):
  one, two = add(shop, ref='a'), add(shop, ref='b')
  collect._to_trash(shop, one.id)  # and then a kill
  assert any(one.id in text for text in collect.check(shop))
  found = collect.collect(shop)
  assert len(found.leftovers) == 1 and not list((shop.path / 'trash').iterdir())
  assert set(shop.catalog.objects()) == {two.id}
  assert collect.check(shop) == [] and set(shop.catalog.refs()) == {'b'}


def test_orphans_are_reported_adopted_or_collected(shop):
  one, two = add(shop, ref='a'), add(shop, ref='b')
  for id in (one.id, two.id):
    shop.catalog._base.execute('delete from art where id = ?', (id,))
  shop.catalog._base.execute('delete from ledger')
  assert len(collect.check(shop)) == 2
  collect.adopt(shop, one.id, 'alice')
  assert collect.orphans(shop) == [two.id]
  assert collect.collect(shop).orphans == ()  # it may still be in the making
  long_ago = time.time() - 7200
  os.utime(shop.place(two.id), (long_ago, long_ago))
  assert collect.collect(shop).orphans == (two.id,)
  assert collect.check(shop) == []


def test_check_sees_damage_and_wrong_sums(shop):
  one = add(shop)
  assert collect.check(shop) == []
  shop.catalog.charge('alice of acme', one.id, live_bytes=1)
  assert 'ledger: expected' in collect.check(shop)[0]
  file = shop.place(one.id) / 'plain.json'
  file.chmod(0o600)
  file.write_bytes(b'{}')
  assert 'E_FILES' in collect.check(shop)[0]


@pytest.mark.parametrize('change, name', [
    ('art set bytes = bytes - 1', 'bytes'), ("art set kind = 'tuned'", 'kind'),
    ("art set workflow = 'x'", 'workflow'),
    ("kin set parent = 'sj1-'", 'parents')])
def test_check_sees_a_changed_catalog(shop, change, name):
  one = bare.mint(shop, 1).id
  two = bare.mint(shop, 2, parents=[one]).id
  assert collect.check(shop) == []
  shop.catalog._base.execute(f'update {change}')
  wrong = [text for text in collect.check(shop) if two in text]
  assert len(wrong) == 1 and f'catalog: {name}: expected' in wrong[0]


def test_a_request_whose_artifact_was_deleted(shop):
  one = add(shop, mint_key='k')
  assert add(shop, mint_key='k').id == one.id
  collect.delete(shop, one.id, 'alice')
  with pytest.raises(ValueError, match='which was deleted'):
    add(shop, mint_key='k')


def test_accounts(shop):
  one = add(shop)
  shop.catalog.charge('bob', one.id, tokens_skipped=11, resumes=1)
  shop.catalog.clock.now += 10
  collect.delete(shop, one.id, 'admin')
  shop.catalog.clock.now += 10
  size = shop.catalog.objects(gone=True)[one.id][0]
  alice, bob = collect.account(shop)
  assert alice == {'principal': 'alice of acme', 'workflow': '',
                   'live_bytes': 0, 'byte_seconds': 10 * size,
                   'tokens_absorbed': 11}
  assert bob == {'principal': 'bob', 'workflow': '', 'byte_seconds': 0,
                 'tokens_skipped': 11, 'resumes': 1}


# Kills.

WORKER = '''
import os, pathlib, signal, sys
sys.path.insert(0, {here!r})
import small_store as small
from statejax.artifact import commit, layout, mint, objects, store
shop = small.store(pathlib.Path({path!r}))
def die(*_):
  os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name):
  setattr(owner, name, die)
def after(owner, name):
  original = getattr(owner, name)
  def replaced(*args, **named):
    original(*args, **named)
    die()
  setattr(owner, name, replaced)
{plan}
kept = mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                 ref={ref!r}, expect={expect}, mint_key={key!r})
print(kept.id, flush=True)
die()
'''
# Where it dies: as the steps of the protocol are named; whether it is kept.
POINTS = {
    'M4': ('before(store, "save_payload")', False),
    'M5': ('after(store, "save_payload")', False),
    'M7': ('before(layout, "listing")', False),
    'M7 half a manifest': (
        'def half(self, data):\n'
        '  with open(self, "wb") as f: f.write(data[:99])\n'
        '  die()\n'
        'write = pathlib.Path.write_bytes\n'
        'pathlib.Path.write_bytes = lambda self, data: half(self, data) if '
        'self.name == "manifest.json" else write(self, data)', False),
    'M8': ('before(os, "chmod")', False),
    'M9': ('before(commit, "_rename")', False),
    'M10': ('after(commit, "_rename")', False),
    'M11': ('after(commit, "place")', False),
    'M12': ('before(type(shop.catalog), "add")', False),
    'M12 late': ('after(type(shop.catalog), "charge")', False),
    'M13': ('after(objects.Store, "keep")', True),
    'M14': ('', True),
}


def killed(path, plan, ref='chat', expect=0, key='k'):
  return run_and_die(WORKER.format(
      here=os.path.dirname(__file__), path=str(path), plan=plan, ref=ref,
      expect=expect, key=key))


def run_and_die(code):
  """Runs a program that kills itself; returns what it has said."""
  done = subprocess.run(
      [sys.executable, '-c', code], stdout=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parent.parent.parent)
  assert done.returncode == -signal.SIGKILL
  return done.stdout.decode().strip()


def after_a_kill(path, point, expect=0):
  """Kills a mint at a point; what was acknowledged is there, all is whole."""
  plan, kept = POINTS[point]
  shop = small.store(path)
  before = set(shop.catalog.objects())
  said = killed(path, plan, expect=expect, key=f'{point}-{expect}')
  new = set(shop.catalog.objects()) - before
  assert len(new) == kept, point
  assert not said or {said} == new
  assert all(text.endswith('cut short') for text in collect.check(shop)), point
  version = (shop.catalog.ref('chat') or ('', 0))[1]
  assert version == expect + kept
  for id in collect.orphans(shop):
    os.utime(shop.place(id), (0, 0))
  collect.collect(shop, grace=0, generations=9)
  assert collect.check(shop) == []
  assert not list((shop.path / 'tmp').iterdir())
  # A retry of the same request makes it once.
  found = add(shop, ref='chat', expect=expect, mint_key=f'{point}-{expect}')
  assert (found.id in new) == kept
  return shop


def test_killed_before_the_catalog_knows(tmp_path):
  after_a_kill(tmp_path, 'M12')


@pytest.mark.slow
@pytest.mark.parametrize('point', POINTS)
def test_killed_at_every_point(tmp_path, point):
  for expect in range(3):  # the first, and overwriting a name
    shop = after_a_kill(tmp_path, point, expect)
    assert shop.catalog.ref('chat')[1] == expect + 1


@pytest.mark.slow
def test_killed_at_random(tmp_path):
  rng, shop = random.Random(0), small.store(tmp_path)
  code = WORKER.format(
      here=os.path.dirname(__file__), path=str(tmp_path), ref='', expect=0,
      plan='', key='').split('kept = ')[0] + (
          'small.state()\nprint("ready", flush=True)\n'
          'while True:\n'
          '  print(mint.mint(shop, small.state(), 0, small.host(),\n'
          '                  small.TERMS, ref="pin/" + os.urandom(4).hex()).id,'
          '\n        flush=True)\n')
  said = set()
  for _ in range(40):
    worker = subprocess.Popen(
        [sys.executable, '-c', code], stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parent.parent.parent)
    assert worker.stdout.readline() == b'ready\n'
    time.sleep(rng.uniform(0, 1.5))
    worker.kill()
    said |= set(worker.communicate()[0].decode().split())
  there = set(shop.catalog.objects())
  lost = {id for id in said if id not in there}
  wrong = [text for text in collect.check(shop)
           if not text.endswith('cut short')]
  print(f'kills: tried 40, acknowledged {len(said)}, lost {len(lost)}, '
        f'damaged {len(wrong)}')
  assert not lost and not wrong and len(said) > 10


def test_tables_can_be_opened_by_two_stores(tmp_path):
  one, two = small.store(tmp_path), small.store(tmp_path)
  kept = add(one, ref='a')
  assert two.find('a') == kept.id
  assert isinstance(two, objects.Store)
