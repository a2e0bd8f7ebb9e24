"""Layers that write their matrix late obey the laws; bitwise ones exactly."""

import dataclasses

import jax
import numpy as np
import pytest

from statejax import config as c
from statejax import laws
from statejax import model as lm

pytestmark = pytest.mark.optimized
MIXERS = {
    'kda': c.KDAConfig(heads=2, key=8, value=8, rank=8, chunk=8),
    'gdn': c.GatedDeltaNetConfig(heads=2, value_heads=4, key=8, value=12,
                                 chunk=4, max_erase=2.0),
    'gdn2': c.GatedDeltaNet2Config(heads=2, value_heads=4, key=8, value=12,
                                   rank=8, chunk=4),
    'delta_net': c.DeltaNetConfig(heads=2, key=8, value=8, chunk=8),
}
# Comparisons of calls that are padded to one length; only `decode` has calls of
# another, whose projections the compiler may round otherwise.
SAME_LENGTH = ('split', 'padding', 'packed', 'rewind', 'save')


def mixer(name, decode):
  return dataclasses.replace(MIXERS[name], decode=decode)


def model():
  """Both kinds of gate."""
  layer = lambda name: c.LayerConfig(
      name, mixer(name, 'bitwise'), c.SwiGLUConfig(32))
  return lm.LanguageModel(c.ModelConfig(
      vocab=32, width=16, layers=(layer('gdn'), layer('kda')),
      groups=(c.GroupConfig(('gdn', 'kda')),)))


@pytest.mark.slow
def test_deferred_quick():
  laws.check(mixer('kda', 'deferred'), laws=('schema', 'decode'))


@pytest.mark.slow
@pytest.mark.parametrize('decode', ('deferred', 'bitwise'))
@pytest.mark.parametrize('name', MIXERS)
def test_all_laws(name, decode):
  laws.check(mixer(name, decode))


@pytest.mark.slow
@pytest.mark.parametrize('name', MIXERS)
def test_bitwise_layer(name):
  laws.check(mixer(name, 'bitwise'), laws=SAME_LENGTH, tolerance=0.0)


@pytest.mark.slow
def test_bitwise_model():
  laws.check(model(), laws=SAME_LENGTH, tolerance=0.0)
  laws.check(model(), laws='decode')


def test_train_prefill_decode():
  """L13: one call, chunks, and single tokens give the same bits.

  Calls are padded to one length, so that the projections are one program too.
  """
  m, steps = model(), 12
  params = m.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 32, (2, steps), np.int32)

  def run(lengths):
    state, at, out = m.init_state(2, 0), 0, []
    for n in lengths:
      part = np.zeros_like(tokens)
      part[:, :n] = tokens[:, at:at + n]
      logits, state = m.step(params, state, part, np.full(2, n, np.int32))
      out.append(np.asarray(logits)[:, :n])
      at += n
    return np.concatenate(out, axis=1), state

  want, final = run([steps])
  for lengths in ([5, 4, 3], [1] * steps):
    got, state = run(lengths)
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    jax.tree.map(np.testing.assert_array_equal, state, final)


def test_unknown_decode():
  with pytest.raises(ValueError, match="decode: expected one of .*'lazy'"):
    mixer('kda', 'lazy')
