import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from configs import tiny_slots
from statejax import config as c
from statejax.model import LanguageModel
from statejax.train import loop, step


def batch_of(config, **changes):
  """One batch; two documents per row, the last tokens padding."""
  source = loop.make_task(config)
  items = [source[i] for i in range(config.train.rows)]
  batch = {k: np.stack([item[k] for item in items]) for k in items[0]}
  segments = np.zeros_like(batch['tokens'])
  segments[:, 9:], segments[:, 14:] = 1, -1
  batch['targets'][:, 14:] = -1
  return {**batch, 'segments': segments, **changes}


def updated(config, count=2, batch=None):
  """Params and metrics after some updates on the same batch."""
  model = LanguageModel(config.model)
  state = step.initial(model, config.train)
  batch = batch_of(config) if batch is None else batch
  for _ in range(count):
    state, metrics = step.update(model, config.train, state, batch)
  return state, {k: float(v) for k, v in metrics.items()}


def loss_by_hand(model, params, batch, z_loss=0.0):
  """Mean over asked tokens, written down once more."""
  logits, _ = model.step(params, model.init_state(8, 0), batch['tokens'],
                         segment_ids=batch['segments'])
  rows, columns = np.nonzero(batch['targets'] >= 0)
  logits = logits[rows, columns]
  norm = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
  hit = logits[np.arange(len(rows)), batch['targets'][rows, columns]]
  return jnp.mean(norm - hit + z_loss * norm**2)


@pytest.mark.parametrize('z_loss', [
    0.1, pytest.param(0.0, marks=pytest.mark.slow)])
def test_loss_and_gradient(z_loss):
  config = small.get_config(z_loss=z_loss)
  model, batch = LanguageModel(config.model), batch_of(config)
  params = step.initial(model, config.train).params
  _, metrics = updated(config, 1, batch)
  by_hand = lambda p: loss_by_hand(model, p, batch)
  plain = jax.jit(by_hand)(params)
  np.testing.assert_allclose(metrics['loss'], plain, rtol=1e-5)
  grads = jax.jit(jax.grad(
      lambda p: loss_by_hand(model, p, batch, z_loss)))(params)
  np.testing.assert_allclose(
      metrics['grad_norm'], optax.tree.norm(grads), rtol=1e-4)
  sums = step.evaluate(model, params, batch)
  asked = batch['targets'] >= 0
  assert int(sums.count) == asked.sum()
  np.testing.assert_allclose(sums.loss / sums.count, plain, rtol=1e-5)
  assert metrics['accuracy'] == pytest.approx(
      float(sums.correct) / asked.sum(), abs=1e-6)


def assert_close(left, right, atol=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left,
               right)


@pytest.mark.parametrize('accumulate', [
    2, pytest.param(8, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing(accumulate):
  config = small.get_config(accumulate=accumulate)
  batch = batch_of(config)
  batch['targets'][:3] = -1  # so that micro-batches ask unequally often
  state, metrics = updated(config, 3, batch)
  other, expected = updated(small.get_config(), 3, batch)
  assert metrics == pytest.approx(expected, abs=1e-5)
  assert_close(state.params, other.params)


@pytest.mark.slow
def test_remat_changes_nothing():
  state, metrics = updated(small.get_config([small.KDA], {'remat': True}))
  other, expected = updated(small.get_config([small.KDA]))
  assert metrics == pytest.approx(expected, abs=1e-5)
  assert_close(state.params, other.params)


def test_padding_is_not_learned():
  config = small.get_config()
  batch = batch_of(config)
  other = {k: np.where(batch['segments'] < 0, 5, x) for k, x in batch.items()
           if k == 'tokens'}
  assert updated(config, 2, {**batch, **other})[1] == updated(
      config, 2, batch)[1]


def test_a_batch_that_asks_nothing():
  config = small.get_config(weight_decay=0.0)
  batch = batch_of(config)
  batch['targets'][:] = -1
  state, metrics = updated(config, 3, batch)
  assert metrics['loss'] == metrics['grad_norm'] == metrics['accuracy'] == 0
  first = step.initial(LanguageModel(config.model), config.train)
  assert_close(state.params, first.params, atol=0)


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_parameters():
  config = small.get_config(model={'dtype': 'bfloat16'})
  state, metrics = updated(config)
  floats = [x.dtype for x in jax.tree.leaves((state.params, state.optimizer))
            if jnp.issubdtype(x.dtype, jnp.floating)]
  assert set(floats) == {jnp.dtype('float32')}
  exact = updated(small.get_config())[1]
  assert metrics['loss'] == pytest.approx(exact['loss'], abs=0.05)
  assert metrics['loss'] != exact['loss']


def test_muon_learns():
  config = small.get_config(optimizer='muon', steps=40)
  before = updated(config, 1)[1]['loss']
  assert updated(config, 12)[1]['loss'] < before - 0.3


def test_update_consumes_its_state():
  config = small.get_config()
  model = LanguageModel(config.model)
  state = step.initial(model, config.train)
  new, _ = step.update(model, config.train, state, batch_of(config))
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert int(new.step) == 1


def test_labels_are_learned_or_refused():
  config = small.get_config()
  model, batch = LanguageModel(config.model), batch_of(config)
  params = step.initial(model, config.train).params
  zero = np.zeros_like(batch['tokens'])
  for name, label, why in (
      ('wants', zero, "expected some of want, .*got 'wants'"),
      ('want', zero[:, 1:], r'want: expected integers of shape .8, 16'),
      ('want', zero * 1., 'want: expected integers')):
    with pytest.raises(ValueError, match=why):
      step.score(model, params, batch | {name: label})


def slots_of(accumulate):
  """A model of two layers, one of slots, and how it is trained."""
  config = tiny_slots.get_config()
  model = dataclasses.replace(config.model, groups=(
      c.GroupConfig(('memory', 'kda')),))
  return LanguageModel(model), dataclasses.replace(
      config.train, accumulate=accumulate, length=16)


def labelled_batch():
  """Four rows of 16 tokens; few have a label, and none in the last row."""
  rng = np.random.default_rng(0)
  draw = lambda high: rng.integers(0, high, (4, 16), dtype=np.int32)
  want = np.where(draw(4) == 0, draw(3), -1)
  want[3] = -1
  return {'tokens': draw(64), 'targets': draw(64),
          'segments': np.zeros((4, 16), np.int32), 'want': want}


def test_a_label_counts_per_token_that_has_it():
  """However few have one, and however the batch is split."""
  batch, found = labelled_batch(), []
  for accumulate in (1, 2):
    model, train = slots_of(accumulate)
    state = step.initial(model, train)
    sums = step.evaluate(model, state.params, batch)
    new, metrics = step.update(model, train, state, batch)
    found.append(metrics['grad_norm'])
    np.testing.assert_allclose(
        metrics['layers'], sums.labels['want'] / (batch['want'] >= 0).sum(),
        rtol=1e-5)
  assert 0.3 < float(metrics['layers']) < 5  # nats: of six wants, untrained
  np.testing.assert_allclose(*found, rtol=1e-4)
  for _ in range(15):
    new, after = step.update(model, train, new, batch)
  assert after['layers'] < 0.8 * metrics['layers']
