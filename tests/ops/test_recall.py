"""Reads of a slot bank against plain numpy, and what they must not touch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax.ops import lifecycle, recall
from statejax.ops import slots as sl

RULES = c.SlotRules(slots=6, key=8, value=5, ring=1, span=1, key_span=1,
                    aliases=2)


def made(seed=0):
  """A bank with a slot of every kind, and the keys that were written."""
  rng = np.random.default_rng(seed)
  keys = jnp.asarray(np.linalg.qr(rng.normal(size=(8, 8)))[0][:6], jnp.float32)
  # 0 twice, 1, 2 for another, 3 to expire, 4 deleted, 5 another name of 1.
  which = jnp.array([[0, 0, 1, 2, 3, 4, 4, 1]])
  op = [[sl.WRITE] * 6 + [sl.DELETE, sl.ALIAS]]
  events = sl.events(
      RULES, op, key=keys[which], name=keys[jnp.full((1, 8), 5)],
      value=jnp.asarray(rng.normal(size=(1, 8, 5)), jnp.float32),
      span=jnp.arange(8, dtype=jnp.int32)[None, :, None],
      principal=jnp.where(which == 2, 7, -1),
      expires=jnp.where(which == 3, 20, -1))
  bank, receipts = lifecycle.commit(RULES, sl.empty(RULES, 1), events,
                                    jnp.zeros(1, jnp.int32))
  assert (receipts.outcome == sl.COMMITTED).all()
  return bank, events.value, keys


def ask(keys, principal=-1, time=10, ago=0):
  count = keys.shape[0]
  fill = lambda x: jnp.broadcast_to(jnp.int32(x), (1, count))
  return recall.Ask(keys[None], fill(principal), fill(time), fill(ago),
                    jnp.ones((1, count), bool))


def read(bank, question, sight=None, k=1):
  sight = recall.Sight() if sight is None else sight
  return run(bank, question, sight, k)


@functools.partial(jax.jit, static_argnums=3)
def run(bank, question, sight, k):
  found = recall.choose(bank, question, sight, k)
  return found, *recall.read(bank, question, found, sight)


def test_each_slot_is_seen_by_whom_and_when_it_should():
  bank, _, keys = made()
  ids = lambda **more: read(bank, ask(keys, **more))[0]
  seen = lambda **more: [
      int(i) if f else None
      for i, f in zip(ids(**more).ids[0, :, 0], ids(**more).fires[0])]
  # Slots in the order of their first writes; 5 is another name of 1, -1 is that
  # a tombstone was found.
  assert seen() == [0, 1, None, 3, -1, 1]
  assert seen(time=20) == [0, 1, None, None, -1, 1]
  assert seen(principal=7) == [0, 1, 2, 3, -1, 1]
  assert seen(principal=8) == [0, 1, None, 3, -1, 1]
  assert seen(ago=1) == [0, None, None, None, -1, None]
  assert seen(ago=2) == [None] * 4 + [-1, None]


def test_the_value_is_that_of_the_slot_and_version():
  bank, value, keys = made()
  sharp = recall.Sight(kappa=1e4)
  _, y, confidence = read(bank, ask(keys[:2]), sharp)
  np.testing.assert_array_equal(y[0], value[0, jnp.array([1, 2])])
  assert (confidence > 0.99).all()
  _, y, _ = read(bank, ask(keys[:1], ago=1), sharp)
  np.testing.assert_array_equal(y[0, 0], value[0, 0])


def test_a_tombstone_is_read_where_it_is_nearest_and_near_enough():
  bank, _, keys = made()
  bank = dataclasses.replace(bank, owner=bank.owner.at[0, 4].set(7))
  toward = lambda i, x: sl.unit(keys[4:5] + x * keys[i:i + 1])
  def found(query, **more):
    seen, y, confidence = read(bank, ask(query, **more))
    assert not y.any() or seen.ids[0, 0, 0] >= 0
    return int(seen.ids[0, 0, 0]), bool(seen.fires[0, 0])
  assert found(toward(0, 0.5), principal=7) == (-1, True)
  # Something that lives is nearer; nothing is near; it is another's.
  assert found(toward(0, 2.), principal=7) == (0, True)
  assert found(toward(5, 3.), principal=7)[0] == 1
  assert not found(sl.unit(keys[4:5] + 1.6 * keys[2:3]))[1]
  assert not found(keys[4:5])[1]
  # What it is near to learns, as if there were a choice.
  grad = jax.grad(lambda q: read(bank, ask(q, principal=7))[2].sum())(
      toward(0, 0.5))
  assert jnp.all(grad @ keys[4] > 0)
  noted = recall.noted(bank, ask(keys[4:5], principal=7), recall.choose(
      bank, ask(keys[4:5], principal=7), recall.Sight()))
  assert not noted.reads.any()


@pytest.mark.parametrize('k', [1, 3, 6])
def test_weights_are_a_softmax_over_all_that_is_cut(k):
  bank, _, _ = made()
  query = sl.unit(jnp.asarray(np.random.default_rng(1).normal(size=(9, 8)),
                              jnp.float32))
  sight = recall.Sight(kappa=3., scale=1., shift=-5.)
  # Nobody here sees the tombstone.
  bank = dataclasses.replace(bank, owner=bank.owner.at[0, 4].set(8))
  found, y, confidence = read(bank, ask(query, principal=7), sight, k)
  assert found.fires.all()
  keys, names = np.array(bank.key[0]), np.array(bank.alias_key[0])
  for t, q in enumerate(np.asarray(query)):
    score = keys @ q
    score[1] = max(score[1], names[0] @ q)
    score = score[:4]  # the others are empty or deleted
    a = np.exp(3 * score) / np.exp(3 * score).sum()
    best = sorted(range(4), key=lambda m: (-score[m], m))[:k]
    assert [i for i in found.ids[0, t].tolist() if i >= 0] == best
    want = sum(a[m] * np.asarray(bank.value[0, m, 0]) for m in best)
    np.testing.assert_allclose(y[0, t], want, atol=1e-6)
    np.testing.assert_allclose(
        confidence[0, t], 1 / (1 + np.exp(-(score[best[0]] + 5))), rtol=1e-5)


def test_what_is_not_selected_gives_no_byte_and_no_gradient():
  bank, _, keys = made()
  poisoned = bank.value.at[:, 1:].set(jnp.nan)
  bad = dataclasses.replace(bank, value=poisoned)
  def total(value, query):
    held = dataclasses.replace(bad, value=value)
    return jnp.sum(read(held, ask(query))[1])
  grads = jax.grad(total, (0, 1))(poisoned, keys[:1])
  np.testing.assert_array_equal(read(bad, ask(keys[:1]))[1],
                                read(bank, ask(keys[:1]))[1])
  assert jnp.isfinite(grads[1]).all() and jnp.any(grads[1] != 0)
  assert not jnp.any(grads[0][:, 1:] != 0) and jnp.all(
      grads[0][0, 0, 0] > 0)


def test_a_doubtful_read_is_exactly_nothing():
  bank, _, keys = made()
  # Not even of a value that is no number.
  bank = dataclasses.replace(bank, value=jnp.full_like(bank.value, jnp.nan))
  far = sl.unit(keys[:1] + 3 * keys[2:3])
  found, y, confidence = read(bank, ask(far))
  assert not found.fires.any() and not y.any() and 0 < confidence[0, 0] < 0.5
  noted = recall.noted(bank, ask(far), found)
  assert not noted.reads.any()
  certain = recall.Sight(shift=-100.)
  assert not read(sl.empty(RULES, 1), ask(keys), certain)[0].fires.any()
  nothing, y, confidence = read(sl.empty(RULES, 1), ask(keys))
  assert (nothing.ids == -1).all() and not y.any() and not confidence.any()
  grad = jax.grad(lambda q: jnp.sum(read(sl.empty(RULES, 1), ask(q))[1]))(keys)
  assert not grad.any()


def test_reads_are_counted_and_dated():
  bank, _, keys = made()
  question = ask(keys[jnp.array([0, 0, 1, 2])])
  question = dataclasses.replace(
      question, time=jnp.array([[5, 6, 7, 8]]),
      real=jnp.array([[True, True, True, False]]))
  bank = recall.noted(bank, question, recall.choose(
      bank, question, recall.Sight()))
  assert bank.reads[0].tolist() == [2, 1, 0, 0, 0, 0]
  assert bank.t_first[0].tolist() == [5, 7, -1, -1, -1, -1]
  assert bank.t_read[0].tolist() == [6, 7, -1, -1, -1, -1]
  again = recall.noted(bank, ask(keys[:1], time=9), recall.choose(
      bank, ask(keys[:1], time=9), recall.Sight()))
  assert again.t_first[0, 0] == 5 and again.t_read[0, 0] == 9


def test_what_is_in_quarantine_keeps_the_caller_from_looking_elsewhere():
  bank, _, keys = made()
  bank = dataclasses.replace(
      bank, status=bank.status.at[0, 1].set(sl.QUARANTINED))
  found, y, _ = read(bank, ask(keys[1:2]))
  assert int(found.ids[0, 0, 0]) == -1 and bool(found.fires[0, 0])
  assert not y.any()


@pytest.mark.parametrize('mine', [0, 1])
def test_what_one_owns_comes_before_what_nobody_owns(mine):
  """In whatever slot, as the same words are the same address but for rounding;
  others read what nobody owns."""
  bank, _, keys = made()
  near = sl.unit(keys[0] + 1e-6 * keys[1])
  shared = 1 - mine
  bank = dataclasses.replace(
      bank, key=bank.key.at[0, :2].set(keys[0]).at[0, shared].set(near),
      owner=bank.owner.at[0, mine].set(7), alias_oid=bank.alias_oid * 0 - 1)
  one = lambda who: int(read(
      bank, ask(near[None], principal=who))[0].ids[0, 0, 0])
  assert one(7) == mine and one(8) == shared
