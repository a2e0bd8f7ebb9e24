"""Latent attention: a naive float64 oracle, its two forms, what there is of it.

Its laws are in `../test_laws_attention.py`, layers of published models in
`test_mla_published.py`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_laws_attention

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.layers import common, mla
from statejax.ops import attend
from statejax.train import optimizer

MIXERS = {name: mixer for name, mixer in test_laws_attention.MIXERS.items()
          if name.startswith('mla')}
SMALL = dataclasses.replace(MIXERS['mla'], q_rank=None)


def close(got, want, tolerance=1e-5):
  limit = tolerance * max(1.0, np.abs(want).max())
  assert np.abs(np.asarray(got, np.float64) - want).max() <= limit


# One layer, run by steps.


def draw(config, width, seed=0):
  """Random parameters of a mixer."""
  whole = lm.LanguageModel(c.ModelConfig(
      1, width, (c.LayerConfig('m', config),), (c.GroupConfig(('m',)),)))
  layer = jax.eval_shape(whole.init, jax.random.key(0))['group_0']['layer_0']
  rng = np.random.default_rng(seed)
  def one(p):
    shape = p.shape[1:]
    if len(shape) == 1:  # a norm
      return (1 + 0.3 * rng.normal(size=shape)).astype(np.float32)
    fan = np.prod(shape[:-1]) if shape[-1] == width else shape[0]
    return (rng.normal(size=shape) * fan ** -0.5).astype(np.float32)
  return jax.tree.map(one, layer['mixer'])


@functools.partial(jax.jit, static_argnums=0)
def step(module, params, x, state, length, n_valid, document):
  context = common.context(length, n_valid, document, x.shape[1])
  views = jax.tree.map(lambda a: st.Store(a, jnp.int32(0)), state)
  y, views = module.apply({'params': params}, x, views, context)
  return y, mla.LatentState(views.latent.data, views.key_rope.data)


def run(module, config, params, x, capacity, cuts=(), document=None,
        store='float32'):
  """Applies a module to pieces of x, from a state of the given capacity."""
  rows = x.shape[0]
  state = jax.tree.map(
      lambda s: jnp.zeros((1, *s.shape), s.dtype),
      mla.MLA.state(config, rows, capacity, store),
      is_leaf=lambda s: isinstance(s, st.Spec))
  outputs, done = [], 0
  for piece in np.split(x, cuts, axis=1):
    size = piece.shape[1]
    full = lambda n: jnp.full((rows,), n, jnp.int32)
    y, state = step(module, params, piece, state, full(done), full(size),
                    document)
    outputs.append(y)
    done += size
  return np.concatenate(outputs, axis=1), jax.tree.map(lambda a: a[0], state)


# The naive form, float64, one query and head at a time.


def rms(x, w, eps=1e-6):
  return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * w


def turn(x, position, config):
  """Rotates neighbouring channels of one vector, by YaRN's formulas."""
  if config is None:
    return x
  x, width = x.copy(), len(x)
  for i in range(width // 2):
    speed = config.theta ** (-2 * i / width)
    if config.scaling is not None:
      s = config.scaling
      low, high = (width / 2 * np.log(s.original / (2 * np.pi * t))
                   / np.log(config.theta) for t in (s.beta_fast, s.beta_slow))
      low, high = max(np.floor(low), 0), min(np.ceil(high), width - 1)
      slowed = np.clip((i - low) / (high - low), 0, 1)
      speed = speed * (1 - slowed) + speed / s.factor * slowed
    z = (x[2 * i] + 1j * x[2 * i + 1]) * np.exp(1j * position * speed)
    x[2 * i:2 * i + 2] = z.real, z.imag
  return x


def naive(config, params, x, document=None):
  p = jax.tree.map(lambda a: a.astype(np.float64), params)
  kernel = lambda name: p[name]['kernel']
  y = np.zeros(x.shape)
  for b in range(x.shape[0]):
    new = np.zeros(x.shape[1], int) if document is None else document[b]
    for t, now in enumerate(x[b].astype(np.float64)):
      mine = [j for j in range(t + 1) if new[j] == new[t]]
      low = now if config.q_rank is None else rms(
          now @ kernel('q_a'), p['norm_q']['weight'])
      q = np.einsum('r,rhk->hk', low, kernel(
          'q' if config.q_rank is None else 'q_b'))
      if config.lora_scale:
        q = q * np.sqrt(x.shape[-1] / config.q_rank)
      heads = []
      for h in range(config.heads):
        here = turn(q[h, config.nope:], t - mine[0], config.rope)
        scores, values = [], []
        for j in mine:
          both = x[b, j].astype(np.float64) @ kernel('kv_a')
          latent = rms(both[:config.rank], p['norm_kv']['weight'])
          if config.lora_scale:
            latent = latent * np.sqrt(x.shape[-1] / config.rank)
          key = turn(both[config.rank:], j - mine[0], config.rope)
          scores.append(q[h, :config.nope] @ (latent @ p['k_b'][:, h])
                        + here @ key)
          values.append(latent @ p['v_b'][:, h])
        scale = (config.nope + config.rope_width) ** -0.5
        if config.rope is not None and config.rope.scaling is not None:
          scale *= (0.1 * np.log(config.rope.scaling.factor) + 1) ** 2
        weight = np.exp(scale * np.array(scores))
        heads.append(weight / weight.sum() @ np.array(values))
      out = np.array(heads)
      if config.output_gate:
        out /= 1 + np.exp(-np.einsum('d,dhv->hv', now, kernel('gate')))
      y[b, t] = np.einsum('hv,hvd->d', out, kernel('out'))
  return y


def inputs(width=12, steps=9, seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, steps, width)).astype(np.float32)


@pytest.mark.parametrize('name', MIXERS)
def test_oracle(name):
  """Trained in one pass, and served in steps."""
  config, x = MIXERS[name], inputs()
  params, module = draw(config, 12), mla.MLA(config)
  want = naive(config, params, x)
  close(run(module, config, params, x, 0)[0], want)
  y, state = run(module, config, params, x, 11, (3, 6))
  close(y, want)
  assert (np.asarray(state.latent)[:, 9:] == 0).all()


def test_documents():
  config, x = MIXERS['mla'], inputs()
  params = draw(config, 12)
  document = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0] * 9], np.int32)
  y, state = run(mla.MLA(config), config, params, x, 9, document=document)
  close(y, naive(config, params, x, document))
  # The last document alone is kept.
  used = (np.asarray(state.latent) != 0).any(-1).sum(1)
  assert used.tolist() == [4, 9]


# The two forms.


@pytest.mark.parametrize('dtype, tolerance', [
    ('float32', 1e-5), ('bfloat16', 2 ** -5)])
def test_expanded_is_absorbed(dtype, tolerance):
  rng = np.random.default_rng(2)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  q = normal(2, 5, 3, 6), normal(2, 5, 3, 4)
  stored = normal(2, 7, 8), normal(2, 7, 4)
  maps = (jnp.asarray(rng.normal(size=(8, 3, n)) * 8 ** -0.5, jnp.float32)
          for n in (6, 5))
  visible = jnp.asarray(rng.random((2, 5, 7)) < 0.6).at[0, 2].set(False)

  def absorbed(q, latent, key, k_b, v_b, visible, scale):
    keys = latent[:, None], key[:, None]
    return mla.absorbed(q, k_b, v_b, lambda q: attend.attend(
        q, [attend.Segment(keys, keys[0], visible)], scale=scale))

  forms = [jax.jit(functools.partial(f, scale=0.3))
           for f in (mla.expanded, absorbed)]
  args = (q, *stored, *maps, visible)
  (want, lse), (got, other) = (f(*args) for f in forms)
  assert got.shape == (2, 5, 3, 5) and got.dtype == want.dtype == dtype
  assert lse.dtype == other.dtype == jnp.float32
  wide = lambda a: np.asarray(a, np.float64)
  close(got, wide(want), tolerance)
  close(other[visible.any(-1)], wide(lse[visible.any(-1)]), tolerance)
  assert (got[0, 2] == 0).all() and (other[0, 2] == -1e30).all()


class Absorbed(nn.Module):
  """Nothing but the absorbed form, over a store that holds all tokens."""

  config: c.MLAConfig

  @nn.compact
  def __call__(self, x, state, context):
    q, _ = mla.queries(self.config, x, context.positions)
    keys = state.latent[:, None], state.key_rope[:, None]
    segment = attend.Segment(keys, keys[0], context.visible_chunk())
    y, _ = mla.absorbed(
        q, *mla.up_maps(self, self.config),
        lambda q: attend.attend(q, [segment], scale=mla.score_scale(
            self.config, x.shape[-1])))
    return mla.output(self.config, x, y)


def test_merged_is_either_form():
  """A step that continues gives what each form gives over all tokens."""
  config, x = MIXERS['mla_yarn_gate'], inputs()
  params, module = draw(config, 12), mla.MLA(config)
  expanded, _ = run(module, config, params, x, 0)
  merged, state = run(module, config, params, x, 11, (3, 6))
  held = jax.tree.map(lambda a: a[:, :9], state)
  context = common.context(jnp.zeros((2,), jnp.int32),
                           jnp.full((2,), 9, jnp.int32), None, 9)
  absorbed = jax.jit(Absorbed(config).apply)(
      {'params': params}, x, held, context)
  close(merged, expanded)
  close(absorbed, expanded)


# What there is of it.


def test_parameters():
  subject = lm.LanguageModel(c.ModelConfig(
      1, 12, (c.LayerConfig('m', MIXERS['mla_yarn_gate']),),
      (c.GroupConfig(('m',)),)))
  axes = subject.axes()['group_0']['layer_0']['mixer']
  shapes = jax.tree.map(
      lambda p: p.shape[1:], jax.eval_shape(subject.init, jax.random.key(0))[
          'group_0']['layer_0']['mixer'])
  assert shapes == {
      'q_a': {'kernel': (12, 7)}, 'norm_q': {'weight': (7,)},
      'q_b': {'kernel': (7, 2, 10)}, 'kv_a': {'kernel': (12, 12)},
      'norm_kv': {'weight': (8,)}, 'k_b': (8, 2, 6), 'v_b': (8, 2, 5),
      'gate': {'kernel': (12, 2, 5)}, 'out': {'kernel': (2, 5, 12)}}
  assert 'q' in draw(SMALL, 12) and 'q_a' not in draw(SMALL, 12)
  # Matrices decay, norms do not.
  assert optimizer.decays(axes) == jax.tree.map(
      lambda s: len(s) > 1, shapes, is_leaf=lambda s: isinstance(s, tuple))


def test_bytes_per_token():
  """2 (R + dr) a layer in bfloat16, and nothing else."""
  mixer = c.MLAConfig(rank=512, rope_width=64)
  subject = lm.LanguageModel(c.ModelConfig(
      1, 16, (c.LayerConfig('m', mixer),), (c.GroupConfig(('m',), 3),),
      dtype='bfloat16'))
  schema = subject.state_schema(2, 5)
  assert st.nbytes(schema)['growing'] == 3 * 2 * 5 * 1152
  kinds = {path: kind for path, _, _, kind in st.leaves(schema)
           if path.startswith('layers/')}
  assert kinds == dict.fromkeys(
      ('layers/m/latent', 'layers/m/key_rope'), 'growing')


def test_config():
  for config in (*MIXERS.values(), c.MLAConfig()):
    assert c.from_dict(c.to_dict(config)) == config
  assert c.MLAConfig().rope.layout == 'interleaved'
  with pytest.raises(ValueError, match='lora_scale.*give q_rank'):
    c.MLAConfig(lora_scale=True)
  for name in ('heads', 'nope', 'value', 'rank', 'q_rank'):
    with pytest.raises(ValueError, match=f'{name}: expected >= 1, got 0'):
      c.MLAConfig(**{name: 0})
  with pytest.raises(ValueError, match='rope_width: expected >= 0, got -1'):
    c.MLAConfig(rope_width=-1)


def test_decoding_copies_no_store():
  """Beside one layer's slice, which XLA takes out on CPU."""
  config = dataclasses.replace(SMALL, rank=32, rope_width=16)
  subject = lm.LanguageModel(c.ModelConfig(
      8, 16, (c.LayerConfig('m', config),), (c.GroupConfig(('m',), 4),)))
  params = jax.eval_shape(subject.init, jax.random.key(0))
  state = jax.eval_shape(lambda: subject.init_state(2, 4096))
  memory = jax.jit(functools.partial(lm.apply, subject), donate_argnums=1
                   ).lower(params, state, jax.ShapeDtypeStruct(
                       (2, 1), jnp.int32)).compile().memory_analysis()
  size = st.nbytes(state)['growing']
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < 0.5 * size
