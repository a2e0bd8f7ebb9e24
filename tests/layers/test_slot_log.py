"""The log of slots against plain numpy, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import state as st
from statejax.layers import attention, common, slot_log

RULES = c.SlotRules(slots=2, key=6, value=5, span=1, key_span=1, aliases=1)
KAPPA, TOKENS = 3.0, 22


def inputs(rows, seed=0):
  rng = np.random.default_rng(seed)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  draw = lambda *shape: rng.normal(size=(rows, TOKENS, *shape))
  found = unit(draw(6)), unit(draw(6)), draw(), draw(5)
  return tuple(jnp.asarray(x, jnp.float32) for x in found)


@functools.partial(jax.jit, static_argnums=0)
def step(config, arrays, k, v, length, n_valid, document=None):
  context = common.context(length, n_valid, document, arrays[0].shape[1])
  y, held, _ = slot_log.read(config, KAPPA, *arrays, attention.StoreState(
      st.Store(k, jnp.int32(0)), st.Store(v, jnp.int32(0))), context)
  return y, held.k.data, held.v.data


def empty(config, rows, capacity):
  specs = slot_log.state(config, rows, capacity, RULES, 'float32')
  return [jnp.zeros((1, *x.shape)) for x in (specs.k, specs.v)]


def naive(config, query, key, salience, value):
  """One row, in float64: the best blocks by their best token, then softmax."""
  out = []
  for t in range(len(query)):
    score = KAPPA * key[:t + 1] @ query[t] + salience[:t + 1]
    blocks = np.arange(t + 1) // config.block
    best = sorted({*blocks.tolist()}, key=lambda b: -score[blocks == b].max())
    mine = np.isin(blocks, best[:config.k])
    p = np.exp(score - score.max()) * mine
    out.append(p / p.sum() @ value[:t + 1])
  return np.stack(out)


@pytest.mark.parametrize('k', [1, 2, 16])
def test_reads_are_those_of_plain_numpy(k):
  config = c.LogConfig(block=4, k=k)
  arrays = inputs(2)
  wide = [np.asarray(x, np.float64) for x in arrays]
  want = np.stack([naive(config, *(x[row] for x in wide)) for row in range(2)])
  stores, got = empty(config, 2, TOKENS), []
  for begin, end in ((0, 9), (9, 10), (10, TOKENS)):
    y, *stores = step(config, [x[:, begin:end] for x in arrays], *stores,
                      jnp.full(2, begin, jnp.int32),
                      jnp.full(2, end - begin, jnp.int32))
    got.append(y)
  np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-6)


def test_a_document_reads_itself_alone():
  config = c.LogConfig(block=4, k=2)
  arrays = inputs(1)
  document = jnp.asarray(np.repeat([0, 1], [7, 15])[None], jnp.int32)
  y, *_ = step(config, arrays, *empty(config, 1, 0), jnp.zeros(1, jnp.int32),
               jnp.full(1, TOKENS, jnp.int32), document)
  wide = [np.asarray(x, np.float64)[0] for x in arrays]
  want = np.concatenate([naive(config, *(x[part] for x in wide))
                         for part in (slice(0, 7), slice(7, None))])
  np.testing.assert_allclose(y[0], want, atol=2e-6)


@pytest.mark.parametrize('change', [dict(block=0), dict(k=0), dict(kappa=0.)])
def test_configs_say_what_is_wrong(change):
  with pytest.raises(ValueError, match='expected'):
    c.LogConfig(**change)
