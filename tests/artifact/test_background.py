"""Minting in the background: the same artifact, whatever the loop does then."""

import dataclasses
import errno
import functools
import json
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store as small
import test_collect

from statejax import generate as gen
from statejax import state as st
from statejax.artifact import background, load, mint
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE = Principal('alice', 'acme')


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  return small.store(tmp_path_factory.mktemp('background'))


@pytest.fixture(scope='module')
def minter(shop):
  jax.config.update('jax_disable_most_optimizations', True)  # as the tests do
  with background.Minter(shop, small.state()) as minter:
    yield minter


@pytest.fixture
def held_up(monkeypatch):
  """Keeps mints of the background from going on until it is set."""
  go, whole = threading.Event(), mint.mint
  def later(*args, **more):
    assert go.wait(60)
    return whole(*args, **more)
  monkeypatch.setattr(mint, 'mint', later)
  yield go
  go.set()


def start(minter, state, row=0, **more):
  return minter.start(state, row, small.host(), small.TERMS, **more)


def about(shop, id):
  """The manifest, and its files by name but for those of the payload."""
  facts = json.loads((shop.place(id) / 'manifest.json').read_bytes())
  files = [f for f in facts.pop('files') if not f[0].startswith('state/')]
  assert facts.pop('nonce')
  return facts, files


def test_the_same_artifact(shop, minter):
  given = dict(transcript=small.transcript(), account={'prefill_tokens': 11})
  one = mint.mint(shop, small.state(), 0, small.host(), small.TERMS, **given)
  two = start(minter, small.state(), ref='chat', mint_key='once',
              **given).result()
  assert one.id != two.id and two.ref == 'chat' and not two.conflict
  # plain.json has the digest of every leaf, hence all bits of the payload,
  # in which Orbax names the files at random.
  assert about(shop, one.id) == about(shop, two.id)
  found = load.load(shop, 'chat', ALICE, small.host())
  assert found.id == two.id and st.diff(found.state, small.state()) is None
  again = start(minter, small.state(), mint_key='once', **given).result()
  assert again.id == two.id


@functools.partial(jax.jit, donate_argnums=0)
def step(state):
  """Changes every bit of a state, in the memory it has."""
  return jax.tree.map(lambda x: ~x if x.dtype.kind in 'iu' else -1 - x, state)


def test_steps_that_consume_the_state(shop, minter, held_up):
  state = jax.tree.map(jnp.copy, small.state())
  pending = start(minter, state, transcript=small.transcript())
  for _ in range(3):
    old, state = state, step(state)
  assert old.length.is_deleted() and not pending.done()
  held_up.set()
  found = load.load(shop, pending.result().id, ALICE, small.host())
  assert str(found.decision) == 'resumed(11)'
  assert st.diff(found.state, small.state()) is None
  # A restored state may be consumed too; it gives the same.
  loaded = found.state
  for _ in range(3):
    loaded = step(loaded)
  length = small.state().length
  assert st.diff(*(dataclasses.replace(x, length=length)
                   for x in (loaded, state))) is None


@pytest.mark.slow
def test_steps_of_a_model(shop, held_up):
  tokens, state = small.begun()
  with background.Minter(shop, state) as minter:
    state = jax.tree.map(jnp.copy, state)
    pending = minter.start(
        state, 0, small.begun_host(), small.TERMS,
        transcript=mint.Transcript(tokens, keep=True))
    for _ in range(3):
      _, state = gen.decode(small.MODEL, small.params(), state, small.SAMPLING)
    held_up.set()
    kept = pending.result()
  found = load.load(shop, kept.id, ALICE, small.begun_host())
  assert str(found.decision) == f'resumed({len(tokens)})'
  loaded = found.state
  for _ in range(3):
    _, loaded = gen.decode(small.MODEL, small.params(), loaded, small.SAMPLING)
  assert st.diff(loaded, state) is None


def rows_of(*lengths):
  """Rows of other random numbers and lengths; without a witness of tokens."""
  rng = np.random.default_rng(3)
  schema = small.MODEL.state_schema(len(lengths), small.CAPACITY)
  state = st.map_leaves(lambda path, axes, kind, leaf: jnp.asarray(
      rng.standard_normal(leaf.shape), leaf.dtype) if path.startswith('layers/')
                        else jnp.zeros(leaf.shape, leaf.dtype), schema)
  return dataclasses.replace(state, length=jnp.asarray(lengths, jnp.int32))


@pytest.mark.parametrize('at_hand', (True, False))
def test_one_row_of_many(shop, monkeypatch, at_hand):
  monkeypatch.setattr(background, '_at_hand', lambda state: at_hand)
  monkeypatch.setattr(background, '_BLOCK', 5)  # does not divide the capacity
  state = rows_of(24, 3, 21)
  with background.Minter(shop, state, most=1) as minter:
    for row in (0, 1, 2):  # shorter ones where a longer one was
      kept = start(minter, state, row).result()
      found = load.load(shop, kept.id, ALICE, small.host())
      assert st.diff(found.state, st.take(state, row)) is None
  background._hold.clear_cache()


def test_no_more_than_there_is_room_for(shop, held_up):
  with background.Minter(shop, small.state(), most=2) as minter:
    one, two = start(minter, small.state()), start(minter, small.state())
    with pytest.raises(background.Busy, match='fewer than 2 mints under way'):
      start(minter, small.state())
    assert two.cancel() and not one.done()
    three = start(minter, small.state())
    held_up.set()
    # Its memory is free when its result is there.
    assert one.result().id != three.result().id
    for _ in range(3):
      start(minter, small.state()).result()
    last = start(minter, small.state())
  assert last.done() and last.result().id in shop.catalog.objects()


def test_errors_come_with_the_result(shop, minter, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')
  before = set(shop.catalog.objects())
  monkeypatch.setattr(os, 'fsync', full)
  pending = start(minter, small.state())
  with pytest.raises(Refused, match='E_NOSPACE'):
    pending.result()
  monkeypatch.undo()
  unsound = dataclasses.replace(small.state(), length=jnp.full(1, 9, jnp.int32))
  with pytest.raises(Refused, match='E_WITNESS'):
    start(minter, unsound, transcript=small.transcript()).result()
  assert set(shop.catalog.objects()) == before
  assert not list((shop.path / 'tmp').iterdir())
  assert start(minter, small.state()).result().id not in before


def test_mistakes(shop, minter):
  with pytest.raises(ValueError, match=r'row: expected 0..0, got 1'):
    start(minter, small.state(), 1)
  with pytest.raises(ValueError, match='the layers and the capacity'):
    start(minter, st.grow(small.state(), small.CAPACITY + 1))
  gone = jax.tree.map(jnp.copy, small.state())
  gone.length.delete()
  for _ in range(3):  # each gives back the memory it was given
    with pytest.raises((RuntimeError, ValueError), match='deleted'):
      start(minter, gone)
  with pytest.raises(ValueError, match='most: expected >= 1'):
    background.Minter(shop, small.state(), most=0)


# Kills.

WORKER = test_collect.WORKER.replace(
    'commit, layout', 'background, commit, layout').replace(
        'kept = mint.mint(shop, small.state(), 0, small.host(), small.TERMS,',
        'minter = background.Minter(shop, small.state())\n'
        'kept = minter.start(small.state(), 0, small.host(), small.TERMS,'
    ).replace('mint_key={key!r})', 'mint_key={key!r}).result()')


def killed_at(path, monkeypatch, point):
  assert 'minter.start' in WORKER and '.result()' in WORKER
  monkeypatch.setattr(test_collect, 'WORKER', WORKER)
  for expect in range(2):  # the first, and overwriting a name
    shop = test_collect.after_a_kill(path, point, expect)
    assert shop.catalog.ref('chat')[1] == expect + 1


@pytest.mark.slow
@pytest.mark.parametrize('point', test_collect.POINTS)
def test_killed_at_every_point(tmp_path, monkeypatch, point):
  killed_at(tmp_path, monkeypatch, point)


def test_killed_while_the_loop_goes_on(tmp_path):
  """What `result` has returned is there; of the rest, nothing half."""
  shop = small.store(tmp_path)
  code = WORKER.split('{plan}')[0].format(
      here=os.path.dirname(__file__), path=str(tmp_path)) + (
          'state = small.state()\n'
          'minter = background.Minter(shop, state, most=5)\n'
          'def start(ref):\n'
          '  return minter.start(state, 0, small.host(), small.TERMS,\n'
          '                      ref=ref)\n'
          'for i in range(3):\n'
          '  one, two = start(f"a{i}"), start(f"b{i}")\n'
          '  print(one.result().id, flush=True)\n'
          'die()\n')
  said = test_collect.run_and_die(code).split()
  there = shop.catalog.objects()
  assert len(said) == 3 and set(said) <= set(there)
  assert {f'a{i}' for i in range(3)} <= set(shop.catalog.refs())
  assert all(text.endswith('cut short') for text in
             test_collect.collect.check(shop))
