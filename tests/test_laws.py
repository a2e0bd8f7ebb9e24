"""Every mixer and every tiny model obeys every law.

    pytest tests/test_laws.py            mixers, and small parts of the models
    pytest tests/test_laws.py -m slow    whole models, other layouts, bfloat16

Default tolerances (2e-6 a layer, 1e-5 a model, float32, CPU) are three times
the worst error seen, except where stated beside the subject.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest

from statejax import config as c
from statejax import laws
from statejax import model as lm
from statejax import state as st

KDA = c.KDAConfig(heads=2, key=8, value=8, rank=8, chunk=8)
MIXERS = {
    'kda': KDA,
    # One chunk for all, and a decay of its own per channel that is bounded.
    'kda_lower_bound': dataclasses.replace(
        KDA, lower_bound=-5.0, chunk=None, conv=2),
    # Two value heads to a key head, K != V, negative eigenvalues.
    'gdn': c.GatedDeltaNetConfig(heads=2, value_heads=4, key=8, value=12,
                                 chunk=4, max_erase=2.0),
    'full_rope': c.AttentionConfig(heads=4, kv_heads=2, key=8, value=12),
    'full_nope': c.AttentionConfig(heads=2, kv_heads=1, key=8, value=8,
                                   rope=None),
    'full_qk_norm_gate': c.AttentionConfig(
        heads=2, kv_heads=2, key=8, value=8, qk_norm=True, output_gate=True,
        rope=c.RopeConfig(fraction=0.5)),
    'window_sink': c.AttentionConfig(heads=4, kv_heads=2, key=8, value=8,
                                     window=5, sink=True),
    'window_1': c.AttentionConfig(heads=1, kv_heads=1, key=4, value=4,
                                  window=1),
    'post_norm': c.LayerConfig(
        'post', c.AttentionConfig(heads=2, kv_heads=1, key=8, value=8,
                                  window=8),
        c.SwiGLUConfig(32), norm='post'),
}
MODELS = ('tiny_full', 'tiny_window', 'tiny_gdn', 'tiny_kda')

# Gradients of a deep model compile for half a minute.
QUICK = ('schema', 'fixed_point', 'split', 'decode', 'padding', 'true_start',
         'rewind', 'save', 'witness', 'neighbours', 'no_recompile')

# In bfloat16 one rounding is 2^-8 = 4e-3 of a number. Splits were bit-equal, or
# up to 2e-2 apart in outputs of a model whose layers round a sum elsewhere;
# gradients of the initial state, allowed tenfold, 5e-3 and 2e-2.
HALF_LAYER, HALF_MODEL = 1e-2, 5e-2


def model(name):
  return importlib.import_module(f'configs.{name}').get_config().model


@pytest.mark.parametrize('name', MIXERS)
def test_mixer(name):
  report = laws.check(MIXERS[name])
  assert tuple(report.worst) == tuple(laws.LAWS)
  assert report.worst['split'] is not None


@pytest.mark.parametrize('name', ('tiny_full', 'tiny_kda'))
def test_model_quick(name):
  laws.check(model(name), laws=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_model(name):
  report = laws.check(model(name))
  assert None not in report.worst.values()


@pytest.mark.slow
@pytest.mark.parametrize('unstacked', (False, True))
@pytest.mark.parametrize('name', ('tiny_gdn', 'tiny_window'))
def test_repeats(name, unstacked):
  """Patterns of unequal layers, repeated, scanned or layer by layer."""
  config = model(name)
  pattern = config.groups[0].pattern[-2:]
  config = dataclasses.replace(config, groups=(
      c.GroupConfig(pattern, 2), c.GroupConfig(pattern[:1])))
  laws.check(laws.ModelSubject(lm.LanguageModel(config), unstacked))


def test_repeats_quick():
  config = dataclasses.replace(
      model('tiny_window'), groups=(c.GroupConfig(('window', 'full'), 2),))
  laws.check(config, laws=('split', 'decode', 'neighbours'))


@pytest.mark.parametrize('name', (
    'full_rope', *(pytest.param(n, marks=pytest.mark.slow)
                   for n in ('kda', 'gdn', 'window_sink'))))
def test_bfloat16_mixer(name):
  layer = c.LayerConfig(name, MIXERS[name], c.SwiGLUConfig(32))
  laws.check(laws.MixerSubject(layer, dtype='bfloat16'), tolerance=HALF_LAYER)


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_bfloat16_model(name):
  laws.check(dataclasses.replace(model(name), dtype='bfloat16'),
             tolerance=HALF_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize('name', ('kda', 'window_sink', 'full_rope'))
def test_bfloat16_store(name):
  """Float32 activations over stores, rings and tails of bfloat16.

  What enters a store is rounded before anyone reads it, so splits stay as
  close as in float32; only the gradient through a stored leaf is rounded.
  """
  layer = c.LayerConfig(name, MIXERS[name], c.SwiGLUConfig(32))
  subject = laws.MixerSubject(layer, store_dtype='bfloat16')
  forward = [n for n in laws.LAWS if n != 'initial_gradient']
  laws.check(subject, laws=forward)
  laws.check(subject, laws='initial_gradient', tolerance=HALF_LAYER)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SumState:
  """The sum of what came, [B, D]."""

  total: jax.Array = st.leaf('batch embed')


class Sum:
  """A subject without any layer of ours: the sum of the document so far."""

  def init(self, key):
    del key
    return {'scale': jnp.float32(0.5)}

  def init_state(self, rows, capacity):
    del capacity
    zeros = lambda *shape: jnp.zeros(shape, jnp.uint32)
    return st.ServingState(
        layers={'sum': SumState(jnp.zeros((1, rows, 4)))},
        length=jnp.zeros((rows,), jnp.int32),
        pending=jnp.full((rows,), -1, jnp.int32), witness=zeros(rows, 4),
        key=zeros(rows, 2), logits=None)

  def inputs(self, key, rows, steps):
    return jax.random.normal(key, (rows, steps, 4))

  def step(self, params, state, x, n_valid, segment_ids):
    steps = x.shape[1]
    real = jnp.arange(steps)[None] < jnp.broadcast_to(
        steps if n_valid is None else n_valid, x.shape[:1])[:, None]
    ids = jnp.zeros(x.shape[:2], jnp.int32)
    if segment_ids is not None:
      real &= segment_ids >= 0
      ids = segment_ids
    total, length, last = (
        state.layers['sum'].total[0], state.length,
        jnp.full(x.shape[:1], -1, jnp.int32))
    outputs = []
    for t in range(steps):
      here = real[:, t]
      border = here & (last >= 0) & (ids[:, t] != last)
      new = jnp.where(border[:, None], 0.0, total) + x[:, t]
      total = jnp.where(here[:, None], new, total)
      length = jnp.where(here, jnp.where(border, 0, length) + 1, length)
      last = jnp.where(here, ids[:, t], last)
      outputs.append(params['scale'] * total)
    return jnp.stack(outputs, 1), dataclasses.replace(
        state, layers={'sum': SumState(total[None])}, length=length)


def test_any_object_with_a_step():
  report = laws.check(Sum())
  silent = {name for name, error in report.worst.items() if error is None}
  assert silent == {'schema', 'witness', 'neighbours'}


def test_report_is_a_table():
  text = str(laws.check(MIXERS['full_nope'], laws=('schema', 'witness')))
  assert text.splitlines()[1].split()[:2] == ['schema', 'exact']
  assert text.splitlines()[2].split()[:2] == ['witness', '-']


def test_unknown_law():
  with pytest.raises(ValueError, match="no law 'splits'.*Did you mean 'split'"):
    laws.check(KDA, laws='splits')


def test_unknown_subject():
  with pytest.raises(ValueError, match='float lacks init, init_state, step'):
    laws.check(1.0)


def test_statements():
  for name in laws.LAWS:
    assert laws.statement(name).endswith('.'), name


def test_too_small_a_tolerance_names_the_place():
  with pytest.raises(laws.LawError, match='time step') as caught:
    laws.check(MIXERS['full_nope'], laws='split', tolerance=1e-12)
  error = caught.value
  assert error.law == 'split' and error.row is not None
  assert 0 <= error.step <= 24
