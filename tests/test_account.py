"""Bytes by layer kind are those of the leaves, and of published models."""

import fractions
import importlib

import jax
import pytest

from experiments import published_bytes
from statejax import account as ac
from statejax import config as c
from statejax import state as st
from statejax.model import LanguageModel


@pytest.mark.parametrize('name', [
    'tiny_kda', 'tiny_dsa', 'tiny_compressed', 'tiny_sharing', 'tiny_hyper',
    'tiny_ksa', 'tiny_slots', 'tiny_segment'])
def test_equals_the_leaves(name):
  """Allocated ones, at a length that no block divides."""
  config = importlib.import_module(f'configs.{name}').get_config().model
  found = ac.account(config, 101)
  state = LanguageModel(config).init_state(1, 101)
  assert set(found) == set(state.layers)
  for key, a in found.items():
    real = st.nbytes(state.layers[key])
    assert a.total == sum(real.values()) and a.fixed == real['fixed']
    assert a.layers == config.names.count(key)
    # A block that 101 tokens do not fill has a slot all the same.
    assert 0 <= a.fixed + 101 * a.per_token <= a.total
  whole = ac.total(found)
  rest = 4 + 4 + 16 + 8
  assert whole.total + rest == sum(st.nbytes(state).values())
  assert whole.layers == len(config.names)


def test_bytes_per_token_are_exact():
  hca = ac.account(published_bytes.deepseek_v4_flash(), 1000)['hca']
  assert hca.per_token == 20 * fractions.Fraction(1024, 128)
  assert hca.total == hca.fixed + 20 * 8 * 1024


def test_published():
  """Nothing is allocated: a million tokens of every model."""
  for row in published_bytes.rows(published_bytes.measure()):
    assert row.ok, row


def test_no_tokens():
  with pytest.raises(ValueError, match='tokens >= 1, got 0'):
    ac.account(published_bytes.qwen35(), 0)


MLP = c.SwiGLUConfig(8)
LAYERS = (
    c.LayerConfig('full', c.AttentionConfig(
        heads=2, kv_heads=1, key=8, value=4), MLP),
    c.LayerConfig('ring', c.AttentionConfig(
        heads=2, kv_heads=1, key=8, value=4, window=16), MLP),
    c.LayerConfig('mla', c.MLAConfig(
        heads=3, nope=8, rope_width=4, value=6, rank=8), MLP),
    c.LayerConfig('kda', c.KDAConfig(heads=2, key=4, value=4, rank=4), MLP))


@pytest.mark.parametrize('tied', [True, False])
def test_operations(tied):
  config = c.ModelConfig(
      vocab=50, width=16, layers=LAYERS, tied=tied,
      groups=(c.GroupConfig(('kda', 'full', 'full', 'ring', 'mla')),))
  params = jax.tree.leaves(jax.eval_shape(
      LanguageModel(config).init, jax.random.key(0)))
  active = sum(x.size for x in params) - (0 if tied else 50 * 16)
  for tokens in (0, 1, 16, 1000):
    # What the queries of a row see, each key and each value of it once.
    pairs = sum(range(1, tokens + 1)) * 2 - tokens
    ring = 2 * sum(min(t, 16) for t in range(1, tokens + 1)) - min(tokens, 16)
    exact = 2 * active * tokens + 2 * pairs * 12 * 2 + ring * 12 * 2 + (
        pairs * 18 * 3)
    assert ac.mflop(config, tokens) == exact // 10 ** 6
  with pytest.raises(ValueError, match='tokens >= 0, got -1'):
    ac.mflop(config, -1)
