"""Law L8 through artifacts, for every mixer that exists, at every phase.

    pytest -m slow tests/artifact/test_every_mixer.py

Many in one model, with fewer lengths, and quick: see `test_every_phase`.

At lengths around borders of chunks and blocks, after single steps, as a fork,
after drafts that were rejected, on other meshes, and in another process.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store as small
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.artifact import digest, identity, load, mint, standing
from statejax.artifact.access import Principal

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import test_laws
import test_laws_attention
import test_laws_delta
import test_laws_memory

KSA = c.KSAConfig(heads=4, kv_heads=2, key=6, value=5,
                  summary=c.SummaryConfig(chunk=5, count=2), chunks=2)
MIXERS = {
    'ksa': KSA, **test_laws.MIXERS, **test_laws_attention.MIXERS,
    **test_laws_delta.MIXERS, **test_laws_memory.MIXERS}
ALICE = Principal('alice', 'acme')
STEP, CAPACITY = 8, 40
# Nothing absorbed, one token, in the middle of chunks and blocks, on a border.
LENGTHS = (0, 1, 7, 8, 13, 16, 23)
# A matrix per head, a ring.
QUICK = ('gdn', 'window_sink')


def model_of(mixer):
  layer = mixer if isinstance(mixer, c.LayerConfig) else c.LayerConfig(
      'layer', mixer, c.SwiGLUConfig(8))
  return lm.LanguageModel(c.ModelConfig(
      vocab=getattr(mixer, 'vocab', 0) or 32,
      width=24, layers=(layer,),
      groups=(c.GroupConfig((layer.name,), 2),),
      summary=getattr(layer.mixer, 'summary', None)))


def absorb(model, params, state, tokens, step=STEP):
  """Absorbs tokens by steps of one program, in every row; any number."""
  rows = st.rows(state)
  for begin in range(0, len(tokens), step):
    piece = np.array(tokens[begin:begin + step], np.int32)
    padded = np.tile(np.pad(piece, (0, step - len(piece))), (rows, 1))
    _, state = model.step(params, state, padded,
                          np.full(rows, len(piece), np.int32), keep='last')
  return state


def host_of(model):
  return identity.Host(model.config, model.state_schema, '0' * 64,
                       program=identity.Program(STEP, capacity=CAPACITY))


def tokens_of(count, seed=0):
  return np.random.default_rng(seed).integers(0, 32, count).tolist()


def through(shop, model, state, tokens):
  """The state by way of an artifact, and the artifact."""
  kept = mint.mint(shop, state, 0, host_of(model), small.TERMS,
                   stands=standing.Standing().after(tokens))
  found = load.load(shop, kept.id, ALICE, host_of(model))
  assert found.decision.promise == 'bit', found.decision
  assert found.stands == standing.at_rest(found.state, 0)
  return found


def resume(mixer, shop, params=None, lengths=LENGTHS):
  """Returns how many lengths were tried, and at how many bits differ."""
  model, tried, differ = model_of(mixer), 0, 0
  params = model.init(jax.random.key(0)) if params is None else params
  host = host_of(model)
  rng = np.random.default_rng(0)
  tokens, more = rng.integers(0, 32, 23).tolist(), rng.integers(0, 32, 5)
  for length in lengths:
    state = absorb(model, params, model.init_state(1, CAPACITY),
                   tokens[:length])
    transcript = mint.Transcript(tuple(tokens[:length]), keep=True)
    kept = mint.mint(shop, state, 0, host, small.TERMS, transcript=transcript)
    found = load.load(shop, kept.id, ALICE, host)
    assert str(found.decision) == f'resumed({length})', found.decision.detail
    assert found.decision.promise == 'bit'
    end = [absorb(model, params, one, more.tolist())
           for one in (state, found.state)]
    tried += 1
    differ += any(st.diff(*pair) for pair in ((found.state, state), end))
  return tried, differ


def drawn(model):
  """Parameters of random numbers; made faster than initial ones."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: jnp.asarray(rng.standard_normal(x.shape) / 4, x.dtype),
      jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.slow
def test_a_few_mixers(tmp_path):
  """In the middle of a chunk, behind the ring's first turn."""
  shop = small.store(tmp_path)
  ends = [resume(MIXERS[name], shop, drawn(model_of(MIXERS[name])), (13,))
          for name in QUICK]
  tried, differ = map(sum, zip(*ends))
  print(f'every mixer: tried {tried}, differ {differ}')
  assert tried == len(QUICK) and not differ


@pytest.mark.slow
@pytest.mark.parametrize('name', MIXERS)
def test_every_mixer(name, tmp_path):
  tried, differ = resume(MIXERS[name], small.store(tmp_path))
  print(f'every mixer: {name}: tried {tried}, differ {differ}')
  assert tried == len(LENGTHS) and not differ


def decode(shop, model, params, fresh):
  """After single steps, and on by single steps."""
  tokens, more = tokens_of(13), tokens_of(6, 1)
  state = absorb(model, params, fresh, tokens, 1)
  found = through(shop, model, state, tokens)
  end = [absorb(model, params, one, more, 1) for one in (state, found.state)]
  assert st.diff(*end) is None


def fork(shop, model, params, fresh):
  """Two children go two ways, each as if it were alone; so does the parent."""
  tokens = tokens_of(11)
  state = absorb(model, params, fresh, tokens)
  found = through(shop, model, state, tokens)
  children = [mint.fork(shop, mint.Parent(found.id, found.about), ALICE).id
              for _ in range(2)]
  for seed, id in enumerate((found.id, *children)):
    one = load.load(shop, id, ALICE, host_of(model))
    assert one.stands == found.stands
    end = [absorb(model, params, x, tokens_of(7, seed))
           for x in (state, one.state)]
    assert st.diff(*end) is None, seed


def commit(shop, model, params, fresh):
  """Of a draft some tokens are accepted; what is minted never saw the rest."""
  tokens = tokens_of(17)
  for accepted in (0, 1, 4):
    state = absorb(model, params, fresh, tokens[:9])
    kept = st.snapshot(state)
    ahead = absorb(model, params, state, [*tokens[9:9 + accepted],
                                          *tokens_of(7, 9)])
    back = absorb(model, params, st.restore_fixed(ahead, kept),
                  tokens[9:9 + accepted])
    found = through(shop, model, back, tokens[:9 + accepted])
    never = absorb(model, params, state, tokens[9:9 + accepted])
    end = [absorb(model, params, one, tokens[9 + accepted:])
           for one in (never, found.state)]
    assert st.diff(*end) is None, accepted


def mesh(shop, model, params, fresh):
  """The same bits on 2, 4 and 8 devices, which go on alike."""
  tokens = tokens_of(13)
  state = absorb(model, params, fresh, tokens)
  found = through(shop, model, state, tokens)
  want = absorb(model, params, st.fork(state, 0, 8), tokens_of(5, 1))
  for devices in (2, 4, 8):
    grid = jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,))
    spread = st.map_leaves(
        lambda path, axes, kind, x, grid=grid: jax.device_put(
            x, NamedSharding(grid, PartitionSpec(*(
                'data' if a == 'batch' else None for a in axes)))),
        st.fork(found.state, 0, 8))
    standing.check(spread, {0: found.stands, 7: found.stands})
    if devices == 8:
      end = absorb(model, params, spread, tokens_of(5, 1))
      assert st.diff(end, want, tolerance=2e-5) is None


@pytest.mark.slow
@pytest.mark.parametrize('schedule', [decode, fork, commit, mesh])
@pytest.mark.parametrize('name', MIXERS)
def test_schedules(name, schedule, tmp_path):
  model = model_of(MIXERS[name])
  schedule(small.store(tmp_path), model, model.init(jax.random.key(0)),
           model.init_state(1, CAPACITY))
  jax.clear_caches()  # a process may map only so many programs


def restart(shop, ids):
  """Digests of what comes of artifacts; run by another process."""
  found = {}
  for name, id in ids.items():
    model = model_of(MIXERS[name])
    one = load.load(shop, id, ALICE, host_of(model))
    assert one.decision.promise == 'bit', (name, one.decision)
    end = absorb(model, model.init(jax.random.key(0)), one.state,
                 tokens_of(9, 1))
    found[name] = digest.tree_digest(st.live(end, 0))
    jax.clear_caches()
  return found


@pytest.mark.slow
def test_restart(tmp_path):
  shop, ids, want = small.store(tmp_path), {}, {}
  for name, mixer in MIXERS.items():
    model = model_of(mixer)
    params, tokens = model.init(jax.random.key(0)), tokens_of(13)
    state = absorb(model, params, model.init_state(1, CAPACITY), tokens)
    ids[name] = through(shop, model, state, tokens).id
    end = absorb(model, params, state, tokens_of(9, 1))
    want[name] = digest.tree_digest(st.live(end, 0))
    jax.clear_caches()
  code = ('import sys\n'
          f'sys.path.insert(0, {os.path.dirname(__file__)!r})\n'
          'import json, pathlib, small_store, test_every_mixer as t\n'
          f'shop = small_store.store(pathlib.Path({str(tmp_path)!r}))\n'
          f'print(json.dumps(t.restart(shop, {ids!r})))')
  done = subprocess.run(
      [sys.executable, '-c', code], check=True, stdout=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parent.parent.parent,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '8',
           'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})
  assert json.loads(done.stdout) == want


def test_the_list_is_whole():
  """A mixer that is registered is also tried."""
  from statejax.layers import block
  tried = {type(getattr(mixer, 'mixer', mixer)) for mixer in MIXERS.values()}
  assert set(block.MIXERS) <= tried
