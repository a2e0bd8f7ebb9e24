"""Attention to chosen blocks: published layers, and naive references."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import published_sparse
import pytest
import single

from statejax import config as c
from statejax import model as lm
from statejax.layers import attention, block_sparse, common
from statejax.ops import candidates

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
HALF = c.RopeConfig(fraction=0.5)
A = c.AttentionConfig(heads=4, kv_heads=2, key=12, value=12, rope=HALF,
                      qk_norm=True)
LAYERS = {
    'minimax_m3': c.BlockMaxConfig(
        A, block=4, k=3, index_width=8, index_rope=c.RopeConfig(fraction=0.75)),
    'qsa': c.QSAConfig(
        dataclasses.replace(A, output_gate=True), block=4, k=2, index_heads=8,
        index_width=12),
    'kpool': c.PooledDSAConfig(
        c.MLAConfig(heads=3, nope=10, rope_width=0, value=12, rank=16,
                    q_rank=20, rope=None, eps=1e-5),
        block=4, k=2, index_heads=8, index_width=12),
}
MOBA = c.MoBAConfig(dataclasses.replace(A, sink=True), block=4, k=3)
# A single token past a full choice gathers; two and more mask.
# Of 30 tokens; two lengths are two programs.
CUTS = (13, 14, 15, 16, 17)


def ours(name, p):
  """Published weights as ours."""
  def kernel(w, *shape):
    return {'kernel': w.T.reshape(w.shape[1], *shape)}
  norm = lambda w: {'weight': 1 + w}
  if name == 'kpool':
    both = p['kv_b_proj.weight'].T.reshape(16, 3, 22)
    return {
        'q_a': kernel(p['q_a_proj.weight'], -1),
        'norm_q': {'weight': p['q_a_layernorm.weight']},
        'q_b': kernel(p['q_b_proj.weight'], 3, 10),
        'kv_a': kernel(p['kv_a_proj_with_mqa.weight'], -1),
        'norm_kv': {'weight': p['kv_a_layernorm.weight']},
        'k_b': both[..., :10], 'v_b': both[..., 10:],
        'out': {'kernel': p['o_proj.weight'].T.reshape(3, 12, -1)},
        'index_q': kernel(p['indexer.wq_b.weight'], 8, 12),
        'index_k': kernel(p['indexer.wk.weight'], -1),
        'index_norm': p['indexer.k_norm.weight'],
        'index_shift': p['indexer.k_norm.bias'],
        'index_gates': kernel(p['indexer.index_kpool_compress_gate'], -1),
        'index_bias': p['indexer.index_kpool_compress_ape'],
        'index_w': kernel(p['indexer.weights_proj.weight'], -1)}
  q = p['q_proj.weight']
  out = {
      'k': kernel(p['k_proj.weight'], 2, 12),
      'v': kernel(p['v_proj.weight'], 2, 12),
      'norm_q': norm(p['q_norm.weight']), 'norm_k': norm(p['k_norm.weight']),
      'out': {'kernel': p['o_proj.weight'].T.reshape(4, 12, -1)}}
  if name == 'qsa':
    q, gate = np.split(q.reshape(4, 24, -1), 2, axis=1)
    index = np.split(p['indexer.index_qk_proj.weight'], [96])
    return out | {
        'q': kernel(q.reshape(48, -1), 4, 12),
        'gate': kernel(gate.reshape(48, -1), 4, 12),
        'index_q': kernel(index[0], 8, 12), 'index_k': kernel(index[1], -1),
        'norm_index_q': norm(p['indexer.q_layernorm.weight']),
        'norm_index_k': norm(p['indexer.k_layernorm.weight'])}
  return out | {
      'q': kernel(q, 4, 12),
      'index_q': kernel(p['indexer.q_proj.weight'], 2, 8),
      'index_k': kernel(p['indexer.k_proj.weight'], -1),
      'norm_index_q': norm(p['indexer.q_norm.weight']),
      'norm_index_k': norm(p['indexer.k_norm.weight'])}


@pytest.mark.parametrize('name, cuts', [
    *((name, CUTS) for name in LAYERS),
    *(pytest.param(name, (), marks=pytest.mark.slow) for name in LAYERS)])
def test_golden(name, cuts):
  g = np.load(GOLDEN / f'{name}.npz')
  params = ours(name, {k[2:]: g[k] for k in g.files if k.startswith('p/')})
  y, _ = single.run(LAYERS[name], params, g['x'], cuts)
  assert np.abs(y - g['y']).max() <= 2e-6 * np.abs(g['y']).max()


@pytest.mark.slow
@pytest.mark.parametrize('name', LAYERS)
def test_golden_is_what_transformers_gives(name):
  pytest.importorskip('transformers')
  stored, fresh = np.load(GOLDEN / f'{name}.npz'), published_sparse.make(name)
  assert set(stored.files) == set(fresh)
  for key, x in fresh.items():
    np.testing.assert_allclose(stored[key], x, rtol=1e-5, atol=1e-6)


# MoBA, token by token.


def naive_moba(params, x):
  """Float64, one query and head at a time."""
  n, a = MOBA.block, MOBA.attention
  class Projections(attention.nn.Module):
    @attention.nn.compact
    def __call__(self, x):
      return attention.project(a, x, jnp.arange(30)[None])
  part = {k: params[k] for k in ('q', 'k', 'v', 'norm_q', 'norm_k')}
  q, k, v = (np.asarray(y, np.float64) for y in Projections().apply(
      {'params': part}, x))
  sink = np.asarray(params['sink'], np.float64)
  out = np.zeros((*q.shape[:3], a.value))
  for b, t, h in np.ndindex(q.shape[:3]):
    keys, values, own = k[b, h // 2], v[b, h // 2], t // n
    best = sorted(range(own), key=lambda w: (
        -q[b, t, h] @ keys[w * n:w * n + n].mean(0), w))[:MOBA.k - 1]
    seen = [j for w in (*best, own)
            for j in range(w * n, min(w * n + n, t + 1))]
    p = np.exp(keys[seen] @ q[b, t, h] * a.key ** -0.5)
    out[b, t, h] = p @ values[seen] / (p.sum() + np.exp(sink[h]))
  return np.einsum('bthv,hvd->btd', out, params['out']['kernel'])


@pytest.mark.parametrize('cuts', [
    CUTS, pytest.param((), marks=pytest.mark.slow)])
def test_moba(cuts):
  params, x = single.draw(MOBA, 24)
  params['sink'] = jnp.array([0.3, -1.0, 2.0, 0.0])
  y, state = single.run(MOBA, params, x, cuts)
  want = naive_moba(params, x)
  assert np.abs(y - want).max() <= 2e-6 * np.abs(want).max()
  k = np.asarray(state.k)[0, :, :, :28].reshape(2, 2, 7, 4, 12).mean(3)
  np.testing.assert_allclose(
      state.mean[0, :, :7].reshape(2, 7, 2, 12).swapaxes(1, 2), k, atol=1e-6)


# Laws of choice.


def everything(config):
  return dataclasses.replace(config, k=100)


@pytest.mark.parametrize('name', [
    'moba', *(pytest.param(n, marks=pytest.mark.slow)
              for n in ('minimax_m3', 'qsa'))])
def test_enough_blocks_are_dense_attention(name):
  config = everything(MOBA if name == 'moba' else LAYERS[name])
  params, x = single.draw(config, 24)
  mine = {k: p for k, p in params.items() if 'index' not in k}
  y, _ = single.run(config, params, x, (15,))
  want, _ = single.run(config.attention, mine, x, (15,))
  np.testing.assert_allclose(y, want, atol=2e-6)


@pytest.mark.slow
def test_enough_pools_are_dense_latent_attention():
  config = everything(LAYERS['kpool'])
  params, x = single.draw(config, 24)
  mine = {k: p for k, p in params.items() if 'index' not in k}
  y, _ = single.run(config, params, x, (15,))
  want, _ = single.run(config.mla, mine, x, (15,))
  np.testing.assert_allclose(y, want, atol=2e-6)


@functools.partial(jax.jit, static_argnums=0)
def influence(config, params, x):
  """Which inputs output t of row 0 depends on, [T, T], without the indexer's:
  it reads its inputs without gradient."""
  def one(x):
    state = single.empty(config, 1, 0)
    return single.step(config, params, x, state, jnp.zeros((1,), jnp.int32))[0]
  return jnp.any(jax.jacrev(lambda x: jnp.sum(one(x), axis=-1)[0])(
      x[:1])[:, 0] != 0, axis=-1)


BUDGET = {'moba': 'inside', 'minimax_m3': 'inside', 'qsa': 'beside',
          'kpool': 'beside'}


@pytest.mark.parametrize('name', BUDGET)
def test_budget(name):
  """How many tokens a query sees, over all its heads' choices: of one head."""
  config = MOBA if name == 'moba' else LAYERS[name]
  if name != 'kpool':
    config = dataclasses.replace(config, attention=dataclasses.replace(
        config.attention, heads=1, kv_heads=1))
  params, x = single.draw(config, 24, seed=3)
  seen = np.asarray(influence(config, params, x))
  for t in range(30):
    n, own = config.block, t % config.block + 1
    # The query itself is seen as a query, whatever is seen as keys.
    count = int(seen[t, :t].sum())
    if BUDGET[name] == 'inside':
      want = min(config.k - 1, t // n) * n + own - 1
    else:
      want = min(config.k, (t + 1) // n) * n + own % n
      want -= bool(own < n or seen[t, t - 1])
    assert count == want and not seen[t, t + 1:].any(), t


def test_all_equal_scores_take_the_first_blocks():
  config = LAYERS['qsa']
  config = dataclasses.replace(config, attention=dataclasses.replace(
      config.attention, output_gate=False))
  params, x = single.draw(config, 24)
  params['index_q'] = jax.tree.map(jnp.zeros_like, params['index_q'])
  seen = np.asarray(influence(config, params, x))
  for t in range(8, 30):
    tail = np.arange(30) > t - (t + 1) % 4
    np.testing.assert_array_equal(
        seen[t], (np.arange(30) < 8) | (tail & (np.arange(30) < t))
        | (np.arange(30) == t))


@pytest.mark.parametrize('tokens', [24, 27, 30])
def test_best_scores_of_a_long_store_are_those_of_a_short_one(
    tokens, monkeypatch):
  """In pieces of two blocks, with a rest, and a block left open."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, keys, new = normal(2, 5, 4, 8), normal(2, 2, tokens, 8), normal(2, 2, 5, 8)
  length = jnp.array([tokens - 3, 6], jnp.int32)
  context = common.context(length, jnp.array([5, 3], jnp.int32), None, 5)
  past = keys, context.visible_store(tokens)
  run = lambda: block_sparse.best_scores(
      q, past, new, context.blocks(3), context)
  whole = run()
  monkeypatch.setattr(block_sparse, '_PIECE', 7)
  np.testing.assert_allclose(run(), whole, rtol=1e-5, atol=1e-6)
  # The best token of each block that was complete before, in numpy.
  dots = np.einsum('bthk,bhnk->bhtn', q, np.repeat(keys, 2, axis=1))
  for row, count in enumerate(np.asarray(length) // 3):
    want = dots[row, :, :, :3 * count].reshape(4, 5, count, 3).max(axis=-1)
    np.testing.assert_allclose(whole[row, :, :, :count][:, :3],
                               want[:, :3], rtol=1e-5, atol=1e-5)


# The indexers learn, and nothing else learns from them.


@pytest.mark.parametrize('name, stage', [
    ('kpool', 'sparse'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('minimax_m3', 'warmup'), ('qsa', 'sparse'), ('kpool', 'warmup'),
        ('minimax_m3', 'sparse'), ('qsa', 'warmup')))])
def test_gradients_are_isolated(name, stage):
  config = dataclasses.replace(LAYERS[name], stage=stage)
  params, x = single.draw(config, 24)
  def run(params, x):
    return single.step(config, params, x, single.empty(config, 2, 0),
                       jnp.zeros((2,), jnp.int32))
  def loss(params, x):
    return run(params, x)[2]['losses']['index']
  value, (grads, d_x) = jax.value_and_grad(loss, argnums=(0, 1))(params, x)
  assert value > 0 and not np.any(d_x)
  plain = jax.grad(lambda p: jnp.sum(run(p, x)[0] ** 2))(params)
  for key in params:
    some = [any(np.any(g) for g in jax.tree.leaves(tree[key]))
            for tree in (grads, plain)]
    assert some == ['index' in key, 'index' not in key], key
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads[key]))


@functools.partial(jax.jit, static_argnames='size')
def block_loss(q, k, v, scores, ranks, document, n_valid, size):
  """The loss of a step of 14 tokens from a state of 6, the choice by rank."""
  rows, length = q.shape[:2]
  held = jnp.full((rows,), 6, jnp.int32)
  context = common.context(held, n_valid, document, length)
  plan, seen = context.blocks(size), context.visible_store(9)
  visible = candidates.visible(plan, candidates.count(9, size))
  chosen = candidates.choose(ranks, visible, 3)
  past, new = zip(*((x[:, :, :9], x[:, :, 9:]) for x in (k, v)))
  return block_sparse.loss(
      scores, q, (*past, seen), new, chosen, plan, context, scale=0.4), (
          chosen, plan.end)


@pytest.mark.parametrize('borders', [False, True])
def test_block_loss_by_hand(borders):
  """Two groups, a block begun before the step, padding; float64, one by one.
  A query's own block counts once, whether it is complete by now or not."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  size, held, entries, wide = 4, 6, 3, 4
  q, k, v = draw(2, 14, 4, 5), draw(2, 2, 23, 5), draw(2, 2, 23, 5)
  scores, ranks = (draw(2, 2, 14, entries + wide + 1) for _ in range(2))
  document = np.zeros((2, 14), np.int32)
  if borders:
    document[0, 5:], document[1, 2:] = 1, 1
  n_valid = np.array([14, 11], np.int32)
  got, (chosen, ends) = block_loss(
      q, k, v, scores, ranks, document if borders else None, n_valid, size)
  chosen, ends = np.asarray(chosen), np.asarray(ends)
  total, counted = 0.0, 0
  for b, g, t in np.ndindex(2, 2, 14):
    if t >= n_valid[b]:
      continue
    mine, start = document[b, t], int(np.argmax(document[b] == document[b, t]))
    # Number of each token's block, by column: 9 of the store, then the step's.
    number = {}
    if mine == 0:
      number |= {j: j // size for j in range(held)}
      number |= {9 + s: (held + s) // size for s in range(t + 1)}
    else:
      number |= {9 + s: (s - start) // size for s in range(start, t + 1)}
    blocks = {}
    for column, n in number.items():
      blocks.setdefault(n, []).append(column)
    place = {}
    for n, columns in blocks.items():
      complete = len(columns) == size
      place[n] = (entries + wide if not complete else
                  n if columns[-1] < 9 else
                  entries + list(ends[b]).index(columns[-1] - 9))
    taken = {n: c for n, c in blocks.items() if chosen[b, g, t, place[n]]}
    assert len(taken) == min(3, len(blocks))
    columns = sum(taken.values(), [])
    p = np.zeros(len(columns))
    for h in (2 * g, 2 * g + 1):
      s = 0.4 * k[b, g, columns].astype(np.float64) @ q[b, t, h]
      p += np.exp(s - s.max()) / np.exp(s - s.max()).sum() / 2
    target = np.array([sum(p[columns.index(c)] for c in held)
                       for held in taken.values()])
    own = np.array([scores[b, g, t, place[n]] for n in taken], np.float64)
    own -= np.log(np.exp(own).sum())
    total += np.sum(target * (np.log(target) - own))
    counted += len(taken) > 1
  assert counted > 20
  np.testing.assert_allclose(got, total / 2, rtol=1e-5)


def test_pools_of_one_token_are_dsa():
  """Outputs, choice and loss."""
  pools = dataclasses.replace(LAYERS['kpool'], block=1, k=6)
  tokens = c.DSAConfig(pools.mla, k=6, index_heads=8, index_width=12,
                       index_rope=None)
  params, x = single.draw(pools, 24)
  params['index_shift'] = jnp.linspace(-1, 1, 12)
  same = {n: p for n, p in params.items()
          if n not in ('index_gates', 'index_shift')}
  same['index_bias'] = params['index_shift']
  zero = jnp.zeros((2,), jnp.int32)
  y, _, said = single.step(pools, params, x, single.empty(pools, 2, 0), zero)
  want, _, wanted = single.step(
      tokens, same, x, single.empty(tokens, 2, 0), zero)
  np.testing.assert_allclose(y, want, atol=1e-6)
  np.testing.assert_array_equal(said['lent']['chosen'],
                                wanted['lent']['chosen'])
  np.testing.assert_allclose(said['losses']['index'],
                             wanted['losses']['index'], rtol=1e-5)


def test_indexer_learns_what_attention_looks_at():
  """Its loss falls to what is left of the entropy between heads."""
  import optax
  config = dataclasses.replace(LAYERS['qsa'], stage='warmup')
  params, x = single.draw(config, 24)
  names = [k for k in params if 'index' in k]
  rest = {k: p for k, p in params.items() if k not in names}
  zero = jnp.zeros((2,), jnp.int32)
  @jax.jit
  def loss(mine):
    return single.step(config, rest | mine, x, single.empty(config, 2, 0),
                       zero)[2]['losses']['index']
  optimizer = optax.adam(1e-2)
  mine = {k: params[k] for k in names}
  state, first = optimizer.init(mine), loss(mine)
  update = jax.jit(lambda m, s: optimizer.update(jax.grad(loss)(m), s, m))
  for _ in range(60):
    change, state = update(mine, state)
    mine = optax.apply_updates(mine, change)
  assert loss(mine) < 0.5 * first


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('name', LAYERS)
def test_serving_computes_no_loss(name):
  def work(run, config):
    whole = lm.LanguageModel(c.ModelConfig(
        9, 24, (c.LayerConfig('m', config),), (c.GroupConfig(('m',)),)))
    params = jax.eval_shape(whole.init, jax.random.key(0))
    return jax.jit(run, static_argnums=0).lower(
        whole, params, whole.init_state(2, 16), np.ones((2, 6), int)
    ).compile().cost_analysis()['flops']
  free = dataclasses.replace(LAYERS[name], index_loss=0.0)
  assert work(lm.apply, LAYERS[name]) == work(lm.apply, free)
  assert work(lm.forward, LAYERS[name]) > work(lm.forward, free)


# A full layer and its readers.

OWNER = c.HySparseConfig(dataclasses.replace(A, sink=True), block=4, k=2)
READER = dataclasses.replace(OWNER, owner='full', window=3)


def projected(params, x):
  class Projections(attention.nn.Module):
    @attention.nn.compact
    def __call__(self, x):
      return attention.project(A, x, jnp.arange(30)[None])
  part = {k: params[k] for k in ('q', 'k', 'v', 'norm_q', 'norm_k')}
  return (np.asarray(y, np.float64) for y in Projections().apply(
      {'params': part}, x))


def softmax(s, sink):
  top = max(s.max(), sink)
  p = np.exp(s - top)
  return p / (p.sum() + np.exp(sink - top))


def naive_choice(params, x):
  """The blocks of the largest probability, [B, T, G] lists."""
  q, k, _ = projected(params, x)
  chosen = np.zeros((2, 30, 2), object)
  for b, t, g in np.ndindex(chosen.shape):
    best = np.zeros(t // 4 + 1)
    for h in (2 * g, 2 * g + 1):
      p = softmax(k[b, g, :t + 1] @ q[b, t, h] * 12 ** -0.5,
                  params['sink'][h])
      best = np.maximum(best, [p[w * 4:w * 4 + 4].max()
                               for w in range(len(best))])
    chosen[b, t, g] = sorted(range(len(best)), key=lambda w: (-best[w], w))[:2]
  return chosen


def naive_reader(owner, params, x, chosen):
  q, near_k, near_v = projected(params, x)
  _, k, v = projected(owner, x)
  gates = 1 / (1 + np.exp(-np.einsum(
      'btd,dxh->btxh', x, params['gates']['kernel'])))
  out = np.zeros((2, 30, 4, 12))
  for b, t, h in np.ndindex(2, 30, 4):
    seen = [j for w in chosen[b, t, h // 2]
            for j in range(w * 4, min(w * 4 + 4, t + 1))]
    window = range(max(0, t - 2), t + 1)
    for i, (keys, values, at, sink) in enumerate((
        (k, v, seen, 'sink'), (near_k, near_v, window, 'sink_window'))):
      at = list(at)
      p = softmax(keys[b, h // 2, at] @ q[b, t, h] * 12 ** -0.5,
                  params[sink][h])
      out[b, t, h] += gates[b, t, i, h] * (p @ values[b, h // 2, at])
  return np.einsum('bthv,hvd->btd', out, params['out']['kernel'])


@pytest.mark.parametrize('cuts', [
    CUTS, pytest.param((), marks=pytest.mark.slow)])
def test_hysparse(cuts):
  """An owner and a reader of the same inputs."""
  whole = lm.LanguageModel(c.ModelConfig(1, 24, (
      c.LayerConfig('full', OWNER), c.LayerConfig('reader', READER)),
      (c.GroupConfig(('full', 'reader')),)))
  params = jax.tree.map(lambda p: p[0], whole.init(jax.random.key(0)))
  owner, reader = (dict(params['group_0'][f'layer_{i}']['mixer'])
                   for i in (0, 1))
  owner['sink'] = jnp.array([0.3, -1.0, 2.0, 0.0])
  reader['sink_window'] = owner['sink'][::-1]
  x = jax.random.normal(jax.random.key(1), (2, 30, 24))
  states = [single.empty(config, 2, 30) for config in (OWNER, READER)]
  outputs, done = [], 0
  for piece in np.split(x, cuts, axis=1):
    length = jnp.full((2,), done, jnp.int32)
    _, states[0], said = single.step(OWNER, owner, piece, states[0], length)
    y, states[1], _ = single.step(READER, reader, piece, states[1], length,
                                  lent={'full': said['lent']})
    outputs.append(y)
    done += piece.shape[1]
  chosen = naive_choice(owner, x)
  want = naive_reader(owner, reader, x, chosen)
  y = np.concatenate(outputs, axis=1)
  assert np.abs(y - want).max() <= 2e-6 * np.abs(want).max()


def test_a_reader_keeps_a_window_only():
  kept = {f.name: f.metadata['kind'] for f in dataclasses.fields(
      single.empty(READER, 1, 50))}
  assert kept == {'k': 'fixed', 'v': 'fixed'}
  assert single.empty(READER, 1, 50).k.shape == (1, 2, 3, 12)


def test_a_reader_agrees_with_its_owner():
  narrow = dataclasses.replace(READER, attention=dataclasses.replace(
      READER.attention, value=8))
  whole = lm.LanguageModel(c.ModelConfig(9, 24, (
      c.LayerConfig('full', OWNER), c.LayerConfig('reader', narrow)),
      (c.GroupConfig(('full', 'reader')),)))
  with pytest.raises(ValueError, match='heads and widths of its owner'):
    whole.init(jax.random.key(0))


def test_a_reader_has_the_blocks_of_its_owner():
  other = dataclasses.replace(READER, block=8)
  whole = lm.LanguageModel(c.ModelConfig(9, 24, (
      c.LayerConfig('full', OWNER), c.LayerConfig('reader', other)),
      (c.GroupConfig(('full', 'reader')),)))
  with pytest.raises(ValueError, match='expected block=4, got 8'):
    whole.init(jax.random.key(0))


def test_local_blocks_are_among_the_chosen():
  with pytest.raises(ValueError, match='expected local <= k, got 3'):
    c.BlockMaxConfig(A, k=2, local=3)


def test_a_window_wants_an_owner():
  with pytest.raises(ValueError, match='owner and window together'):
    c.HySparseConfig(window=4)


def test_mixers_want_no_window():
  with pytest.raises(ValueError, match='MoBAConfig.attention.*window=None'):
    c.MoBAConfig(dataclasses.replace(A, window=8))
