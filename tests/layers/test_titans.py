"""Titans against plain numpy, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from single import draw, run

from statejax import config as c
from statejax.ops import delta_rule, titans

WIDTH = 12
MATRIX = c.TitansConfig(heads=2, key=6, value=5, segment=4, rate=0.2)
LAYERS = dataclasses.replace(MATRIX, hidden=7, rate=0.01)
CUTS = (10, 20)


@functools.cache
def drawn(config=MATRIX):
  """Parameters by which every gate differs from token to token."""
  params, x = draw(config, WIDTH)
  return params | {'bias_forget': np.full(2, -1., np.float32)}, x


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def forward(w, x):
  """What the memory says, and the inputs of its last matrix."""
  if len(w) == 1:
    return x @ w[0], x
  inner = x @ w[0]
  return inner * sigmoid(inner) @ w[1], inner * sigmoid(inner)


def slope(w, k, v):
  """The gradient of the square of what is missed, by hand."""
  said, last = forward(w, k)
  error = 2 * (said - v)
  if len(w) == 1:
    return [np.outer(k, error)]
  inner = k @ w[0]
  s = sigmoid(inner)
  back = (w[1] @ error) * s * (1 + inner * (1 - s))
  return [np.outer(k, back), np.outer(last, error)]


def unit(x):
  return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True))


def naive(config, params, x):
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x, out = np.asarray(x, np.float64), []
  for row in x:
    q, k, v = (np.einsum('nd,dhk->nhk', row, p[n]['kernel']) for n in 'qkv')
    eta, theta, alpha = (sigmoid(row @ p[n]['kernel'] + p[f'bias_{n}'])
                         for n in ('keep', 'rate', 'forget'))
    q, k, theta = unit(q), unit(k), config.rate * theta
    for h in range(config.heads):
      now = ([np.zeros((6, 5))] if config.hidden is None else
             [p['first'][h], p['second'][h]])
      s = [np.zeros_like(w) for w in now]
      for t in range(len(row)):
        if t % config.segment == 0:
          start = now
        g = slope(start, k[t, h], v[t, h])
        s = [eta[t, h] * a - theta[t, h] * b for a, b in zip(s, g)]
        now = [(1 - alpha[t, h]) * a + b for a, b in zip(now, s)]
        v[t, h] = forward(now, q[t, h])[0]
    y = v / np.sqrt(np.mean(v * v, axis=-1, keepdims=True) + config.eps)
    out.append(np.einsum('nhv,hvd->nd', y * p['norm'], p['out']['kernel']))
  return np.stack(out)


@pytest.mark.parametrize('config', [
    MATRIX, *(pytest.param(s, marks=pytest.mark.slow) for s in (
        LAYERS, dataclasses.replace(MATRIX, segment=7)))])
def test_oracle(config):
  params, x = drawn(config)
  got, want = run(config, params, x, CUTS)[0], naive(config, params, x)
  assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
  other = naive(dataclasses.replace(config, segment=1), params, x)
  assert np.abs(want - other).max() > 1e-3


def test_one_step_a_token_is_the_delta_rule():
  """Without momentum and forgetting, at theta = beta / 2."""
  random = np.random.default_rng(2)
  q, k = unit(random.normal(size=(2, 2, 9, 3, 6))).astype(np.float32)
  v = random.normal(size=(2, 9, 3, 5)).astype(np.float32)
  beta = random.uniform(size=(2, 9, 3)).astype(np.float32)
  zero, old = np.zeros_like(beta), random.normal(
      size=(2, 3, 6, 5)).astype(np.float32)
  n_valid = np.array([9, 6], np.int32)
  valid = np.arange(9)[None] < n_valid[:, None]
  state = (old,), (old,), (np.zeros_like(old),)
  y, (_, (now,), _) = titans.neural_memory(
      titans.Tokens(q, k, v, zero, beta / 2, zero), state,
      (jnp.zeros(old.shape[1:]),), np.ones_like(valid), np.zeros_like(valid),
      valid)
  want, after = delta_rule(
      q, k, v, 0, beta, beta, old, n_valid, scale=1.0)
  y = np.where(valid[..., None, None], y, 0)
  assert np.abs(y - want).max() <= 1e-5 and np.abs(now - after).max() <= 1e-5


@pytest.mark.parametrize('make, text', [
    (lambda: c.TitansConfig(hidden=0), 'hidden: expected >= 1, got 0'),
    (lambda: c.TitansConfig(rate=0.0), 'rate: expected > 0, got 0.0')])
def test_refused(make, text):
  with pytest.raises(ValueError, match=text):
    make()
