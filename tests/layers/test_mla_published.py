"""Latent attention against single layers of published models.

The fixtures are made as those of `test_delta_layers.py`: weights of the first
layer of a tiny checkpoint, the residual stream before and after, and the cache,
all from the public implementation in float32. With -m slow, and transformers
installed, attention modules with random weights are run beside ours.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import state as st
from statejax.layers import common, mla
from statejax.layers.block import Block

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


def yarn(mscale):
  return c.RopeConfig(theta=20.0, layout='interleaved', scaling=c.YarnConfig(
      factor=40.0, original=64, beta_fast=4.0, beta_slow=1.0, mscale=mscale,
      mscale_all_dim=mscale))


SIZES = {'heads': 4, 'nope': 12, 'rope_width': 8, 'value': 14, 'rank': 20}
V3 = c.MLAConfig(**SIZES, q_rank=28, rope=yarn(1.0))
V2_LITE = c.MLAConfig(**SIZES, rope=yarn(0.707))
KIMI = c.MLAConfig(**SIZES, rope=None)
LONGCAT = c.MLAConfig(**SIZES, q_rank=28, lora_scale=True, rope=c.RopeConfig(
    theta=1e7, layout='interleaved'))


def close(got, want):
  limit = 1e-5 * max(1.0, np.abs(want).max())
  assert np.abs(np.asarray(got) - want).max() <= limit


def ours(config, g, prefix=''):
  """Parameters of the published names, as ours."""
  heads = config.heads
  def kernel(name, *shape):  # [out, in] to [in, *shape]
    w = g[f'{prefix}{name}.weight']
    return {'kernel': w.T.reshape(w.shape[1], *(shape or w.shape[:1]))}
  weight = lambda name: {'weight': g[f'{prefix}{name}.weight']}
  head = (heads, config.nope + config.rope_width)
  both = kernel('kv_b_proj', heads, config.nope + config.value)['kernel']
  k_b, v_b = np.split(both, [config.nope], axis=-1)
  out = g[f'{prefix}o_proj.weight']
  queries = ({'q': kernel('q_proj', *head)} if config.q_rank is None else
             {'q_a': kernel('q_a_proj'), 'norm_q': weight('q_a_layernorm'),
              'q_b': kernel('q_b_proj', *head)})
  return queries | {
      'kv_a': kernel('kv_a_proj_with_mqa'),
      'norm_kv': weight('kv_a_layernorm'), 'k_b': k_b, 'v_b': v_b,
      'out': {'kernel': out.T.reshape(heads, config.value, -1)}}


def run(module, config, params, x, cuts):
  """Applies a block or a mixer to pieces of x, from an empty store."""
  rows, length = x.shape[:2]
  state = jax.tree.map(
      lambda s: jnp.zeros((1, *s.shape), s.dtype),
      mla.MLA.state(config, rows, length, 'float32'),
      is_leaf=lambda s: isinstance(s, st.Spec))

  @jax.jit
  def step(x, state, done):
    full = lambda n: jnp.full((rows,), n, jnp.int32)
    context = common.context(full(done), full(x.shape[1]), None, x.shape[1])
    views = jax.tree.map(lambda a: st.Store(a, jnp.int32(0)), state)
    y, views = module.apply({'params': params}, x, views, context)
    return y, mla.LatentState(views.latent.data, views.key_rope.data)

  outputs, done = [], 0
  for piece in np.split(x, cuts, axis=1):
    y, state = step(piece, state, done)
    outputs.append(y)
    done += piece.shape[1]
  return np.concatenate(outputs, axis=1), jax.tree.map(lambda a: a[0], state)


@pytest.mark.parametrize('name, config, cached', [
    # V3's cache holds its rotated channels in the half-split order.
    ('deepseek_v3', V3, [0, 2, 4, 6, 1, 3, 5, 7]),
    ('deepseek_v2_lite', V2_LITE, list(range(8)))])
def test_fixture(name, config, cached):
  g = dict(np.load(GOLDEN / f'layer_{name}.npz'))
  block = Block(c.LayerConfig('mla', config, c.SwiGLUConfig(64)),
                c.NormConfig(1e-3))
  params = {
      'mixer': ours(config, g, 'self_attn.'),
      'mlp': {n: {'kernel': g[f'mlp.{n}_proj.weight'].T}
              for n in ('gate', 'up', 'down')},
      'norm_mixer': {'weight': g['input_layernorm.weight']},
      'norm_mlp': {'weight': g['post_attention_layernorm.weight']}}
  y, state = run(block, config, params, g['x'], (33, 66))
  close(y, g['y'])
  close(state.latent, g['latent'])
  close(np.asarray(state.key_rope)[..., cached], g['key_rope'])


# Modules of transformers.


def published(family, config):
  """Their attention module, its rotary embedding or None, and its weights."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  fields = {
      'hidden_size': 48, 'num_attention_heads': 4, 'num_key_value_heads': 4,
      'kv_lora_rank': 20, 'q_lora_rank': config.q_rank,
      'qk_nope_head_dim': 12, 'qk_rope_head_dim': 8, 'v_head_dim': 14,
      'head_dim': 8, 'attn_implementation': 'eager',
      'max_position_embeddings': 2560}
  if config.rope is not None:
    fields['rope_parameters'] = {
        'rope_type': 'default', 'rope_theta': config.rope.theta}
    scaling = config.rope.scaling
    if scaling is not None:
      fields['rope_parameters'] |= {
          'rope_type': 'yarn', 'factor': scaling.factor,
          'original_max_position_embeddings': scaling.original,
          'beta_fast': scaling.beta_fast, 'beta_slow': scaling.beta_slow,
          'mscale': scaling.mscale, 'mscale_all_dim': scaling.mscale_all_dim}
  names = {'deepseek_v3': ('DeepseekV3', 'Attention'),
           'kimi_linear': ('KimiLinear', 'Attention'),
           'longcat_flash': ('LongcatFlash', 'MLA')}
  start, end = names[family]
  source = getattr(transformers.models, family)
  setup = getattr(transformers, f'{start}Config')(**fields)
  modeling = getattr(source, f'modeling_{family}')
  torch.manual_seed(0)
  module = getattr(modeling, f'{start}{end}')(setup, layer_idx=0).eval()
  with torch.no_grad():
    for p in module.parameters():
      p.normal_(1.0 if p.ndim == 1 else 0.0,
                0.3 if p.ndim == 1 else p.shape[1] ** -0.5)
  rotary = (None if config.rope is None else
            getattr(modeling, f'{start}RotaryEmbedding')(setup))
  return module, rotary


@pytest.mark.slow
@pytest.mark.parametrize('family, config', [
    ('deepseek_v3', V3), ('kimi_linear', KIMI), ('longcat_flash', LONGCAT)])
def test_transformers(family, config):
  torch = pytest.importorskip('torch')
  module, rotary = published(family, config)
  x = np.random.default_rng(0).normal(size=(2, 40, 48)).astype(np.float32)
  tokens = torch.from_numpy(x)
  mask = torch.full((40, 40), float('-inf')).triu(1)[None, None]
  arguments = {} if rotary is None else {'position_embeddings': rotary(
      tokens, torch.arange(40)[None])}
  with torch.no_grad():
    want = module(tokens, attention_mask=mask, **arguments)[0].numpy()
  weights = {k: v.numpy() for k, v in module.state_dict().items()}
  y, _ = run(mla.MLA(config), config, ours(config, weights), x,
             (25, 26, 27, 39))
  close(y, want)
