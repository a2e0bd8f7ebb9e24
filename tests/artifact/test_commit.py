import os
import random
import subprocess
import sys
import time

import pytest

from statejax.artifact import commit


def fill(folder, number=0):
  (folder / 'deep' / 'er').mkdir(parents=True)
  (folder / 'a').write_bytes(b'%d' % number * 1000)
  (folder / 'deep' / 'er' / 'b').write_bytes(b'%d' % number * 50)
  (folder / 'empty').write_bytes(b'')


def holds(folder, number):
  return ((folder / 'a').read_bytes() == b'%d' % number * 1000
          and (folder / 'deep/er/b').read_bytes() == b'%d' % number * 50)


@pytest.fixture
def published(tmp_path):
  with commit.publish(tmp_path / 'one') as folder:
    fill(folder)
  return tmp_path / 'one'


def test_publish_and_check(published):
  commit.check(published)
  assert holds(published, 0)
  assert os.listdir(published.parent) == ['one']


def test_relative_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with commit.publish('one') as folder:
    fill(folder)
    monkeypatch.chdir('/')
  commit.check(tmp_path / 'one')


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
  events = []
  fsync, rename = os.fsync, os.rename

  def record_fsync(descriptor):
    events.append(os.readlink(f'/proc/self/fd/{descriptor}'))
    fsync(descriptor)

  def record_rename(*names):
    events.append('rename')
    rename(*names)

  monkeypatch.setattr(os, 'fsync', record_fsync)
  monkeypatch.setattr(os, 'rename', record_rename)
  with commit.publish(tmp_path / 'one') as folder:
    fill(folder)
  inside, after = events[:-2], events[-2:]
  assert after == ['rename', str(tmp_path)]
  names = [os.path.relpath(name, folder) for name in inside]
  assert sorted(names) == ['.', 'a', 'deep', 'deep/er', 'deep/er/b', 'empty',
                           'files.json']
  order = [names.index(n) for n in ('deep/er/b', 'deep/er', 'deep', '.')]
  assert order == sorted(order) and names[-1] == '.'


def test_never_overwrites(published):
  with pytest.raises(commit.AlreadyPublished, match='not yet taken'):
    with commit.publish(published):
      raise AssertionError('not reached')
  with pytest.raises(ValueError, match='not yet taken'):
    with commit.publish(published.parent / 'two') as folder:
      fill(folder, 2)
      with commit.publish(published.parent / 'two') as faster:
        fill(faster, 3)
  assert holds(published.parent / 'two', 3)
  assert sorted(os.listdir(published.parent)) == ['one', 'two']


def test_exception_leaves_nothing(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with commit.publish(tmp_path / 'one') as folder:
      fill(folder)
      raise KeyboardInterrupt
  assert not os.listdir(tmp_path)


def test_failed_sync_leaves_nothing(tmp_path, monkeypatch):
  def fail(descriptor):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(os, 'fsync', fail)
  with pytest.raises(OSError, match='Input/output'):
    with commit.publish(tmp_path / 'one') as folder:
      fill(folder)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('number', [0, 1])
def test_what_cannot_be_listed_is_not_published(tmp_path, monkeypatch, number):
  """A walk that leaves a folder out would leave its files unsynced."""
  calls, scandir = iter(range(99)), os.scandir

  def once(*args):
    if next(calls) == number:
      raise OSError(5, 'Input/output error')
    return scandir(*args)

  monkeypatch.setattr(os, 'scandir', once)
  with pytest.raises(OSError, match='Input/output'):
    with commit.publish(tmp_path / 'one') as folder:
      fill(folder)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('spoil, text', [
    (lambda d: (d / 'l').symlink_to(d / 'a'), 'l: expected regular files'),
    (lambda d: (d / 'l').symlink_to(d / 'deep'), 'l: expected regular files'),
    (lambda d: os.mkfifo(d / 'f'), 'f: expected regular files'),
    (lambda d: (d / 'void').mkdir(), 'empty directory'),
    (lambda d: (d / 'files.json').write_text('[]'), 'rename it'),
])
def test_publish_refuses(tmp_path, spoil, text):
  with pytest.raises(ValueError, match=text):
    with commit.publish(tmp_path / 'one') as folder:
      fill(folder)
      spoil(folder)
  assert not os.listdir(tmp_path)


def flip(path, position=0):
  data = bytearray(path.read_bytes())
  data[position] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize('damage, text', [
    (lambda d: flip(d / 'a', 500), 'a: expected sha256'),
    (lambda d: os.truncate(d / 'deep/er/b', 49), 'er/b: expected 50 bytes'),
    (lambda d: (d / 'empty').unlink(), 'empty: expected a file'),
    (lambda d: (d / '.git').write_text('x'), r'\.git: expected only files'),
    (lambda d: (d / 'void').mkdir(), 'empty directory'),
    (lambda d: (d / 'files.json').unlink(), 'expected a listing, got none'),
    (lambda d: (d / 'files.json').write_text('[' * 9999), 'something else'),
    (lambda d: (d / 'files.json').write_text('{"a": 1}'), 'something else'),
    (lambda d: ((d / 'a').rename(d.parent / 'a'),
                (d / 'a').symlink_to(d.parent / 'a')), 'a: expected regular'),
])
def test_check_refuses(published, damage, text):
  damage(published)
  with pytest.raises(ValueError, match=text):
    commit.check(published)


def test_check_refuses_any_flip_in_the_listing(published):
  listing = published / 'files.json'
  for position in range(listing.stat().st_size):
    flip(listing, position)
    with pytest.raises(ValueError):
      commit.check(published)
    flip(listing, position)
  commit.check(published)


def test_check_refuses_links_and_nothing(published, tmp_path):
  (tmp_path / 'link').symlink_to(published)
  with pytest.raises(ValueError, match='path of the directory itself'):
    commit.check(tmp_path / 'link')
  with pytest.raises(ValueError, match='check the path'):
    commit.check(tmp_path / 'nowhere')


def test_sweep_leaves_the_living(published):
  parent = published.parent
  (parent / '.mine.tmp-1').mkdir()
  with commit.publish(parent / 'two') as folder:
    fill(folder)
    assert not commit.sweep(parent)
  assert sorted(os.listdir(parent)) == ['.mine.tmp-1', 'one', 'two']


WRITER = """
import itertools, pathlib, sys
sys.path.insert(0, sys.argv[2])
from test_commit import commit, fill
for number in itertools.count(int(sys.argv[3])):
  with commit.publish(pathlib.Path(sys.argv[1]) / str(number)) as folder:
    fill(folder, number)
  print(number, flush=True)
"""


def test_kill_at_any_time(tmp_path):
  """What is visible is whole, and nothing acknowledged is lost."""
  random.seed(0)
  acknowledged, swept, start = [], 0, 0
  for _ in range(10):
    with subprocess.Popen(
        [sys.executable, '-c', WRITER, tmp_path, os.path.dirname(__file__),
         str(start)], stdout=subprocess.PIPE, text=True) as child:
      first = child.stdout.readline()
      time.sleep(random.uniform(0, 0.02))
      child.kill()
      acknowledged += [int(n) for n in [first, *child.stdout]]
    swept += len(commit.sweep(tmp_path))
    present = sorted(int(name) for name in os.listdir(tmp_path))
    assert set(acknowledged) <= set(present)
    for number in present:
      commit.check(tmp_path / str(number))
      assert holds(tmp_path / str(number), number)
    start = present[-1] + 1
  assert swept  # else nothing was interrupted
