"""Hyper-connections: golden vectors, mappings, and what a model makes of them.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import model as lm
from statejax.layers import hyper

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'mhc.npz')
PLAIN = c.ModelConfig(
    vocab=16, width=8,
    layers=(
        c.LayerConfig('pre', c.AttentionConfig(2, 1, 4, 4, window=3),
                      c.SwiGLUConfig(8)),
        c.LayerConfig('post', c.AttentionConfig(2, 1, 4, 4),
                      c.SwiGLUConfig(8), norm='post')),
    groups=(c.GroupConfig(('pre', 'post')),))
HYPER = dataclasses.replace(PLAIN, streams=c.HyperConfig(count=3))
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


def mappings(dtype=jnp.float32):
  wide = lambda name: jnp.asarray(GOLDEN[name], dtype)
  return jax.jit(functools.partial(hyper.split, norm_eps=1e-3, eps=1e-3))(
      wide('streams'), wide('p/fn').T, wide('p/base'), wide('p/scale'))


def relative(got, want):
  return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def test_golden():
  pre, post, comb = mappings()
  streams = jnp.asarray(GOLDEN['streams'])
  assert relative(post, GOLDEN['post']) <= 1e-6
  assert relative(comb, GOLDEN['comb']) <= 1e-6
  assert relative(hyper.collapse(streams, pre), GOLDEN['collapsed']) <= 1e-6
  head = {name: jnp.asarray(GOLDEN[f'head/hc_{key}']) for name, key in (
      ('kernel', 'fn'), ('bias', 'base'), ('scale', 'scale'))}
  head['kernel'] = head['kernel'].T
  got = hyper.read(head, streams, norm_eps=1e-3, eps=1e-3)
  assert relative(got, GOLDEN['head_out']) <= 1e-6


def test_golden_within_the_references_rounding(float64):
  """No further from the exact numbers than ten times the reference is."""
  exact, mine = mappings(jnp.float64), mappings()
  for name, want, got in zip(('post', 'comb'), exact[1:], mine[1:]):
    assert want.dtype == jnp.float64 and got.dtype == jnp.float32
    theirs = relative(GOLDEN[name], np.asarray(want))
    assert relative(got, np.asarray(want)) <= 10 * max(theirs, 6e-8)


def test_mix_transposes():
  streams, y = GOLDEN['streams'], GOLDEN['collapsed'] - 1
  post, comb = GOLDEN['post'], GOLDEN['comb']
  got = hyper.mix(*map(jnp.asarray, (streams, y, post, comb)))
  written = post[..., None] * y[..., None, :]
  np.testing.assert_allclose(
      got, comb.swapaxes(-1, -2) @ streams + written, atol=1e-5)
  assert relative(got, comb @ streams + written) > 0.01


@pytest.mark.parametrize('size', [1.0, 30.0])
def test_doubly_stochastic(size):
  logits = size * jax.random.normal(jax.random.key(0), (5, 4, 4))
  comb = hyper.sinkhorn(logits)
  assert np.all(comb >= 0)
  np.testing.assert_allclose(comb.sum(axis=-2), 1, atol=1e-5)
  if size == 1:
    np.testing.assert_allclose(comb.sum(axis=-1), 1, atol=1e-5)
  # The first normalisation is that of columns, after a softmax of rows.
  first = hyper.sinkhorn(logits, iterations=1)
  rows = jax.nn.softmax(logits) + 1e-6
  np.testing.assert_allclose(
      first, rows / (rows.sum(axis=-2, keepdims=True) + 1e-6), atol=1e-6)


def test_shapes_are_checked():
  with pytest.raises(ValueError, match=r'kernel of \(12, 15\) for 3 streams'):
    hyper.split(jnp.zeros((2, 3, 4)), jnp.zeros((12, 14)), jnp.zeros(15),
                jnp.zeros(3), norm_eps=1e-6)
  with pytest.raises(ValueError, match='count: expected >= 2'):
    c.HyperConfig(count=1)


def logits(config, params):
  model = lm.LanguageModel(config)
  return model.step(params, model.init_state(2, 8), TOKENS)[0]


def without(params):
  """The parameters of the same model with a plain residual."""
  drop = lambda tree: {k: drop(v) if isinstance(v, dict) else v
                       for k, v in tree.items() if not k.startswith('streams')}
  return drop(params)


def set_streams(tree, value):
  return {k: (jax.tree.map(lambda x: value * x, v) if k.startswith('streams')
              else set_streams(v, value) if isinstance(v, dict) else v)
          for k, v in tree.items()}


@pytest.mark.slow
def test_starts_as_the_plain_residual():
  params = lm.LanguageModel(HYPER).init(jax.random.key(0))
  want = logits(PLAIN, without(params))
  assert relative(logits(HYPER, params), want) < 2e-3
  # And with the mappings at their biases it is the same function. Their eps
  # makes it read a little more than one stream.
  scale = lambda p, x: 0 * x if 'scale' in jax.tree_util.keystr(p) else x
  still = jax.tree_util.tree_map_with_path(scale, params)
  exact = dataclasses.replace(HYPER, streams=c.HyperConfig(3, eps=1e-12))
  assert relative(logits(exact, still), want) < 1e-5
  # Elsewhere it is not.
  far = set_streams(params, 40.0)
  assert relative(logits(HYPER, far), want) > 0.05


@pytest.mark.slow
def test_streams_come_apart_and_gradients_are_finite():
  model = lm.LanguageModel(HYPER)
  state = model.init_state(2, 0)
  def loss(params):
    out = lm.apply(model, params, state, TOKENS, jnp.array([6, 0], jnp.int32))
    return jnp.sum(jnp.sin(out[0]))
  gradient = jax.jit(jax.grad(loss))
  for size in (1.0, 1e3):
    params = set_streams(model.init(jax.random.key(0)), size)
    grads = gradient(params)
    found = {jax.tree_util.keystr(path): g for path, g
             in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(np.isfinite(g).all() for g in found.values())
    if size == 1:
      for path, g in found.items():
        assert np.any(g != 0), path
      kernel = next(g for p, g in found.items() if 'streams_mlp' in p
                    and 'kernel' in p)
      assert not np.allclose(kernel[..., 0], kernel[..., 1])


def test_only_where_configured():
  assert 'streams' not in lm.LanguageModel(PLAIN).init(jax.random.key(0))
  hyper_axes = lm.LanguageModel(HYPER).axes()
  assert hyper_axes['streams']['kernel'] == ('embed', 'channels')
  assert without(hyper_axes) == lm.LanguageModel(PLAIN).axes()
  config = c.override(HYPER, 'streams.count=2')
  assert c.from_dict(c.to_dict(config)) == config
