"""The command `state`: going on, and what else keeps a user from it."""

import json
import sys

import jax
import numpy as np
import pytest
from absl import flags
from test_main import run  # noqa: F401
from test_main_state import model, state  # noqa: F401

from statejax import asking
from statejax import config as c
from statejax import generate as gen
from statejax import model as lm
from statejax.artifact import digest, objects
from statejax.tasks import text


def absorbed(tmp_path, name):
  """Tokens that an artifact keeps, the one that waits among them."""
  shop = objects.Store(tmp_path / 'store',
                       objects.Secrets(tmp_path / 'secrets'))
  data = (shop.place(shop.find(name)) / 'tokens.u32').read_bytes()
  return np.frombuffer(data, '<u4').tolist()


def test_more_to_read(state, tmp_path):  # noqa: F811
  """A prompt comes behind the token that waits."""
  go = ['--workdir=x', '--temperature=0']
  assert state('mint', 'chat', *go, '--prompt=ab', '--tokens=5',
               '--transcript=keep')[0] == 0
  first = absorbed(tmp_path, 'chat')
  code, _, err = state('resume', 'chat', *go, '--prompt=cd', '--tokens=4')
  assert code == 0 and err.startswith('resumed(7) promise=bit')
  then = absorbed(tmp_path, 'chat')
  assert then[:10] == [*first, *text.encode('cd')] and len(then) == 10 + 4 + 1
  # As if all had been read at once.
  m, params, _ = model()
  whole = gen.prefill(m, params, m.init_state(1, 256), np.array([then[:10]]))
  assert gen.generate(m, params, whole, 5)[0][0].tolist() == then[10:]


def test_what_has_ended_is_told_before_the_load(state, monkeypatch):  # noqa: F811
  go = ['--workdir=x', '--temperature=0', '--tokens=3']
  m, params, _ = model()
  drawn = gen.prefill(m, params, m.init_state(1, 256), text.encode('ab')[None])
  monkeypatch.setattr(text, 'END', int(drawn.pending[0]))
  assert state('mint', 'chat', *go, '--prompt=ab')[0] == 0
  rows = state('audit')[1]
  code, _, err = state('resume', 'chat', *go)
  assert code == 2 and 'give it more to read with --prompt' in err
  assert state('audit')[1] == rows
  code, _, err = state('resume', 'chat', *go, '--prompt=c')
  assert code == 0 and err.startswith('resumed(2)')


def test_what_the_machine_cannot_count(state):  # noqa: F811
  for flag in ('--seed=18446744073709551616', '--row=100000000000000000000',
               '--horizon=4294967296', '--epoch=9007199254740992'):
    with pytest.raises(flags.IllegalFlagValueError, match=flag.split('=')[0]):
      state('mint', 'chat', '--workdir=x', '--prompt=ab', flag)
  code, _, err = state('mint', 'chat', '--workdir=x', '--prompt=')
  assert code == 2 and '--prompt: expected some text' in err


def test_the_secrets_of_another_store(state, tmp_path):  # noqa: F811
  go = ['--workdir=x', '--temperature=0', '--tokens=3', '--prompt=ab']
  assert state('mint', 'chat', *go)[0] == 0
  for verb in (['show', 'chat'], ['mint', 'other', *go]):
    code, _, err = state(*verb, f'--secrets={tmp_path}/wrong')
    assert code == 2 and 'name the directory of its secrets' in err
    assert not list((tmp_path / 'wrong').glob('store-*'))
  assert json.loads(state('fsck')[1].splitlines()[-1])['wrong'] == []


def test_an_epoch_stays(state):  # noqa: F811
  go = ['--workdir=x', '--temperature=0', '--tokens=1']
  assert state('mint', 'chat', *go, '--prompt=ab', '--epoch=3')[0] == 0
  for epoch in (0, 9):
    assert state('resume', 'chat', *go, f'--epoch={epoch}')[0] == 0
    assert 'epoch 3;' in state('show', 'chat')[1]


def test_where_nothing_grows_a_capacity_is_of_no_program(state, monkeypatch):  # noqa: F811
  layer = c.LayerConfig('kda', c.KDAConfig(heads=1, key=8, value=8, rank=8),
                        c.SwiGLUConfig(8))
  fixed = lm.LanguageModel(c.ModelConfig(
      vocab=257, width=8, layers=(layer,), groups=(c.GroupConfig(('kda',)),)))
  params = fixed.init(jax.random.key(0))
  monkeypatch.setattr(asking, 'model', lambda: (
      fixed, fixed.unstack(params), digest.tree_digest(params)))
  go = ['--workdir=x', '--temperature=0', '--tokens=2']
  assert state('mint', 'chat', *go, '--prompt=ab')[0] == 0
  code, _, err = state('resume', 'chat', *go)
  assert code == 0 and err.startswith('resumed(4) promise=bit')


def test_the_head_is_signed_after_a_refusal(state, tmp_path):  # noqa: F811
  pytest.importorskip('cryptography', reason='the extra [sign] is missing')
  go = ['--workdir=x', '--temperature=0', '--tokens=1', '--prompt=ab']
  assert state('mint', 'chat', *go)[0] == 0
  assert state('keygen', f'{tmp_path}/secrets/head')[0] == 0
  assert state('resume', 'chat', *go, '--principal=eve')[0] == 2
  last = json.loads(state('audit')[1].splitlines()[-1])
  assert last['signed'] == last['rows'] and not last['wrong']
  head, = (tmp_path / 'secrets').glob('head-*.json')
  head.unlink()
  code, out, _ = state('audit')
  wrong = json.loads(out.splitlines()[-1])['wrong']
  assert code == 2 and 'got none' in wrong[0]


def test_without_the_package_that_opens_what_is_sealed(state,  # noqa: F811
                                                       monkeypatch):
  pytest.importorskip('cryptography', reason='it is to be taken away')
  go = ['--workdir=x', '--temperature=0', '--tokens=1']
  sealed = ['--prompt=ab', '--sensitivity=confidential']
  assert state('mint', 'chat', *go, *sealed)[0] == 0
  for name in [x for x in sys.modules if x.startswith('cryptography')]:
    monkeypatch.setitem(sys.modules, name, None)
  for argv in (['resume', 'chat', *go], ['show', 'chat'],
               ['mint', 'other', *go, *sealed]):
    code, out, err = state(*argv)
    assert code == 2 and not out
    assert "install it with: pip install 'statejax[sign]'" in err
