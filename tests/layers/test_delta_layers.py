"""Delta layers against single layers of real architectures, and their bytes.

Each fixture holds the weights of one layer of a tiny checkpoint under the
names of its files, the residual stream before and after, and the carried state
after the last token, all from the public implementation in float32.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.layers import common
from statejax.layers.block import MIXERS, Block
from statejax.ops import norm

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


def load(name):
  g = dict(np.load(GOLDEN / f'{name}.npz'))
  return g, g.pop('x'), g.pop('y')


def close(got, want):
  limit = 1e-5 * max(1.0, np.abs(want).max())
  assert np.abs(np.asarray(got) - want).max() <= limit


def run(module, mixer, params, x, cuts=()):
  """Applies a block or a mixer to pieces of x, from an empty state."""
  state = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), st.describe(
          MIXERS[type(mixer)].state(mixer, x.shape[0], 0, 'float32')),
      is_leaf=lambda s: isinstance(s, st.Leaf))
  step = jax.jit(module.apply)
  outputs, done = [], 0
  for piece in np.split(x, cuts, axis=1):
    steps = piece.shape[1]
    full = lambda n: jnp.full((x.shape[0],), n, jnp.int32)
    context = common.context(full(done), full(steps), None, steps)
    y, state = step({'params': params}, piece, state, context)
    outputs.append(y)
    done += steps
  return np.concatenate(outputs, axis=1), state


def kernel(w, *shape):
  """A linear weight [out, in] as ours: [in, *shape]."""
  return {'kernel': w.T.reshape(w.shape[1], *shape)}


def back(w, *shape):
  """An output projection [D, H V] as ours: [H, V, D]."""
  return {'kernel': w.T.reshape(*shape, w.shape[0])}


def taps(w, *shape):
  """A depthwise convolution [C, 1, W] as ours: [W, heads, width]."""
  return w[:, 0].T.reshape(-1, *shape)


def swiglu(g):
  return {n: {'kernel': g[f'mlp.{n}_proj.weight'].T}
          for n in ('gate', 'up', 'down')}


def check_state(state, g, matrix=None):
  """The matrix, and the tails side by side, as the reference keeps them."""
  close(state.matrix, g['matrix'] if matrix is None else matrix)
  tails = [getattr(state, f'tail_{n}') for n in 'qkv']
  flat = np.concatenate([t.reshape(*t.shape[:2], -1) for t in tails], axis=-1)
  close(flat.swapaxes(1, 2), g['conv'])


def test_qwen3_next():
  g, x, y = load('layer_qwen3_next')
  mixer = c.GatedDeltaNetConfig.qwen(
      heads=2, value_heads=4, key=12, value=16, eps=1e-3)
  keys, values = (2, 12), (4, 16)
  # Grouped by key head: q, k, then v and z of its two value heads.
  rows = g['linear_attn.in_proj_qkvz.weight'].reshape(2, -1, 48)
  q, k, v, z = (part.reshape(-1, 48) for part in np.split(
      rows, np.cumsum([12, 12, 2 * 16]), axis=1))
  b, a = (part.reshape(-1, 48) for part in np.split(
      g['linear_attn.in_proj_ba.weight'].reshape(2, -1, 48), 2, axis=1))
  conv = np.split(g['linear_attn.conv1d.weight'], (24, 48))
  params = {
      'q': kernel(q, *keys), 'k': kernel(k, *keys), 'v': kernel(v, *values),
      'gate': kernel(z, *values), 'beta': kernel(b, 4), 'rate': kernel(a, 4),
      'a_log': g['linear_attn.A_log'], 'dt_bias': g['linear_attn.dt_bias'],
      'norm': g['linear_attn.norm.weight'],
      'out': back(g['linear_attn.out_proj.weight'], *values),
      **{f'conv_{n}': {'weight': taps(w, *shape)}
         for n, w, shape in zip('qkv', conv, (keys, keys, values))}}
  block = Block(c.LayerConfig('gdn', mixer, c.SwiGLUConfig(56)),
                c.NormConfig(1e-3, 1.0))
  got, state = run(block, mixer, {
      'mixer': params, 'mlp': swiglu(g),
      'norm_mixer': {'weight': g['input_layernorm.weight']},
      'norm_mlp': {'weight': g['post_attention_layernorm.weight']}}, x,
                   (1, 2, 33))
  close(got, y)
  check_state(state, g)


def separate(g, name, names, keys, values):
  """Projections and convolutions where each has a tensor of its own.

  The files of a layer with V != K cut the joint convolution in three equal
  parts, so that only all of them together are q | k | v.
  """
  shape = dict(q=keys, k=keys, v=values)
  joint = np.concatenate([g[f'{name}.{n}_conv1d.weight'] for n in 'qkv'])
  width = int(np.prod(keys))
  conv = dict(zip('qkv', np.split(joint, (width, 2 * width))))
  return {
      **{n: kernel(g[f'{name}.{n}_proj.weight'], *shape[n]) for n in 'qkv'},
      **{f'conv_{n}': {'weight': taps(conv[n], *shape[n])} for n in 'qkv'},
      **{ours: kernel(g[f'{name}.{theirs}_proj.weight'], *shape)
         for ours, (theirs, *shape) in names.items()},
      'norm': g[f'{name}.o_norm.weight'],
      'out': back(g[f'{name}.o_proj.weight'], *values)}


def test_olmo_hybrid():
  g, x, y = load('layer_olmo_hybrid')
  mixer = c.GatedDeltaNetConfig.olmo(heads=3, value_heads=3, key=12, value=24)
  assert mixer.max_erase == 2.0 and mixer.eps == 1e-5
  params = separate(g, 'linear_attn', {
      'gate': ('g', 3, 24), 'beta': ('b', 3), 'rate': ('a', 3)},
                    (3, 12), (3, 24))
  params |= {'a_log': g['linear_attn.A_log'],
             'dt_bias': g['linear_attn.dt_bias']}
  block = Block(c.LayerConfig('gdn', mixer, c.SwiGLUConfig(80)),
                c.NormConfig(1e-3))
  got, state = run(block, mixer, {
      'mixer': params, 'mlp': swiglu(g),
      'norm_mixer': {'weight': g['attention_layer_norm.weight']},
      'norm_mlp': {'weight': g['feedforward_layer_norm.weight']}}, x)
  close(got, y)
  check_state(state, g)


def test_kimi_linear():
  g, x, y = load('layer_kimi_linear')
  mixer = c.KDAConfig(heads=3, key=12, value=12, rank=12, eps=1e-3)
  params = separate(g, 'self_attn', {
      'decay_a': ('f_a', 12), 'decay_b': ('f_b', 3, 12), 'beta': ('b', 3),
      'gate_a': ('g_a', 12), 'gate_b': ('g_b', 3, 12)}, (3, 12), (3, 12))
  params |= {'a_log': g['self_attn.A_log'].reshape(3),
             'dt_bias': g['self_attn.dt_bias'].reshape(3, 12)}
  block = Block(c.LayerConfig('kda', mixer, c.SwiGLUConfig(72)),
                c.NormConfig(1e-3))
  got, state = run(block, mixer, {
      'mixer': params, 'mlp': swiglu(g),
      'norm_mixer': {'weight': g['input_layernorm.weight']},
      'norm_mlp': {'weight': g['post_attention_layernorm.weight']}}, x)
  close(got, y)
  check_state(state, g)


def test_mamba2():
  g, x, y = load('layer_mamba2')
  mixer = c.Mamba2Config(heads=8, groups=2, key=16, value=12, eps=1e-3)
  keys, values = (2, 16), (8, 12)
  order = (('gate', values), ('v', values), ('k', keys), ('q', keys),
           ('rate', (8,)))
  sizes = [int(np.prod(shape)) for _, shape in order]
  rows = np.split(g['mixer.in_proj.weight'], np.cumsum(sizes)[:-1])
  cut = np.cumsum(sizes[1:3])
  conv = np.split(g['mixer.conv1d.weight'], cut)
  bias = np.split(g['mixer.conv1d.bias'], cut)
  params = {
      **{name: kernel(w, *shape) for (name, shape), w in zip(order, rows)},
      **{f'conv_{n}': {'weight': taps(w, *shape), 'bias': b.reshape(shape)}
         for n, w, b, shape in zip('vkq', conv, bias, (values, keys, keys))},
      'a_log': g['mixer.A_log'], 'dt_bias': g['mixer.dt_bias'],
      'skip': g['mixer.D'], 'norm': g['mixer.norm.weight'].reshape(values),
      'out': back(g['mixer.out_proj.weight'], *values)}
  inner = norm.rms_norm(x, g['norm.weight'], eps=1e-3)
  got, state = run(MIXERS[type(mixer)](mixer), mixer, params,
                   np.asarray(inner), (1, 2, 33))
  close(got, y - x)
  # The reference keeps [P, N], and x | B | C.
  x_conv, b_conv, c_conv = np.split(g['conv'], cut, axis=1)
  g['conv'] = np.concatenate([c_conv, b_conv, x_conv], axis=1)
  check_state(state, g, g['matrix'].swapaxes(2, 3))


def test_mamba2_clamps_time_steps():
  """Also in single steps."""
  mixer = c.Mamba2Config(heads=2, key=4, value=4, dt_min=0.01, dt_max=0.3)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1, 6, 8)).astype(np.float32)
  module = MIXERS[type(mixer)](mixer)
  params = jax.tree.map(np.float32, parts(mixer, x))
  params['rate']['kernel'] *= 10
  whole, _ = run(module, mixer, params, x)
  steps, _ = run(module, mixer, params, x, range(1, 6))
  close(steps, whole)
  free = MIXERS[type(mixer)](c.Mamba2Config(heads=2, key=4, value=4))
  assert np.abs(run(free, mixer, params, x)[0] - whole).max() > 1e-3


def test_lightning():
  g, x, y = load('lightning_attention')
  mixer = c.LightningConfig.of_layer(2, 5, heads=4, key=6, value=6)
  # Within a head q, k, v.
  q, k, v = np.split(g['p/qkv_proj.weight'].reshape(4, 18, 24), 3, axis=1)
  flat = lambda w: w.reshape(24, 24)
  params = {
      **{n: kernel(flat(w), 4, 6) for n, w in zip('qkv', (q, k, v))},
      'gate': kernel(g['p/output_gate.weight'], 4, 6),
      'norm': g['p/norm.weight'].reshape(4, 6),
      'out': back(g['p/out_proj.weight'], 4, 6)}
  got, state = run(MIXERS[type(mixer)](mixer), mixer, params, x)
  close(got, y)
  close(state.matrix, g['final_state'])


# The recurrences that no fixture covers, by the equation of their paper.


def parts(mixer, x):
  """Random parameters of a mixer, of the shapes and scales of initial ones."""
  model = lm.LanguageModel(c.ModelConfig(
      1, x.shape[-1], (c.LayerConfig('m', mixer),), (c.GroupConfig(('m',)),)))
  layer = jax.eval_shape(model.init, jax.random.key(0))['group_0']['layer_0']
  rng = np.random.default_rng(7)
  def draw(p):
    fan = np.prod(p.shape[1:-1]) if p.ndim == 4 else p.shape[1]
    scale = fan ** -0.5 if p.ndim > 2 else 0.5
    return scale * rng.normal(size=p.shape[1:])
  return jax.tree.map(draw, layer['mixer'])


def project(x, params, name):
  return np.einsum('btd,d...->bt...', x.astype(np.float64),
                   params[name]['kernel'])


def finish(y, x, params, eps, gate=None):
  """Norm per head, SiLU gate, output projection, in float64."""
  y = y / np.sqrt((y ** 2).mean(-1, keepdims=True) + eps) * params['norm']
  if gate is not None:
    y = y * gate / (1 + np.exp(-gate))
  return np.einsum('bthv,hvd->btd', y, params['out']['kernel'])


def test_retnet_equation():
  mixer = c.RetNetConfig(heads=2, key=8, value=12)
  x = np.random.default_rng(1).normal(size=(2, 11, 16)).astype(np.float32)
  params = parts(mixer, x)
  q, k, v, gate = (project(x, params, n) for n in ('q', 'k', 'v', 'gate'))
  turn = np.exp(1j * np.arange(11)[:, None] * 1e4 ** (-np.arange(4) / 4))
  pair = lambda a: (a[..., :4] + 1j * a[..., 4:]) * turn[None, :, None]
  # Retention as attention with a decay in place of the softmax.
  scores = np.einsum('bihk,bjhk->bhij', pair(q), pair(k).conj()).real
  age = np.arange(11)[:, None] - np.arange(11)[None]
  fade = np.array([1 - 2.0 ** -5, 1 - 2.0 ** -6])[:, None, None]
  weights = np.where(age >= 0, fade ** np.maximum(age, 0), 0) * 8 ** -0.5
  y = np.einsum('bhij,bjhv->bihv', scores * weights[None], v)
  got, _ = run(MIXERS[type(mixer)](mixer), mixer, jax.tree.map(
      np.float32, params), x)
  close(got, finish(y, x, params, 1e-5, gate))


def test_gla_equation():
  mixer = c.GLAConfig(heads=2, key=8, value=12, rank=4)
  x = np.random.default_rng(2).normal(size=(2, 11, 16)).astype(np.float32)
  params = parts(mixer, x)
  q, k, v, gate = (project(x, params, n) for n in ('q', 'k', 'v', 'gate'))
  rate = project(project(x, params, 'decay_a'), params, 'decay_b')
  fade = (1 + np.exp(-rate - params['decay_bias'])) ** (-1 / 16)
  state, y = np.zeros((2, 2, 8, 12)), np.zeros((2, 11, 2, 12))
  for t in range(11):
    state = fade[:, t, :, :, None] * state + np.einsum(
        'bhk,bhv->bhkv', k[:, t], v[:, t])
    y[:, t] = np.einsum('bhk,bhkv->bhv', q[:, t], state) * 8 ** -0.5
  got, final = run(MIXERS[type(mixer)](mixer), mixer, jax.tree.map(
      np.float32, params), x)
  close(got, finish(y, x, params, 1e-5, gate))
  close(final.matrix, state)


def short(x, params, name, state_taps=4):
  """Projection, convolution and SiLU, in float64."""
  x = project(x, params, name)
  full = np.pad(x, ((0, 0), (state_taps - 1, 0), (0, 0), (0, 0)))
  w = params[f'conv_{name}']['weight']
  y = sum(full[:, i:i + x.shape[1]] * w[i] for i in range(state_taps))
  return y / (1 + np.exp(-y))


def unit(x):
  return x / np.sqrt((x ** 2).sum(-1, keepdims=True) + 1e-6)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_delta_product_equation():
  """A product of generalised Householder matrices per token."""
  writes = 3
  mixer = c.DeltaProductConfig(heads=1, value_heads=2, key=8, value=12,
                               writes=writes)
  x = np.random.default_rng(4).normal(size=(2, 7, 16)).astype(np.float32)
  params = parts(mixer, x)
  q = unit(short(x, params, 'q'))[:, :, 0]
  k = unit(short(x, params, 'k'))
  v = short(x, params, 'v').reshape(2, 7, 2, writes, 12)
  beta = 2 * sigmoid(project(x, params, 'beta')).reshape(2, 7, 2, writes)
  rate = project(x, params, 'rate') + params['dt_bias']
  fade = np.exp(-np.exp(params['a_log']) * np.log1p(np.exp(rate)))
  state, y = np.zeros((2, 2, 8, 12)), np.zeros((2, 7, 2, 12))
  for t in range(7):
    state = fade[:, t, :, None, None] * state
    for i in range(writes):
      key = k[:, t, i]
      house = np.eye(8) - beta[:, t, :, i, None, None] * (
          key[:, None, :, None] * key[:, None, None, :])
      state = house @ state + beta[:, t, :, i, None, None] * (
          key[:, None, :, None] * v[:, t, :, i, None])
    y[:, t] = np.einsum('bk,bhkv->bhv', q[:, t], state) * 8 ** -0.5
  got, final = run(MIXERS[type(mixer)](mixer), mixer, jax.tree.map(
      np.float32, params), x)
  close(got, finish(y, x, params, 1e-5, project(x, params, 'gate')))
  close(final.matrix, state)


def test_gated_delta_net2_equation():
  mixer = c.GatedDeltaNet2Config(heads=1, value_heads=2, key=8, value=12,
                                 rank=4, max_erase=2.0)
  x = np.random.default_rng(5).normal(size=(2, 7, 16)).astype(np.float32)
  params = parts(mixer, x)
  q, k = (unit(short(x, params, n))[:, :, 0] for n in 'qk')
  v = short(x, params, 'v')
  erase = 2 * sigmoid(project(x, params, 'erase'))[:, :, 0]
  write = sigmoid(project(x, params, 'write'))
  rate = project(project(x, params, 'decay_a'), params, 'decay_b')
  fade = np.exp(-np.exp(params['a_log'])[:, None] * np.log1p(
      np.exp(rate + params['dt_bias'])))[:, :, 0]
  state, y = np.zeros((2, 2, 8, 12)), np.zeros((2, 7, 2, 12))
  for t in range(7):
    state = fade[:, t, None, :, None] * state
    old = np.einsum('bk,bhkv->bhv', erase[:, t] * k[:, t], state)
    state = state + k[:, t, None, :, None] * (
        write[:, t] * v[:, t] - old)[:, :, None]
    y[:, t] = np.einsum('bk,bhkv->bhv', q[:, t], state) * 8 ** -0.5
  y = y / np.sqrt((y ** 2).mean(-1, keepdims=True) + 1e-5) * params['norm']
  gate = project(project(x, params, 'gate_a'), params, 'gate_b')
  y = y * sigmoid(gate + params['gate_bias'])
  got, final = run(MIXERS[type(mixer)](mixer), mixer, jax.tree.map(
      np.float32, params), x)
  close(got, np.einsum('bthv,hvd->btd', y, params['out']['kernel']))
  close(final.matrix, state)


# Initial gates, bytes and configurations.


def test_initial_gates():
  many = dict(heads=64, value_heads=64, key=2, value=2)
  mixers = (
      c.GatedDeltaNetConfig.qwen(**many), c.GatedDeltaNetConfig.olmo(**many),
      c.GatedDeltaNetConfig(**many), c.KDAConfig(
          heads=4, key=2, value=2, rank=2, lower_bound=-5.0, gate_bias=True))
  names = tuple('qopk')
  model = lm.LanguageModel(c.ModelConfig(
      1, 8, tuple(c.LayerConfig(n, m, c.SwiGLUConfig(1))
                  for n, m in zip(names, mixers)), (c.GroupConfig(names),)))
  layers = model.init(jax.random.key(0))['group_0']
  qwen, olmo, plain, bounded = (
      jax.tree.map(lambda p: p[0], layers[f'layer_{i}']['mixer'])
      for i in range(4))
  assert (qwen['dt_bias'] == 1).all()
  for params, low, high in ((qwen, 0.01, 2), (olmo, 0, 2), (plain, 1, 3)):
    rate = np.exp(params['a_log'])
    assert low <= rate.min() < high and 14 < rate.max() < 16
  for params in (olmo, plain):
    step = np.log1p(np.exp(params['dt_bias']))
    assert 9e-4 < step.min() < 3e-3 and 3e-2 < step.max() < 0.11
  assert (bounded['a_log'] == 0).all() and (bounded['gate_bias'] == 0).all()
  assert bounded['gate_bias'].shape == (4, 2)


def test_slopes_of_layers():
  """A shallow layer forgets faster; the last one hardly."""
  slopes = [c.LightningConfig.of_layer(i, 5).slope for i in range(5)]
  np.testing.assert_allclose(slopes, [1, 0.75, 0.5, 0.25, 0], atol=2e-5)
  assert min(slopes) > 0


BYTES = {
    c.DeltaNetConfig(2, 8, 12): 4 * 2 * 8 * 12 + 2 * 3 * (16 + 16 + 24),
    c.GatedDeltaNetConfig(2, 4, 8, 12): 4 * 4 * 8 * 12 + 2 * 3 * (32 + 48),
    c.GatedDeltaNet2Config(2, 4, 8, 12): 4 * 4 * 8 * 12 + 2 * 3 * (32 + 48),
    c.KDAConfig(2, 8, 12): 4 * 2 * 8 * 12 + 2 * 3 * (16 + 16 + 24),
    # A tail for every write of k and v, but one of q; one matrix.
    c.DeltaProductConfig(2, 4, 8, 12, writes=3): (
        4 * 4 * 8 * 12 + 2 * 3 * (16 + 3 * 16 + 3 * 48)),
    c.GLAConfig(2, 8, 12): 4 * 2 * 8 * 12,
    c.RetNetConfig(2, 8, 12): 4 * 2 * 8 * 12,
    c.LightningConfig(2, 8, 12): 4 * 2 * 8 * 12,
    c.Mamba2Config(4, 2, 8, 12): 4 * 4 * 8 * 12 + 2 * 3 * (16 + 16 + 48),
}


@pytest.mark.parametrize('mixer', BYTES, ids=lambda m: type(m).__name__)
def test_bytes(mixer):
  """By hand, by the schema, and over real leaves; context does not count."""
  model = lm.LanguageModel(c.ModelConfig(
      8, 16, (c.LayerConfig('m', mixer),), (c.GroupConfig(('m',), 2),),
      dtype='bfloat16'))
  for capacity in (4, 4096):
    schema = model.state_schema(3, capacity)
    counted = sum(leaf.nbytes for _, leaf, _, _ in st.leaves(
        {'m': schema.layers['m']}))
    assert counted == 2 * 3 * BYTES[mixer]
  state = model.init_state(3, 4)
  assert sum(x.nbytes for x in jax.tree.leaves(state.layers)) == counted
  assert sum(st.nbytes(model.state_schema(3, 4)).values()) == sum(
      x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize('mixer', BYTES, ids=lambda m: type(m).__name__)
def test_round_trip(mixer):
  assert c.from_dict(c.to_dict(mixer)) == mixer


@pytest.mark.parametrize('make, match', [
    (lambda: c.GatedDeltaNet2Config(2, 3), 'multiple of heads'),
    (lambda: c.GatedDeltaNet2Config(lower_bound=0.0), 'lower_bound'),
    (lambda: c.DeltaProductConfig(writes=0), 'writes: expected >= 1'),
    (lambda: c.Mamba2Config(heads=3, groups=2), 'multiple of groups'),
    (lambda: c.Mamba2Config(dt_min=0.2, dt_max=0.1), '0 <= dt_min <= dt_max'),
    (lambda: c.LightningConfig(slope=-1.0), 'slope: expected >= 0'),
])
def test_config_errors(make, match):
  with pytest.raises(ValueError, match=match):
    make()
