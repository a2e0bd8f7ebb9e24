"""Native sparse attention: a naive float64 oracle, who influences whom, bytes.

Its laws are in `../test_laws_attention.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.layers import attention, common
from statejax.layers.nsa import NSA
from statejax.train import optimizer

CONFIG = c.NSAConfig(
    heads=4, kv_heads=2, key=6, value=5, compress_block=6, stride=2,
    compress_hidden=7, select_block=4, select_count=3, initial=1, local=1,
    window=3, rope=c.RopeConfig(theta=20.0))
FEW = dataclasses.replace(
    CONFIG, kv_heads=4, compress_block=4, stride=4, select_count=5, initial=2,
    local=2, window=5, rope=None)
WIDTH, STEPS, CUTS = 12, 27, (13, 14)


# One layer, run by steps.


@functools.cache
def draw(config):
  whole = lm.LanguageModel(c.ModelConfig(
      1, WIDTH, (c.LayerConfig('m', config),), (c.GroupConfig(('m',)),)))
  layer = jax.eval_shape(whole.init, jax.random.key(0))['group_0']['layer_0']
  rng = np.random.default_rng(0)
  def one(path, p):
    shape = p.shape[1:]
    fan = np.prod(shape[:-1]) if shape[-1] == WIDTH else shape[0]
    # Far from uniform attention, so that blocks differ.
    fan /= 9 if path[0].key in ('q', 'entry_k') else 1
    return (rng.normal(size=shape) * fan ** -0.5).astype(np.float32)
  return jax.tree_util.tree_map_with_path(one, layer['mixer'])


GROWING = ('select_k', 'select_v', 'entry_k', 'entry_v')


def apply(config, params, x, state, length):
  n_valid = jnp.full(length.shape, x.shape[1], jnp.int32)
  context = common.context(length, n_valid, None, x.shape[1])
  views = dataclasses.replace(state, **{
      f: st.Store(getattr(state, f)[None], jnp.int32(0)) for f in GROWING})
  y, views = NSA(config).apply({'params': params}, x, views, context)
  return y, dataclasses.replace(views, **{
      f: getattr(views, f).data[0] for f in GROWING})


step = jax.jit(apply, static_argnums=0)


def empty(config, rows, capacity=STEPS):
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                      NSA.state(config, rows, capacity, 'float32'),
                      is_leaf=lambda s: isinstance(s, st.Spec))


def run(config, params, x, cuts=()):
  rows, done, outputs = x.shape[0], 0, []
  state = empty(config, rows)
  for piece in np.split(x, cuts, axis=1):
    y, state = step(config, params, piece, state,
                    jnp.full((rows,), done, jnp.int32))
    outputs.append(y)
    done += piece.shape[1]
  return np.concatenate(outputs, axis=1), state


def inputs(steps=STEPS, rows=2):
  return np.random.default_rng(1).normal(
      size=(rows, steps, WIDTH)).astype(np.float32)


def close(got, want, tolerance=1e-5):
  assert np.abs(got - want).max() <= tolerance * max(1, np.abs(want).max())


# The naive form, float64, one query at a time.


def turn(x, position, config):
  """Rotates the last axis: channel i with the one half the width ahead."""
  if config.rope is None:
    return x
  first, second = np.split(x, 2, axis=-1)
  speed = config.rope.theta ** (-np.arange(first.shape[-1])
                                / first.shape[-1])
  z = (first + 1j * second) * np.exp(1j * position * speed)
  return np.concatenate([z.real, z.imag], axis=-1)


def chosen_blocks(config, entries, t):
  """The blocks that a group selects, from its entries' probabilities."""
  length, s, size = config.compress_block, config.stride, config.select_block
  own = t // size
  weight = np.zeros(own + 1)
  for j in range(own + 1):
    for m in range(size // s):
      for u in range(length // s):
        i = j * size // s + m - u
        if 0 <= i < len(entries):
          weight[j] += entries[i]
  forced = [j for j in range(own + 1)
            if j < config.initial or j > own - config.local]
  others = sorted(set(range(own + 1)) - set(forced),
                  key=lambda j: (-weight[j], j))
  return sorted((forced + others)[:config.select_count])


def softmax(scores):
  p = np.exp(scores - scores.max())
  return p / p.sum()


def naive(config, params, x):
  """Returns outputs, and the blocks selected, [row][t][group]."""
  g = config
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  kernel = lambda name: p[name]['kernel']
  y, blocks = np.zeros(x.shape), []
  each, scale = g.heads // g.kv_heads, g.key ** -0.5
  for b, row in enumerate(x.astype(np.float64)):
    blocks.append([])
    q = np.einsum('td,dhk->thk', row, kernel('q'))
    branch = {n: [np.einsum('td,dgk->tgk', row, kernel(f'{n}_{a}'))
                  for a in 'kv'] for n in ('compress', 'select', 'window')}
    for n in ('select', 'window'):
      branch[n][0] = np.stack([turn(k, j, g)
                               for j, k in enumerate(branch[n][0])])
    entries = []
    for i in range(0, len(row) - g.compress_block + 1, g.stride):
      entry = []
      for name, raw in zip('kv', branch['compress']):
        block = raw[i:i + g.compress_block].swapaxes(0, 1) + p[f'place_{name}']
        hidden = block.reshape(g.kv_heads, -1) @ kernel(f'hidden_{name}')
        entry.append(hidden / (1 + np.exp(-hidden)) @ kernel(f'entry_{name}'))
      entries.append(entry)
    for t, now in enumerate(row):
      blocks[-1].append([])
      complete = [e for i, e in enumerate(entries)
                  if i * g.stride + g.compress_block - 1 <= t]
      out = np.zeros((3, g.heads, g.value))
      for group in range(g.kv_heads):
        heads = range(group * each, (group + 1) * each)
        mass = np.zeros(len(complete))
        for h in heads:
          if complete:
            weight = softmax(scale * np.array(
                [k[group] @ q[t, h] for k, _ in complete]))
            mass += weight
            out[0, h] = sum(w * v[group] for w, (_, v) in zip(weight, complete))
        mine = chosen_blocks(g, mass, t)
        blocks[-1][-1].append(mine)
        for h in heads:
          here = turn(q[t, h], t, g)
          for place, (name, tokens) in enumerate((
              ('select', [j for j in range(t + 1)
                          if j // g.select_block in mine]),
              ('window', range(max(0, t - g.window + 1), t + 1)))):
            k, v = (a[list(tokens), group] for a in branch[name])
            out[1 + place, h] = softmax(scale * k @ here) @ v
      gates = np.stack([now @ kernel(f'gate_{n}')
                        for n in ('compress', 'select', 'window')])
      mixed = (out / (1 + np.exp(-gates))[..., None]).sum(0)
      y[b, t] = np.einsum('hv,hvd->d', mixed, kernel('out'))
  return y, blocks


@pytest.mark.parametrize('config, cuts', [
    pytest.param(CONFIG, (), marks=pytest.mark.slow), (CONFIG, CUTS),
    pytest.param(FEW, CUTS, marks=pytest.mark.slow)])
def test_oracle(config, cuts):
  x, params = inputs(), draw(config)
  want, blocks = naive(config, params, x)
  # The choice is one: neither the first blocks nor the last, nor one for all.
  late = {tuple(group) for row in blocks for groups in row[20:]
          for group in groups}
  assert len(late) > 3 and (blocks[0][-1][0] != blocks[0][-1][1])
  close(run(config, params, x, cuts=cuts)[0], want)


def test_a_single_token_gathers():
  """Of a store of more blocks than it may select, with the same result."""
  x, params = inputs(), draw(CONFIG)
  text = {capacity: step.lower(
      CONFIG, params, x[:, :1], empty(CONFIG, 2, capacity),
      jnp.zeros((2,), jnp.int32)).as_text() for capacity in (8, STEPS)}
  # Rows of 3 blocks of 4 tokens; a store of 2 blocks is read whole.
  assert ('tensor<2x2x12x6xf32>' in text[STEPS]
          and 'tensor<2x2x12x6xf32>' not in text[8])
  want, _ = naive(CONFIG, params, x)
  got, _ = run(CONFIG, params, x, cuts=(*CUTS, *range(15, STEPS)))
  close(got, want)


def only(config, name):
  """Parameters with which one branch alone speaks; the choice is the same."""
  params = dict(draw(config))
  for other, last in (('compress', 'entry_v'), ('select', 'select_v'),
                      ('window', 'window_v')):
    if other != name:
      params[last] = {'kernel': 0 * params[last]['kernel']}
  return params


def test_selecting_all_is_attention():
  """With the other branches silent and a gate of one half."""
  config = dataclasses.replace(CONFIG, select_count=7)
  params = only(config, 'select')
  params['gate_select'] = {'kernel': 0 * params['gate_select']['kernel']}
  x = inputs()
  got, _ = run(config, params, x)
  dense = c.AttentionConfig(4, 2, 6, 5, rope=config.rope)
  context = common.context(jnp.zeros((2,), jnp.int32),
                           jnp.full((2,), STEPS, jnp.int32), None, STEPS)
  empty = attention.StoreState(*(
      st.Store(jnp.zeros((1, 2, 2, 0, n)), jnp.int32(0)) for n in (6, 5)))
  want, _ = jax.jit(attention.Attention(dense).apply)({'params': {
      'q': params['q'], 'k': params['select_k'], 'v': params['select_v'],
      'out': params['out']}}, x, empty, context)
  close(2 * got, want)


@functools.partial(jax.jit, static_argnums=0)
def influence(config, params, x, state, length):
  """Gradients of output t to each token of the step, [T, B, T, D], and to the
  leaves of the state."""
  _, pull = jax.vjp(lambda x, s: apply(config, params, x, s, length)[0],
                    x, state)
  return jax.vmap(lambda t: pull(jnp.zeros(x.shape).at[:, t].set(1.0)))(
      jnp.arange(x.shape[1]))


@pytest.mark.parametrize('begin', [
    pytest.param(0, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize('name', ['compress', 'select', 'window'])
def test_who_influences_whom(name, begin):
  """Every pair of tokens, in a step and through the state, as the rule says.

  All but the query itself, which gates too.
  """
  config, x, steps = CONFIG, inputs(), 14
  params = only(config, name)
  _, blocks = naive(config, params, x)
  state = empty(config, 2)
  if begin:
    _, state = run(config, params, x[:, :begin])
  d_x, d = jax.tree.map(
      lambda a: np.any(np.asarray(a) != 0, axis=-1), influence(
          config, params, x[:, begin:begin + steps], state,
          jnp.full((2,), begin, jnp.int32)))
  if name == 'select':
    # Compressed keys only choose, and no gradient runs through a choice.
    assert not d.entry_k.any() and not d.raw_k.any()
  length, stride = config.compress_block, config.stride
  old = max(0, (begin - length) // stride + 1)
  for b, i in np.ndindex(2, steps):
    t = begin + i
    count = max(0, (t + 1 - length) // stride + 1)
    rules = {
        'compress': set(range(count and (count - 1) * stride + length)),
        'select': {j for j in range(t + 1) for group in blocks[b][t]
                   if j // config.select_block in group},
        'window': set(range(max(0, t - config.window + 1), t + 1))}
    mine = {begin + j for j in np.flatnonzero(d_x[i, b])}
    assert mine - {t} == {j for j in rules[name] if begin <= j < t}
    # What of the state: its values count whatever the step's own are.
    before = lambda name, rules=rules: {j for j in rules[name] if j < begin}
    want = {
        'select_v': before('select'),
        'window_v': {j % config.window for j in before('window')},
        'entry_v': {e + length // stride - 1 for e in range(min(count, old))},
        'raw_v': {j % (length - 1) for j in range(old * stride, begin)
                  if count > old and name == 'compress'}}
    for leaf, slots in want.items():
      some = getattr(d, leaf)[i, b].any(axis=0)
      assert set(np.flatnonzero(some)) == slots, leaf


# What there is of it.


def model(config, dtype='float32'):
  return lm.LanguageModel(c.ModelConfig(
      1, 16, (c.LayerConfig('m', config),), (c.GroupConfig(('m',), 3),),
      dtype=dtype))


def test_bytes_per_token():
  """2 G (K + V) (1 + 1/s) in bfloat16; fixed 2 G (K + V) (W + l - 1)."""
  config = c.NSAConfig(heads=64, kv_heads=4, key=192, value=128)
  both = 2 * 4 * (192 + 128)
  found = st.nbytes(model(config, 'bfloat16').state_schema(2, 2 ** 17).layers)
  assert found == {'growing': 2 * 3 * 2 ** 17 * both * 17 // 16,
                   'fixed': 2 * 3 * both * (512 + 31)}


def test_matrices_decay():
  """The networks' too; neither gates nor places in a block."""
  axes = model(CONFIG).axes()['group_0']['layer_0']['mixer']
  decays = {jax.tree_util.keystr(path[:1], simple=True): decay
            for path, decay in jax.tree_util.tree_leaves_with_path(
                optimizer.decays(axes))}
  assert {name for name, decay in decays.items() if not decay} == {
      'gate_compress', 'gate_select', 'gate_window', 'place_k', 'place_v'}
  assert {'hidden_k', 'entry_k', 'hidden_v', 'entry_v'} <= set(decays)


def test_config():
  for config in (CONFIG, FEW, c.NSAConfig()):
    assert c.from_dict(c.to_dict(config)) == config
  for fields, words in (
      (dict(stride=12), 'multiple of stride'),
      (dict(compress_block=32, stride=32, select_block=16), 'select_block=16'),
      (dict(select_count=2), 'initial . local = 3'),
      (dict(local=0), 'local: expected >= 1'),
      (dict(compress_block=1, stride=1), 'compress_block: expected >= 2'),
      (dict(kv_heads=3), 'multiple of kv_heads')):
    with pytest.raises(ValueError, match=words):
      c.NSAConfig(**fields)
