import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from statejax.config import TrainConfig
from statejax.model import LanguageModel
from statejax.train import optimizer

CONFIG = TrainConfig(steps=20, peak=0.01, warmup=4, decay=8, clip=1e9)


def named(tree):
  """{path: leaf}, None and tuples of names being leaves too."""
  is_leaf = lambda n: n is None or isinstance(n, tuple)
  paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  return {jax.tree_util.keystr(p, simple=True, separator='/'): x
          for p, x in paths}


def axes():
  """Logical axes of a model with every kind of parameter there is."""
  layers = [small.KDA, small.GDN, small.RING, small.FULL]
  return LanguageModel(small.get_config(layers, {'tied': False}).model).axes()


def test_decay_is_for_matrices_only():
  decays = named(optimizer.decays(axes()))
  last = {name: {path.split('/')[-1] for path, d in decays.items() if d == name}
          for name in (True, False)}
  assert last[True] == {'kernel', 'embed', 'head'}
  assert last[False] == {'a_log', 'dt_bias', 'kernel', 'norm', 'sink', 'weight'}
  gates = {path.split('/')[-2] for path, d in decays.items()
           if path.endswith('/kernel') and not d}
  assert gates == {'beta', 'rate'}
  kinds = {path.split('/')[-2] for path in decays if path.endswith('/weight')}
  assert {'conv_q', 'conv_v', 'norm_q', 'norm_k'} <= kinds


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_decay_acts_where_the_gradient_is_zero(name):
  config = TrainConfig(steps=20, peak=0.01, warmup=0, decay=8, weight_decay=0.5,
                       optimizer=name)
  tree = {'kernel': ('layers', 'embed', 'hidden'), 'norm': ('layers', 'embed'),
          'conv': ('layers', 'taps', 'heads', 'key')}
  params = {k: jnp.ones([2] * len(names)) for k, names in tree.items()}
  chain = optimizer.make_optimizer(config, tree)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = chain.update(zero, chain.init(params), params)
  np.testing.assert_allclose(updates['kernel'], -0.005, rtol=1e-6)
  assert not updates['norm'].any() and not updates['conv'].any()


@pytest.mark.parametrize('at, rate', [
    (0, 0), (1, 0.0025), (4, 0.01), (8, 0.01), (12, 0.01), (16, 0.005),
    (20, 0), (99, 0)])
def test_schedule(at, rate):
  assert float(optimizer.schedule(CONFIG)(at)) == pytest.approx(rate, abs=1e-8)


def test_schedule_without_warmup_or_decay():
  rate = optimizer.schedule(TrainConfig(steps=9, peak=0.5, warmup=0, decay=0))
  assert [float(rate(i)) for i in (0, 5, 8)] == [0.5] * 3
  with pytest.raises(ValueError, match=r'warmup=6 \+ decay=5 exceed steps=10'):
    optimizer.schedule(TrainConfig(steps=10, warmup=6, decay=5))


def test_muon_dimension_numbers():
  found = named(optimizer._muon_dimensions(axes()))
  numbers = optax.contrib.MuonDimensionNumbers
  kda, full = 'group_0/layer_0/mixer', 'group_0/layer_3/mixer'
  expected = {
      'embed': None, 'head': None, 'norm': None,
      # [layers, embed, heads, key] and [layers, heads, value, embed].
      f'{kda}/q/kernel': numbers((1,), (2, 3)),
      f'{kda}/beta/kernel': None,
      f'{kda}/decay_b/kernel': numbers((1,), (2, 3)),
      f'{kda}/out/kernel': numbers((1, 2), (3,)),
      f'{kda}/conv_q/weight': None, f'{kda}/a_log': None,
      f'{kda}/dt_bias': None, f'{full}/out/kernel': numbers((1, 2), (3,))}
  assert {path: found[path] for path in expected} == expected
  kernels = {path for path in found
             if path.endswith('kernel')
             and path.split('/')[-2] not in ('beta', 'rate')}
  assert {path for path, n in found.items() if n is not None} == kernels


@pytest.mark.parametrize('names, shape', [
    (('embed', 'heads', 'key'), (6, 2, 4)),
    (('heads', 'value', 'embed'), (2, 4, 6)), (('hidden', 'embed'), (5, 3))])
def test_muon_treats_each_layer_of_a_scan_alone(names, shape):
  def updates(names, grads):
    chain = optimizer.make_optimizer(
        TrainConfig(steps=9, warmup=0, decay=0, clip=1e9, optimizer='muon'),
        {'w': names})
    params = {'w': jnp.zeros(grads.shape)}
    return chain.update({'w': grads}, chain.init(params), params)[0]['w']
  grads = jax.random.normal(jax.random.key(0), (3, *shape))
  whole = updates(('layers', *names), grads)
  for layer in range(3):
    np.testing.assert_allclose(
        whole[layer], updates(names, grads[layer]), rtol=1e-4, atol=1e-7)
  # Orthogonal: all singular values of the map are about equal.
  reduced = (shape[0], -1) if names[0] == 'embed' else (-1, shape[-1])
  values = np.linalg.svd(np.reshape(whole[0], reduced), compute_uv=False)
  assert values.max() < 2 * values.min()


def test_gradients_are_clipped_together():
  tree = {'a': ('embed',), 'b': ('embed',)}
  chain = optimizer.make_optimizer(
      TrainConfig(steps=9, warmup=0, decay=0, clip=1.0), tree)
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
  grads = {'a': jnp.full(1, 30.0), 'b': jnp.full(1, 40.0)}
  _, state = chain.update(grads, chain.init(params), params)
  first = optax.tree_utils.tree_get(state, 'mu')
  np.testing.assert_allclose(first['a'], 0.1 * 0.6, rtol=1e-5)
  np.testing.assert_allclose(first['b'], 0.1 * 0.8, rtol=1e-5)
