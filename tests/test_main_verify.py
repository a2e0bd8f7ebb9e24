"""What `state verify` says of what does not count, and what becomes of names.
"""

import json
import os
import sqlite3
import time

import pytest
from test_main import run  # noqa: F401
from test_main_state import model, state  # noqa: F401

from statejax import asking
from statejax.artifact import objects


def test_verify_says_what_ends_it(
    state, monkeypatch, tmp_path):  # noqa: F811
  go = ['--workdir=x', '--prompt=ab', '--tokens=3', '--temperature=0',
        '--org=acme']
  def verify(*argv):
    code, out, err = state('verify', *argv, '--org=acme')
    assert bool(err) == bool(code)
    return code, json.loads(out)
  state('mint', 'chat', *go, '--acl=bob:inspect')
  code, found = verify('chat')
  assert code == 0 and found['verified'] and found['resume'] == 'yes'
  assert found['revoked'] == found['expired'] == 'no'
  # Rights, and the run.
  code, found = verify('chat', '--principal=bob')
  assert code == 1 and found['verified'] and 'E_ACL: bob' in found['resume']
  monkeypatch.setattr(asking, 'model', lambda: model(1))
  code, found = verify('chat', '--workdir=x')
  assert code == 1 and found['verified'] and found['resume'] == 'yes'
  assert found['load'] == 'refused(E_WEIGHTS)'
  monkeypatch.setattr(asking, 'model', model)
  # Its time.
  now = int(time.time())
  state('mint', 'short', *go, f'--not_after={now + 100}')
  assert verify('short')[0] == 0
  real = objects.Store.__init__
  monkeypatch.setattr(objects.Store, '__init__', lambda *args, **options: real(
      *args, **options | {'clock': lambda: now + 101}))
  code, found = verify('short')
  assert code == 1 and not found['verified']
  assert found['expired'] == f'at {now + 100}' and found['revoked'] == 'no'
  assert found['resume'].startswith('no, E_EXPIRED')
  # Revoked, of a name and of its directory.
  one = json.loads(state('revoke', 'chat', '--org=acme')[1])['value']
  place = tmp_path / 'store' / 'objects' / one[4:6] / one[4:]
  for key in ('chat', str(place)):
    code, found = verify(key)
    assert code == 1 and not found['verified']
    assert found['revoked'] == f'by artifact {one}'
    assert found['resume'].startswith('no, E_REVOKED')
    assert found['expired'] == 'no'


def test_a_file_and_nobody_to_ask(state, tmp_path):  # noqa: F811
  state('mint', 'chat', '--workdir=x', '--prompt=ab', '--tokens=3')
  one, = (tmp_path / 'store' / 'objects').glob('*/*')
  for verb in ('show', 'verify'):
    code, _, err = state(verb, str(one), '--store=none', '--root=root.pub')
    assert code == 2 and 'a store, whose trust documents say' in err
    assert 'statejax.artifact.verify' in err
  code, _, err = state('verify', str(one), '--store=none')
  assert code == 3 and 'statejax.artifact.verify' in err
  # A seal that opens with a key, or not.
  pytest.importorskip('cryptography')
  mine = ['--org=acme', '--export=org']
  state('mint', 'shut', '--workdir=x', '--prompt=ab', '--tokens=3', *mine)
  assert 'does its key open here: yes' in state('show', 'shut', '--org=acme')[1]
  place, = {*(tmp_path / 'store' / 'objects').glob('*/*')} - {one}
  for store, said in (('none', 'not tried, there is no store'),
                      ('there', 'no, expected key art-')):
    others = [f'--store={tmp_path}/{store}', f'--secrets={tmp_path}/others']
    out = state('show', str(place), *others, '--org=acme')
    assert f'does its key open here: {said}' in out[1]
    others[0] = f'--store={tmp_path}/there'
    state('mint', 'x', '--workdir=x', '--prompt=ab', '--tokens=1', *others)


@pytest.mark.parametrize('name, change, code, text', [
    ('statvfs', lambda path: os.statvfs_result((4096, 1024, *(0,) * 9)),
     'E_NOSPACE', 'expected room for a row of the log'),
    ('access', lambda *_: False, 'E_IO', 'a log that can be written to')])
def test_a_store_that_takes_no_row(
    state, tmp_path, monkeypatch, name, change, code, text):  # noqa: F811
  state('mint', 'chat', '--workdir=x', '--prompt=ab', '--tokens=3')
  def broken(*_, **options):
    raise sqlite3.OperationalError('disk I/O error')
  monkeypatch.setattr(sqlite3, 'connect', broken)
  monkeypatch.setattr(os, name, change)
  found, out, err = state('show', 'chat')
  assert (found, out) == (2, '') and f'{code}: ' in err and text in err


def test_a_damaged_one_gives_its_name_back(state, tmp_path):  # noqa: F811
  mint = ['--workdir=x', '--prompt=ab', '--tokens=3', '--temperature=0']
  for name in ('chat', 'other'):
    state('mint', name, *mint)
  for file in (tmp_path / 'store' / 'objects').rglob('manifest.json'):
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[1:])
  assert state('fsck')[0] == 2
  code, _, err = state('mint', 'chat', *mint, '--replace', '--principal=eve')
  assert code == 0 and json.loads(err)['ref'].startswith('chat~')
  code, _, err = state('mint', 'chat', *mint)
  assert code == 2 and 'or say --replace to take it from sj1-' in err
  code, _, err = state('mint', 'chat', *mint, '--replace')
  kept = json.loads(err)
  assert code == 0 and kept['ref'] == 'chat' and not kept['conflict']
  assert state('delete', 'other', '--principal=eve')[0] == 2
  assert state('delete', 'other')[0] == 0
  assert len(json.loads(state('gc', '--grace=0')[1])['objects']) == 1
  assert state('fsck')[0] == state('audit')[0] == 0
  assert state('show', 'other')[0] == 2 and state('show', 'chat')[0] == 0
