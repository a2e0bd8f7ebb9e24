"""Sparse latent attention: golden vectors, and its indexer's loss."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny_dsa
from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.layers import common, rotary
from statejax.layers.dsa import DSA
from statejax.layers.mla import MLA
from statejax.ops import index
from statejax.train import step as step_of_training

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
SMALL = c.MLAConfig(heads=2, nope=6, rope_width=4, value=5, rank=8, q_rank=7)
DSA_SMALL = c.DSAConfig(mla=SMALL, k=4, index_heads=8, index_width=8)


@functools.partial(jax.jit, static_argnums=0)
def step(module, params, x, state, length, n_valid):
  context = common.context(length, n_valid, None, x.shape[1])
  views = jax.tree.map(lambda a: st.Store(a, jnp.int32(0)), state)
  (y, views), said = module.apply({'params': params}, x, views, context,
                                  mutable=('lent', 'losses'))
  is_store = lambda s: isinstance(s, st.Store)
  return y, jax.tree.map(lambda s: s.data, views, is_leaf=is_store), said


def empty(config, rows, capacity):
  return jax.tree.map(
      lambda s: jnp.zeros((1, *s.shape)),
      DSA.state(config, rows, capacity, 'float32'),
      is_leaf=lambda s: isinstance(s, st.Spec))


def apply(config, params, x, capacity=0, n_valid=None):
  rows, length = x.shape[:2]
  if n_valid is None:
    n_valid = jnp.full((rows,), length, jnp.int32)
  return step(DSA(config), params, x, empty(config, rows, capacity),
              jnp.zeros((rows,), jnp.int32), n_valid)


def draw(config, width, seed=0):
  """Parameters, and inputs [2, 24, width]."""
  whole = lm.LanguageModel(c.ModelConfig(
      1, width, (c.LayerConfig('m', config),), (c.GroupConfig(('m',)),)))
  params = whole.init(jax.random.key(seed))['group_0']['layer_0']['mixer']
  return (jax.tree.map(lambda p: p[0], params),
          jax.random.normal(jax.random.key(seed + 1), (2, 24, width)))


# Published layers.


def published(golden, heads, index_heads):
  p = {n[2:]: golden[n] for n in golden.files if n.startswith('p/')}
  kernel = lambda name, *shape: {'kernel': p[name].T.reshape(
      p[name].shape[1], *(shape or (-1,)))}
  rank = p['kv_a_layernorm.weight'].shape[0]
  both = p['kv_b_proj.weight'].T.reshape(rank, heads, -1)
  return jax.tree.map(jnp.asarray, {
      'q_a': kernel('q_a_proj.weight'),
      'norm_q': {'weight': p['q_a_layernorm.weight']},
      'q_b': kernel('q_b_proj.weight', heads, 18),
      'kv_a': kernel('kv_a_proj_with_mqa.weight'),
      'norm_kv': {'weight': p['kv_a_layernorm.weight']},
      'k_b': both[..., :10], 'v_b': both[..., 10:],
      'out': {'kernel': p['o_proj.weight'].T.reshape(heads, 12, -1)},
      'index_q': kernel('indexer.wq_b.weight', index_heads, -1),
      'index_k': kernel('indexer.wk.weight'),
      'index_norm': p['indexer.k_norm.weight'],
      'index_bias': p['indexer.k_norm.bias'],
      'index_w': kernel('indexer.weights_proj.weight')})


@pytest.mark.parametrize('capacity', [0, 50])
@pytest.mark.parametrize('name,layout', [
    ('deepseek_v32', 'half'), ('glm_moe_dsa', 'interleaved')])
def test_golden(name, layout, capacity):
  golden = np.load(GOLDEN / f'dsa_{name}.npz')
  config = c.DSAConfig(
      mla=c.MLAConfig(heads=3, nope=10, rope_width=8, value=12, rank=16,
                      q_rank=20),
      k=10, index_heads=12, index_width=20,
      index_rope=c.RopeConfig(fraction=0.4, layout=layout))
  params, x = published(golden, 3, 12), golden['x']
  rows, length = x.shape[:2]
  state, outputs, chosen, done = empty(config, rows, capacity), [], [], 0
  # A step of one token gathers what others mask.
  for piece in np.split(x, (21, 22) if capacity else (), axis=1):
    y, state, said = step(
        DSA(config), params, piece, state, jnp.full((rows,), done, jnp.int32),
        jnp.full((rows,), piece.shape[1], jnp.int32))
    outputs.append(y)
    mask = np.zeros((rows, piece.shape[1], length), bool)
    found = np.asarray(said['lent']['chosen'])
    found = found if found.dtype == bool else found[:, None]
    for b, t, at in np.ndindex(*found.shape):
      column = found[b, t, at] if found.dtype != bool else at
      if found[b, t, at] and column >= 0:
        # Columns: the store, then the step's own tokens.
        mask[b, t, column if column < capacity else
             done + column - capacity] = True
      elif found.dtype != bool and column == 0:
        mask[b, t, 0] = True
    chosen.append(mask)
    done += piece.shape[1]
  np.testing.assert_array_equal(np.concatenate(chosen, axis=1),
                                golden['selected'])
  want = golden['attn_out']
  error = np.abs(np.concatenate(outputs, axis=1) - want).max()
  assert error <= 2e-6 * np.abs(want).max()


@pytest.mark.slow
def test_all_visible_is_dense():
  config = dataclasses.replace(DSA_SMALL, k=100)
  params, x = draw(config, 12)
  y, _, _ = apply(config, params, x)
  context = common.context(*jnp.array([[0, 0], [24, 24]], jnp.int32), None, 24)
  views = jax.tree.map(lambda a: st.Store(a, jnp.int32(0)), jax.tree.map(
      lambda s: jnp.zeros((1, *s.shape)), MLA.state(SMALL, 2, 0, 'float32'),
      is_leaf=lambda s: isinstance(s, st.Spec)))
  mine = {n: p for n, p in params.items() if not n.startswith('index')}
  dense, _ = MLA(SMALL).apply({'params': mine}, x, views, context)
  np.testing.assert_allclose(y, dense, rtol=1e-5, atol=1e-6)


# The indexer's loss.


def test_gradients_are_isolated():
  params, x = draw(DSA_SMALL, 12)
  def loss(params, x):
    _, _, said = apply(DSA_SMALL, params, x)
    return said['losses']['index']
  grads, d_x = jax.grad(loss, argnums=(0, 1))(params, x)
  assert not np.any(d_x)
  for name, grad in grads.items():
    some = any(np.any(g) for g in jax.tree.leaves(grad))
    assert some == name.startswith('index'), name
  grads = jax.grad(lambda p: jnp.sum(apply(DSA_SMALL, p, x)[0] ** 2))(params)
  for name, grad in grads.items():
    some = any(np.any(g) for g in jax.tree.leaves(grad))
    assert some != name.startswith('index'), name


def test_loss_by_hand():
  """Against the sum in numpy; 0 for a perfect indexer; blocks and padding."""
  rng = np.random.default_rng(0)
  length, heads = 300, 3  # three blocks, the last of which reaches back
  s = rng.normal(size=(1, length, heads, length)).astype(np.float32)
  scores = rng.normal(size=(1, length, length)).astype(np.float32)
  allowed = np.tril(rng.random((1, length, length)) < 0.5)
  allowed[:, 7] = False
  valid = np.arange(length)[None] < 290
  def probabilities(x, mask):
    weight = np.where(mask, np.exp(x.astype(np.float64)), 0.0)
    return weight / np.maximum(weight.sum(-1, keepdims=True), 1e-300)
  target = probabilities(s, allowed[:, :, None]).mean(axis=2)
  own = probabilities(scores, allowed)
  each = np.where(target > 0, target * np.log(
      np.maximum(target, 1e-300) / np.maximum(own, 1e-300)), 0.0).sum(-1)
  take = lambda begin, size: jax.lax.dynamic_slice_in_dim(
      jnp.asarray(s), begin, size, axis=1)
  found = jax.jit(index.loss, static_argnums=1)(scores, take, allowed, valid)
  np.testing.assert_allclose(found, each[valid].sum(), rtol=1e-4)
  perfect = np.log(np.maximum(target, 1e-30)).astype(np.float32)
  found = jax.jit(index.loss, static_argnums=1)(perfect, take, allowed, valid)
  assert abs(found) < 1e-3
  grad = jax.jit(jax.grad(index.loss), static_argnums=1)(
      scores, take, allowed, valid)
  want = np.where(valid[..., None] & allowed.any(-1, keepdims=True),
                  own - target, 0.0)
  np.testing.assert_allclose(grad, want, atol=1e-6)


def test_padding_does_not_change_the_loss():
  params, x = draw(DSA_SMALL, 12)
  n_valid = jnp.array([24, 9], jnp.int32)
  _, _, said = apply(DSA_SMALL, params, x, n_valid=n_valid)
  _, _, more = apply(DSA_SMALL, params, jnp.pad(
      x, ((0, 0), (0, 3), (0, 0)), constant_values=5.0), n_valid=n_valid)
  np.testing.assert_allclose(said['losses']['index'], more['losses']['index'],
                             rtol=1e-6)


def test_all_chosen_is_warmup():
  """With k for everything the sparse loss and its gradient are the dense ones,
  and so is what is attended to."""
  params, x = draw(DSA_SMALL, 12)
  def both(stage, k):
    config = dataclasses.replace(DSA_SMALL, stage=stage, k=k)
    def total(params):
      y, _, said = apply(config, params, x)
      return said['losses']['index'], (y, said['lent']['chosen'])
    return jax.value_and_grad(total, has_aux=True)(params)
  dense, sparse = both('warmup', 4), both('sparse', 100)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-6, atol=1e-6), dense, sparse)
  # And with fewer it is not.
  assert abs(both('sparse', 4)[0][0] - dense[0][0]) > 0.1


def test_a_reader_attends_to_what_its_owner_chose():
  owner = DSA_SMALL
  reader = dataclasses.replace(owner, owner='owner', index_loss=0.0)
  params, x = draw(owner, 12)
  y, _, said = apply(owner, params, x)
  mine = {n: p for n, p in params.items() if not n.startswith('index')}

  def read(chosen):
    state = empty(reader, 2, 0)
    both = jnp.array([[0, 0], [24, 24]], jnp.int32)
    context = common.context(*both, None, 24)
    context = dataclasses.replace(context, lent={'owner': {'chosen': chosen}})
    views = jax.tree.map(lambda a: st.Store(a, jnp.int32(0)), state)
    return DSA(reader).apply({'params': mine}, x, views, context,
                             mutable=('lent', 'losses'))[0][0]

  chosen = said['lent']['chosen']
  np.testing.assert_allclose(read(chosen), y, rtol=1e-5, atol=1e-6)
  # Of a query that sees one token alone, that one's value comes out.
  one = jnp.zeros_like(chosen).at[:, 5:, 3].set(True)
  alone = read(one)[:, 5:]
  np.testing.assert_allclose(alone, jnp.broadcast_to(alone[:, :1], alone.shape),
                             rtol=1e-5, atol=1e-6)


def test_an_owner_in_warmup_lends_all_it_sees():
  params, x = draw(DSA_SMALL, 12)
  _, _, said = apply(dataclasses.replace(DSA_SMALL, stage='warmup'), params, x)
  np.testing.assert_array_equal(
      said['lent']['chosen'], np.broadcast_to(np.tri(24) > 0, (2, 24, 24)))
  with pytest.raises(ValueError, match="'sparse' for a layer with an owner"):
    c.DSAConfig(owner='dsa', stage='warmup')


@functools.cache
def tiny():
  """The tiny model with an owner and a reader, its parameters, a batch."""
  config = tiny_dsa.get_config()
  whole, rng = lm.LanguageModel(config.model), np.random.default_rng(0)
  batch = {n: rng.integers(0, 64, (4, 12)) for n in ('tokens', 'targets')}
  batch['targets'][:, ::2] = -1
  batch['segments'] = np.where(np.arange(12) < [[12], [9], [5], [1]], 0, -1)
  return config, whole, whole.init(jax.random.key(0)), batch


@pytest.mark.slow
@pytest.mark.parametrize('pieces', [
    1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_trainer_adds_it(pieces):
  """Per real token, however the batch is cut: nothing else moves an indexer."""
  config, whole, params, batch = tiny()
  def alone(params):
    state = whole.init_state(4, 0)
    *_, losses = lm.forward(whole, params, state, batch['tokens'],
                            segment_ids=batch['segments'])
    return losses['dsa']['index'] / 27
  want, wanted = jax.jit(jax.value_and_grad(alone))(params)
  train = dataclasses.replace(config.train, accumulate=pieces)
  grads, sums = jax.jit(step_of_training._gradient, static_argnums=(0, 1))(
      whole, train, params, batch)
  assert int(sums.tokens) == 27
  np.testing.assert_allclose(sums.layers / 27, want, rtol=1e-5)
  pick = lambda tree: {n: g for n, g in tree['group_0']['layer_0'][
      'mixer'].items() if n.startswith('index')}
  assert len(pick(grads)) == 5
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-6), pick(grads), pick(wanted))
  assert all(np.any(g) for g in jax.tree.leaves(pick(grads)))


@pytest.mark.slow
@pytest.mark.parametrize('unrolled', [
    False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_survives_remat_and_scan(unrolled):
  config, whole, params, batch = tiny()
  params = whole.unstack(params) if unrolled else params
  def loss(params, remat):
    model = lm.LanguageModel(dataclasses.replace(config.model, remat=remat))
    *_, losses = lm.forward(model, params, model.init_state(4, 0),
                            batch['tokens'], segment_ids=batch['segments'])
    return losses['dsa']['index']
  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  plain, remat = run(params, False), run(params, True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-6), plain, remat)
  assert plain[0] > 0


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('length', [1, 4])
def test_serving_does_not_compute_it(length):
  config, whole, params, _ = tiny()
  free = lm.LanguageModel(dataclasses.replace(config.model, layers=tuple(
      dataclasses.replace(x, mixer=dataclasses.replace(
          x.mixer, index_loss=0.0)) for x in config.model.layers)))
  work = lambda run, model: jax.jit(run, static_argnums=0).lower(
      model, params, model.init_state(2, 16), np.ones((2, length), int)
  ).compile().cost_analysis()['flops']
  assert work(lm.apply, whole) == work(lm.apply, free)
  assert work(lm.forward, whole) > work(lm.forward, free)


@pytest.mark.slow
def test_warmup_raises_recall():
  """The loss alone teaches the indexer what attention itself looks at."""
  config = dataclasses.replace(
      DSA_SMALL, mla=dataclasses.replace(SMALL, heads=1, rope=None),
      stage='warmup', index_heads=16, index_width=32, index_rope=None)
  params, x = draw(config, 12)
  # Sharp attention, so that there is something to be missed.
  params = params | {'q_b': jax.tree.map(lambda p: 4 * p, params['q_b'])}
  mine = {n: p for n, p in params.items() if n.startswith('index')}
  steps = 2000
  chain = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

  @jax.jit
  def train(mine, optimizer):
    grad = jax.grad(lambda p: apply(config, params | p, x)[2]['losses'][
        'index'] / x[..., 0].size)(mine)
    updates, optimizer = chain.update(grad, optimizer)
    return optax.apply_updates(mine, updates), optimizer

  def recall(mine):
    """Share of attention's own four best that the indexer chooses."""
    _, _, said = apply(dataclasses.replace(config, stage='sparse'),
                       params | mine, x)
    best = attention_best(params | mine, x, config)
    late = np.arange(x.shape[1]) >= 8  # else everything is chosen
    hit = np.asarray(said['lent']['chosen']) & best
    return hit[:, late].sum() / best[:, late].sum()

  before, optimizer = recall(mine), chain.init(mine)
  for _ in range(steps):
    mine, optimizer = train(mine, optimizer)
  after = recall(mine)
  assert before < 0.8 and after > 0.99, (before, after)


def attention_best(params, x, config):
  """The k columns of the largest summed probability, [B, T, T] bool."""
  m, x = config.mla, np.asarray(x)
  params = jax.tree.map(np.asarray, params)
  low = x @ params['q_a']['kernel']
  rms = lambda y, w: y / np.sqrt(np.mean(y * y, -1, keepdims=True)
                                 + m.eps) * w['weight']
  q = np.einsum('btr,rhk->bthk', rms(low, params['norm_q']),
                params['q_b']['kernel'])
  both = x @ params['kv_a']['kernel']
  latent = rms(both[..., :m.rank], params['norm_kv'])
  turn = rotary.rotation(m.rope, m.rope_width)
  at = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  k = np.einsum('btr,rhk->bthk', latent, params['k_b'])
  turned = (np.asarray(turn(jnp.asarray(a), at)) for a in (
      q[..., m.nope:], both[:, :, None, m.rank:]))
  s = np.einsum('bthk,bnhk->bthn', q[..., :m.nope], k) + np.einsum(
      'bthk,bnjk->bthn', *turned)
  s = np.where(np.tril(np.ones(s.shape[1::2], bool))[None, :, None],
               s * (m.nope + m.rope_width) ** -0.5, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  p = (p / p.sum(-1, keepdims=True)).sum(axis=2)
  order = np.argsort(-p, axis=-1, kind='stable')[..., :config.k]
  mask = np.zeros(p.shape, bool)
  np.put_along_axis(mask, order, True, axis=-1)
  return mask & (p > 0)


def test_reader_keeps_no_index_keys():
  mla = c.MLAConfig(heads=1, nope=128, rope_width=64, value=128, rank=512,
                    q_rank=1536)
  owner = c.DSAConfig(mla=mla, index_heads=64, index_width=128)
  reader = c.DSAConfig(mla=mla, owner='dsa')
  for config, each in ((owner, 1152 + 256), (reader, 1152)):
    specs = DSA.state(config, 1, 10, 'bfloat16')
    size = sum(2 * np.prod(s.shape) for s in jax.tree.leaves(
        specs, is_leaf=lambda s: isinstance(s, st.Spec)))
    assert size == 10 * each
