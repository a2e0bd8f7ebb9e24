"""The rest of the delta family obeys every law.

    pytest tests/test_laws_delta.py            a few laws of all mixers
    pytest tests/test_laws_delta.py -m slow    all of all, models, bfloat16

Default tolerances, see `tests/test_laws.py`; programs are compiled without
most optimisations, which is what takes the time.
"""

import dataclasses

import jax
import pytest
from test_laws import HALF_LAYER, HALF_MODEL, model

from statejax import config as c
from statejax import laws, sharding
from statejax import model as lm
from statejax import state as st

MIXERS = {
    'delta_net': c.DeltaNetConfig(heads=2, key=8, value=12, max_erase=2.0,
                                  chunk=8),
    'gdn2': c.GatedDeltaNet2Config(heads=1, value_heads=2, key=8, value=12,
                                   rank=4, max_erase=2.0, chunk=8),
    # Three writes do not divide a chunk: borders fall inside of it.
    'delta_product': c.DeltaProductConfig(heads=1, value_heads=2, key=8,
                                          value=12, writes=3, chunk=8),
    'gla': c.GLAConfig(heads=2, key=8, value=12, rank=4, chunk=8),
    'retnet': c.RetNetConfig(heads=2, key=8, value=12, chunk=8),
    'lightning': c.LightningConfig.of_layer(1, 4, heads=2, key=8, value=12,
                                            chunk=8),
    'mamba2': c.Mamba2Config(heads=4, groups=2, key=8, value=6, chunk=8),
}
MODELS = ('tiny_delta_net', 'tiny_delta_product', 'tiny_gdn2', 'tiny_gla',
          'tiny_lightning', 'tiny_mamba2', 'tiny_olmo', 'tiny_retnet')
QUICKLY = ('delta_product', 'lightning', 'mamba2')
# No gradient is compiled.
QUICK = ('schema', 'split', 'decode', 'true_start')


@pytest.mark.parametrize('name', [
    n if n in QUICKLY else pytest.param(n, marks=pytest.mark.slow)
    for n in MIXERS])
def test_mixer_quick(name):
  laws.check(MIXERS[name], laws=QUICK)


@pytest.mark.parametrize('name', MODELS)
def test_every_axis_has_a_rule(name):
  """Of parameters and state; an unknown name would fail only on a mesh."""
  subject = lm.LanguageModel(model(name))
  names = jax.tree.leaves(subject.axes())
  for _, _, axes, _ in st.leaves(subject.state_schema(1, 8)):
    names += axes
  assert set(names) <= set(sharding.RULES)


@pytest.mark.slow
@pytest.mark.parametrize('name', MIXERS)
def test_mixer(name):
  report = laws.check(MIXERS[name])
  assert tuple(report.worst) == tuple(laws.LAWS)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_model(name):
  worst = laws.check(model(name)).worst
  # Where nothing grows, no row can outgrow its store.
  assert {n for n, error in worst.items() if error is None} <= {'neighbours'}


@pytest.mark.slow
@pytest.mark.parametrize('name', MIXERS)
def test_bfloat16_mixer(name):
  layer = c.LayerConfig(name, MIXERS[name], c.SwiGLUConfig(32))
  laws.check(laws.MixerSubject(layer, dtype='bfloat16'), tolerance=HALF_LAYER)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_bfloat16_model(name):
  laws.check(dataclasses.replace(model(name), dtype='bfloat16'),
             tolerance=HALF_MODEL)
