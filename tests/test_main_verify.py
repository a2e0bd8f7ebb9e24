"""What `state verify` says of what does not count, and what becomes of names.
"""

import json
import time

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
