"""Transformer-XL and the compressive transformer against plain numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from single import draw, empty, run, step

from statejax import config as c

WIDTH = 12
XL = c.TransformerXLConfig(WIDTH, heads=4, kv_heads=2, key=6, value=5,
                           segment=4, memory=6, relative=6)
COMPRESSIVE = c.CompressiveConfig(
    WIDTH, heads=4, kv_heads=2, key=6, value=5, segment=4, memory=6,
    relative=6, compressed=3, rate=2)
# Pieces of one length, which is no multiple of a segment; others are laws.
CUTS = (10, 20)


def rows_seen(config, params, x, t):
  """(row, place) of everything that token t of x [T, D] attends to."""
  begin = t // config.segment * config.segment
  low = max(0, begin - config.memory)
  found = [(x[j], j) for j in range(low, t + 1)]
  if isinstance(config, c.CompressiveConfig):
    w = np.asarray(params['compress']['kernel'], np.float64)
    rate, end = config.rate, low // config.rate
    for j in range(max(0, end - config.compressed), end):
      row = sum(x[rate * j + i] @ w[i] for i in range(rate))
      found.append((row, rate * j + rate - 1))
  return found


def naive(config, params, x):
  """float64, token by token, every distance encoded by itself."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x, out = np.asarray(x, np.float64), []
  rate = 10_000 ** (-np.arange(config.relative // 2) * 2 / config.relative)
  group = config.heads // config.kv_heads
  for row in x:
    for t, token in enumerate(row):
      q = np.einsum('d,dhk->hk', token, p['q']['kernel'])
      rows, places = zip(*rows_seen(config, params, row, t))
      k, v = (np.repeat(np.einsum('nd,dgk->ngk', rows, p[f'kernel_{n}']), group,
                        axis=1) for n in 'kv')
      turn = (t - np.array(places))[:, None] * rate
      r = np.einsum('nr,rhk->nhk', np.concatenate(
          [np.sin(turn), np.cos(turn)], axis=1), p['kernel_distance'])
      score = np.einsum('hk,nhk->hn', q + p['content'], k) + np.einsum(
          'hk,nhk->hn', q + p['position'], r)
      a = np.exp(score * config.key ** -0.5)
      y = np.einsum('hn,nhv->hv', a / a.sum(axis=1, keepdims=True), v)
      out.append(np.einsum('hv,hvd->d', y, p['out']['kernel']))
  return np.array(out).reshape(x.shape)


@functools.cache
def drawn(kind=c.TransformerXLConfig):
  """Parameters whose u and v are not zero, and inputs."""
  own = XL if kind is c.TransformerXLConfig else COMPRESSIVE
  params, x = draw(own, WIDTH)
  u, v = np.random.default_rng(9).normal(size=(2, 4, 6)).astype(np.float32)
  return params | {'content': u, 'position': v}, x


def close(got, want):
  assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


SLOW = [
    XL, dataclasses.replace(XL, memory=0),
    dataclasses.replace(XL, memory=3, segment=5, detach=False),
    dataclasses.replace(COMPRESSIVE, memory=0, compressed=7)]


@pytest.mark.parametrize('config', [
    COMPRESSIVE, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)])
def test_oracle(config):
  params, x = drawn(type(config))
  close(run(config, params, x, CUTS)[0], naive(config, params, x))


@pytest.mark.slow
def test_oracle_of_other_entries():
  config = dataclasses.replace(COMPRESSIVE, memory=8, rate=4, compressed=2)
  params, x = draw(config, WIDTH)
  close(run(config, params, x, CUTS)[0], naive(config, params, x))


@pytest.mark.slow
def test_a_memory_of_everything_is_full_attention():
  """Of one segment that is as long as the document."""
  params, x = drawn()
  whole = dataclasses.replace(XL, memory=30)
  want = naive(dataclasses.replace(XL, segment=30, memory=0), params, x)
  close(run(whole, params, x, CUTS)[0], want)
  assert np.abs(naive(XL, params, x) - want).max() > 0.01


def test_without_entries_it_is_transformer_xl():
  """Bit for bit, with the same parameters."""
  config = dataclasses.replace(COMPRESSIVE, compressed=0)
  params, x = drawn()
  got, state = run(config, params, x, CUTS)
  want, other = run(XL, params, x, CUTS)
  assert (got == want).all() and state.compressed is None
  assert (np.asarray(state.hidden) == np.asarray(other.hidden)).all()
  close(got, naive(XL, params, x))


def gradient(config, params, x, t):
  """Of output t, with respect to the step's tokens: [B, T] whether any."""
  state, zero = empty(config, 2, 0), jnp.zeros((2,), jnp.int32)
  def total(x):
    y, _, _ = step(config, params, x, state, zero)
    return jnp.sum(y[:, t] ** 2)
  return np.any(np.asarray(jax.grad(total)(x)) != 0, axis=-1)[0]


@pytest.mark.slow
@pytest.mark.parametrize('config', [XL, COMPRESSIVE])
def test_no_gradient_into_earlier_segments(config):
  params, x = drawn(type(config))
  t = 18
  assert np.flatnonzero(gradient(config, params, x, t)).tolist() == [16, 17, 18]
  live = dataclasses.replace(config, detach=False)
  first = 16 - config.memory
  if isinstance(config, c.CompressiveConfig):
    first -= config.compressed * config.rate
  assert np.flatnonzero(gradient(live, params, x, t)).tolist() == list(
      range(first, t + 1))


@pytest.mark.slow
def test_compress_loss():
  """Attention to what leaves against attention to its entries; it teaches the
  convolution alone."""
  config = dataclasses.replace(COMPRESSIVE, segment=2, memory=4)
  params, x = draw(config, WIDTH)
  state, zero = empty(config, 2, 0), jnp.zeros((2,), jnp.int32)
  def loss(params, x):
    _, _, said = step(config, params, x, state, zero)
    return said['losses']['compress_loss']
  total, (d_params, d_x) = jax.value_and_grad(loss, (0, 1))(params, x)
  p, want = jax.tree.map(lambda a: np.asarray(a, np.float64), params), 0
  for row in np.asarray(x, np.float64):
    for t in range(30):
      begin = t // 2 * 2
      if begin < 4:
        continue
      leaves = range(begin - 4, begin - 2)
      entry = sum(row[j] @ w for j, w in zip(leaves, p['compress']['kernel']))
      looks = [look(config, p, row, t, rows, places) for rows, places in (
          ([row[j] for j in leaves], leaves), ([entry], leaves[-1:]))]
      want += np.mean((looks[0] - looks[1]) ** 2)
  assert abs(total - want) <= 1e-4 * want
  some = {name: np.any(np.asarray(jax.tree.leaves(g)[0]) != 0)
          for name, g in d_params.items()}
  assert [name for name in some if some[name]] == ['compress']
  # The rows that are compressed are cut as those that are not.
  assert not np.any(d_x)


def look(config, p, x, t, rows, places):
  """Attention of token t to given rows, [H, V]."""
  rate = 10_000 ** (-np.arange(config.relative // 2) * 2 / config.relative)
  turn = (t - np.array(places))[:, None] * rate
  k, v = (np.repeat(np.einsum('nd,dgk->ngk', rows, p[f'kernel_{n}']), 2, axis=1)
          for n in 'kv')
  q = np.einsum('d,dhk->hk', x[t], p['q']['kernel'])
  r = np.einsum('nr,rhk->nhk', np.concatenate(
      [np.sin(turn), np.cos(turn)], axis=1), p['kernel_distance'])
  a = np.exp(np.einsum('hk,nhk->hn', q, k + r) * config.key ** -0.5)
  return np.einsum('hn,nhv->hv', a / a.sum(axis=1, keepdims=True), v)


@pytest.mark.parametrize('make, text', [
    (lambda: c.TransformerXLConfig(relative=5), 'relative: expected an even'),
    (lambda: c.TransformerXLConfig(memory=-1), 'memory: expected >= 0, got -1'),
    (lambda: c.CompressiveConfig(rate=3), 'segment=256 must be a multiple of'),
    (lambda: c.CompressiveConfig(compressed=-1), 'compressed: expected >= 0'),
    (lambda: run(dataclasses.replace(XL, width=9), {}, np.zeros((2, 3, 12),
                                                               np.float32)),
     'width: expected the width of the model, 12, got 9'),
])
def test_refused(make, text):
  with pytest.raises(ValueError, match=text):
    make()
