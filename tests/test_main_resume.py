"""What `state resume` does where a state does not fit, as its flags say."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from test_main import run  # noqa: F401
from test_main_state import MODEL, model, state  # noqa: F401

from statejax import account, asking, meter
from statejax.artifact import identity, load, mint, names, objects
from statejax.artifact.access import Principal
from statejax.meter import Meter

GO = ['--workdir=x', '--temperature=0']
ME = Principal('local')


@pytest.fixture
def shop(state, tmp_path):  # noqa: F811
  """A store with `chat`, seven tokens and their transcript."""
  assert state('mint', 'chat', *GO, '--prompt=ab', '--tokens=5',
               '--transcript=keep')[0] == 0
  return objects.Store(tmp_path / 'store',
                       objects.Secrets(tmp_path / 'secrets'))


def again(shop, ref, **changes):
  """Mints the same state as a host with other texts or tokens."""
  host = asking.host(MODEL, model()[2], 256)
  found = load.load(shop, 'chat', ME, host)
  mint.mint(shop, found.state, 0, dataclasses.replace(host, **changes),
            mint.Terms('local'), ref=ref, transcript=mint.Transcript(
                found.tokens[:found.decision.n], keep=True))


def test_another_policy(state, shop):  # noqa: F811
  again(shop, 'ruled', texts=identity.Texts(bytes(32), system='be kind'))
  one = shop.find('ruled')
  code, _, err = state('resume', 'ruled', *GO, '--tokens=4')
  assert code == 2 and 'refused(E_POLICY)' in err
  code, _, err = state('resume', 'ruled', *GO, '--tokens=4',
                       '--on_mismatch=reprefill')
  assert code == 2 and 'refused(E_POLICY)' in err
  code, out, err = state('resume', 'ruled', *GO, '--tokens=4',
                         '--policy_upgrade=replay')
  assert code == 0 and err.startswith('reprefilled(7, E_POLICY) promise=none')
  # It goes on as it would have, and from there on without a policy.
  assert out == state('resume', 'chat', *GO, '--tokens=4')[1]
  assert shop.find('ruled') != one
  # The horizon of whoever loads it, 11 tokens now.
  code, _, err = state('resume', 'chat', *GO, '--horizon=10')
  assert code == 2 and 'refused(E_HORIZON)' in err and 'at most' in err
  assert state('resume', 'chat', *GO, '--tokens=1', '--horizon=11')[0] == 0
  code, _, err = state('resume', 'ruled', *GO, '--tokens=1')
  assert code == 0 and err.startswith('resumed(11) promise=bit')
  assert state('fsck')[0] == 0


@pytest.mark.slow
def test_as_a_chat(state, shop):  # noqa: F811
  again(shop, 'told', special={'end': 1})
  code, _, err = state('resume', 'told', *GO, '--tokens=1', '--chat')
  assert code == 2 and 'refused(E_CHAT)' in err
  code, _, err = state('resume', 'told', *GO, '--tokens=1')
  assert code == 0 and err.startswith('resumed(7) promise=bit W_CHAT')
  assert state('resume', 'chat', *GO, '--tokens=1', '--chat')[0] == 0


def test_crossed_weights(state, shop, monkeypatch):  # noqa: F811
  cross = '--unsafe_cross_weights'
  code, _, err = state('resume', 'chat', *GO, cross, '--chat',
                       '--on_mismatch=reprefill')
  assert code == 2 and 'unsafe_cross_weights: expected it alone' in err
  monkeypatch.setattr(asking, 'model', lambda: model(1))
  assert state('resume', 'chat', *GO, '--tokens=2')[0] == 2
  code, _, err = state('resume', 'chat', *GO, '--tokens=2', cross)
  assert code == 0 and err.startswith('resumed(7) promise=none W_WEIGHTS')
  assert json.loads(err.splitlines()[-1])['mark'] == 'W_WEIGHTS'
  rows = [(row['action'], row['code']) for row in shop.catalog.rows()]
  assert rows[-2:] == [('resume', 'W_WEIGHTS'), ('mint', 'W_WEIGHTS')]
  # It is of neither model now, and each of its outputs says so.
  for seed in (0, 1):
    monkeypatch.setattr(asking, 'model', lambda seed=seed: model(seed))
    code, _, err = state('resume', 'chat', *GO, '--tokens=2')
    assert code == 2 and 'refused(E_WEIGHTS)' in err
  code, _, err = state('resume', 'chat', *GO, '--tokens=2', cross)
  assert code == 0 and err.startswith('resumed(9) promise=none W_WEIGHTS')


@pytest.mark.slow
def test_what_it_took_and_saved(state, shop):  # noqa: F811
  def about(key):
    return load.verify.head(shop.place(shop.find(key)))[2]['account']
  one = about('chat')
  assert one['device_us'] > 0
  assert (one['prefill_tokens'], one['decode_tokens']) == (2, 5)
  assert state('resume', 'chat', *GO, '--tokens=3')[0] == 0
  two = about('chat')
  assert two['device_us'] > one['device_us'] and two['tokens_absorbed'] == 10
  assert (two['prefill_tokens'], two['decode_tokens']) == (2, 8)
  row, = (json.loads(line) for line in state('account')[1].splitlines())
  assert row['device_us'] == two['device_us']
  assert row['device_us_avoided'] == one['device_us']
  assert row['tokens_skipped'] == 7 and row['tokens_absorbed'] == 10
  assert asking.host(MODEL, '0' * 64, 256).work(10 ** 6) == account.mflop(
      MODEL.config, 10 ** 6) > 0
  # What is absorbed anew has its own account; all of it is charged.
  again(shop, 'ruled', texts=identity.Texts(bytes(32), system='be kind'))
  assert state('resume', 'ruled', *GO, '--tokens=3',
               '--policy_upgrade=replay')[0] == 0
  three = about('ruled')
  assert (three['prefill_tokens'], three['decode_tokens']) == (10, 3)
  row, = (json.loads(line) for line in state('account')[1].splitlines())
  assert row['device_us'] == two['device_us'] + three['device_us']


def test_edits_are_not_undone(state, shop, monkeypatch):  # noqa: F811
  edits, host = ((2, 'ab' * 32),), asking.host(MODEL, model()[2], 256)
  found = load.load(shop, 'chat', ME, host)
  mark = np.frombuffer(bytes.fromhex(names.witness(
      list(found.tokens[:7]), edits)), '<u4')
  one = mint.mint(
      shop, dataclasses.replace(found.state, witness=jnp.asarray(
          mark, jnp.uint32)[None]), 0, host, mint.Terms('local'), ref='ed',
      transcript=mint.Transcript(found.tokens[:7], edits, keep=True)).id
  monkeypatch.setattr(asking, 'model', lambda: model(1))
  code, _, err = state('resume', 'ed', *GO, '--tokens=2',
                       '--on_mismatch=reprefill')
  assert code == 2 and 'refused(E_WEIGHTS)' in err and 'edited 1 times' in err
  assert shop.find('ed') == one
  # Where it fits it goes on, edits and transcript with it.
  monkeypatch.setattr(asking, 'model', model)
  assert state('resume', 'ed', *GO, '--tokens=2')[0] == 0
  again = load.load(shop, 'ed', ME, host)
  assert again.decision.n == 9 and again.edited.edits == edits
  assert again.tokens[:7] == found.tokens[:7]


def test_what_saves_nothing_is_not_counted(state, shop):  # noqa: F811
  def spent():  # all but what grows by the second
    row, = (json.loads(line) for line in state('account')[1].splitlines())
    return {name: x for name, x in row.items() if name != 'byte_seconds'}
  before = spent()
  assert 'resumed(7)' in state('verify', 'chat', '--workdir=x')[1]
  for wrong in ('--tokens=0', '--temperature=-1', '--top_p=2'):
    assert state('resume', 'chat', '--workdir=x', wrong)[0] == 2
  assert 'tokens_skipped' not in before and spent() == before
  rows = [(row['action'], row['outcome']) for row in shop.catalog.rows()]
  assert ('verify', 'resumed(7)') in rows
  assert 'resume' not in {action for action, _ in rows}
  assert state('fsck')[0] == 0


def test_nothing_is_compiled_while_it_is_measured(
    state, shop, monkeypatch):  # noqa: F811
  found = []
  monkeypatch.setattr(meter, 'covered', lambda spans, begin: found.append(
      spans) or 0.0)
  # Of another capacity are other programs.
  assert state('mint', 'more', *GO, '--prompt=abc', '--tokens=3',
               '--capacity=9')[0] == 0
  assert state('resume', 'chat', *GO, '--tokens=3', '--capacity=10')[0] == 0
  assert found == [[], []]


def test_more_room_than_there_is(
    state, shop, monkeypatch):  # noqa: F811
  host = asking.host(MODEL, model()[2], 256)
  for room in (1 << 40, 9, 0):  # 7 and 3 are 10
    code, _, err = state('resume', 'chat', *GO, '--tokens=3',
                         f'--capacity={room}')
    assert code == 2 and f'--capacity={room}: expected at least 10' in err
  # Of what they may not see they do not hear how long it is.
  code, _, err = state('resume', 'chat', *GO, '--tokens=3', '--capacity=9',
                       '--principal=eve')
  assert code == 2 and 'refused(E_ACL)' in err
  for room in (1 << 40, -1):
    found = load.load(shop, 'chat', ME, host, capacity=room)
    assert str(found.decision) == 'refused(E_LIMIT)'
    assert 'and at most 2147483647' in found.decision.detail
  def full(leaf):
    raise MemoryError(leaf.nbytes)
  monkeypatch.setattr(load, '_aligned', full)
  found = load.load(shop, 'chat', ME, host)
  assert str(found.decision) == 'refused(E_LIMIT)'
  assert list(shop.catalog.rows())[-1]['code'] == 'E_LIMIT'
  with pytest.raises(ValueError, match='key: expected text'):
    load.load(shop, None, ME, host)


def test_sums_of_meters():
  meter = Meter()
  meter.us = 5
  assert meter.spent(lambda tokens: tokens ** 2, {}, 3, 4) == {
      'account': {'prefill_tokens': 3, 'decode_tokens': 4, 'device_us': 5,
                  'mflop': 49}, 'spent': {'device_us': 5}}
  assert meter.spent(lambda tokens: tokens ** 2, {
      'tokens_absorbed': 7, 'prefill_tokens': 3, 'decode_tokens': 4,
      'device_us': 20, 'mflop': 49}, 0, 1)['account'] == {
          'prefill_tokens': 3, 'decode_tokens': 5, 'device_us': 25,
          'mflop': 64}


def test_compiling_is_not_counted():
  import jax
  import jax.numpy as jnp
  import numpy as np
  x, meter, names = jnp.ones(8), Meter(), []
  def note(name, seconds, **_):
    names.append((name, seconds))
  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    with meter.running():
      jax.block_until_ready(jax.jit(
          lambda x: x @ jnp.sin(x * 3) + np.float32(5))(x))
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  compiling = sum(seconds for name, seconds in names
                  if name.endswith('backend_compile_duration'))
  assert 0 < compiling and 0 <= meter.us < 1e6 * compiling
