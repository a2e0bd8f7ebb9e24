"""The command `memory` on saved states and artifacts of a text model."""

import contextlib
import functools
import json
import shutil
import types

import jax
import pytest
from test_main import run  # noqa: F401

from statejax import config as c
from statejax import main, memories
from statejax import model as lm
from statejax.artifact import journal, manifest, objects, serving, verify
from statejax.train import checkpoint, restore, step

CONFIG = '''
import dataclasses
from configs import text_kda
from statejax import config as c

def get_config():
  config = text_kda.get_config()
  memory = c.LayerConfig('memory', c.SlotsConfig(c.SlotRules(
      slots=4, key=8, value=8, span=4, key_span=4), segment=16), c.SwiGLUConfig(
          16))
  return dataclasses.replace(config, model=dataclasses.replace(
      config.model, width=16, layers=(memory,),
      groups=(c.GroupConfig(('memory',)),)), train=dataclasses.replace(
          config.train, steps=2, warmup=1, decay=1, save_every=2, rows=2,
          length=32, eval_batches=1, data=1))
'''


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir of a run that has not learned yet, and a state."""
  place = tmp_path_factory.mktemp('memory')
  (place / 'config.py').write_text(CONFIG)
  config = main.load_config(place / 'config.py')
  model = lm.LanguageModel(config.model)
  begun = jax.jit(lambda: step.initial(model, config.train))()
  checkpoint.save(place / 'run/checkpoints', 0, begun, {
      'config': c.to_dict(config)}, keep=1)
  serving.save_state(place / 's0', model, begun.params,
                     model.init_state(1, 16))
  return place


@pytest.fixture
def restored(monkeypatch):
  """A run is restored once, not by each of many commands."""
  monkeypatch.setattr(restore, 'from_workdir', once)


once = functools.cache(restore.from_workdir)


def test_edits_from_the_command_line(saved, run, restored):  # noqa: F811
  def memory(verb, before, after=None, *more):
    save = [f'--save={saved / after}', f'--journal={saved}/edits'] if (
        after) else []
    code, out, err = run('memory', verb, f'--workdir={saved}/run',
                         f'--resume={saved / before}', *save, *more)
    return code, [json.loads(x) for x in out.splitlines()
                  if x.startswith('{')], err
  assert memory('list', 's0')[1] == []
  code, (first,), _ = memory('write', 's0', 's1', '--statement=sky is blue',
                               '--key=sky', '--value=blue')
  assert code == 0 and first['outcome'] == 'committed'
  (slot,) = memory('list', 's1')[1]
  assert bytes(slot['values'][0]) == b'blue' and bytes(slot['key']) == b'sky'
  assert memory('delete', 's1', 's2', '--slot=0', '--expect=1')[0] == 0
  assert memory('list', 's2')[1][0]['status'] == 'tombstone'
  assert memory('read', 's1', None, '--slot=0')[1][0]['text'] == 'blue'
  assert memory('read', 's1', None, '--slot=2')[0] == 2
  # What is refused saves nothing, and says why.
  code, (receipt,), err = memory('delete', 's2', 's3', '--slot=0')
  assert code == 2 and receipt['outcome'] == 'invalid'
  assert 'nothing was changed' in err and not (saved / 's3').exists()
  assert memory('purge', 's1', 's4', '--slot=0', '--host')[0] == 0
  # A saved state keeps its edits, and what is minted of it lists them.
  marks = [first['mark']]
  assert serving.edits(saved / 's1') == [((0, *marks),)]
  assert [at for at, _ in serving.edits(saved / 's2')[0]] == [0, 0]
  store = [f'--store={saved}/edited', f'--secrets={saved}/secrets']
  assert run('state', 'mint', 'chat', *store, f'--workdir={saved}/run',
             f'--resume={saved}/s1')[0] == 0
  shop = objects.Store(saved / 'edited', objects.Secrets(saved / 'secrets'))
  found = verify.verify(shop.place(shop.find('chat')))
  assert found.plain['edits'] == [[0, *marks]]
  assert '  edits: 1, after 0 tokens\n' in run('state', 'show', 'chat', *store)[
      1]
  entries = journal.Journal(saved / 'edits').entries
  assert [e['op'] for e in entries] == ['write', 'delete', 'delete', 'purge']


@pytest.mark.slow
def test_what_else_there_is_to_say(saved, run, restored):  # noqa: F811
  def memory(verb, *argv, after=None):
    save = [f'--save={saved / after}', f'--journal={saved}/book'] if (
        after) else []
    code, out, err = run('memory', verb, *(
        saved / x if isinstance(x, str) and x[0] == 't' else x
        for x in argv), f'--workdir={saved}/run', *save)
    return code, [json.loads(x) for x in out.splitlines()], err
  says = lambda words, key, value: [
      f'--statement={words}', f'--key={key}', f'--value={value}']
  shutil.copytree(saved / 's0', saved / 't0')
  assert memory('write', 't0', *says('sky is blue', 'sky', 'blue'), '--ttl=9',
                '--reason=said so', after='t1')[0] == 0
  assert memory('write', 't1', *says('sky is grey', 'sky', 'grey'), '--slot=0',
                after='t2')[0] == 0
  (slot,) = memory('list', 't1', '--where=status=live', '--where=key=sky')[1]
  assert slot['expires'] == 9
  assert memory('list', 't1', '--where=version=2')[1] == []
  for where, why in (('status=alive', 'status: expected one of'),
                     ('version=x', 'version: expected an integer'),
                     ('values=blue', 'expected another field')):
    code, _, err = memory('list', 't1', f'--where={where}')
    assert code == 2 and why in err
  for flag, said in (('--version=1', 'blue'), ('--version=2', 'grey')):
    (found,) = memory('read', 't2', '--key=sky', flag)[1]
    assert found['text'] == said and found['slot'] == 0
  (pair,) = memory('diff', 't1', 't2')[1]
  assert (pair['before']['version'], pair['after']['version']) == (1, 2)
  assert memory('export', 't2', '--fields=slot,version')[1][0]['slots'] == [
      {'slot': 0, 'version': 2}]
  assert 'values' not in memory('export', 't2', '--redact')[1][0]['slots'][0]
  assert memory('rollback', 't2', '--slot=0', '--steps=2', after='t3')[0] == 2
  assert memory('rollback', 't2', '--slot=0', '--steps=1', after='t3')[0] == 0
  assert memory('alias', 't3', '--slot=0', '--statement=heaven',
                after='t4')[0] == 0
  assert memory('expire', 't4', '--slot=0', '--ttl=1', after='t5')[1][0][
      'op'] == 'expire'
  code, (receipt,), _ = memory('delete', 't5', '--slot=0', '--tenant=7',
                               after='t6')
  assert code == 2 and receipt['outcome'] == 'missing'
  assert receipt['principal'] == 7
  code, _, err = memory('rekey', 't5', '--slot=0', '--statement=sea',
                        '--key=sea', after='t6')
  assert code == 2 and 'forbidden, it wants --host; nothing' in err
  assert memory('rekey', 't5', '--slot=0', '--statement=sea', '--key=sea',
                '--host', after='t6')[0] == 0
  assert memory('read', 't6', '--key=sea')[1][0]['text'] == 'blue'
  # The book of it.
  code, out, _ = run('memory', 'journal', saved / 'book')
  *edits, last = map(json.loads, out.splitlines())
  assert code == 0 and last['edits'] == len(edits) == 9
  assert edits[0]['reason'] == 'said so'
  assert run('memory', 'journal', saved / 'book',
             f'--journal_head={last["head"]}')[0] == 0
  code, _, err = run('memory', 'journal', saved / 'book',
                     f'--journal_head={"0" * 64}')
  assert code == 2 and 'edits were cut off' in err
  log = saved / 'book/journal.jsonl'
  log.write_text(log.read_text().replace('said so', 'never!!'))
  for argv in (['journal', saved / 'book'], [
      'delete', saved / 't6', '--slot=0', f'--journal={saved}/book',
      f'--save={saved}/t7', f'--workdir={saved}/run']):
    code, _, err = run('memory', *argv)
    assert code == 2 and 'journal.jsonl:1: expected an entry' in err


def kept(err):
  """What a command says of the artifact that it has made."""
  return json.loads(err.splitlines()[-1])


def test_an_artifact_is_edited_into_a_child(saved, run, tmp_path,  # noqa: F811
                                            restored):
  store = [f'--store={tmp_path}/store', f'--secrets={tmp_path}/secrets']
  go = [*store, f'--workdir={saved}/run']
  acme = [*go, '--org=acme']
  assert run('state', 'mint', 'chat', *acme, f'--resume={saved}/s0',
             '--acl=bob:resume')[0] == 0
  code, _, err = run('memory', 'write', 'chat', *acme,
                     '--statement=sky is blue', '--key=sky', '--value=blue')
  one = kept(err)
  assert code == 0 and one['ref'] == 'chat' and err.startswith('resumed(')
  shop = objects.Store(tmp_path / 'store', objects.Secrets(
      tmp_path / 'secrets'))
  place = shop.place(one['id'])
  # By name, id, beginning of the id, and directory; given as --resume too.
  for target in ('chat', one['id'], one['id'][:20], place,
                 f'--resume={place}', '--resume=chat'):
    code, out, err = run('memory', 'list', target, *acme)
    assert code == 0 and json.loads(out)['status'] == 'live', err
  code, out, err = run('memory', 'delete', place, *acme, '--slot=0',
                       f'--journal={tmp_path}/edits')
  # An id has no name to move, and a directory is an id.
  two = kept(err)
  assert code == 0 and two['ref'] == '' and json.loads(out)['after']
  assert f'{one["id"]}: has no name, and what comes of it' in err
  code, _, err = run('memory', 'lock', one['id'], *acme, '--slot=0',
                     '--ref=locked')
  assert code == 0 and kept(err)['ref'] == 'locked' and 'no name' not in err
  # It has its edits, and what they are checked with.
  child = verify.verify(shop.place(two['id']))
  assert [at for at, _ in child.plain['edits']] == [0, 0]
  assert child.plain['edits'][1][1] == json.loads(out)['mark']
  salts = verify.salts(shop.place(two['id']), child.about)
  assert salts == {'memory/0': journal.Journal(tmp_path / 'edits').salt(
      'memory/0/0')}
  code, _, err = run('memory', 'lock', 'chat', *acme, '--slot=0',
                     f'--journal={tmp_path}/edits', '--expect=7')
  assert code == 2 and 'conflict, the slot has version 1' in err
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other/slots.json').write_text(json.dumps({
      'memory/0/0': '00' * 16}))
  code, _, err = run('memory', 'lock', two['id'], *acme, '--slot=0',
                     f'--journal={tmp_path}/other')
  assert code == 2 and 'expected a journal of this state' in err
  # What the journal has forgotten is in no child, whatever else was edited.
  shutil.copytree(tmp_path / 'edits', tmp_path / 'short')
  journal.Journal(tmp_path / 'short').forget('memory/0/0')
  code, _, err = run('memory', 'write', two['id'], *acme,
                     '--statement=42 ox', '--key=42', '--value=ox',
                     f'--journal={tmp_path}/short')
  assert code == 0, err
  child = verify.verify(shop.place(kept(err)['id']))
  assert set(verify.salts(shop.place(child.id), child.about)) == {'memory/1'}
  # A purge, journal or none, leaves no salt in what comes of it.
  code, _, err = run('memory', 'purge', two['id'], *acme, '--slot=0', '--host')
  gone = verify.verify(shop.place(kept(err)['id']))
  assert code == 0 and len(gone.plain['edits']) == 3
  assert not verify.salts(shop.place(gone.id), gone.about)
  code, out, err = run('memory', 'delete', 'chat', *acme, '--slot=0')
  two = kept(err)
  assert code == 0 and two['ref'] == 'chat' and two['id'] != one['id']
  (found,) = map(json.loads, run('memory', 'list', 'chat', *acme)[
      1].splitlines())
  assert found['status'] == 'tombstone' and found['values'] == []
  (pair,) = map(json.loads, run('memory', 'diff', one['id'], 'chat', *acme)[
      1].splitlines())
  assert pair['before']['status'] == 'live'
  out = run('state', 'show', 'chat', *acme)[1]
  assert f'from {one["id"]}' in out and two['id'] in out
  assert 'bob may resume' in out
  # An edit too many is refused before the journal is told of it.
  with pytest.MonkeyPatch.context() as few:
    few.setattr(manifest, 'MAX_EDITS', 2)
    code, _, err = run('memory', 'lock', 'chat', *acme, '--slot=0',
                       f'--journal={tmp_path}/late')
    assert code == 2 and 'expected at most 2 edits of an artifact' in err
    assert not (tmp_path / 'late').exists()
  # So is one that the store has no place for.
  with pytest.MonkeyPatch.context() as full:
    full.setattr(objects.shutil, 'disk_usage', lambda _: types.SimpleNamespace(
        free=0))
    code, out, err = run('memory', 'lock', 'chat', *acme, '--slot=0',
                         f'--journal={tmp_path}/late')
    assert code == 2 and 'E_NOSPACE' in err and not out
    assert not (tmp_path / 'late').exists()
  # What is refused makes nothing, and the name stays.
  code, _, err = run('memory', 'delete', 'chat', *acme, '--slot=0')
  assert code == 2 and 'invalid, it cannot be done' in err
  assert two['id'] in run('state', 'show', 'chat', *acme)[1]
  # Others have the rights that they have, no more.
  code, out, err = run('memory', 'list', 'chat', *go, '--org=globex')
  assert code == 2 and 'E_ACL' in err and not out
  code, _, err = run('memory', 'quarantine', 'chat', *acme, '--slot=0',
                     '--principal=bob')
  assert code == 2 and 'invalid' in err
  code, _, err = run('memory', 'purge', 'chat', *acme, '--slot=0', '--host',
                     '--principal=bob')
  assert code == 0 and kept(err)['ref'].startswith('chat~')
  assert run('state', 'revoke', 'chat', *store, '--org=acme')[0] == 0
  code, out, err = run('memory', 'list', 'chat', *acme)
  assert code == 2 and 'E_REVOKED' in err and not out
  for target, more, why in (
      (one['id'], ['--save=x', '--slot=0'], 'an edit of an artifact makes'),
      (one['id'], ['--ref=locked', '--slot=0'], 'expected a free name'),
      (saved / 's0', ['--slot=0', '--save=x'], 'is a saved state, of no store'),
      (saved, ['--slot=0'], 'expected a saved state or an artifact, got some'),
      (one['id'], ['--slot=0', '--row=1', f'--journal={tmp_path}/none'],
       'row: expected 0 to 0, got 1'),
      ('chatty', ['--slot=0'], 'refused(E_ACL)')):
    code, _, err = run('memory', 'delete', target, *acme, *more)
    assert code == 2 and why in err, err
  assert not (tmp_path / 'none').exists()
  code, _, err = run('memory', 'list', place, f'--store={tmp_path}/no')
  assert code == 2 and 'there is no store at' in err


def test_slots_of_two_artifacts(saved, run, tmp_path, restored):  # noqa: F811
  store = [f'--store={tmp_path}/store', f'--secrets={tmp_path}/secrets']
  acme = [*store, f'--workdir={saved}/run', '--org=acme']
  mint = lambda name, *more: kept(run(
      'state', 'mint', name, *acme, f'--resume={saved}/s0', *more)[2])['id']
  write = lambda name, value, *more: run(
      'memory', 'write', name, *acme, f'--statement=sky is {value}',
      '--key=sky', f'--value={value}', *more)
  mint('chat', '--acl=bob:resume')
  assert write('chat', 'red')[0] == 0
  one = kept(run('state', 'fork', 'chat', *store, '--org=acme', '--ref=other')[
      2])['id']
  code, out, err = run('memory', 'merge', 'chat', 'other', *acme)
  assert code == 2 and not out and 'nothing was changed' in err
  assert write('other', 'blue', '--slot=0')[0] == 0
  with pytest.MonkeyPatch.context() as few:
    few.setattr(manifest, 'MAX_EDITS', 1)
    code, _, err = run('memory', 'merge', 'chat', 'other', *acme,
                       f'--journal={tmp_path}/edits')
    assert code == 2 and 'expected at most 1 edits' in err
    assert not (tmp_path / 'edits').exists()
  code, out, err = run('memory', 'merge', 'chat', 'other', *acme,
                       f'--journal={tmp_path}/edits', '--reason=both')
  assert code == 0, err
  (receipt,), child = map(json.loads, out.splitlines()), kept(err)
  assert (receipt['theirs'], receipt['outcome'], receipt['op']) == (
      0, 'committed', 'merge')
  assert child['ref'] == 'chat' and not child['conflict']
  found = run('memory', 'read', 'chat', *acme, '--key=sky')[1]
  assert json.loads(found)['text'] == 'blue'
  # Both are its parents, and the edit is on its list.
  shop = objects.Store(tmp_path / 'store', objects.Secrets(
      tmp_path / 'secrets'))
  told = verify.verify(shop.place(child['id']))
  ref = lambda name: shop.catalog.ref(name)[0]
  parents = told.about['provenance']['parents']
  assert [p['role'] for p in parents] == ['state', 'slots']
  assert parents[1]['id'] == ref('other')
  assert told.about['provenance']['depth'] == 1 + 3  # the deeper one
  assert told.plain['edits'][-1][1] == receipt['mark']
  assert [e['op'] for e in journal.read(tmp_path / 'edits')[0]] == ['merge']
  assert f'slots of {ref("other")[:16]}' in run(
      'state', 'lineage', 'chat', *store, '--org=acme')[1]
  # It goes on as any other, and is guarded as what is in it.
  code, _, err = run('memory', 'lock', 'chat', *acme, '--slot=0')
  assert code == 0 and err.startswith('resumed(')
  mint('secret', '--sensitivity=confidential')
  code, _, err = write('secret', 'grey')
  assert code == 0
  mint('plain')
  for source, why in (('secret', "governance.class: expected 'confidential'"),
                      ('plain', 'nothing was changed')):
    code, out, err = run('memory', 'merge', 'plain', source, *acme,
                         f'--journal={tmp_path}/plain')
    assert code == 2 and why in err and not out, err
    if source == 'secret':  # so the journal knows nothing of it
      assert not (tmp_path / 'plain').exists()
  code, _, err = run('memory', 'merge', 'secret', 'plain', *acme)
  assert code == 2 and 'nothing was changed' in err
  # Who may resume the first may not take from another's that binds otherwise.
  mint('lent', '--acl=bob:resume,fork')
  code, out, err = run('memory', 'merge', 'lent', 'chat', *acme,
                       '--principal=bob', f'--journal={tmp_path}/lent')
  assert code == 2 and 'E_ACL: governance.acl' in err and not out, err
  assert not (tmp_path / 'lent').exists()
  # Whatever it comes from is revoked, and it with that.
  assert run('state', 'revoke', ref('other'), *store, '--org=acme',
             '--by=descendants')[0] == 0
  code, out, err = run('memory', 'list', 'chat', *acme)
  assert code == 2 and 'E_REVOKED' in err and not out
  for argv, why in (
      ([one, saved / 's0'], 'two saved states or two artifacts, got one of'),
      ([one], 'expected 2 to look at or to edit, got 1'),
      ([one, one, '--expect=1'], '--expect: memory merge does not use it')):
    code, _, err = run('memory', 'merge', *argv, *acme)
    assert code == 2 and why in err, err


@pytest.mark.slow
def test_slots_of_two_saved_states(saved, run, restored):  # noqa: F811
  go = [f'--workdir={saved}/run']
  says = lambda value: [f'--statement=sea is {value}', '--key=sea',
                        f'--value={value}']
  write = lambda before, after, value, *more: run(
      'memory', 'write', saved / before, *go, *says(value),
      f'--save={saved / after}', *more)[0]
  assert write('s0', 'm1', 'red') == 0
  assert write('m1', 'm2', 'blue', '--slot=0') == 0
  code, _, err = run('memory', 'merge', saved / 'm1', saved / 'm2', *go)
  assert code == 2 and '--save: memory merge needs it' in err
  code, out, _ = run('memory', 'merge', saved / 'm1', saved / 'm2', *go,
                     f'--save={saved / "m3"}')
  assert code == 0 and json.loads(out)['version'] == 2
  (slot,) = map(json.loads, run('memory', 'list', saved / 'm3', *go)[
      1].splitlines())
  assert [bytes(x) for x in slot['values']] == [b'blue', b'red']


@pytest.mark.slow
def test_what_goes_on_keeps_its_edits(saved, run, tmp_path):  # noqa: F811
  go, says = [f'--workdir={saved}/run'], [
      '--statement=sky is blue', '--key=sky', '--value=blue']
  assert run('generate', *go, '--prompt=ab', '--tokens=3',
             f'--save={tmp_path}/a')[0] == 0
  assert run('memory', 'write', tmp_path / 'a', *go, *says,
             f'--save={tmp_path}/b')[0] == 0
  assert run('generate', *go, f'--resume={tmp_path}/b', '--tokens=2',
             f'--save={tmp_path}/c')[0] == 0
  assert serving.edits(tmp_path / 'a') == [()]
  assert serving.edits(tmp_path / 'c') == serving.edits(tmp_path / 'b') != [()]


@pytest.mark.slow
def test_no_transcript_undoes_an_edit(saved, run, tmp_path):  # noqa: F811
  go = [f'--store={tmp_path}/store', f'--secrets={tmp_path}/secrets',
        f'--workdir={saved}/run']
  mint = ['--prompt=a b', '--tokens=3', '--temperature=0', '--transcript=keep']
  code, _, err = run('state', 'mint', 'chat', *go, *mint)
  shop = objects.Store(tmp_path / 'store', objects.Secrets(
      tmp_path / 'secrets'))
  names = lambda err: [p.name for p in shop.place(kept(err)['id']).iterdir()]
  assert code == 0 and manifest.TOKENS in names(err)
  says = ['--statement=sky is blue', '--key=sky', '--value=blue']
  code, _, err = run('memory', 'write', 'chat', *go, *says)
  assert code == 0 and manifest.TOKENS not in names(err)
  code, _, err = run('state', 'resume', 'chat', *go, '--tokens=2')
  assert code == 0 and err.startswith('resumed(')
  assert manifest.TOKENS not in names(err)
  # What comes of it lists the edit as well.
  found = verify.verify(shop.place(kept(err)['id']))
  assert [at for at, _ in found.plain['edits']] == [6]
  found = run('memory', 'read', 'chat', *go, '--key=sky')[1]
  assert json.loads(found)['text'] == 'blue'


@pytest.mark.parametrize('argv, message', [
    (['fly', 'x'], 'expected one of list, read, export, diff, write'),
    (['delete', '--resume=x', '--save=y'], '--slot: memory delete needs it'),
    (['list', '--resume=x', '--save=y'], '--save: memory list does not use it'),
    (['list', 'x', '--journal=y'], '--journal: memory list does not use it'),
    (['list', 'x', '--slot=1'], '--slot: memory list does not use it'),
    (['list', 'x', '--expect=1'], '--expect: memory list does not use it'),
    (['lock', 'x', '--slot=1', '--steps=2'], '--steps: memory lock does not'),
    (['lock', 'x', '--slot=1'], 'x: expected a saved state, or an artifact'),
    (['write', '--resume=x', '--save=y'], '--statement: memory write'),
    (['journal', 'x'], 'expected a journal of edits, got nothing'),
    (['journal', 'x', '--store=y'], '--store: memory journal does not use it'),
    (['overwrite', 'x', '--slot=1', '--statement=y'], '--expect: memory overw'),
    (['diff', 'x'], 'expected 2 to look at or to edit, got 1'),
    (['list', 'x', '--resume=y'], 'expected 1 to look at or to edit, got 2'),
    (['list'], 'expected 1 to look at or to edit, got 0')])
def test_mistakes_are_one_line(run, monkeypatch, tmp_path, argv,  # noqa: F811
                               message):
  monkeypatch.chdir(tmp_path)
  code, _, err = run('memory', *argv)
  assert code == 2 and message in err and len(err.splitlines()) == 1
  assert not list(tmp_path.iterdir())


def test_a_model_that_reads_no_text_and_has_two_memories(
    tmp_path, run, monkeypatch):  # noqa: F811
  """Numbers are what its tokens are called, and one memory has to be named."""
  slots = c.SlotsConfig(c.SlotRules(slots=2, key=8, value=8, span=2,
                                    key_span=1), segment=4)
  layers = tuple(c.LayerConfig(n, slots, c.SwiGLUConfig(8)) for n in 'ab')
  model = lm.LanguageModel(c.ModelConfig(
      vocab=64, width=8, layers=layers, groups=(c.GroupConfig(('a', 'b')),)))
  params = jax.jit(model.init)(jax.random.key(0))
  monkeypatch.setattr(restore, 'from_workdir', lambda _: (model, params))
  serving.save_state(tmp_path / 's', model, params, model.init_state(1, 4))
  def memory(verb, target, *more):
    code, out, err = run('memory', verb, str(tmp_path / target), '--workdir=x',
                         *more)
    return code, [json.loads(x) for x in out.splitlines() if x[0] == '{'], err
  said = '--statement=12,43', '--key=12', '--value=43', f'--save={tmp_path}/t'
  assert "got ''; this model has ['a', 'b']" in memory('write', 's', *said)[2]
  code, (found,), _ = memory('write', 's', '--slot_layer=b', *said)
  assert code == 0 and found['outcome'] == 'committed'
  assert memory('list', 't', '--slot_layer=a')[1] == []
  (slot,) = memory('list', 't', '--slot_layer=b', '--where=key=12')[1]
  assert slot['values'] == [[43]]
  assert memory('read', 't', '--slot_layer=b', '--key=12')[1] == [
      {'slot': 0, 'value': [43]}]
  _, _, err = memory('read', 't', '--slot_layer=b', '--key=sky')
  assert '--key=sky: expected numbers of tokens' in err


def test_a_journal_forgets_what_has_no_slot(saved, run, restored):  # noqa: F811
  book = journal.Journal(saved / 'forgetful')
  told = {'layer': 'memory', 'row': 0, 'oid': 7, 'outcome': 'committed'}
  book.append(told | {'after': book.commitment('memory/0/7', {'value': [1]})})
  code, out, _ = run('memory', 'journal', str(saved / 'forgetful'),
                     '--forget=memory/0/7', '--reason=asked to')
  last = json.loads(out.splitlines()[-2])
  assert code == 0 and last['op'] == 'forget' and last['reason'] == 'asked to'
  assert journal.Journal(saved / 'forgetful').salt('memory/0/7') is None
  code, _, err = run('memory', 'journal', str(saved / 'forgetful'),
                     '--forget=memory/0/7')
  assert code == 2 and 'of an object that this journal knows' in err


def test_a_journal_of_another_head_forgets_nothing(saved, run):  # noqa: F811
  path = saved / 'headed'
  book = journal.Journal(path)
  told = {'layer': 'memory', 'row': 0, 'oid': 7, 'outcome': 'committed'}
  book.append(told | {'after': book.commitment('memory/0/7', {'value': [1]})})
  forget = lambda head: run('memory', 'journal', str(path),
                            '--forget=memory/0/7', f'--journal_head={head}')
  code, out, err = forget('0' * 64)
  assert code == 2 and 'edits were cut off' in err and not out
  assert journal.Journal(path).salt('memory/0/7')
  # What a crash has torn is cut off by the next entry, which this is.
  with open(path / journal.LOG, 'a') as f:
    f.write('{"op": ')
  assert forget(book.head)[0] == 0
  assert journal.Journal(path).salt('memory/0/7') is None


@pytest.mark.parametrize('have, more, ok', [
    (1023, 1, True), (1023, 2, False), (1024, 1, False)])
def test_the_journal_is_not_told_of_an_edit_that_no_artifact_can_have(
    have, more, ok):
  full = types.SimpleNamespace(
      edited=types.SimpleNamespace(edits=((0, ''),) * have), origin='parent')
  saved = types.SimpleNamespace(edited=full.edited, origin=None)
  memories._require_room(saved, more)
  with (contextlib.nullcontext() if ok else pytest.raises(
      ValueError, match=f'at most 1024 edits .* this one has {have}; nothing')):
    memories._require_room(full, more)
