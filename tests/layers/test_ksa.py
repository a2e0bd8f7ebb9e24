"""Kwai summary attention: a naive stream, who sees what, bytes, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import laws
from statejax import model as lm
from statejax import state as st
from statejax.layers import common, ksa

SUMMARY = c.SummaryConfig(chunk=3, count=2)
NEAR = c.KSAConfig(heads=4, kv_heads=2, key=6, value=5, summary=SUMMARY,
                   chunks=1, mix=0.7, qk_norm=True)
FULL = dataclasses.replace(NEAR, chunks=None)


def model(*mixers, summary=SUMMARY, **options):
  layers = tuple(c.LayerConfig(f'l{i}', mixer, c.SwiGLUConfig(12))
                 for i, mixer in enumerate(mixers))
  return lm.LanguageModel(c.ModelConfig(**({
      'vocab': 16, 'width': 8, 'layers': layers, 'summary': summary,
      'groups': (c.GroupConfig(tuple(x.name for x in layers)),)} | options)))


# The whole stream at once, in float64, as the paper draws it.


def stream(length, summary):
  """Places of the interleaved stream: (is summary, chunk, offset, position)."""
  out, size, m = [], summary.chunk, summary.count
  for t in range(length):
    out.append((False, t // size, t % size, t))
    if (t + 1) % size == 0:
      out += [(True, t // size, u, t - size + 1 + (u + 1) * size // m - 1)
              for u in range(m)]
  return out


def sees(query, key, chunks):
  """Whether a place of the stream sees another."""
  (summary, i, a, _), (other, j, b, _) = query, key
  if summary:
    return i == j and (not other or b <= a)
  if other:
    return chunks is not None and j < i - chunks
  return (j, b) <= (i, a) and (chunks is None or j >= i - chunks)


def rotate(x, positions, theta=10_000.0):
  half = x.shape[-1] // 2
  angle = positions[:, None] / theta ** (np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rms(x, weight):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def attention(layer, params, x, places):
  """Of one layer, [places, D]."""
  is_summary = np.array([p[0] for p in places])
  positions = np.array([p[3] for p in places])
  def side(name):
    def project(suffix):
      y = np.einsum('td,dhk->thk', x, params[name + suffix]['kernel'])
      return y if name == 'v' else rms(y, params[f'norm_{name}']['weight'])
    own = layer.mix * project('_summary') + (1 - layer.mix) * project('')
    y = np.where(is_summary[:, None, None], own, project(''))
    return y if name == 'v' else rotate(y, positions)
  q, k, v = map(side, 'qkv')
  k, v = (np.repeat(a, layer.heads // layer.kv_heads, axis=1) for a in (k, v))
  mask = np.array([[sees(a, b, layer.chunks) for b in places] for a in places])
  scores = np.einsum('thk,nhk->htn', q, k) * layer.key ** -0.5
  weight = np.where(mask, np.exp(scores), 0)
  weight /= weight.sum(axis=-1, keepdims=True)
  y = np.einsum('htn,nhv->thv', weight, v)
  return np.einsum('thv,hvd->td', y, params['out']['kernel'])


def naive(config, params, tokens):
  """Logits of one document, [T, P]."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  places = stream(len(tokens), config.summary)
  x = np.stack([params['summary'][offset] if s else params['embed'][tokens[at]]
                for s, _, offset, at in places])
  for j, name in enumerate(config.names):
    p = jax.tree.map(lambda w: w[0], params['group_0'][f'layer_{j}'])
    x = x + attention(config.layer(name).mixer, p['mixer'],
                      rms(x, p['norm_mixer']['weight']), places)
    h, mlp = rms(x, p['norm_mlp']['weight']), p['mlp']
    gate = h @ mlp['gate']['kernel']
    x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp['up']['kernel'])) @ (
        mlp['down']['kernel'])
  text = [i for i, place in enumerate(places) if not place[0]]
  return rms(x, params['norm'])[text] @ params['embed'].T


# One chunk, and one token more or less; beyond the window; a single token.
LENGTHS = np.array([17, 1, 2, 3, 4, 9, 13], np.int32)


@functools.cache
def case():
  whole = model(NEAR, FULL, NEAR)
  params = whole.init(jax.random.key(0))
  # Larger than at the start, so that a wrong neighbour shows.
  params = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)
  tokens = np.random.default_rng(0).integers(0, 16, (7, 17)).astype(np.int32)
  want = [naive(whole.config, params, row[:n])
          for row, n in zip(tokens, LENGTHS)]
  return whole, params, tokens, want


def close(got, want):
  for row, logits in zip(np.asarray(got), want):
    error = np.abs(row[:len(logits)] - logits).max()
    assert error <= 1e-5 * max(1, np.abs(logits).max())


def test_equals_the_naive_stream():
  whole, params, tokens, want = case()
  got, _ = whole.step(params, whole.init_state(7, 0), tokens, LENGTHS)
  close(got, want)


def test_decoding_equals_the_naive_stream():
  whole, params, tokens, want = case()
  state, outputs = whole.init_state(7, 18), []
  for t in range(17):
    logits, state = whole.step(params, state, tokens[:, t:t + 1],
                               (t < LENGTHS).astype(np.int32))
    outputs.append(logits)
  close(np.concatenate(outputs, axis=1), want)


# Who sees what, by derivatives of one layer.


@pytest.mark.parametrize('chunks, count, before', [
    pytest.param(1, 2, 8, marks=pytest.mark.slow), (0, 1, 9),
    pytest.param(None, 1, 8, marks=pytest.mark.slow)])
def test_reach_is_exact(chunks, count, before):
  """Derivatives by every place of the step and every slot of the state are
  there where the place is to be seen, and nowhere else."""
  size, steps = 3, 7
  summary = c.SummaryConfig(size, count)
  config = c.KSAConfig(heads=2, kv_heads=1, key=4, value=4, summary=summary,
                       chunks=chunks)
  module = ksa.KSA(config)
  length = jnp.array([before], jnp.int32)
  context = common.context(length, 0 * length + steps, None, steps)
  x, context = ksa.append(summary, jnp.ones((count, 6)),
                          jnp.ones((1, steps, 6)), context)
  x = jax.random.normal(jax.random.key(1), x.shape)
  specs = ksa.KSA.state(config, 1, 16, 'float32')
  growing = {f.name: f.metadata['kind'] == 'growing'
             for f in dataclasses.fields(specs)}
  leaves = {name: jax.random.normal(jax.random.key(2),
                                    getattr(specs, name).shape)
            for name in growing}

  def state(leaves):
    return dataclasses.replace(specs, **{
        n: st.Store(a[None], jnp.int32(0)) if growing[n] else a
        for n, a in leaves.items()})

  @jax.jit
  def derivatives(x, leaves):
    params = module.init(jax.random.key(0), x, state(leaves), context)
    def outputs(x, leaves):
      y, _ = module.apply(params, x, state(leaves), context)
      return jnp.sum(jnp.sin(y[0]), axis=-1)
    return jax.jacrev(outputs, argnums=(0, 1))(x, leaves)

  by_x, by_leaf = derivatives(x, leaves)
  some = lambda a, axis: np.any(np.asarray(a) != 0, axis=axis)
  new = some(by_x[:, 0], -1)  # [places, places of the step]
  held = some(by_leaf['v'], (1, 2, 4))  # [places, slots]
  far = (some(by_leaf['summary_v'], (1, 2, 5)) if chunks is not None
         else np.zeros((len(new), count, 6), bool))  # [places, m, slots]

  total = before + steps
  places = stream(total, summary)
  made = [p for p in places if p[0] and p[1] >= before // size]
  names = [p for p in places if not p[0]][before:] + made
  room = new.shape[0] - steps - len(made)
  assert not new[len(names):, :len(names)].any() and room >= 0
  slots = held.shape[1]
  for query, row, old, old_far in zip(names, new, held, far):
    got = {key for key, seen in zip(names, row) if seen}
    for key in places:
      if not key[0] and key[3] < before:
        assert chunks is None or key[3] >= before - slots or (
            not sees(query, key, chunks))
        if key[3] >= before - slots and old[key[3] % slots]:
          got.add(key)
      if key[0] and key not in made and old_far[key[2], key[1]]:
        got.add(key)
    assert got == {key for key in places if sees(query, key, chunks)}
    if not query[0]:
      # Every earlier token as text, or in each summary of its chunk.
      text = {key[3] for key in got if not key[0]}
      told = [{key[1] * size + i for i in range(size)} for u in range(count)
              for key in got if key[0] and key[2] == u]
      told = set().union(*told) if told else set()
      assert text | told == set(range(query[3] + 1)) and not text & told
    # Slots that hold nothing yet are seen by nobody.
    assert old.sum() == len({k for k in got if not k[0] and k[3] < before})


@pytest.mark.slow
def test_mix():
  """Without a share of their own, summaries use the projections of text."""
  whole, params, tokens, _ = case()
  base = jax.tree.map(lambda x: x, params)
  for j in range(3):
    mixer = base['group_0'][f'layer_{j}']['mixer']
    for name in 'qkv':
      mixer[f'{name}_summary'] = mixer[name]
  none = model(*(dataclasses.replace(a, mix=0.0) for a in (NEAR, FULL, NEAR)))
  state = whole.init_state(7, 0)
  got, _ = none.step(params, state, tokens, LENGTHS)
  want, _ = whole.step(base, state, tokens, LENGTHS)
  np.testing.assert_allclose(got, want, atol=2e-5)
  other, _ = whole.step(params, state, tokens, LENGTHS)
  assert np.abs(other - got).max() > 1e-3


def test_bytes_of_the_published_model():
  """KSA-4B: 36 layers, 3:1, 8 key/value heads of 128, chunks of 8, 128 of them.
  """
  summary = c.SummaryConfig()
  near = c.KSAConfig(heads=32, kv_heads=8, key=128, value=128, summary=summary)
  whole = lm.LanguageModel(c.ModelConfig(
      1, 2560, (c.LayerConfig('ksa', near), c.LayerConfig(
          'full', dataclasses.replace(near, chunks=None))),
      (c.GroupConfig(('ksa', 'ksa', 'ksa', 'full'), 9),), dtype='bfloat16',
      summary=summary))
  found = st.nbytes(whole.state_schema(1, 2 ** 17).layers)
  assert found['growing'] == 50_688 * 2 ** 17
  assert found['fixed'] == 27 * (128 + 1) * 8 * 4096
  assert round(found['fixed'] / 2 ** 20) == 109


def test_wrong_company_is_refused():
  plain = c.AttentionConfig(2, 1, 4, 4)
  for mixers, summary, match in (
      ((NEAR,), None, "'l0': expected a mixer with summary=None, .* KSAConfig"),
      ((NEAR, plain), SUMMARY, "'l1': expected .*got a AttentionConfig with "),
      ((NEAR,), c.SummaryConfig(4, 2), r"'l0': .*summary=SummaryConfig\(chunk="
                                       r'4, count=2\)')):
    with pytest.raises(ValueError, match=match):
      model(*mixers, summary=summary)
  for options, match in ((dict(mix=1.5), 'mix: expected 0 to 1'),
                         (dict(chunks=-1), 'chunks: expected >= 0'),
                         (dict(heads=3), 'multiple of kv_heads')):
    with pytest.raises(ValueError, match=match):
      c.KSAConfig(**options)
  with pytest.raises(ValueError, match='expected count <= chunk'):
    c.SummaryConfig(chunk=2, count=3)
  assert c.from_dict(c.to_dict(model(NEAR).config)) == model(NEAR).config


@pytest.mark.slow
def test_streams_of_summaries():
  """Both features at once: summary tokens have their streams too."""
  whole = model(NEAR, streams=c.HyperConfig(2))
  params = whole.init(jax.random.key(0))
  assert params['summary'].shape == (2, 8)
  tokens = np.arange(14, dtype=np.int32).reshape(2, 7)
  want, _ = whole.step(params, whole.init_state(2, 0), tokens)
  state, outputs = whole.init_state(2, 8), []
  for t in range(7):
    logits, state = whole.step(params, state, tokens[:, t:t + 1])
    outputs.append(logits)
  np.testing.assert_allclose(np.concatenate(outputs, 1), want, atol=1e-5)


# Of several layers: what a summary has gathered in one, text sees in the next.
VARIANTS = {
    'two_summaries': model(NEAR, FULL),
    'own_chunk_only': model(
        *(dataclasses.replace(NEAR, chunks=0, rope=None, mix=0.0, qk_norm=False,
                              summary=c.SummaryConfig(4, 3)),) * 2,
        summary=c.SummaryConfig(4, 3)),
    'chunks_of_one': model(
        *(dataclasses.replace(NEAR, chunks=3, summary=c.SummaryConfig(1, 1)),
          ) * 2, summary=c.SummaryConfig(1, 1)),
    'all_full': model(FULL, FULL),
}


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('name', VARIANTS)
def test_laws(name):
  laws.check(VARIANTS[name])
