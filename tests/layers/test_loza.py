"""Streaming latent attention: a naive float64 oracle, who influences whom,
bytes. Its laws are in `../test_laws_attention.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mla

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.layers import common
from statejax.layers.loza import LoZA

MLA = c.MLAConfig(heads=2, nope=6, rope_width=4, value=5, rank=8, q_rank=7,
                  rope=c.RopeConfig(theta=20.0, layout='interleaved'))
CONFIG = c.LoZAConfig(MLA, block=3, sink_blocks=1, recent_blocks=2)
WIDE = c.LoZAConfig(MLA, block=2, sink_blocks=3, recent_blocks=4)
WIDTH, STEPS = 12, 27


def seen(config, p):
  """The positions that position p sees, by the published rule."""
  begin = config.block * (p // config.block - (config.recent_blocks - 1))
  return [k for k in range(p + 1)
          if k < config.block * config.sink_blocks or k >= begin]


@functools.cache
def draw(config):
  whole = lm.LanguageModel(c.ModelConfig(
      1, WIDTH, (c.LayerConfig('m', config),), (c.GroupConfig(('m',)),)))
  layer = jax.eval_shape(whole.init, jax.random.key(0))['group_0']['layer_0']
  rng = np.random.default_rng(0)
  def one(p):
    shape = p.shape[1:]
    if len(shape) == 1:
      return (1 + 0.3 * rng.normal(size=shape)).astype(np.float32)
    fan = np.prod(shape[:-1]) if shape[-1] == WIDTH else shape[0]
    return (rng.normal(size=shape) * fan ** -0.5).astype(np.float32)
  return jax.tree.map(one, layer['mixer'])


def apply(config, params, x, state, length, n_valid, document=None):
  context = common.context(length, n_valid, document, x.shape[1])
  return LoZA(config).apply({'params': params}, x, state, context)


step = jax.jit(apply, static_argnums=0)


def empty(config, rows, dtype='float32'):
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                      LoZA.state(config, rows, None, dtype),
                      is_leaf=lambda s: isinstance(s, st.Spec))


def run(config, x, cuts=()):
  rows, done, outputs = x.shape[0], 0, []
  state = empty(config, rows)
  for piece in np.split(x, cuts, axis=1):
    full = lambda n: jnp.full((rows,), n, jnp.int32)
    y, state = step(config, draw(config), piece, state, full(done),
                    full(piece.shape[1]))
    outputs.append(y)
    done += piece.shape[1]
  return np.concatenate(outputs, axis=1), state


def naive(config, x):
  """One query and head at a time, in float64."""
  m = config.mla
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), draw(config))
  kernel = lambda name: p[name]['kernel']
  y = np.zeros(x.shape)
  for b in range(x.shape[0]):
    both = x[b].astype(np.float64) @ kernel('kv_a')
    latent = test_mla.rms(both[:, :m.rank], p['norm_kv']['weight'])
    key = [test_mla.turn(k, j, m.rope) for j, k in enumerate(both[:, m.rank:])]
    for t, now in enumerate(x[b].astype(np.float64)):
      q = np.einsum('r,rhk->hk', test_mla.rms(
          now @ kernel('q_a'), p['norm_q']['weight']), kernel('q_b'))
      for h in range(m.heads):
        here, mine = test_mla.turn(q[h, m.nope:], t, m.rope), seen(config, t)
        scores = np.array([
            q[h, :m.nope] @ (latent[j] @ p['k_b'][:, h]) + here @ key[j]
            for j in mine]) * (m.nope + m.rope_width) ** -0.5
        weight = np.exp(scores)
        out = weight / weight.sum() @ (latent[mine] @ p['v_b'][:, h])
        y[b, t] += out @ kernel('out')[h]
  return y


def inputs(rows=2, steps=STEPS):
  return np.random.default_rng(1).normal(
      size=(rows, steps, WIDTH)).astype(np.float32)


@pytest.mark.parametrize('config, cuts', [
    (CONFIG, ()), (CONFIG, (13, 14)), (WIDE, (13, 14))])
def test_oracle(config, cuts):
  """A chunk of 13 tokens is longer than the rings, of 6 and 8."""
  x = inputs()
  got, want = run(config, x, cuts)[0], naive(config, x)
  assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_no_block_left_out_is_mla():
  """A ring as long as the document, half of it also in the sink."""
  config, x = c.LoZAConfig(MLA, 3, 4, 9), inputs()
  want = test_mla.naive(MLA, draw(CONFIG), x)
  got, _ = run(config, x, (13,))
  assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@functools.partial(jax.jit, static_argnums=0)
def influence(config, x, state, length):
  """Whether output t has a gradient to each token of the step, [T, B, T], and
  to each slot of the sink and of the ring."""
  steps = x.shape[1]
  def outputs(x, leaves):
    y, _ = apply(config, draw(config), x, leaves, length,
                 jnp.full(length.shape, steps, jnp.int32))
    return y
  _, pull = jax.vjp(outputs, x, state)
  def one(t):
    y = jnp.zeros(x.shape).at[:, t].set(1.0)
    return pull(y)
  d_x, d_state = jax.vmap(one)(jnp.arange(steps))
  some = lambda a: jnp.any(a != 0, axis=-1)
  both = lambda a, b: some(a) | some(b)
  return (some(d_x), both(d_state.sink, d_state.sink_rope),
          both(d_state.ring, d_state.ring_rope))


@pytest.mark.parametrize('config', [CONFIG, WIDE])
def test_who_influences_whom(config):
  """Every pair of tokens, in a step and through the state, as the rule says;
  a token of the state through the sink or the ring, never both."""
  x, steps = inputs(rows=12), 10
  state, lengths = empty(config, 12), np.arange(12, dtype=np.int32)
  # Row b stands at position b: everything around two blocks and the sink.
  _, state = step(config, draw(config), x, state,
                  jnp.zeros((12,), jnp.int32), jnp.asarray(lengths))
  within, sink, ring = map(np.asarray, influence(
      config, x[:, :steps], state, jnp.asarray(lengths)))
  for b, length in enumerate(lengths):
    for t in range(steps):
      mine = seen(config, length + t)
      assert (np.flatnonzero(within[t, b]) + length).tolist() == [
          k for k in mine if k >= length]
      old = np.flatnonzero(sink[t, b]).tolist()
      old += [k for k in range(config.sink, length)
              if k >= length - config.window and ring[t, b, k % config.window]]
      assert old == [k for k in mine if k < length]
      assert ring[t, b].sum() == sum(k >= config.sink for k in old)


def test_bytes():
  """1.125 MiB a layer whatever the length, at the sizes of LongCat-Flash."""
  config = c.LoZAConfig(c.MLAConfig(rank=512, rope_width=64))
  whole = lm.LanguageModel(c.ModelConfig(
      1, 16, (c.LayerConfig('m', config),), (c.GroupConfig(('m',), 3),),
      dtype='bfloat16'))
  for capacity in (1, 2 ** 17):
    assert st.nbytes(whole.state_schema(2, capacity).layers) == {
        'growing': 0, 'fixed': 2 * 3 * 1_179_648}


def test_config():
  assert c.from_dict(c.to_dict(CONFIG)) == CONFIG
  for name in ('block', 'sink_blocks', 'recent_blocks'):
    with pytest.raises(ValueError, match=f'{name}: expected >= 1, got 0'):
      c.LoZAConfig(**{name: 0})
