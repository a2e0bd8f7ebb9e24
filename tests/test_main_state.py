"""The command `state`, from minting to collection."""

import dataclasses
import functools
import json
import sys
import tarfile

import jax
import pytest
from test_main import TRAIN, call, run  # noqa: F401

from statejax import asking, states
from statejax import config as c
from statejax import model as lm
from statejax.artifact import digest, objects

FULL = c.LayerConfig('full', c.AttentionConfig(
    heads=1, kv_heads=1, key=8, value=8), c.SwiGLUConfig(8))
MODEL = lm.LanguageModel(c.ModelConfig(
    vocab=257, width=8, layers=(FULL,), groups=(c.GroupConfig(('full',)),)))


@functools.cache
def model(seed=0):
  params = MODEL.init(jax.random.key(seed))
  return MODEL, MODEL.unstack(params), digest.tree_digest(params)


@pytest.fixture
def state(run, monkeypatch, tmp_path):  # noqa: F811
  """Runs `state ...` with an untrained model; status, lines, errors."""
  monkeypatch.setattr(asking, 'model', model)
  def state(*argv):
    # Of two values of a flag the last one counts.
    return run('state', f'--store={tmp_path}/store',
               f'--secrets={tmp_path}/secrets', *argv)
  return state


def test_life_of_an_artifact(state, monkeypatch):
  go = ['--workdir=x', '--temperature=0']
  whole = state('mint', 'whole', *go, '--prompt=ab', '--tokens=12')[1]
  code, first, err = state(
      'mint', 'chat', *go, '--prompt=ab', '--tokens=5', '--transcript=keep',
      '--acl=bob:resume', '--org=acme', '--workflow=demo')
  assert code == 0
  one = json.loads(err)
  assert one['ref'] == 'chat' and not one['conflict']
  # On from there, as if it had never stopped; the name moves along.
  code, second, err = state('resume', 'chat', *go, '--tokens=7', '--org=acme')
  assert code == 0 and err.startswith('resumed(7) promise=bit')
  assert first.rstrip('\n') + second == whole
  two = json.loads(err.splitlines()[-1])
  assert two['id'] != one['id'] and two['ref'] == 'chat'
  # What it is, for a person.
  code, out, _ = state('show', 'chat', '--org=acme', '--workdir=x')
  assert code == 0 and 'whose: local of acme' in out and two['id'] in out
  assert 'after 14 tokens' in out and 'bob may resume' in out
  assert f'from {one["id"]}' in out
  assert 'does it fit here: yes, promise bit' in out
  monkeypatch.setattr(asking, 'model', lambda: model(1))
  out = state('show', 'chat', '--org=acme', '--workdir=x')[1]
  assert 'does it fit here: no, E_WEIGHTS: model.params' in out
  # Another model refuses it, or absorbs the kept tokens again.
  code, _, err = state('resume', 'chat', *go, '--tokens=2', '--org=acme')
  assert code == 2 and 'refused(E_WEIGHTS)' in err
  code, _, err = state('resume', one['id'], *go, '--tokens=2', '--org=acme',
                       '--on_mismatch=reprefill')
  assert code == 0 and err.startswith('reprefilled(7, E_WEIGHTS) promise=none')
  monkeypatch.setattr(asking, 'model', model)
  code, out, _ = state('verify', 'chat', '--org=acme', '--workdir=x')
  assert code == 0 and json.loads(out)['load'] == 'resumed(14)'
  # Others.
  who = ['--org=acme', '--principal=bob']
  code, _, err = state('resume', 'chat', *go, '--tokens=2', *who)
  kept = json.loads(err.splitlines()[-1])
  # The name is not theirs to move.
  assert code == 0 and kept['ref'].startswith('chat~') and kept['conflict']
  rows = [json.loads(line) for line in state('audit')[1].splitlines()][-3:-1]
  assert [(row['principal'], row['action']) for row in rows] == [
      ('bob of acme', 'resume'), ('bob of acme', 'mint')]
  out = state('show', 'chat', '--org=acme')[1]
  assert 'whose: local of acme' in out and two['id'] in out
  code, _, err = state('fork', 'chat', '--ref=b', *who)
  assert code == 2 and 'E_ACL: bob of acme may not fork' in err
  assert state('fork', 'chat', '--ref=b', '--org=acme')[0] == 0
  # What they have in common and where they come from.
  code, out, _ = state('diff', one['id'], 'b', '--org=acme')
  lines = out.splitlines()
  assert code == 0 and lines[0].startswith(f'{one["id"]} | sj1-')
  assert 'state.length: 7 | 14' in lines and 'governance.owner' not in out
  assert '  layers/full/k' in lines and '  key' not in lines
  assert 'tokens: the first 8 are the same, then 0 | 7' in lines
  code, out, _ = state('lineage', two['id'], '--org=acme')
  lines = out.splitlines()
  assert code == 0 and [line.split(', ')[0][-1] for line in lines] == [
      '0', '1', '2', '2']
  assert lines[0].startswith(f'  {one["id"]}  depth 0, live, 7 tokens')
  assert lines[1].startswith(f'* {two["id"]}') and any(
      'named b' in line for line in lines[2:])
  # Revoked.
  code, out, _ = state('revoke', 'b', '--org=acme')
  assert code == 0 and json.loads(out)['revoked'] == 'artifact'
  code, _, err = state('resume', 'b', *go, '--org=acme')
  assert code == 2 and 'E_REVOKED' in err
  # The books.
  code, out, _ = state('audit')
  rows = [json.loads(line) for line in out.splitlines()]
  assert code == 0 and rows[-1]['rows'] == len(rows) - 1 and not rows[-1][
      'wrong']
  assert [row['outcome'] for row in rows[:3]] == [
      'allowed', 'allowed', 'resumed(7)']
  assert {row['code'] for row in rows[:-1]} == {
      '', 'E_WEIGHTS', 'E_ACL', 'E_REVOKED'}
  accounts = [json.loads(x) for x in state('account')[1].splitlines()]
  demo = next(row for row in accounts if row['workflow'] == 'demo' and
              row['principal'] == 'local of acme')
  assert demo['tokens_skipped'] == 7 and demo['tokens_reprefilled'] == 7
  assert json.loads(state('gc')[1])['objects'] == []
  assert len(json.loads(state('gc', '--grace=0')[1])['objects']) >= 1
  assert state('audit')[0] == 0


@pytest.mark.parametrize('argv, message', [
    ([], 'usage: '), (['fly'], 'state takes one of mint, resume, show'),
    (['mint'], 'and, but for audit, account, fsck, gc, a target'),
    (['trust', 'nothing'], 'target: expected a file, got nothing'),
    (['trust', 'x', '--retire'], 'target: expected a file'),
    (['audit', '--store=typo'], '--store=typo: expected a store, got none'),
    (['audit', '--root=nix'], '--root: expected a file, got nothing at nix'),
    (['show', 'nothing.tar', '--store=typo'], 'nothing there and no store at'),
    (['crl', 'x'], '--signing_key: name the file'),
    (['audit', 'x'], 'usage'), (['diff', 'x'], 'diff takes two'),
    (['show', 'x', '--ref=y'], '--ref: state show does not use it'),
    (['mint', 'x', '--workdir=w'], 'expected one of them'),
    (['mint', 'x', '--prompt=a', '--resume=b'], 'expected one of them'),
    (['fork', 'x'], '--ref: name the child'),
    (['migrate', 'x', '--workdir=w'], '--ref: name the child'),
    (['show', 'nothing'], 'E_ACL: expected an artifact or name'),
    (['show', 'sj1-b950'], 'name of this store (12 characters or more of'),
    (['resume', 'nothing', '--workdir=w'], 'refused(E_ACL)'),
    (['mint', 'a b', '--prompt=a', '--tokens=1', '--workdir=w'],
     'ref: expected'),
    (['mint', 'x', '--prompt=a', '--acl=b:fly', '--org=acme'],
     '--acl=b:fly: expected WHO:RIGHT'),
    (['mint', 'x', '--prompt=a', '--acl=b', '--org=acme'], '--acl=b: expected'),
    (['mint', 'x', '--prompt=a', '--acl=b:resume'], 'expected an --org'),
    (['mint', 'x', '--prompt=a', '--workflow=A B'], 'flags of state mint'),
    (['mint', 'x', '--prompt=a', '--tokens=0'], '--tokens=0: expected'),
    (['mint', 'x', '--prompt=a', '--temperature=-1'], 'temperature: expected'),
    (['mint', 'x', '--prompt=a', '--tokens=4', '--horizon=4'],
     '--horizon=4: expected at least 5'),
    (['resume', 'x', '--tokens=0', '--workdir=w'], '--tokens=0: expected'),
    (['mint', 'x', '--prompt=a', '--not_after=5'], 'E_EXPIRED'),
    (['mint', 'x', '--resume=b', '--transcript=keep'], 'does not have its')])
def test_mistakes(state, tmp_path, argv, message):
  objects.Store(tmp_path / 'store', objects.Secrets(tmp_path / 'secrets'))
  code, _, err = state(*argv)
  assert code == 2 and message in err


def test_needs_a_workdir(run, tmp_path):  # noqa: F811
  code, _, err = run('state', 'mint', 'x', '--prompt=a',
                     f'--store={tmp_path}/s', f'--secrets={tmp_path}/k')
  assert code == 2 and '--workdir: name the directory of the run' in err


def test_from_store_to_store(state, monkeypatch, tmp_path):
  pytest.importorskip('cryptography', reason='the extra [sign] is not there')
  monkeypatch.chdir(tmp_path)
  assert state('keygen', 'root')[0] == state('keygen', 'acme')[0] == 0
  assert state('keygen', 'root')[0] == 2  # nothing is overwritten
  assert oct((tmp_path / 'root.pem').stat().st_mode)[-3:] == '600'
  org, there = ['--org=acme'], ['--org=acme', '--root=root.pub']
  mint = ['--workdir=x', '--prompt=ab', '--tokens=3', '--temperature=0', *org]
  assert state('mint', 'chat', *mint, '--export=org')[0] == 0
  assert state('mint', 'mine', *mint)[0] == 0
  assert state('trust', 'acme.pub', *org, '--signing_key=root.pem')[0] == 0
  code, out, _ = state('transfer', 'chat', *org, '--signing_key=acme.pem',
                       '--file=chat.tar')
  assert code == 0
  one = json.loads(out)['id']
  code, _, err = state('transfer', 'mine', *org, '--signing_key=acme.pem',
                       '--file=x')
  assert code == 2 and 'E_ACL: the artifact is never exported' in err
  assert state('transfer', 'mine', *org)[0] == 2
  assert state('crl', 'acme.crl', '--signing_key=acme.pem')[0] == 0
  out = state('show', 'chat.tar')[1]
  assert one in out and 'sealed: aes256gcm1' in out
  # The other store.
  (tmp_path / 'store').rename(tmp_path / 'first')
  code, _, err = state('transfer', 'chat.tar', *there, '--ref=chat')
  assert code == 2 and 'E_UNSIGNED' in err
  assert state('trust', 'acme.pub', *org, '--signing_key=root.pem')[0] == 0
  code, _, err = state('transfer', 'chat.tar', *there, '--ref=chat')
  assert code == 2 and 'E_CRL_STALE' in err
  assert state('trust', 'acme.crl', *there)[0] == 0
  code, _, err = state('transfer', 'chat.tar', *there, '--ref=chat',
                       '--workdir=x')
  assert code == 0 and json.loads(err)['id'] == one
  code, out, _ = state('verify', 'chat', *there, '--workdir=x')
  assert code == 0 and json.loads(out)['load'] == 'resumed(5)'
  assert state('audit', *there)[0] == 0
  # Without the root key nobody knows whose signatures count: that is no fault.
  for verb, *argv in (('audit',), ('audit', *there), ('fsck', *org),
                      ('fsck', *there)):
    code, out, _ = state(verb, *argv)
    last = json.loads(out.splitlines()[-1])
    assert code == 0 and last['wrong'] == []
    assert last.get('signatures not checked') == (
        None if '--root=root.pub' in argv else [one])
  # A private key is nobody's to see, and names nothing.
  key = ['--signing_key=acme.pem', '--root=root.pub', *org]
  for argv in (['trust', 'acme.pem', '--signing_key=root.pem', *org],
               ['revoke', 'acme.pem', '--by=key', *key],
               ['grant', 'chat', '--holder=root.pem', '--file=g', *key]):
    code, out, err = state(*argv)
    assert code == 2 and not out and 'one with a private key' in err, argv
  assert not (tmp_path / 'g').exists()


def test_a_name_is_not_taken_by_mistake(state):
  mint = ['--workdir=x', '--prompt=ab', '--tokens=3', '--temperature=0']
  assert state('mint', 'chat', *mint)[0] == 0
  code, out, err = state('mint', 'chat', *mint)
  assert code == 2 and not out
  assert 'or say --replace to take it from sj1-' in err
  # Somebody else's is not told of: theirs gets a name beside it.
  for more in ('--principal=eve', '--org=other'):
    code, _, err = state('mint', 'chat', *mint, '--replace', more)
    assert code == 0 and json.loads(err)['ref'].startswith('chat~')
    code, _, err = state('fork', json.loads(err)['id'], '--ref=chat', more)
    assert code == 0 and json.loads(err)['ref'].startswith('chat~')
  code, _, err = state('mint', 'chat', *mint, '--replace')
  assert code == 0 and json.loads(err)['ref'] == 'chat'
  one = json.loads(err)['id']
  # Nor one for a child.
  for verb in (['fork', 'chat'], ['migrate', 'chat', '--workdir=x'],
               ['resume', one, *mint[:1], '--tokens=1']):
    code, _, err = state(*verb, '--ref=chat')
    assert code == 2 and 'chat: expected a free name' in err
  # What goes on from an id is nameless, which is said, unless it is named.
  code, _, err = state('resume', one, '--workdir=x', '--tokens=1')
  assert code == 0 and f'{one}: has no name, and what comes of it' in err
  for key, ref in ((one, 'more'), ('chat', 'most')):
    code, _, err = state('resume', key, '--workdir=x', '--tokens=1',
                         f'--ref={ref}')
    assert code == 0 and 'has no name' not in err
    assert json.loads(err.splitlines()[-1])['ref'] == ref
  assert one in state('show', 'chat')[1]


def test_texts_that_hold_here(state):
  kind = '--system=be kind'
  go = ['--workdir=x', '--temperature=0', '--tokens=1']
  assert state('mint', 'ruled', *go, '--prompt=ab', kind, '--persona=a pirate',
               '--org=acme', '--acl=org:acme:resume')[0] == 0
  go.append('--org=acme')
  for more, code, says in (
      ([], 2, 'E_POLICY'), (['--system=be rude'], 2, 'E_POLICY'),
      ([kind, '--safety=do no harm'], 2, 'E_POLICY'), ([kind], 0, 'resumed(3)'),
      ([kind, '--principal=bob'], 0, 'resumed(4)')):
    got, _, err = state('resume', 'ruled', *go, *more)
    assert got == code and says in err
  assert 'yes, promise bit' in state('show', 'ruled', '--workdir=x',
                                     '--org=acme', kind)[1]
  assert 'resumed(4)' in state('verify', 'ruled', '--workdir=x', '--org=acme',
                               kind)[1]
  # Of both that were minted under it; what went on without it is not.
  assert state('revoke', 'a pirate', '--by=persona', '--org=acme')[0] == 0
  assert state('revoke', 'a parrot', '--by=persona', '--org=acme')[0] == 2


def test_only_a_file(state, monkeypatch, tmp_path):
  """What a portable file says to whoever has nothing else."""
  pytest.importorskip('cryptography', reason='the extra [sign] is not there')
  monkeypatch.chdir(tmp_path)
  org, sign = ['--org=acme'], ['--org=acme', '--signing_key=acme.pem']
  for name in ('root', 'acme', 'bob'):
    state('keygen', name)
  assert state('mint', 'chat', '--workdir=x', '--prompt=ab', '--tokens=3',
               '--temperature=0', '--export=any', *org)[0] == 0
  state('trust', 'acme.pub', *org, '--signing_key=root.pem')
  state('crl', 'acme.crl', '--signing_key=acme.pem')
  state('trust', 'acme.crl', '--root=root.pub', *org)
  assert state('transfer', 'chat', *sign, '--file=chat.tar')[0] == 0
  nowhere = ['--store=nowhere']
  code, out, _ = state('show', 'chat.tar', *nowhere)
  assert code == 0 and 'whose: local of acme' in out and 'not asked, ' in out
  assert not (tmp_path / 'nowhere').exists()
  code, _, err = state('show', 'chat', '--store=gs://bucket/states')
  assert code == 2 and 'a store is a directory' in err
  # Whose signature counts, who may, which model.
  def show(*argv):
    return state('show', 'chat.tar', '--workdir=x', *argv)[1].splitlines()[-2:]
  may, load = show('--root=root.pub', *org)
  assert may.endswith('resume it here: yes') and 'yes, promise bit' in load
  assert 'no, E_TRUST: expected a pinned root key' in show(*org)[0]
  assert 'no, E_ACL: bob of globex may not' in show(
      '--root=root.pub', '--org=globex', '--principal=bob')[0]
  monkeypatch.setattr(asking, 'model', lambda: model(1))
  assert 'no, E_WEIGHTS: model.params' in show('--root=root.pub', *org)[1]
  monkeypatch.setattr(asking, 'model', model)
  code, out, _ = state('verify', 'chat.tar', '--workdir=x', '--root=root.pub',
                       *org)
  found = json.loads(out)
  assert code == 0 and found['resume'] == 'yes'
  assert found['load'] == 'resumed(5)'
  # A damaged one.
  data = bytearray((tmp_path / 'chat.tar').read_bytes())
  with tarfile.open(tmp_path / 'chat.tar') as archive:
    data[archive.getmember('plain.json').offset_data] ^= 1
  (tmp_path / 'bad.tar').write_bytes(data)
  assert 'E_FILES' in state('show', 'bad.tar')[2]
  # Who was asked, and does not vouch.
  out = state('show', 'chat.tar')[1]
  assert 'vouched for by: nobody who counts here: E_TRUST: expected a' in out
  assert 'E_TRUST' in json.loads(state('verify', 'chat.tar')[1])['signature']
  # For another organisation, by a grant.
  bob = ['--root=root.pub', '--org=globex', '--principal=bob']
  shown = ['--grant=bob.grant', '--holder_key=bob.pem']
  code, _, err = state('grant', 'chat', *sign)
  assert code == 2 and '--holder and --file' in err
  assert state('grant', 'chat', *sign, '--holder=bob.pub',
               '--file=bob.grant')[0] == 0
  out = state('grant', 'bob.grant', '--root=root.pub')[1]
  assert 'rights: inspect, resume; 1 uses' in out and 'count here: yes' in out
  code, _, err = state('verify', 'chat', *bob)
  assert code == 2 and 'E_ACL' in err
  code, _, err = state('verify', 'chat', *bob, shown[0])
  assert code == 2 and 'expected both' in err
  code, out, _ = state('verify', 'chat', *bob, *shown, '--workdir=x')
  assert code == 0 and json.loads(out)['load'] == 'resumed(5)'
  # What it is for is resumed, also where the name has moved since it was shown.
  assert state('fork', 'chat', *org, '--ref=other')[0] == 0
  names = objects.Store(tmp_path / 'store', objects.Secrets(
      tmp_path / 'secrets')).catalog
  real = asking.who
  (one, at), (other, _) = names.ref('chat'), names.ref('other')
  def who(shop, key):
    found = real(shop, key)
    assert names.move('chat', other, at)
    return found
  with monkeypatch.context() as patch:
    patch.setattr(asking, 'who', who)
    code, _, err = state('resume', 'chat', *bob, *shown, '--workdir=x',
                         '--temperature=0', '--tokens=1')
  assert code == 0 and err.startswith('resumed(5)') and names.move(
      'chat', one, at + 1)
  rows = [json.loads(line) for line in state('audit')[1].splitlines()]
  assert [row['id'] for row in rows if row.get('action') == 'resume'][-1] == one
  code, _, err = state('resume', 'chat', *bob, *shown, '--workdir=x')
  assert code == 2 and 'E_GRANT: it was used 1 times' in err
  row = json.loads(state('audit')[1].splitlines()[-2])
  assert (row['principal'], row['code']) == ('bob of globex', 'E_GRANT')
  # A bucket.
  url = f'file://{tmp_path}/bucket'
  code, out, _ = state('push', 'chat', *org, f'--url={url}')
  there = json.loads(out)['url']
  assert code == 0 and state('pull', there, *org)[0] == 0
  assert state('push', 'chat', *org)[0] == 2
  one = json.loads(state('transfer', 'chat', *sign, f'--file={url}')[1])['id']
  code, _, err = state('transfer', f'{url}/{one}', *org, '--root=root.pub',
                       '--ref=sent')
  assert code == 0 and json.loads(err)['ref'] == 'sent'


def test_only_what_somebody_vouches_for_is_verified(
    state, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  go = ['--workdir=x', '--prompt=ab', '--tokens=3', '--temperature=0']
  state('mint', 'chat', *go)
  id = json.loads(state('mint', 'forged', *go, '--store=other')[2])['id']
  forged = str(next((tmp_path / 'other' / 'objects').glob(f'*/{id[4:]}')))
  code, out, err = state('verify', forged)
  assert code == 1 and 'expected one for which somebody vouches' in err
  found = json.loads(out)
  assert not found['verified'] and found['resume'].startswith('no, E_SIG')
  code, out, _ = state('verify', forged, '--store=nowhere')
  found = json.loads(out)
  assert code == 3 and not found['verified']
  assert found['signature'] == 'not checked'
  # A name is what has it in the store, not a file beside it.
  (tmp_path / 'chat').mkdir()
  assert json.loads(state('verify', 'chat')[1])['verified']
  code, _, err = state('verify', './chat')
  assert code == 2 and 'E_LAYOUT' in err


def test_revoking_and_deleting(state, monkeypatch, tmp_path):
  pytest.importorskip('cryptography', reason='the extra [sign] is not there')
  monkeypatch.chdir(tmp_path)
  org, sign = ['--org=acme'], ['--org=acme', '--signing_key=acme.pem']
  go = ['--workdir=x', '--prompt=ab', '--tokens=2', '--temperature=0', *org]
  root = ['--root=root.pub']
  for name in ('root', 'acme', 'lost'):
    assert state('keygen', name)[0] == 0
  for name, flow in (('a', 'demo'), ('b', 'demo'), ('c', 'other')):
    assert state('mint', name, *go, f'--workflow={flow}')[0] == 0
  def revoke(*argv):
    code, out, err = state('revoke', *argv)
    return code, [json.loads(line)['revoked'] for line in out.splitlines()], err
  assert revoke('demo', '--by=workflow', *org)[:2] == (0, 2 * ['artifact'])
  for name, code in (('a', 2), ('b', 2), ('c', 0)):
    assert state('resume', name, '--workdir=x', '--tokens=1', *org)[0] == code
  assert revoke('c', '--by=family', *org)[:2] == (0, ['root'])
  assert 'E_REVOKED' in state('resume', 'c', '--workdir=x', *org)[2]
  # By keys.
  for name in ('acme', 'lost'):
    assert state('trust', f'{name}.pub', *org, '--signing_key=root.pem')[0] == 0
  lost = ['lost.pub', '--by=key', '--since=5']
  assert 'E_ACL' in revoke(*lost, *org)[2]
  assert 'E_TRUST' in revoke(*lost, *org, *root, '--signing_key=root.pem')[2]
  assert revoke(*lost, *root, *sign)[:2] == (0, ['key'])
  assert revoke('a pirate', '--by=persona', *root, *sign)[:2] == (
      0, ['persona'])
  assert 'the --epoch of here' in revoke('4', '--by=epoch', *root, *sign)[2]
  assert revoke('4', '--by=epoch', '--epoch=4', *root, *sign)[:2] == (
      0, ['epoch'])
  assert revoke('x', '--by=epoch', *root, *sign)[0] == 2
  # The trust document.
  def trust(*argv, code=0):
    got, out, err = state('trust', *argv, '--signing_key=root.pem')
    assert got == code, err
    return json.loads(out) if code == 0 else err
  assert trust('lost.pub', '--retire', *org)['status'] == 'retired'
  assert 'expected one that is trusted' in trust('root.pub', '--retire', *org,
                                                 code=2)
  rules = ['rules', '--min_epoch=5', '--classes=public,internal']
  assert '4 artifacts are older; say --epoch=5' in trust(*rules, code=2)
  found = trust(*rules, '--epoch=5')
  assert (found['trust'], found['min_epoch'], found['older']) == (4, 5, 4)
  assert 'never go back' in trust('rules', '--min_epoch=4', '--epoch=4',
                                code=2)
  assert 'state trust rules' in trust('acme.pub', '--min_epoch=6', code=2)
  assert 'state trust rules' in trust('rules', code=2)
  assert '--retire' in trust('rules', '--min_epoch=6', '--retire', code=2)
  # What is older ends; nothing is minted that could not be resumed.
  assert '--epoch=0: expected at least 5' in state('mint', 'late', *go)[2]
  for verb in ('resume', 'show'):
    out = state(verb, 'c', '--workdir=x', '--epoch=5', *org)
    assert 'E_EPOCH' in out[1] + out[2]
  assert state('mint', 'late', *go, '--epoch=5')[0] == 0
  assert state('resume', 'late', '--workdir=x', '--epoch=5', '--tokens=1',
               *org)[0] == 0
  # Whoever may not see it deletes nothing, and hears of nothing.
  code, _, err = state('delete', 'late', '--org=globex')
  assert code == 2 and "name of this store, got 'late'" in err
  code, out, _ = state('delete', 'late', *org)
  assert code == 0 and json.loads(out)['deleted'].startswith('sj1-')
  assert state('audit')[0] == 0


def test_fsck(state, tmp_path):
  mint = ['--workdir=x', '--prompt=ab', '--tokens=2', '--temperature=0']
  assert state('mint', 'chat', *mint)[0] == 0
  code, out, _ = state('fsck')
  assert code == 0 and json.loads(out) == {'artifacts': 1, 'wrong': []}
  # As if the mint had died before it was in the catalog.
  shop = objects.Store(tmp_path / 'store',
                       objects.Secrets(tmp_path / 'secrets'))
  id = shop.find('chat')
  shop.catalog._base.execute('delete from art')
  shop.catalog.charge('local', id, live_bytes=-sum(
      row['delta'] for row in shop.catalog.rows('ledger')
      if row['unit'] == 'live_bytes'))
  shop.catalog.close()
  code, out, err = state('fsck')
  assert code == 2 and 'in no catalog' in json.loads(out)['wrong']
  assert '1 faults' in err
  code, out, _ = state('fsck', '--adopt')
  assert code == 0 and json.loads(out.splitlines()[0]) == {'adopted': id}
  file = next(p for p in (tmp_path / 'store/objects').rglob('plain.json'))
  file.chmod(0o600)
  file.write_bytes(b'{}')
  code, out, err = state('fsck', '--adopt')
  assert code == 2 and 'E_FILES' in out and 'plain.json' in err


def test_the_head_of_the_log_is_signed(state, tmp_path):
  pytest.importorskip('cryptography', reason='the extra [sign] is missing')
  secrets = objects.Secrets(tmp_path / 'secrets')
  shop = objects.Store(tmp_path / 'store', secrets)
  for _ in range(3):
    shop.catalog.audit('local', 'mint', 'x', 'allowed')
  last = lambda out: json.loads(out.splitlines()[-1])
  assert last(state('audit')[1])['signed'] == 0
  secrets.get('x')  # makes the directory
  assert state('keygen', f'{tmp_path}/secrets/head')[0] == 0
  assert last(state('audit')[1])['signed'] == 3
  [kept] = (tmp_path / 'secrets').glob('head-*.json')
  (tmp_path / 'copy.json').write_bytes(kept.read_bytes())
  assert state('gc', '--generations=2')[0] == 0 and state(
      'audit', f'--signed_head={tmp_path}/copy.json')[0] == 0
  # Cut short: told by what is beside the secrets, and by a copy.
  shop.catalog._base.execute('delete from audit where seq = 3')
  code, out, err = state('audit')
  assert code == 2 and 'expected at least 3 rows' in err
  assert 'cut short' in last(out)['wrong'][0]
  code, _, err = state('gc')
  assert code == 2 and 'E_IO: audit: expected at least 3 rows' in err
  kept.unlink()
  (tmp_path / 'secrets/head.pem').unlink()  # the public key is enough
  assert state('audit')[0] == 0
  code, _, err = state('audit', f'--signed_head={tmp_path}/copy.json')
  assert code == 2 and 'cut short' in err
  (tmp_path / 'secrets/head.pub').unlink()
  code, _, err = state('audit', f'--signed_head={tmp_path}/copy.json')
  assert code == 2 and 'put its public key there' in err


@pytest.mark.slow
def test_in_processes_of_their_own(tmp_path):
  import subprocess
  assert call(*TRAIN, f'--workdir={tmp_path}/run') == 0
  assert call('generate', f'--workdir={tmp_path}/run', '--tokens=3',
              f'--save={tmp_path}/saved') == 0
  base = [sys.executable, '-m', 'statejax.main', 'state']
  where = [f'--store={tmp_path}/store', f'--secrets={tmp_path}/secrets']
  go = [f'--workdir={tmp_path}/run', '--temperature=0', *where]
  def state(*argv):
    return subprocess.run([*base, *argv], check=True, text=True,
                          capture_output=True)
  whole = state('mint', 'w', *go, '--prompt=ab', '--tokens=12').stdout
  first = state('mint', 'a', *go, '--prompt=ab', '--tokens=5').stdout
  second = state('resume', 'a', *go, '--tokens=7')
  assert first.rstrip('\n') + second.stdout == whole
  assert second.stderr.startswith('resumed(7) promise=bit')
  state('mint', 's', *go, f'--resume={tmp_path}/saved')
  assert 'resumed(4)' in state('verify', 's', *go[:1], *where).stdout
  assert state('audit', *where).returncode == 0


def test_migrate(state):
  go = ['--workdir=x', '--temperature=0']
  half = '--set=model.store_dtype=bfloat16'
  assert state('mint', 'chat', *go, '--prompt=ab', '--tokens=3',
               '--transcript=keep')[0] == 0
  assert 'refused(E_DTYPE)' in state('verify', 'chat', '--workdir=x', half)[1]
  code, _, err = state('migrate', 'chat', '--workdir=x', half, '--ref=half')
  assert code == 2 and 'ask for a cast' in err
  code, _, err = state('migrate', 'chat', '--workdir=x', half, '--ref=half',
                       '--cast')
  assert code == 0 and json.loads(err)['ref'] == 'half'
  code, _, err = state('resume', 'half', *go, half, '--tokens=2')
  assert code == 0 and err.startswith('resumed(5) promise=tolerance')
  assert 'W_MIGRATED' in err.splitlines()[0]
  assert 'resumed(5)' in state('verify', 'chat', '--workdir=x')[1]
  lines = state('lineage', 'half')[1].splitlines()
  assert 'migrated at' in lines[1] and 'migrated of sj1-' in lines[1]
  assert state('audit')[0] == 0


def test_flags_of_the_table_exist():
  from absl import flags
  assert all(name in flags.FLAGS for name in states.ALL)
  assert dataclasses.is_dataclass(MODEL)
