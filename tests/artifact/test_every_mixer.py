"""Law L8 through artifacts, for every mixer that exists, at every phase."""

import pathlib
import sys

import jax
import numpy as np
import pytest
import small_store as small

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.artifact import identity, load, mint
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


def model_of(mixer):
  layer = mixer if isinstance(mixer, c.LayerConfig) else c.LayerConfig(
      'layer', mixer, c.SwiGLUConfig(8))
  return lm.LanguageModel(c.ModelConfig(
      vocab=32, width=16, layers=(layer,),
      groups=(c.GroupConfig((layer.name,), 2),),
      summary=getattr(layer.mixer, 'summary', None)))


def absorb(model, params, state, tokens):
  """Absorbs tokens by steps of one program; any number of them."""
  for begin in range(0, len(tokens), STEP):
    piece = np.array(tokens[begin:begin + STEP], np.int32)
    padded = np.pad(piece, (0, STEP - len(piece)))[None]
    _, state = model.step(params, state, padded,
                          np.array([len(piece)], np.int32), keep='last')
  return state


def resume(name, mixer, shop):
  """Number of lengths at which it went on bit for bit."""
  model = model_of(mixer)
  params = model.init(jax.random.key(0))
  host = identity.Host(model.config, model.state_schema, '0' * 64,
                       program=identity.Program(STEP, capacity=CAPACITY))
  rng = np.random.default_rng(0)
  tokens, more = rng.integers(0, 32, 23).tolist(), rng.integers(0, 32, 5)
  for length in LENGTHS:
    state = absorb(model, params, model.init_state(1, CAPACITY),
                   tokens[:length])
    transcript = mint.Transcript(tuple(tokens[:length]), keep=True)
    kept = mint.mint(shop, state, 0, host, small.TERMS, transcript=transcript)
    found = load.load(shop, kept.id, ALICE, host)
    assert str(found.decision) == f'resumed({length})', (
        name, found.decision.detail)
    assert found.decision.promise == 'bit'
    assert st.diff(found.state, state) is None, (name, length)
    end = [absorb(model, params, one, more.tolist())
           for one in (state, found.state)]
    assert st.diff(*end) is None, (name, length)
  return len(LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize('name', MIXERS)
def test_every_mixer(name, tmp_path):
  found = resume(name, MIXERS[name], small.store(tmp_path))
  print(f'{name}: tried {found}, lost 0, other bits 0')


@pytest.mark.slow
def test_the_list_is_whole():
  """A mixer that is registered is also tried."""
  from statejax.layers import block
  tried = {type(getattr(mixer, 'mixer', mixer)) for mixer in MIXERS.values()}
  assert set(block.MIXERS) <= tried
