"""The command `memory` on a saved state of a text model."""

import json

import pytest
from test_main import call, run  # noqa: F401

from statejax import generate as gen
from statejax.artifact import journal, serving
from statejax.tasks import text
from statejax.train import restore

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
  """A workdir and a state."""
  place = tmp_path_factory.mktemp('memory')
  (place / 'config.py').write_text(CONFIG)
  assert not call('train', f'--config={place}/config.py',
                  f'--workdir={place}/run')
  model, params = restore.from_workdir(place / 'run')
  state = gen.prefill(model, params, model.init_state(1, 16),
                      text.encode('a b')[None])
  serving.save_state(place / 's0', model, params, state)
  return place


def test_edits_from_the_command_line(saved, run):  # noqa: F811
  def memory(verb, before, after=None, *more):
    save = [f'--save={saved / after}'] if after else []
    code, out, err = run('memory', verb, f'--workdir={saved}/run',
                         f'--resume={saved / before}',
                         f'--journal={saved}/edits', *save, *more)
    return code, [json.loads(x) for x in out.splitlines()
                  if x.startswith('{')], err
  assert memory('list', 's0')[1] == []
  code, (receipt,), _ = memory('write', 's0', 's1', '--statement=sky is blue',
                               '--key=sky', '--value=blue')
  assert code == 0 and receipt['outcome'] == 'committed'
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
  entries = journal.Journal(saved / 'edits').entries
  assert [e['op'] for e in entries] == ['write', 'delete', 'delete', 'purge']


@pytest.mark.parametrize('argv, message', [
    (['fly'], 'expected one of list, read, write'),
    (['delete', '--resume=x', '--save=y'], '--slot: memory delete needs it'),
    (['list', '--resume=x', '--save=y'], 'changes nothing to save'),
    (['lock', '--slot=1', '--resume=x'], '--save: memory lock needs it'),
    (['write', '--resume=x', '--save=y'], '--statement: memory write'),
    (['list'], '--resume: memory list needs it')])
def test_mistakes_are_one_line(run, argv, message):  # noqa: F811
  code, _, err = run('memory', *argv)
  assert code == 2 and message in err and len(err.splitlines()) == 1
