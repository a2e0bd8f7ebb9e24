"""Every mixer and every tiny model obeys every law.

    pytest tests/test_laws.py            mixers, and small parts of the models
    pytest tests/test_laws.py -m slow    whole models, other layouts, bfloat16

Default tolerances (2e-6 a layer, 1e-5 a model, float32, CPU) are three times
the worst error seen, except where stated beside the subject.
"""

import dataclasses
import functools
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from statejax import config as c
from statejax import laws
from statejax import model as lm
from statejax import state as st
from statejax.layers import block, delta, weights
from statejax.ops import window

KDA = c.KDAConfig(heads=2, key=8, value=8, rank=8, chunk=8)
MIXERS = {
    'kda': KDA,
    # One chunk for all, and a decay of its own per channel that is bounded.
    'kda_lower_bound': dataclasses.replace(
        KDA, lower_bound=-5.0, chunk=None, conv=2),
    # Two value heads to a key head, K != V, negative eigenvalues.
    'gdn': c.GatedDeltaNetConfig(heads=2, value_heads=4, key=8, value=12,
                                 chunk=4, max_erase=2.0),
    'gated_conv': c.GatedConvConfig(width=24, taps=4),
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
QUICK = ('schema', 'split', 'decode', 'padding', 'rewind', 'save', 'witness',
         'no_recompile')

# In bfloat16 one rounding is 2^-8 = 4e-3 of a number. Splits were bit-equal, or
# up to 2e-2 apart in outputs of a model whose layers round a sum elsewhere;
# gradients of the initial state, allowed tenfold, 5e-3 and 2e-2.
HALF_LAYER, HALF_MODEL = 1e-2, 5e-2


def model(name):
  return importlib.import_module(f'configs.{name}').get_config().model


# The kinds; the others differ in a detail, and run whole with -m slow.
QUICKLY = ('full_rope', 'gated_conv', 'gdn')


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('name', MIXERS)
def test_mixer(name):
  report = laws.check(MIXERS[name])
  assert tuple(report.worst) == tuple(laws.LAWS)
  assert report.worst['split'] is not None


@pytest.mark.parametrize('name', QUICKLY)
def test_mixer_quick(name):
  laws.check(MIXERS[name], laws=('split', 'decode', 'padding', 'packed'))


@pytest.mark.optimized
def test_model_quick():
  laws.check(model('tiny_kda'), laws=QUICK)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('name', MODELS)
def test_model(name):
  report = laws.check(model(name))
  assert None not in report.worst.values()


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('unstacked', (False, True))
@pytest.mark.parametrize('name', ('tiny_gdn', 'tiny_window'))
def test_repeats(name, unstacked):
  """Patterns of unequal layers, repeated, scanned or layer by layer."""
  config = model(name)
  pattern = config.groups[0].pattern[-2:]
  config = dataclasses.replace(config, groups=(
      c.GroupConfig(pattern, 2), c.GroupConfig(pattern[:1])))
  # Five layers round more than four: 1.05e-5 was seen.
  laws.check(laws.ModelSubject(lm.LanguageModel(config), unstacked),
             tolerance=2e-5)


@pytest.mark.slow
def test_repeats_quick():
  config = dataclasses.replace(
      model('tiny_window'), groups=(c.GroupConfig(('window', 'full'), 2),))
  laws.check(config, laws=('split', 'decode', 'neighbours'))


@pytest.mark.slow
@pytest.mark.parametrize('name', ('full_rope', 'kda', 'gdn', 'window_sink'))
def test_bfloat16_mixer(name):
  layer = c.LayerConfig(name, MIXERS[name], c.SwiGLUConfig(32))
  laws.check(laws.MixerSubject(layer, dtype='bfloat16'), tolerance=HALF_LAYER)


@pytest.mark.slow
@pytest.mark.optimized
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


@pytest.mark.slow
def test_any_object_with_a_step():
  report = laws.check(Sum())
  silent = {name for name, error in report.worst.items() if error is None}
  assert silent == {'schema', 'witness', 'neighbours'}


class RoundedSum(Sum):
  """What accumulates in bfloat16."""

  def init_state(self, rows, capacity):
    state = super().init_state(rows, capacity)
    return dataclasses.replace(state, layers={
        'sum': SumState(jnp.zeros((1, rows, 4), jnp.bfloat16))})

  def step(self, params, state, *inputs):
    y, new = super().step(params, state, *inputs)
    return y, dataclasses.replace(new, layers={
        'sum': SumState(new.layers['sum'].total.astype(jnp.bfloat16))})


def test_whatever_accumulates_is_float32():
  with pytest.raises(laws.LawError, match="'dtype'.*layers/sum/total.*float32"):
    laws.check(RoundedSum(), laws='dtype')


def test_a_phase_that_no_law_reaches():
  subject = Sum()
  subject.phases = (5, 24)
  with pytest.raises(ValueError, match='feeds 24 tokens and would never.*24'):
    laws.check(subject, laws='schema')


@pytest.mark.slow
def test_long_windows_and_chunks_are_cut(monkeypatch):
  """A fault beyond a window or chunk of real size is found all the same."""
  attention = c.AttentionConfig(heads=1, kv_heads=1, key=4, value=4, window=64)
  laws.check(attention, laws='split')
  right = window.positions
  monkeypatch.setattr(window, 'positions', lambda n, w: right(n + 1, w))
  with pytest.raises(laws.LawError):
    laws.check(attention, laws='split')
  kda = dataclasses.replace(KDA, chunk=None)
  laws.check(kda, laws='split')
  right = delta.delta_rule
  monkeypatch.setattr(delta, 'delta_rule', lambda *a, chunk_size, **k: right(
      *a, chunk_size=chunk_size, **k) if chunk_size == 8 else 1 / 0)
  laws.check(kda, laws='split')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EveryFourthState:
  """Every fourth token, [B, N, D]."""

  x: jax.Array = st.leaf('batch capacity embed', 'growing')


@dataclasses.dataclass(frozen=True)
class EveryFourthConfig:
  """A store with a slot for four tokens."""


class EveryFourth(nn.Module):
  """A mixer in few lines: the sum of every fourth token of the document."""

  config: EveryFourthConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    del config
    return EveryFourthState(
        x=st.Spec((rows, -(-capacity // 4), 24), dtype, stride=4))

  @nn.compact
  def __call__(self, x, state, context):
    weight = weights.weight(self, 'w', ('embed',), (24,), weights.ones)
    data, at = state.x.data, context.positions
    rows, slots = jnp.arange(x.shape[0])[:, None], data.shape[2]
    stored = context.valid & (at % 4 == 3)
    old = state.x.read()
    seen = context.visible_past(jnp.broadcast_to(
        4 * jnp.arange(slots, dtype=jnp.int32)[None] + 3, old.shape[:2]))
    product = functools.partial(jnp.matmul, precision='highest')
    y = product(seen.astype(x.dtype), old)
    chunk = context.visible_chunk() & stored[:, None]
    y += product(chunk.astype(x.dtype), x)
    if context.document is not None:  # the last document alone is kept
      stored &= context.document == context.document[
          rows, jnp.maximum(context.n_valid - 1, 0)[:, None]]
    new = data.at[state.x.layer, rows, jnp.where(stored, at // 4, slots)].set(
        x, mode='drop')
    return weight[None, None] * y, EveryFourthState(
        dataclasses.replace(state.x, data=new))


@pytest.mark.slow
def test_slots_of_several_tokens(monkeypatch):
  monkeypatch.setitem(block.MIXERS, EveryFourthConfig, EveryFourth)
  # Most tokens are seen by none but themselves.
  report = laws.check(EveryFourthConfig(), laws=[
      name for name in laws.LAWS if name != 'causality'])
  assert report.worst['neighbours'] is not None
  model = lm.LanguageModel(c.ModelConfig(
      vocab=8, width=24, layers=(c.LayerConfig('a', EveryFourthConfig()),),
      groups=(c.GroupConfig(('a',)),)))
  params, state = model.init(jax.random.key(0)), model.init_state(1, 7)
  assert st.capacity(state) == 7 and state.layers['a'].x.shape[2] == 2
  _, state = model.step(params, state, jnp.ones((1, 7), jnp.int32))
  with pytest.raises(ValueError, match='have room for 7; use'):
    model.step(params, state, jnp.ones((1, 1), jnp.int32))
  grown = st.grow(state, 9)
  assert grown.layers['a'].x.shape[2] == 3 and st.capacity(grown) == 9
  model.step(params, grown, jnp.ones((1, 2), jnp.int32))


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
