"""What a model refuses, what it returns, and its two layouts of parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_kda
from statejax import config as c
from statejax import model as lm
from statejax import state as st

# A full layer shared by name, so that stacks of unequal height occur.
CONFIG = c.ModelConfig(
    vocab=16, width=8,
    layers=(
        c.LayerConfig('delta', c.KDAConfig(
            heads=1, key=4, value=4, rank=2), c.SwiGLUConfig(8)),
        c.LayerConfig('full', c.AttentionConfig(
            heads=2, kv_heads=1, key=4, value=4), c.SwiGLUConfig(8))),
    groups=(c.GroupConfig(('delta', 'full'), 2), c.GroupConfig(('full',))))
MODEL = lm.LanguageModel(CONFIG)
TOKENS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], np.int32)
HUGE = np.int64(2) ** 32


@functools.cache
def params():
  return MODEL.init(jax.random.key(0))


def fresh(capacity=8, **options):
  return MODEL.init_state(2, capacity, **options)


# What is refused, before anything is compiled.


@pytest.mark.parametrize('tokens, options, match', [
    (TOKENS.astype(np.float32), {}, r'tokens: expected \[B, T\] integers, got '
                                    r'\(2, 5\) float32'),
    (TOKENS[0], {}, r'tokens: expected \[B, T\] integers, got \(5,\) int32'),
    (TOKENS[:, :0], {}, 'got T = 0; to leave a row alone pass n_valid = 0'),
    (TOKENS[[0, 1, 0]], {}, r'one row per row of the state \(2\), got 3'),
    (TOKENS, dict(keep='first'), "keep: expected 'all' or 'last', got 'first'"),
    (TOKENS, dict(n_valid=np.array([1, 2, 3])),
     r'n_valid: expected \(2,\) integers, got \(3,\) int'),
    (TOKENS, dict(n_valid=np.array([0.5, 1])), r'n_valid: .* got \(2,\) float'),
    (TOKENS, dict(n_valid=np.array([0, 6])),
     r'n_valid: expected 0..5, got \[0, 6\]'),
    (TOKENS, dict(n_valid=np.array([-1, 5])), r'n_valid: expected 0..5'),
    (TOKENS, dict(segment_ids=TOKENS[:, :3]),
     r'segment_ids: expected \(2, 5\) integers, got \(2, 3\)'),
    (TOKENS + 7, {}, r'tokens\[1, 3\] = 16: expected 0 <= token < vocab=16'),
    (-TOKENS, {}, r'tokens\[0, 0\] = -1: expected 0 <= token'),
    (TOKENS + HUGE, {}, r'tokens\[0, 0\] = 4294967297: expected 0 <= token'),
    (TOKENS, dict(segment_ids=TOKENS + HUGE), 'numbers that fit int32'),
    (TOKENS, dict(n_valid=[1, 2, 3]), r'n_valid: expected \(2,\) integers'),
])
def test_bad_input(tokens, options, match):
  with pytest.raises(ValueError, match=match):
    MODEL.step(params(), fresh(), tokens, **options)


def test_lists_are_taken():
  got, _ = MODEL.step(params(), fresh(), TOKENS.tolist(), [5, 2],
                      np.zeros((2, 5), int).tolist())
  want, _ = MODEL.step(params(), fresh(), TOKENS, np.array([5, 2]),
                       np.zeros((2, 5), np.int32))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('wrong', [
    lambda: None, lambda: {**params(), 'more': jnp.zeros(1)},
    lambda: lm.LanguageModel(dataclasses.replace(CONFIG, width=10)).init(
        jax.random.key(0))])
def test_bad_params(wrong):
  with pytest.raises(ValueError, match='params: expected the tree and .* of'):
    MODEL.step(wrong(), fresh(), TOKENS)


@pytest.mark.slow
def test_64_bit_types_change_nothing(float64):
  logits, state = MODEL.step(params(), fresh(), TOKENS.astype(np.int64))
  assert logits.dtype == jnp.float32
  MODEL.step(params(), state, TOKENS[:, :3])


def test_bad_ids_at_padding_are_fine():
  tokens = np.where(np.arange(5) < 3, TOKENS, 99)
  logits, _ = MODEL.step(params(), fresh(), tokens, np.array([3, 3]))
  assert np.isfinite(logits).all()
  assert not np.any(logits[:, 3:])


@pytest.mark.parametrize('state, match', [
    (lambda: None, r'row of the state \(NoneType\), got 2'),
    (lambda: lm.LanguageModel(dataclasses.replace(
        CONFIG, groups=CONFIG.groups[:1])).init_state(2, 8),
     r'layers/full/k: expected \[layers=3, .*, got layers=2'),
    (lambda: dataclasses.replace(fresh(), layers={}),
     r'layers/delta/matrix: expected .*, got none'),
    (lambda: dataclasses.replace(fresh(), length=jnp.zeros(2)),
     r'length: expected \[batch=2\] int32, got float32'),
])
def test_bad_state(state, match):
  with pytest.raises(ValueError, match=match):
    MODEL.step(params(), state(), TOKENS)


def test_capacity():
  _, state = MODEL.step(params(), fresh(), TOKENS, np.array([2, 5]))
  with pytest.raises(ValueError, match=(
      'capacity: row 1 would hold 10 tokens, its stores have room for 8; use '
      r'statejax.state.grow\(state, 10\) first')):
    MODEL.step(params(), state, TOKENS)
  MODEL.step(params(), st.grow(state, 10), TOKENS)
  # A border starts the row anew, and padding takes no room.
  MODEL.step(params(), state, TOKENS, np.array([5, 2]),
             np.array([[3] * 5, [3, 4, 4, 4, 4]]))


def test_no_capacity_serves_one_step():
  logits, state = MODEL.step(params(), fresh(0), TOKENS)
  want, _ = MODEL.step(params(), fresh(), TOKENS)
  np.testing.assert_allclose(logits, want, atol=1e-5)
  with pytest.raises(ValueError, match='keeps no store'):
    MODEL.step(params(), state, TOKENS)


@pytest.mark.parametrize('rows, capacity', [(0, 8), (2, -1)])
def test_bad_state_size(rows, capacity):
  with pytest.raises(ValueError, match=f'got rows={rows}, capacity={capacity}'):
    MODEL.init_state(rows, capacity)


def test_bad_config():
  with pytest.raises(ValueError, match='expected a ModelConfig, got Config'):
    lm.LanguageModel(tiny_kda.get_config())
  with pytest.raises(ValueError, match="layer 'fall' is not among layers="):
    lm.LanguageModel(dataclasses.replace(
        CONFIG, groups=(c.GroupConfig(('fall',)),)))
  layer = dataclasses.replace(CONFIG.layers[0], mixer=c.SwiGLUConfig())
  with pytest.raises(ValueError, match='delta: no module for SwiGLUConfig'):
    lm.LanguageModel(dataclasses.replace(
        CONFIG, layers=(layer, CONFIG.layers[1])))


def test_bad_norm():
  layer = dataclasses.replace(CONFIG.layers[1], norm='sandwich')
  model = lm.LanguageModel(dataclasses.replace(
      CONFIG, layers=(layer,), groups=(c.GroupConfig(('full',)),)))
  with pytest.raises(ValueError, match="norm is 'sandwich', expected 'pre' or"):
    model.init(jax.random.key(0))


def test_bad_ids_inside_jit_stay_in_their_row():
  step = jax.jit(MODEL.step)
  spoilt = TOKENS.copy()
  spoilt[1, 2] = 16
  got, state = step(params(), fresh(), jnp.asarray(spoilt))
  want, clean = step(params(), fresh(), jnp.asarray(TOKENS))
  assert np.isnan(got[1, 2:]).all()
  assert np.array_equal(got[0], want[0])
  assert st.diff(st.take(state, 0), st.take(clean, 0)) is None


# What is returned.


def test_keep_last_is_the_last_real_one():
  n = np.array([2, 5])
  every, state = MODEL.step(params(), fresh(), TOKENS, n)
  last, same = MODEL.step(params(), fresh(), TOKENS, n, keep='last')
  assert last.shape == (2, 1, 16)
  np.testing.assert_allclose(last[:, 0], every[[0, 1], n - 1], atol=1e-6)
  assert st.diff(same, state) is None


def test_keep_last_with_borders_and_padding():
  ids = np.array([[0, 0, 1, 1, -1], [-1, 2, -1, 2, 2]])
  every, _ = MODEL.step(params(), fresh(), TOKENS, segment_ids=ids)
  last, _ = MODEL.step(params(), fresh(), TOKENS, segment_ids=ids, keep='last')
  np.testing.assert_allclose(last[:, 0], every[[0, 1], [3, 4]], atol=1e-6)
  assert not np.any(every[0, 4]) and not np.any(every[1, [0, 2]])


def test_logits_leaf():
  state = fresh(logits=True)
  assert state.logits.shape == (2, 16) and fresh().logits is None
  logits, state = MODEL.step(params(), state, TOKENS, np.array([3, 5]))
  np.testing.assert_allclose(state.logits, logits[[0, 1], [2, 4]], atol=1e-6)
  _, later = MODEL.step(params(), state, TOKENS[:, :1], np.array([0, 1]))
  assert np.array_equal(later.logits[0], state.logits[0])
  assert not np.array_equal(later.logits[1], state.logits[1])


def test_row_keys_differ_and_stay():
  state = fresh()
  assert not np.array_equal(state.key[0], state.key[1])
  again = MODEL.init_state(2, 8, key=jax.random.key(1))
  assert not np.array_equal(state.key, again.key)
  _, new = MODEL.step(params(), state, TOKENS)
  assert np.array_equal(new.key, state.key)
  assert new.pending.tolist() == [-1, -1]


# Parameters.


def test_stacked_and_unstacked_agree():
  loose = MODEL.unstack(params())
  assert sorted(loose['group_0']) == ['repeat_0', 'repeat_1']
  want, state = MODEL.step(params(), fresh(), TOKENS, np.array([4, 5]))
  got, same = MODEL.step(loose, fresh(), TOKENS, np.array([4, 5]))
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert st.diff(same, state, tolerance=1e-5) is None


@pytest.mark.slow
@pytest.mark.optimized
def test_remat_changes_no_gradient():
  def loss(model, params):
    logits, state = lm.apply(
        model, params, model.init_state(2, 0), jnp.asarray(TOKENS))
    return jnp.sum(jnp.sin(logits)) + jnp.sum(state.layers['delta'].matrix)
  remat = lm.LanguageModel(dataclasses.replace(CONFIG, remat=True))
  plain, again = (
      jax.jit(jax.grad(functools.partial(loss, model)))(params())
      for model in (MODEL, remat))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('tied', (True, False))
def test_axes_name_every_dimension(tied):
  model = lm.LanguageModel(dataclasses.replace(CONFIG, tied=tied))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  axes = model.axes()
  is_names = lambda x: isinstance(x, tuple)
  assert jax.tree.structure(shapes) == jax.tree.structure(
      axes, is_leaf=is_names)
  for shape, names in zip(jax.tree.leaves(shapes),
                          jax.tree.leaves(axes, is_leaf=is_names)):
    assert len(shape.shape) == len(names) and shape.dtype == jnp.float32
    assert len(set(names)) == len(names)
  assert axes['embed'] == ('vocab', 'embed')
  assert axes['group_0']['layer_0']['mixer']['q']['kernel'] == (
      'layers', 'embed', 'heads', 'key')
  assert ('head' in axes) != tied


def test_heads_of_one_seed_are_one_model():
  again = MODEL.init(jax.random.key(0))
  other = MODEL.init(jax.random.key(1))
  assert np.array_equal(again['embed'], params()['embed'])
  assert not np.array_equal(other['embed'], params()['embed'])
  stack = params()['group_0']['layer_0']['mixer']['q']['kernel']
  assert not np.array_equal(stack[0], stack[1])


def test_n_valid_out_of_range_under_jit_is_nan_and_touches_no_other():
  model = lm.LanguageModel(tiny_kda.get_config().model)
  params, state = model.init(jax.random.key(0)), model.init_state(3, 16)
  tokens = jnp.ones((3, 4), jnp.int32)
  logits, state = jax.jit(model.step)(
      params, state, tokens, jnp.array([4, 9, -1], jnp.int32))
  assert jnp.isnan(logits[1]).any() and jnp.isfinite(logits[0]).all()
  assert state.length.tolist() == [4, 4, 0]


@pytest.mark.parametrize('make, match', [
    (lambda: c.AttentionConfig(heads=3, kv_heads=2), 'multiple of kv_heads'),
    (lambda: c.AttentionConfig(window=0), 'window: expected >= 1'),
    (lambda: c.GatedDeltaNetConfig(2, 3), 'multiple of heads'),
    (lambda: c.KDAConfig(lower_bound=1.0), 'lower_bound'),
    (lambda: c.GroupConfig('kda'), 'tuple of layer names'),
    (lambda: c.GroupConfig(('kda',), 0), 'repeats: expected >= 1'),
    (lambda: c.ModelConfig(8, 8, (), (), dtype='bf16'), 'dtype: expected one'),
    (lambda: c.ModelConfig(8, 8, [], ()), 'layers: expected a tuple'),
    (lambda: c.ModelConfig(8, 8, (c.LayerConfig('a', None),) * 2, ()),
     'distinct names')])
def test_bad_configs_say_what_is_wrong(make, match):
  with pytest.raises(ValueError, match=match):
    make()
