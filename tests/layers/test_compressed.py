"""Window, CSA and HCA layers: golden vectors, bytes."""

import dataclasses
import functools
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import single

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.layers import common
from statejax.layers.compressed import Compressed
from statejax.ops import attend, index

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
FAR = c.RopeConfig(
    theta=160_000.0, fraction=0.5, layout='interleaved', side='trailing',
    scaling=c.YarnConfig(factor=16.0, original=64, attention_factor=1.0))
SIZES = dict(heads=4, width=16, q_rank=12, window=6, out_groups=2, out_rank=6,
             eps=1e-3)
LAYERS = {
    'dsv4_swa': c.CompressedConfig.sliding(**SIZES),
    'dsv4_csa': c.CompressedConfig(
        **SIZES, ratio=4, index=c.IndexConfig(k=3, heads=5, width=12),
        rope=FAR),
    'dsv4_hca': c.CompressedConfig.heavily(**(SIZES | {'ratio': 8}), rope=FAR),
}


def published(golden, config):
  """The parameters of a layer from the names of the published code."""
  p = {n[2:]: golden[n] for n in golden.files if n.startswith('p/')}
  kernel = lambda name, *shape: {'kernel': p[name].T.reshape(
      p[name].shape[1], *(shape or (-1,)))}
  heads, width = config.heads, config.width
  out = {
      'q_a': kernel('q_a_proj.weight'),
      'norm_q': {'weight': p['q_a_norm.weight']},
      'q_b': kernel('q_b_proj.weight', heads, width),
      'kv': kernel('kv_proj.weight'),
      'norm_kv': {'weight': p['kv_norm.weight']},
      'sink': p['sinks'],
      'out_a': p['o_a_proj.weight'].reshape(
          config.out_groups, config.out_rank, -1).swapaxes(1, 2),
      'out_b': {'kernel': p['o_b_proj.weight'].T.reshape(
          config.out_groups, config.out_rank, -1)}}
  def compressor(prefix, ours):
    return {
        f'{ours}values': kernel(f'{prefix}.kv_proj.weight'),
        f'{ours}gates': kernel(f'{prefix}.gate_proj.weight'),
        f'{ours}bias': p[f'{prefix}.position_bias'],
        f'{ours}norm': {'weight': p[f'{prefix}.kv_norm.weight']}}
  if config.ratio is not None:
    out |= compressor('compressor', '')
  if config.index is not None:
    prefix = 'compressor.indexer'
    out |= compressor(prefix, 'index_') | {
        'index_q': kernel(f'{prefix}.q_b_proj.weight', config.index.heads,
                          config.index.width),
        'index_w': kernel(f'{prefix}.scorer.weights_proj.weight')}
  return jax.tree.map(jnp.asarray, out)


@functools.partial(jax.jit, static_argnums=0)
def step(module, params, x, state, length):
  n_valid = jnp.full(length.shape, x.shape[1], jnp.int32)
  context = common.context(length, n_valid, None, x.shape[1])
  views = dataclasses.replace(state, **{
      f.name: st.Store(getattr(state, f.name), jnp.int32(0))
      for f in dataclasses.fields(state) if f.metadata['kind'] == 'growing'})
  y, views = module.apply({'params': params}, x, views, context)
  return y, dataclasses.replace(views, **{
      f.name: getattr(views, f.name).data
      for f in dataclasses.fields(state) if f.metadata['kind'] == 'growing'})


def empty(config, rows, capacity):
  specs = Compressed.state(config, rows, capacity, 'float32')
  return dataclasses.replace(specs, **{
      f.name: jnp.zeros((*([1] if f.metadata['kind'] == 'growing' else []),
                         *getattr(specs, f.name).shape))
      for f in dataclasses.fields(specs)})


@pytest.mark.parametrize('name,cuts', [
    *((name, ()) for name in LAYERS), ('dsv4_csa', (19, 20)),
    pytest.param('dsv4_hca', (19, 20), marks=pytest.mark.slow)])
def test_golden(name, cuts):
  golden, config = np.load(GOLDEN / f'{name}.npz'), LAYERS[name]
  params, x = published(golden, config), golden['x']
  state, outputs, done = empty(config, x.shape[0], x.shape[1]), [], 0
  for piece in np.split(x, cuts, axis=1):
    y, state = step(Compressed(config), params, piece, state,
                    jnp.full((x.shape[0],), done, jnp.int32))
    outputs.append(y)
    done += piece.shape[1]
  want = golden['attn_out']
  error = np.abs(np.concatenate(outputs, axis=1) - want).max()
  assert error <= 2e-6 * np.abs(want).max()
  if config.ratio is not None:
    want = golden['compressed_kv'][:, 0]
    got = state.entries[0, :, :want.shape[1]]
    assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


def test_bytes_per_token():
  """CSA 320 and HCA 8 bytes a token and layer at the widths of V4-Flash."""
  sizes = dict(heads=64, width=512, q_rank=1024, window=128, out_groups=8,
               out_rank=1024, rope=dataclasses.replace(FAR, fraction=64 / 512))
  for config, each, fixed in (
      (c.CompressedConfig(**sizes, index=c.IndexConfig(512, 64, 128)), 320,
       128 * 1024 + 4 * 6 * (512 + 128)),
      (c.CompressedConfig.heavily(**sizes), 8, 128 * 1024 + 4 * 3 * 512),
      (c.CompressedConfig.sliding(**sizes), 0, 128 * 1024)):
    whole = lm.LanguageModel(c.ModelConfig(
        1, 64, (c.LayerConfig('m', config),), (c.GroupConfig(('m',)),),
        dtype='bfloat16'))
    found = st.nbytes(whole.state_schema(1, 2 ** 17).layers)
    assert found == {'growing': each * 2 ** 17, 'fixed': fixed}


@pytest.mark.slow
def test_the_indexer_learns_from_its_loss_alone():
  config = LAYERS['dsv4_csa']
  params, x = single.draw(config, 24)
  def run(params, x, **fields):
    changed = dataclasses.replace(config, **fields)
    return single.step(changed, params, x, single.empty(changed, 2, 0),
                       jnp.zeros((2,), jnp.int32))
  def loss(params, x):
    return run(params, x)[2]['losses']['index']
  value, (grads, d_x) = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
  assert value > 0 and not np.any(d_x)
  plain = jax.grad(lambda p: jnp.sum(run(p, x)[0] ** 2))(params)
  for name in params:
    some, other = (any(np.any(g) for g in jax.tree.leaves(tree[name]))
                   for tree in (grads, plain))
    assert some == name.startswith('index') and other != some, name
  # With all entries in reach both stages are one.
  every = dataclasses.replace(config.index, k=100)
  for a, b in zip(run(params, x, index=every)[::2],
                  run(params, x, stage='warmup')[::2]):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5,
                                                         atol=1e-6), a, b)


@pytest.mark.slow
def test_the_loss_is_that_of_the_mass_on_entries():
  """KL to what attention gives the visible entries, all heads, in numpy."""
  config = dataclasses.replace(LAYERS['dsv4_csa'], stage='warmup')
  params, x = single.draw(config, 24)
  state = single.empty(config, 2, 0)
  _, _, said = single.step(config, params, x, state, jnp.zeros(2, jnp.int32))
  seen = {}
  def spy(scores, heads, allowed, valid):
    seen.update(scores=scores, allowed=allowed)
    return jnp.float32(0)
  true = attend.attend
  def look(q, segments, **rest):
    # What attention itself is given: behind the two of the window, entries.
    keys = np.concatenate([x.k[:, 0] for x in segments[2:]], axis=1)
    seen['s'] = np.einsum('bthk,bnk->bthn', np.float64(q), np.float64(keys)
                          ) * config.width ** -0.5
    return true(q, segments, **rest)
  with mock.patch.object(index, 'loss', spy), mock.patch.object(
      attend, 'attend', look):
    n = jnp.full((2,), 30, jnp.int32)
    Compressed(config).apply(
        {'params': params}, x, dataclasses.replace(state, **{
            f: st.Store(getattr(state, f), jnp.int32(0))
            for f in ('entries', 'index')}),
        common.context(0 * n, n, None, 30), mutable=('lent', 'losses'))
  allowed = np.asarray(seen['allowed'])
  # Entry w of four tokens is seen from its last token on.
  t, w = np.arange(30)[:, None], np.arange(allowed.shape[2])[None]
  np.testing.assert_array_equal(allowed, np.broadcast_to(
      (w + 1) * 4 - 1 <= t, allowed.shape) & (w < 7))
  def softmax(x, mask):
    weight = np.where(mask, np.exp(np.asarray(x, np.float64)), 0)
    return weight / np.maximum(weight.sum(-1, keepdims=True), 1e-300)
  target = softmax(seen['s'], allowed[:, :, None]).mean(axis=2)
  own = softmax(seen['scores'], allowed)
  want = np.sum(np.where(target > 0, target * np.log(
      np.maximum(target, 1e-300) / np.maximum(own, 1e-300)), 0))
  np.testing.assert_allclose(said['losses']['index'], want, rtol=1e-4)


def test_what_is_turned_back_has_no_factor():
  far = dataclasses.replace(FAR, scaling=c.YarnConfig(factor=16.0, original=64))
  with pytest.raises(ValueError, match='expected attention_factor=1.0'):
    c.CompressedConfig(rope=far)
  with pytest.raises(ValueError, match='rope: expected a RopeConfig, got None'):
    c.CompressedConfig(rope=None)
  with pytest.raises(ValueError, match="without an index 'sparse'"):
    c.CompressedConfig.heavily(stage='warmup')


def test_entries_need_a_ratio():
  with pytest.raises(ValueError, match='without a ratio there are no entries'):
    c.CompressedConfig(ratio=None)


def test_an_indexer_turns_as_many_channels():
  with pytest.raises(ValueError, match='index.width: expected >= 32'):
    c.CompressedConfig(width=64, index=c.IndexConfig(width=16))
  # All of them, too.
  config = dataclasses.replace(
      LAYERS['dsv4_csa'], index=c.IndexConfig(k=3, heads=5, width=8))
  assert np.isfinite(single.run(config, *single.draw(config, 24))[0]).all()
