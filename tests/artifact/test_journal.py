"""Two processes that write down edits of one state."""

import concurrent.futures
import json
import multiprocessing

import pytest

from statejax.artifact import journal as jn


def edit(book, oid):
  """An entry as `statejax.memory` makes it."""
  after = book.commitment(f'memory/0/{oid}', {'x': oid})
  book.append({'op': 'write', 'layer': 'memory', 'row': 0, 'oid': oid,
               'before': '', 'after': after, 'outcome': 'committed'})


def salts(path):
  return set(json.loads((path / jn.SALTS).read_text()))


def test_who_comes_second_loses_nothing(tmp_path):
  one, two = jn.Journal(tmp_path / 'a'), jn.Journal(tmp_path / 'a')
  edit(one, 0)
  for late in (lambda: edit(two, 1), lambda: two.adopt(0, {'memory/5': 'ab'}),
               lambda: two.append({'op': 'lock'})):
    with pytest.raises(ValueError, match='only writer'):
      late()
  assert salts(tmp_path / 'a') == {'memory/0/0'}
  edit(one, 2)
  assert jn.Journal(tmp_path / 'a').entries == one.entries


def test_who_comes_second_brings_no_purged_salt_back(tmp_path):
  one = jn.Journal(tmp_path / 'a')
  edit(one, 0)
  two = jn.Journal(tmp_path / 'a')
  one.append({'op': 'purge', 'forgets': 'memory/0/0'})
  with pytest.raises(ValueError, match='only writer'):
    edit(two, 5)
  assert salts(tmp_path / 'a') == set()


def test_a_parent_brings_no_purged_salt_back(tmp_path):
  """Nor is it a journal of another state for that."""
  book = jn.Journal(tmp_path / 'a')
  edit(book, 0)
  kept = book.salts(0)
  book.append({'op': 'purge', 'forgets': 'memory/0/0'})
  book.adopt(0, kept | {'memory/1': '11' * 16})
  assert salts(tmp_path / 'a') == {'memory/0/1'}
  assert book.forgotten(0) == {'memory/0'} and not book.forgotten(1)
  for oid in range(2):  # also what it has forgotten
    with pytest.raises(ValueError, match=f'that knows memory/0/{oid} otherw'):
      book.adopt(0, {f'memory/{oid}': '22' * 16})
  jn.Journal(tmp_path / 'a').adopt(0, kept)


def test_salts_of_entries_to_come_stay(tmp_path):
  one, two = jn.Journal(tmp_path / 'a'), jn.Journal(tmp_path / 'a')
  mine = one.commitment('memory/0/0', {'x': 0})
  assert two.commitment('memory/0/0', {'x': 0}) == mine
  two.commitment('memory/0/1', {'x': 1})
  one.append({'op': 'write', 'after': mine, 'layer': 'memory', 'row': 0,
              'oid': 0})
  again = jn.Journal(tmp_path / 'a')
  assert again.commitment('memory/0/0', {'x': 0}) == mine
  assert salts(tmp_path / 'a') == {'memory/0/0', 'memory/0/1'}


def test_what_the_disk_refused_is_tried_again(tmp_path, monkeypatch):
  book = jn.Journal(tmp_path / 'a')
  edit(book, 1)
  replace = jn.os.replace

  def full(*_):
    raise OSError(28, 'no space')

  for late in (lambda: edit(book, 0), lambda: book.adopt(0, {'m/7': '00' * 16}),
               lambda: book.append({'op': 'purge', 'forgets': 'memory/0/1'})):
    monkeypatch.setattr(jn.os, 'replace', full)
    with pytest.raises(OSError):
      late()
    monkeypatch.setattr(jn.os, 'replace', replace)
  assert salts(tmp_path / 'a') == {'memory/0/1'}
  book.append({'op': 'lock'})
  assert salts(tmp_path / 'a') == set()
  edit(book, 0)
  assert salts(tmp_path / 'a') == {'memory/0/0'} == set(book._salt)
  assert jn.Journal(tmp_path / 'a').entries == book.entries


def test_threads_append_one_after_another(tmp_path):
  book = jn.Journal(tmp_path / 'a')
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda i: book.append({'op': 'lock', 'row': i}), range(40)))
  assert jn.Journal(tmp_path / 'a').entries == book.entries
  assert sorted(e['row'] for e in book.entries) == list(range(40))


def _opened(path, done):
  jn.Journal(path)
  done.set()


def test_a_journal_is_not_opened_while_a_line_is_written(tmp_path):
  book = jn.Journal(tmp_path / 'a')
  spawn = multiprocessing.get_context('spawn')
  done = spawn.Event()
  other = spawn.Process(target=_opened, args=(tmp_path / 'a', done))
  with book._alone() as f:
    # Half a line: who read it now would take it for torn, and cut it off.
    f.write(b'{"op": ')
    f.flush()
    other.start()
    assert not done.wait(1.5)
    f.truncate(0)
  other.join(60)
  assert done.is_set() and other.exitcode == 0
