"""Latent attention obeys every law.

    pytest tests/test_laws_mla.py            a few laws of one mixer
    pytest tests/test_laws_mla.py -m slow    all of all, the model, bfloat16

Default tolerances, see `tests/test_laws.py`, except where stated.
"""

import dataclasses

import jax
import pytest
from test_laws import HALF_LAYER, HALF_MODEL, model

from statejax import config as c
from statejax import laws, sharding
from statejax import model as lm
from statejax import state as st

YARN = c.RopeConfig(theta=20.0, layout='interleaved', scaling=c.YarnConfig(
    factor=40.0, original=64, beta_fast=4.0, mscale=1.0, mscale_all_dim=1.0))
SMALL = c.MLAConfig(heads=2, nope=6, rope_width=4, value=5, rank=8)
MIXERS = {
    'mla': dataclasses.replace(SMALL, q_rank=7),
    'yarn_gate': dataclasses.replace(SMALL, q_rank=7, rope=YARN,
                                     output_gate=True),
    'nope': dataclasses.replace(SMALL, rope=None),
    'lora_scale': dataclasses.replace(SMALL, q_rank=7, lora_scale=True),
}
# Single tokens are decoded in tests/layers/test_mla_published.py.
QUICK = ('schema', 'split', 'packed')


def test_every_axis_has_a_rule():
  """Of parameters and state; an unknown name would fail only on a mesh."""
  subject = lm.LanguageModel(model('tiny_mla'))
  names = jax.tree.leaves(subject.axes())
  for _, _, axes, _ in st.leaves(subject.state_schema(1, 8)):
    names += axes
  assert set(names) <= set(sharding.RULES)


@pytest.mark.parametrize('name', [
    'mla', *(pytest.param(n, marks=pytest.mark.slow)
             for n in MIXERS if n != 'mla')])
def test_mixer_quick(name):
  laws.check(MIXERS[name], laws=QUICK)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('name', MIXERS)
def test_mixer(name):
  report = laws.check(MIXERS[name])
  assert tuple(report.worst) == tuple(laws.LAWS)


@pytest.mark.slow
@pytest.mark.optimized
def test_model():
  assert None not in laws.check(model('tiny_mla')).worst.values()


@pytest.mark.slow
@pytest.mark.parametrize('name', MIXERS)
def test_bfloat16_mixer(name):
  layer = c.LayerConfig(name, MIXERS[name], c.SwiGLUConfig(32))
  # The two forms round in different places, each several times: single steps
  # and one pass were up to 1.6e-2 apart, where all else is as everywhere.
  laws.check(laws.MixerSubject(layer, dtype='bfloat16'),
             tolerance=4 * HALF_LAYER)


@pytest.mark.slow
def test_bfloat16_store():
  """See `test_laws.test_bfloat16_store`."""
  layer = c.LayerConfig('mla', MIXERS['mla'], c.SwiGLUConfig(32))
  subject = laws.MixerSubject(layer, store_dtype='bfloat16')
  laws.check(subject, laws=[n for n in laws.LAWS if n != 'initial_gradient'])
  laws.check(subject, laws='initial_gradient', tolerance=HALF_LAYER)


@pytest.mark.slow
@pytest.mark.optimized
def test_bfloat16_model():
  laws.check(dataclasses.replace(model('tiny_mla'), dtype='bfloat16'),
             tolerance=HALF_MODEL)
