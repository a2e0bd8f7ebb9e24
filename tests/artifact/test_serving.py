import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import generate as gen
from statejax import model as lm
from statejax import state as st
from statejax.artifact import commit, serving

MLP = c.SwiGLUConfig(16)
KDA = c.LayerConfig('kda', c.KDAConfig(heads=2, key=4, value=4, rank=4), MLP)
RING = c.LayerConfig('ring', c.AttentionConfig(
    heads=2, kv_heads=1, key=8, value=8, window=3), MLP)
FULL = c.LayerConfig('full', c.AttentionConfig(
    heads=2, kv_heads=1, key=8, value=8), MLP)
CONFIG = c.ModelConfig(
    vocab=32, width=16, layers=(KDA, RING, FULL), store_dtype='bfloat16',
    groups=(c.GroupConfig(('kda', 'ring', 'full')),))
MODEL = lm.LanguageModel(CONFIG)
SAMPLING = gen.Sampling(temperature=0.8)
PROMPTS = np.random.default_rng(0).integers(1, 32, (2, 7))
LENGTHS = np.array([7, 3])
CAPACITY = 20


@functools.cache
def params():
  return MODEL.init(jax.random.key(1))


def generate(state, steps):
  return gen.generate(MODEL, params(), state, steps, sampling=SAMPLING)


def run(state, steps):
  """Tokens of `steps` more steps, and the digest of the state after them."""
  tokens, state = generate(state, steps)
  return tokens.tolist(), serving.state_digest(state)


@functools.cache
def middle():
  state = MODEL.init_state(2, CAPACITY, key=jax.random.key(3), logits=True)
  state = gen.prefill(MODEL, params(), state, PROMPTS, LENGTHS,
                      sampling=SAMPLING)
  return generate(state, 4)[1]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp('serving') / 'one'
  found = serving.save_state(path, MODEL, params(), middle())
  assert found == serving.state_digest(middle())
  return path


# Going on.


def test_continues_bit_for_bit(saved):
  state = serving.load_state(saved, MODEL, params())
  assert jax.tree.structure(state) == jax.tree.structure(middle())
  assert st.diff(state, middle()) is None
  assert run(state, 8) == run(middle(), 8)


@pytest.mark.parametrize('capacity', [
    19, *(pytest.param(n, marks=pytest.mark.slow) for n in (15, 64))])
def test_continues_in_another_capacity(saved, capacity):
  state = serving.load_state(saved, MODEL, params(), capacity=capacity)
  assert st.capacity(state) == capacity
  assert st.diff(state, middle()) is None
  # Another capacity is another program, which may round differently.
  tokens, end = generate(state, 4)
  expected, other = generate(middle(), 4)
  assert (tokens == expected).all()
  assert st.diff(end, other, tolerance=0.01) is None


def test_continues_in_a_new_process(saved):
  code = ('import sys\n'
          f'sys.path.insert(0, {os.path.dirname(__file__)!r})\n'
          'import json, test_serving as t\n'
          f'state = t.serving.load_state({str(saved)!r}, t.MODEL, t.params())\n'
          'print(json.dumps(t.run(state, 8)))')
  done = subprocess.run(
      [sys.executable, '-c', code], check=True, stdout=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parent.parent.parent,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '8',
           'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})
  assert json.loads(done.stdout) == [*run(middle(), 8)]


def test_digest_is_of_the_live_prefix():
  state, found = middle(), serving.state_digest(middle())
  assert serving.state_digest(st.grow(state, 50)) == found
  # The second row is four tokens shorter than the first.
  dirty = dataclasses.replace(state.layers['full'], k=state.layers['full'].k.at[
      :, 1, :, 7:].set(jnp.nan))
  assert serving.state_digest(dataclasses.replace(
      state, layers={**state.layers, 'full': dirty})) == found
  others = [st.take(state, [1, 0]), st.take(state, 0),
            dataclasses.replace(state, pending=state.pending + 1),
            dataclasses.replace(state, witness=state.witness + 1)]
  digests = {found, *map(serving.state_digest, others)}
  assert len(digests) == 1 + len(others)


def test_edits_are_kept(saved, tmp_path):
  assert serving.edits(saved) == [(), ()]
  mark, save = 'ab' * 32, serving.save_state
  rows = [((3, mark), (3, mark)), ()]
  save(tmp_path / 'edited', MODEL, params(), middle(), edits=rows)
  assert serving.edits(tmp_path / 'edited') == rows
  for bad, why in (([()], '2 rows, got 1'), ([((99, mark),), ()], 'none past'),
                   ([((2, 'x'),), ()], '64 hex')):
    with pytest.raises(ValueError, match=f'edits.*{why}'):
      save(tmp_path / 'bad', MODEL, params(), middle(), edits=bad)
  assert not (tmp_path / 'bad').exists()


def test_layout_of_parameters_does_not_matter(saved, tmp_path):
  flat = MODEL.unstack(params())
  assert st.diff(serving.load_state(saved, MODEL, flat), middle()) is None
  serving.save_state(tmp_path / 'flat', MODEL, flat, middle())
  mine, theirs = serving.about(saved), serving.about(tmp_path / 'flat')
  assert mine == theirs


@pytest.mark.parametrize('layers, capacity', [((KDA, RING), 0), ((FULL,), 5)])
def test_states_without_stores_and_empty_ones(tmp_path, layers, capacity):
  model = lm.LanguageModel(dataclasses.replace(
      CONFIG, layers=layers,
      groups=(c.GroupConfig(tuple(k.name for k in layers)),)))
  weights = model.init(jax.random.key(0))
  state = model.init_state(2, capacity, key=jax.random.key(4))
  serving.save_state(tmp_path / 'one', model, weights, state)
  for room in (None, 0, 9):
    loaded = serving.load_state(tmp_path / 'one', model, weights, capacity=room)
    assert st.diff(loaded, state) is None
    # Without growing leaves a capacity says nothing.
    want = (capacity if room is None else room) if FULL in layers else None
    assert st.capacity(loaded) == want


# What is refused.


def changed(layer, **fields):
  """The model with one field of one mixer changed."""
  layers = tuple(
      dataclasses.replace(k, mixer=dataclasses.replace(k.mixer, **fields))
      if k.name == layer else k for k in CONFIG.layers)
  return lm.LanguageModel(dataclasses.replace(CONFIG, layers=layers))


@pytest.mark.parametrize('model, text', [
    (changed('ring', window=4),
     r'saved with config\.layers\.1\.mixer\.window=3, this model has 4'),
    (changed('full', rope=None), r'config\.layers\.2\.mixer\.rope='),
    (changed('kda', eps=1e-5), r'mixer\.eps=1e-06, this model has 1e-05'),
    (lm.LanguageModel(dataclasses.replace(CONFIG, store_dtype=None)),
     r"config\.store_dtype='bfloat16', this model has None"),
    (lm.LanguageModel(dataclasses.replace(CONFIG, groups=2 * CONFIG.groups)),
     r'config\.groups=\['),
])
def test_another_config(saved, model, text):
  with pytest.raises(ValueError, match=text):
    serving.load_state(saved, model, params())


def test_other_parameters(saved):
  other = {**params(), 'norm': params()['norm'].at[3].add(1e-6)}
  with pytest.raises(ValueError, match='expected parameters with digest'):
    serving.load_state(saved, MODEL, other)


def damages(data):
  """A flipped bit at the begin, middle and end, and what ends before each."""
  if not data:
    yield b'x'
    return
  for at in (0, len(data) // 2, len(data) - 1):
    yield data[:at] + bytes([data[at] ^ 16]) + data[at + 1:]
    yield data[:at]


def test_damage(saved):
  kinds = set()
  for file in sorted(p for p in saved.rglob('*') if p.is_file()):
    data = file.read_bytes()
    kinds.add(file.relative_to(saved).parts[0])
    for damaged in damages(data):
      file.write_bytes(damaged)
      with pytest.raises(ValueError, match=str(saved)):
        serving.load_state(saved, MODEL, params())
    file.write_bytes(data)
  assert kinds == {'about.json', 'files.json', 'leaves.json', 'state'}
  assert st.diff(serving.load_state(saved, MODEL, params()), middle()) is None


@pytest.mark.parametrize('name', ['about.json', 'leaves.json', 'state'])
def test_missing_file(saved, tmp_path, name):
  (saved / name).rename(tmp_path / name)
  with pytest.raises(ValueError, match='expected a file'):
    serving.load_state(saved, MODEL, params())
  (tmp_path / name).rename(saved / name)


def test_capacity_too_small(saved):
  with pytest.raises(ValueError, match='expected capacity >= 11, .* got 10'):
    serving.load_state(saved, MODEL, params(), capacity=10)


def test_not_a_state(tmp_path):
  with pytest.raises(ValueError, match='check the path'):
    serving.load_state(tmp_path / 'nothing', MODEL, params())
  with commit.publish(tmp_path / 'other') as folder:
    (folder / 'about.json').write_text('{"format": "else", "version": 1}')
  with pytest.raises(ValueError, match='expected a saved serving state'):
    serving.load_state(tmp_path / 'other', MODEL, params())


def test_never_overwrites(saved):
  with pytest.raises(ValueError, match='nothing published is overwritten'):
    serving.save_state(saved, MODEL, params(), middle())
  commit.check(saved)


def test_only_whole_states_of_the_model_are_saved(tmp_path):
  lost = dataclasses.replace(middle(), length=middle().length + 20)
  with pytest.raises(ValueError, match='absorbed 31 tokens, its stores have '
                                       'room for 20; it is incomplete'):
    serving.save_state(tmp_path / 'one', MODEL, params(), lost)
  with pytest.raises(ValueError, match='layers/ring/k: expected .*window=4'):
    serving.save_state(tmp_path / 'one', changed('ring', window=4), params(),
                       middle())
  assert not list(tmp_path.iterdir())
