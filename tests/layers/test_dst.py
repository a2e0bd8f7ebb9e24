"""Dynamic state transduction against plain numpy, segment by segment."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from single import draw, empty, run, step

from statejax import config as c
from statejax.layers import dst

WIDTH = 12
POOL = c.DSTConfig(WIDTH, heads=4, kv_heads=2, key=6, value=5, segment=4,
                   vectors=3)
ROWS = dataclasses.replace(POOL, update='rows')
ALONE = dataclasses.replace(POOL, vectors=0)
CUTS = (10, 20)


@functools.cache
def drawn(config=POOL):
  return draw(config, WIDTH)


def wide(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def rotated(x, places):
  """Rotary embedding of [N, heads, K], halves paired."""
  half = x.shape[-1] // 2
  turn = np.asarray(places)[:, None] * 10_000.0 ** (-np.arange(half) / half)
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turn)[:, None]
  return np.concatenate([z.real, z.imag], axis=-1)


def attention(p, queries, places, rows, row_places, mask):
  """[N, D] of queries [N, D] over rows [M, D]; mask [N, M]."""
  q, k = (rotated(np.einsum('nd,dhk->nhk', x, p[f'kernel_{n}']), at)
          for n, x, at in (('q', queries, places), ('k', rows, row_places)))
  k, v = (np.repeat(y, 2, axis=1)
          for y in (k, np.einsum('nd,dhk->nhk', rows, p['kernel_v'])))
  score = np.einsum('nhk,mhk->hnm', q, k) * POOL.key ** -0.5
  a = np.exp(score) * mask[None]
  y = np.einsum('hnm,mhv->nhv', a / a.sum(axis=-1, keepdims=True), v)
  return np.einsum('nhv,hvd->nd', y, p['kernel_out'])


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def behind(config, p, s, x, y):
  """The vectors behind a segment of inputs x with outputs y."""
  if config.update == 'rows':
    m, size = config.vectors, config.segment
    rows, own = np.concatenate([s + p['read'], x]), s + p['write']
    places = m + size + np.arange(m)
    o = own + attention(p, own, places, np.concatenate([rows, own]),
                        np.arange(2 * m + size), np.ones((m, 2 * m + size)))
    return o / np.sqrt(np.mean(o * o, axis=-1, keepdims=True) + config.eps)
  logit = p['ask'] @ y.T * y.shape[1] ** -0.5
  a = np.exp(30 * np.tanh(logit / 30))
  both = np.concatenate([s, a @ y / a.sum(axis=1, keepdims=True)], axis=1)
  g = sigmoid(both @ p['kernel_gate'])
  return (1 - g) * s + g * np.tanh(both @ p['kernel_new'])


def naive(config, params, x):
  p, out, m = wide(params), [], config.vectors
  for row in np.asarray(x, np.float64):
    s = np.zeros((m, WIDTH))
    for first in range(0, len(row), config.segment):
      part = row[first:first + config.segment]
      n = len(part)
      rows = np.concatenate([s + p['read'], part]) if m else part
      mask = np.tri(n, m + n, m)
      y = attention(p, part, m + np.arange(n), rows, np.arange(m + n), mask)
      out.append(y)
      if m and n == config.segment:
        s = behind(config, p, s, part, y)
  return np.concatenate(out).reshape(x.shape)


def close(got, want):
  assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


# Of the open segment of the second step, some of the first are no part.
SEVEN = dataclasses.replace(POOL, segment=7)


@pytest.mark.parametrize('config', [
    SEVEN, *(pytest.param(s, marks=pytest.mark.slow) for s in (
        POOL, ROWS, dataclasses.replace(SEVEN, vectors=1)))])
def test_oracle(config):
  params, x = drawn(config)
  want = naive(config, params, x)
  close(run(config, params, x, CUTS)[0], want)
  # Of tokens behind the first segment the vectors matter.
  alone = naive(dataclasses.replace(config, vectors=0), params, x)
  assert np.abs(want - alone)[:, config.segment:].max() > 0.01


@pytest.mark.slow
def test_without_vectors_segments_are_independent():
  """Each as if it were a document."""
  params, x = drawn()
  x = x[:, :28]
  whole, state = run(ALONE, params, x, (14,))
  parts = run(ALONE, params, x.reshape(14, 4, WIDTH))[0]
  assert state.memory is None and state.pooled is None
  close(whole, parts.reshape(x.shape))


@pytest.mark.slow
def test_unseen_vectors_are_none(monkeypatch):
  """With the prefix masked every segment is alone."""
  whole = dst._prefixes
  def unseen(*args):
    found = whole(*args)
    return dataclasses.replace(found, visible=jnp.zeros_like(found.visible))
  monkeypatch.setattr(dst, '_prefixes', unseen)
  # A config of its own, or the program of another test would run.
  config = dataclasses.replace(POOL, eps=2e-6)
  params, x = drawn()
  close(run(config, params, x, CUTS)[0], naive(ALONE, params, x))


def sources(config, t):
  """Tokens that output t has a gradient to, from an empty state."""
  params, x = drawn(dataclasses.replace(config, through=None))
  state, zero = empty(config, 2, 0), jnp.zeros((2,), jnp.int32)
  def total(x):
    y, _, _ = step(config, params, x, state, zero)
    return jnp.sum(y[:, t] ** 2)
  found = np.any(np.asarray(jax.grad(total)(x)) != 0, axis=-1)
  return np.flatnonzero(found[0]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize('config', [POOL, ROWS])
def test_through(config):
  """A gradient runs through so many segments and no further."""
  cut = lambda n: dataclasses.replace(config, through=n)
  assert sources(config, 18) == list(range(19))
  assert sources(cut(2), 18) == [16, 17, 18]
  assert sources(cut(2), 22) == list(range(16, 23))
  assert sources(cut(1), 22) == [20, 21, 22]
  assert sources(cut(4), 14) == list(range(15))


@pytest.mark.parametrize('make, text', [
    (lambda: c.DSTConfig(update='mean'), "update: expected one of"),
    (lambda: c.DSTConfig(vectors=-1), 'vectors: expected >= 0, got -1'),
    (lambda: c.DSTConfig(through=0), 'through: expected >= 1, got 0')])
def test_refused(make, text):
  with pytest.raises(ValueError, match=text):
    make()
