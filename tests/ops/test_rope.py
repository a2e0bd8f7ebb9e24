"""Scalings of rotary frequencies against golden vectors and a scalar oracle in
float64; layouts, sides and the inverse rotation. See also test_norm_rope.py."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit

from statejax import config as c
from statejax.layers import rotary
from statejax.ops import rope

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
EPS = float(np.finfo(np.float32).eps)

# As the golden vectors were made: 64 channels, 131,072 positions.
YARN = c.YarnConfig(factor=40.0, original=4096)
LONG = c.LongRopeConfig(
    short=tuple(1 + 0.1 * i for i in range(32)),
    long=tuple(1 + 0.5 * i for i in range(32)), original=4096, factor=32.0)
GOLDENS = {
    'yarn': (1e4, YARN),
    'yarn_mscale': (1e4, dataclasses.replace(
        YARN, mscale=1.0, mscale_all_dim=0.707)),
    'llama3': (5e5, c.Llama3RopeConfig(factor=8.0, original=8192)),
    'longrope': (1e4, LONG),
    'longrope_short': (1e4, dataclasses.replace(LONG, maximum=4096)),
}


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


def scaled(width, theta, scaling, fraction=1.0):
  turn = rotary.rotation(c.RopeConfig(theta, fraction, scaling), width)
  return turn.keywords['inverse'], turn.keywords['factor']


def oracle(width, theta, scaling):
  """Inverse frequencies and factor, channel by channel."""
  s, out = scaling, []
  for i in range(width // 2):
    plain = theta ** (-2 * i / width)
    if isinstance(s, c.YarnConfig):
      # The channel, a real number, that turns a given number of times.
      ends = [width / 2 * math.log(s.original / (2 * math.pi * turns), theta)
              for turns in (s.beta_fast, s.beta_slow)]
      if s.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
      low, high = max(0, ends[0]), min(width - 1, ends[1])
      slowed = min(1, max(0, (i - low) / (high - low)))
      out.append(plain * (1 - slowed) + plain / s.factor * slowed)
    elif isinstance(s, c.Llama3RopeConfig):
      wave = 2 * math.pi / plain
      if wave < s.original / s.high:
        out.append(plain)
      elif wave > s.original / s.low:
        out.append(plain / s.factor)
      else:
        kept = (s.original / wave - s.low) / (s.high - s.low)
        out.append((1 - kept) * plain / s.factor + kept * plain)
    else:
      factors = s.long if s.maximum > s.original else s.short
      out.append(plain / factors[i])
  if isinstance(s, c.Llama3RopeConfig):
    factor = 1.0
  elif isinstance(s, c.LongRopeConfig):
    factor = math.sqrt(1 + math.log(s.factor) / math.log(s.original))
  else:
    top = 0.1 * (s.mscale or 1.0) * math.log(s.factor) + 1
    factor = top if s.mscale is None else top / (
        0.1 * s.mscale_all_dim * math.log(s.factor) + 1)
  return np.array(out), factor


@pytest.mark.parametrize('name', GOLDENS)
def test_golden(name):
  theta, scaling = GOLDENS[name]
  with np.load(GOLDEN / f'rope_{name.removesuffix("_short")}.npz') as g:
    golden = g['inv_freq_long' if name == 'longrope' else 'inv_freq']
    factor = float(g['attention_factor'])
  inverse, got = scaled(64, theta, scaling)
  assert inverse.shape == (32,) and inverse.dtype == np.float32
  truth, true_factor = oracle(64, theta, scaling)
  off = lambda x: np.abs(x / truth - 1).max()
  # The reference is float32: ours may be off ten times as far as it is.
  assert EPS / 2 < off(golden) < 4 * EPS
  assert off(inverse) < 10 * off(golden)
  assert got == pytest.approx(true_factor, rel=1e-14)
  assert got == pytest.approx(factor, rel=EPS)


def test_scalings_change_what_they_should():
  plain = rope.frequencies(64, theta=1e4)
  yarn, factor = rope.yarn(64, theta=1e4, factor=40.0, original=4096)
  np.testing.assert_array_equal(yarn[:10], plain[:10])
  np.testing.assert_allclose(yarn[-8:], plain[-8:] / 40, rtol=EPS)
  assert (np.diff(yarn) < 0).all() and factor > 1
  loose, _ = rope.yarn(64, theta=1e4, factor=40.0, original=4096,
                       truncate=False)
  assert (loose != yarn).any()
  np.testing.assert_allclose(
      loose, oracle(64, 1e4, dataclasses.replace(YARN, truncate=False))[0],
      rtol=4 * EPS)
  assert rope.yarn(64, theta=1e4, factor=16.0, original=4096,
                   attention_factor=1.0)[1] == 1.0
  assert rope.yarn(64, theta=1e4, factor=1.0, original=4096)[1] == 1.0
  assert rope.magnitude(0.5, 3.0) == 1.0
  assert rope.longrope(64, theta=1e4, short=(1.0,) * 32, long=(2.0,) * 32,
                       original=4096, maximum=8192)[1] == pytest.approx(
                           math.sqrt(1 + 1 / 12))


def test_a_step_between_fast_and_slow():
  """Limits at one channel divide nothing by zero."""
  inverse, _ = rope.yarn(4, theta=1e4, factor=2.0, original=5)
  np.testing.assert_allclose(inverse, [1.0, 0.005], rtol=EPS)


def test_partial_rope_is_scaled_by_its_own_width():
  inverse, _ = scaled(64, 1e4, YARN, fraction=0.5)
  np.testing.assert_array_equal(inverse, scaled(32, 1e4, YARN)[0])


# The rotation.

rotate = jit(rope.rotate, static_argnames=('layout', 'side', 'factor'))


def turned(x, positions, inverse, layout, side, factor):
  """Pairs of channels as complex numbers, float64."""
  x, half = np.array(x, np.float64), len(inverse)
  first = 0 if side == 'leading' else x.shape[-1] - 2 * half
  for i in range(half):
    a, b = (i, i + half) if layout == 'half' else (2 * i, 2 * i + 1)
    z = x[..., first + a] + 1j * x[..., first + b]
    z = z * factor * np.exp(
        1j * np.asarray(positions, np.float64)[..., None] * inverse[i])
    x[..., first + a], x[..., first + b] = z.real, z.imag
  return x


@pytest.mark.parametrize('side', rope.SIDES)
@pytest.mark.parametrize('layout', rope.LAYOUTS)
def test_layout_and_side(layout, side):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 4, 3, 10)).astype(np.float32)
  positions = np.array([[0, 1, 2, 3], [5, 6, 30, 31]], np.int32)
  inverse = rope.frequencies(10, theta=100.0, fraction=0.6)
  how = {'layout': layout, 'side': side}
  y = rotate(x, positions, inverse, **how, factor=1.25)
  want = turned(x, positions, inverse, layout, side, 1.25)
  np.testing.assert_allclose(y, want, rtol=40 * EPS, atol=40 * EPS)
  still = slice(6, None) if side == 'leading' else slice(4)
  np.testing.assert_array_equal(y[..., still], x[..., still])
  # The rotation by -position is the inverse, exactly so at position 0.
  back = rotate(rotate(x, positions, inverse, **how), -positions, inverse,
                **how)
  np.testing.assert_allclose(back, x, rtol=0, atol=8 * EPS)
  np.testing.assert_array_equal(back[0, 0], x[0, 0])


def test_float64(float64):
  x = np.random.default_rng(1).normal(size=(1, 2, 1, 4))
  positions = np.array([[3, 70_000]], np.int32)
  inverse = rope.frequencies(4, theta=1e4)
  y = rope.rotate(x, jnp.asarray(positions), inverse, layout='interleaved')
  np.testing.assert_allclose(
      y, turned(x, positions, inverse.astype(np.float64), 'interleaved',
                'leading', 1.0), rtol=0, atol=1e-11)


def test_rotation_of_a_config():
  x = np.random.default_rng(2).normal(size=(1, 3, 2, 64)).astype(np.float32)
  positions = np.arange(3, dtype=np.int32)[None] + 100
  config = c.RopeConfig(scaling=YARN, layout='interleaved', side='trailing',
                        fraction=0.5)
  inverse, factor = rope.yarn(64, theta=1e4, fraction=0.5, factor=40.0,
                              original=4096)
  np.testing.assert_array_equal(
      rotary.rotation(config, 64)(x, positions),
      rope.rotate(x, positions, inverse, layout='interleaved',
                  side='trailing', factor=factor))
  assert rotary.rotation(None, 64)(x, positions) is x


def test_errors():
  x, positions = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 1), np.int32)
  inverse = rope.frequencies(4, theta=1e4)
  for wrong in ({'layout': 'halves'}, {'side': 'left'}):
    with pytest.raises(ValueError, match=f'got.*{[*wrong.values()][0]}'):
      rope.rotate(x, positions, inverse, **wrong)
  with pytest.raises(ValueError, match='at least 4 channels .* got 2'):
    rope.rotate(x[..., :2], positions, inverse)
  with pytest.raises(ValueError, match='expected 4 factors.*got 32'):
    rotary.rotation(c.RopeConfig(scaling=LONG), 8)


@pytest.mark.parametrize('make, match', [
    (lambda: c.RopeConfig(layout='gptj'), "RopeConfig.layout: .*'gptj'"),
    (lambda: c.RopeConfig(side='both'), "RopeConfig.side: .*'both'"),
    (lambda: c.YarnConfig(beta_fast=1.0), '0 < beta_slow < beta_fast'),
    (lambda: c.YarnConfig(factor=0.0), 'factor: expected >= 1'),
    (lambda: c.Llama3RopeConfig(low=4.0), '0 < low < high'),
    (lambda: c.LongRopeConfig([1.0], (1.0,)), 'short: expected a tuple'),
    (lambda: c.LongRopeConfig((1.0,), (0.0,)), 'long: .*above 0'),
])
def test_config_errors(make, match):
  with pytest.raises(ValueError, match=match):
    make()


@pytest.mark.parametrize('scaling', [s for _, s in GOLDENS.values()])
def test_round_trip(scaling):
  config = c.AttentionConfig(rope=c.RopeConfig(scaling=scaling))
  assert c.from_dict(c.to_dict(config)) == config
  other = c.override(config, 'rope.scaling.factor=2')
  assert other.rope.scaling.factor == 2.0
