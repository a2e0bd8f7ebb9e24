"""Infini-attention against plain numpy, segment by segment."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from single import draw, run

from statejax import config as c
from statejax.ops import infini

WIDTH = 12
DELTA = c.InfiniConfig(heads=4, kv_heads=2, key=6, value=5, segment=4)
ADD = dataclasses.replace(DELTA, write='add', rope=None)
CUTS = (10, 20)


@functools.cache
def drawn():
  params, x = draw(DELTA, WIDTH)
  gate = np.random.default_rng(0).normal(size=4).astype(np.float32)
  return params | {'gate': gate}, x


def features(x):
  return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def rotated(x, places):
  half = x.shape[-1] // 2
  turn = np.asarray(places)[:, None] * 10_000.0 ** (-np.arange(half) / half)
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turn)[:, None]
  return np.concatenate([z.real, z.imag], axis=-1)


def projected(p, row):
  """q, k, v of every head, [N, H, .], whose group of two shares k and v."""
  q, k, v = (np.einsum('nd,dhk->nhk', row, p[n]['kernel']) for n in 'qkv')
  return q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)


def near(config, q, k, v):
  """Causal attention inside one segment."""
  if config.rope is not None:
    q, k = (rotated(a, np.arange(len(a))) for a in (q, k))
  a = np.exp(np.einsum('nhk,mhk->hnm', q, k) * config.key ** -0.5)
  a = a * np.tri(len(q))[None]
  return np.einsum('hnm,mhv->nhv', a / a.sum(axis=-1, keepdims=True), v)


def naive(config, params, x):
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  gate, out = 1 / (1 + np.exp(-p['gate']))[:, None], []
  for row in np.asarray(x, np.float64):
    memory, mass = np.zeros((4, 6, 5)), np.zeros((4, 6))
    def recall(f, memory, mass):
      total = np.einsum('nhk,hk->nh', f, mass)[..., None]
      return np.einsum('nhk,hkv->nhv', f, memory) / np.where(
          total == 0, 1, total)
    for first in range(0, len(row), config.segment):
      q, k, v = projected(p, row[first:first + config.segment])
      far = recall(features(q), memory, mass)
      y = gate * far + (1 - gate) * near(config, q, k, v)
      out.append(np.einsum('nhv,hvd->nd', y, p['out']['kernel']))
      if len(q) == config.segment:
        f = features(k)
        u = v - recall(f, memory, mass) if config.write == 'delta' else v
        memory = memory + np.einsum('nhk,nhv->hkv', f, u)
        mass = mass + f.sum(axis=0)
  return np.concatenate(out).reshape(x.shape)


def close(got, want):
  assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize('config', [
    DELTA, pytest.param(dataclasses.replace(ADD, segment=7),
                        marks=pytest.mark.slow)])
def test_oracle(config):
  params, x = drawn()
  close(run(config, params, x, CUTS)[0], naive(config, params, x))


def test_a_gate_that_is_shut_leaves_local_attention():
  """And the matrix still matters where it is open."""
  params, x = drawn()
  shut = params | {'gate': np.full(4, -1e4, np.float32)}
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  want = np.stack([np.concatenate([
      np.einsum('nhv,hvd->nd', near(DELTA, *projected(p, part)),
                p['out']['kernel'])
      for part in np.split(row, range(4, 30, 4))]) for row in np.asarray(x)])
  close(run(DELTA, shut, x, CUTS)[0], want)
  assert np.abs(naive(DELTA, params, x) - want)[:, 4:].max() > 0.01


@pytest.mark.slow
def test_without_delta_the_memory_is_linear_attention():
  """To all tokens of earlier segments, one by one."""
  params, x = drawn()
  params = params | {'gate': np.full(4, 1e4, np.float32)}
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  want = np.zeros(x.shape)
  for b, row in enumerate(np.asarray(x, np.float64)):
    q, k, v = projected(p, row)
    for t in range(4, len(row)):
      past = t // 4 * 4
      a = np.einsum('hk,nhk->hn', features(q[t]), features(k[:past]))
      y = np.einsum('hn,nhv->hv', a / a.sum(axis=1, keepdims=True), v[:past])
      want[b, t] = np.einsum('hv,hvd->d', y, p['out']['kernel'])
  close(run(ADD, params, x, CUTS)[0], want)


def test_delta_is_no_overwrite():
  """A key of its own, written twice, recalls half of the second value: the
  matrix holds it whole, but the sum of keys counts both visits."""
  v1, v2 = np.random.default_rng(1).normal(size=(2, 1, 5)).astype(np.float32)
  key, other = (jnp.eye(6)[None, i] for i in (2, 4))
  state = jnp.zeros((6, 5)), jnp.zeros((6,))
  how = dict(delta=True, eps=1e-9)
  for value in (v1, v2):
    state = infini.write(key, value, *state, **how)
  recall = functools.partial(infini.read, eps=1e-9)
  assert np.abs(recall(key, *state) - v2 / 2).max() <= 1e-6
  assert np.abs(state[0][2] - v2[0]).max() <= 1e-6
  assert (np.asarray(recall(other, *state)) == 0).all()
  # Without delta it is the mean of both.
  state = jnp.zeros((6, 5)), jnp.zeros((6,))
  for value in (v1, v2):
    state = infini.write(key, value, *state, delta=False, eps=1e-9)
  assert np.abs(recall(key, *state) - (v1 + v2) / 2).max() <= 1e-6


@pytest.mark.parametrize('make, text', [
    (lambda: c.InfiniConfig(write='erase'), 'write: expected one of'),
    (lambda: c.InfiniConfig(eps=0.0), 'eps: expected > 0, got 0.0'),
    (lambda: c.InfiniConfig(heads=3, kv_heads=2), 'must be a multiple')])
def test_refused(make, text):
  with pytest.raises(ValueError, match=text):
    make()
