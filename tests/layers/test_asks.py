"""A fallback of slots that answers only those who ask, and what that costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import single

from statejax import config as c
from statejax.layers import block_sparse, slot_log

SLOTS = c.SlotsConfig(
    c.SlotRules(slots=3, key=4, value=5, span=3, key_span=2, aliases=2),
    segment=5, events=3, statement=6, confidence=0.5, asks=True,
    fallback=c.LogConfig(block=4, k=2))


def made(seed=0, **change):
  config = dataclasses.replace(SLOTS, **change)
  params, x = single.draw(config, 12, seed)
  return config, params, x


def one_step(config, params, x, capacity=0, hints=None):
  n = jnp.zeros(x.shape[0], jnp.int32)
  return single.step(config, params, x, single.empty(
      config, x.shape[0], capacity), n, hints=hints)


def asked(params, x):
  return np.argmax(np.asarray(x) @ params['ask']['kernel'], axis=-1) == 1


@pytest.mark.slow
def test_only_those_who_ask_are_answered():
  """By the answer that they get where all ask; slots read as ever."""
  config, params, x = made()
  y, state, said = one_step(config, params, x)
  every = dataclasses.replace(config, asks=False)
  both, same, _ = one_step(every, params, x)
  alone, *_ = one_step(dataclasses.replace(every, fallback=None), params, x)
  who, fires = asked(params, x), np.asarray(said['lent']['fires'])
  # Something of everything.
  assert all((who == a)[fires == b].any() for a in (0, 1) for b in (0, 1))
  np.testing.assert_array_equal(y[fires], alone[fires])
  np.testing.assert_array_equal(y[~fires & who], both[~fires & who])
  assert not np.any(y[~fires & ~who])
  assert np.all(np.any(both[~fires] != 0, axis=-1))
  jax.tree.map(np.testing.assert_array_equal, state, same)


@pytest.mark.slow
def test_chunks_by_hand():
  """Two blocks of 4 or what there is of them; one of a slot; none."""
  config, params, x = made()
  lent = one_step(config, params, x)[2]['lent']
  for row in range(2):
    for t in range(30):
      want = (1 if lent['fires'][row, t] else
              min(2, t // 4 + 1) if asked(params, x)[row, t] else 0)
      assert lent['active'][row, t] == want
  assert set(np.unique(lent['active'])) == {0, 1, 2}


@pytest.mark.slow
def test_nobody_asks_nobody_looks(monkeypatch):
  """The step attends once where one token of a row asks, else never."""
  calls = []
  attend_to = block_sparse.attend_to
  def counted(*args, **kwargs):
    jax.debug.callback(lambda: calls.append(1))
    return attend_to(*args, **kwargs)
  monkeypatch.setattr(block_sparse, 'attend_to', counted)
  jax.clear_caches()
  config, params, x = made()
  # Whoever has a large first number asks.
  kernel = np.zeros((12, 2), np.float32)
  kernel[0, 1] = 1
  params = params | {'ask': {'kernel': jnp.asarray(kernel)}}
  nobody = x.at[..., 0].set(-1)
  counts = []
  for some in (nobody, nobody.at[1, 7, 0].set(1)):
    calls.clear()
    y, *_ = jax.block_until_ready(one_step(config, params, some))
    jax.effects_barrier()
    counts.append(len(calls))
  assert counts == [0, 1]
  jax.clear_caches()


@pytest.mark.slow
def test_one_by_one_is_at_once(monkeypatch):
  """Into a long store those who ask look one after the other."""
  config, params, x = made()
  def outputs():
    jax.clear_caches()
    state, out = single.empty(config, 2, 30), []
    for begin in (0, 15):
      y, state, said = single.step(
          config, params, x[:, begin:begin + 15], state,
          jnp.full((2,), begin, jnp.int32))
      out += [y, said['lent']['active']]
    return out, state
  want = outputs()
  one_by_one, calls = slot_log._one_by_one, []
  monkeypatch.setattr(slot_log, '_one_by_one',
                      lambda *args: calls.append(1) or one_by_one(*args))
  monkeypatch.setattr(slot_log, '_LONG', 29)
  got = outputs()
  assert calls
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got,
               want)
  jax.clear_caches()


@pytest.mark.slow
def test_hints_teach_who_asks():
  """Cross-entropy of the known ones."""
  config, params, x = made()
  hint = jnp.where(jnp.arange(30)[None] % 3 == 0, -1,
                   jnp.arange(30, dtype=jnp.int32)[None] % 2)
  hint = jnp.broadcast_to(hint, (2, 30))
  run = lambda kernel: one_step(
      config, params | {'ask': {'kernel': kernel}}, x,
      hints={'ask': hint})[2]['losses']
  losses = run(params['ask']['kernel'])
  logp = np.asarray(jax.nn.log_softmax(x @ params['ask']['kernel']))
  want = -sum(logp[b, t, int(hint[b, t])] for b in range(2) for t in range(30)
              if hint[b, t] >= 0)
  np.testing.assert_allclose(losses['ask_loss'], want, rtol=1e-5)


@pytest.mark.slow
def test_without_hints_asking_learns_from_the_answer():
  """As if the probability weighed what the fallback says."""
  config, params, x = made()
  target = jax.random.normal(jax.random.key(7), (2, 30, 12))
  def total(kernel):
    y, _, said = one_step(config, params | {'ask': {'kernel': kernel}}, x)
    return jnp.sum(y * target), (y, said['lent']['fires'])
  kernel = params['ask']['kernel']
  (_, (y, fires)), grad = jax.value_and_grad(total, has_aux=True)(kernel)
  counts = ~np.asarray(fires) & asked(params, x)
  gain = np.where(counts, np.sum(y * target, axis=-1), 0.)
  want = jax.grad(lambda w: jnp.sum(
      jax.nn.softmax(x @ w)[..., 1] * gain))(kernel)
  np.testing.assert_allclose(grad, want, atol=1e-5)
  assert np.any(want != 0)


def test_without_asks_there_is_no_parameter():
  _, params, _ = made(asks=False)
  assert 'ask' not in params and 'ask' in made()[1]


def test_refused():
  with pytest.raises(ValueError, match='expected a fallback with asks=True'):
    dataclasses.replace(SLOTS, fallback=None)
