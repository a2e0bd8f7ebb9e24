"""The lifecycle of slots against plain Python, event by event."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import ops
from statejax import state as st
from statejax.config.slots import MODES, POLICIES
from statejax.ops import lifecycle, recall
from statejax.ops import slots as sl
from tests.ops import slot_oracle

SMALL = c.SlotRules(slots=4, key=8, value=3, ring=2, span=2, key_span=2,
                    aliases=2)
FIELDS = ('op', 'key', 'name', 'value', 'span', 'key_span', 'source', 'time',
          'salience', 'principal', 'expires', 'slot', 'expect', 'steps', 'host')


def draw(rules, rng, rows, segments, count, busy=()):
  """Random events as a list of rows of segments of dicts."""
  keys = rng.normal(size=(7, rules.key)).astype(np.float32)
  # Two that are nearly the same, and one that is no key.
  keys[1] = keys[0] + 0.02 * keys[1]
  keys /= np.linalg.norm(keys, axis=1, keepdims=True)
  keys[-1] = 0
  ops = np.array([sl.WRITE] * 12 + [sl.DELETE] * 2 + [sl.REKEY] * 2 + [
      *range(15), *busy])
  named = 0.9 if rules.mode == 'router' else 0.2
  def one(time):
    which, other = rng.integers(7, size=2)
    rare = lambda p, low, high: int(
        rng.integers(low, high) if rng.random() < p else -1)
    return {
        'op': int(rng.choice(ops)), 'key': keys[which], 'name': keys[other],
        'value': np.float32(rng.normal(size=rules.value)),
        'span': np.array([rare(0.95, 0, 3), rare(0.5, 0, 2)]),
        # A host says no source, and may call an object by other tokens.
        'key_span': np.array([which if rng.random() < 0.9 else rare(0.5, 0, 7),
                              0]),
        'source': rng.integers(9, size=2) if rng.random() < 0.7 else (
            np.array([-1, -1])),
        # Now and then of what was said before.
        'time': max(0, time - 25 * (rng.random() < 0.1)),
        'salience': np.float32(rng.random()), 'principal': rare(0.3, 0, 1),
        'expires': rare(0.2, time, time + 40),
        'slot': rare(named, 0, rules.slots + 1),
        'expect': rare(0.1, 0, 3), 'steps': int(rng.integers(4)),
        'host': bool(rng.random() < 0.3)}
  return [[[one(10 * s + e) for e in range(count)] for s in range(segments)]
          for _ in range(rows)]


def arrays(rules, found):
  """`Events` [B, S, E] of what `draw` returns."""
  stack = lambda name: np.array(
      [[[e[name] for e in s] for s in row] for row in found])
  given = {n: jnp.asarray(stack(n)) for n in FIELDS}
  shaped = {n: x if n in ('key', 'name', 'value', 'salience') else
            x.astype(bool if n == 'host' else jnp.int32)
            for n, x in given.items()}
  return sl.Events(**shaped)


def same(bank, row, oracle):
  """Asserts that a row of a bank is what the oracle says, to the bit."""
  want = oracle.arrays()
  for path, x, axes, _ in st.leaves(bank):
    got = np.take(np.asarray(x), row, axis=axes.index('batch'))
    np.testing.assert_array_equal(got, want[path], err_msg=path)


CASES = [pytest.param(m, p, marks=pytest.mark.slow if p in (
    'oldest', 'reject') else [])
         for m, p in itertools.product(MODES, POLICIES)
         if m == 'content' or p == 'lru']


@pytest.mark.parametrize('mode, policy', CASES)
def test_every_event_does_what_plain_python_does(mode, policy):
  rules = dataclasses.replace(SMALL, mode=mode, policy=policy, ways=2)
  rng = np.random.default_rng(0)
  found = draw(rules, rng, 6, 12, 8)
  oracles = [slot_oracle.Row(rules) for _ in found]
  bank = sl.empty(rules, len(found))
  run = jax.jit(lifecycle.commit, static_argnums=0)
  seen = set()
  for s in range(12):
    events = arrays(rules, [[row[s]] for row in found])
    events = jax.tree.map(lambda x: x[:, 0], events)
    now = 10 * s + 8
    bank, receipts = run(rules, bank, events, jnp.full(len(found), now))
    for b, oracle in enumerate(oracles):
      want = [sl.OUTCOMES[0] if o is None else o
              for o in oracle.commit(found[b][s], now)]
      got = [sl.OUTCOMES[i] for i in np.asarray(receipts.outcome[b])]
      assert got == want, (s, b, [sl.OPS[min(e['op'], 13)]
                                  for e in found[b][s]])
      seen |= set(got)
      same(bank, b, oracle)
  assert seen == set(sl.OUTCOMES)


@pytest.mark.slow
def test_one_pass_over_segments_is_segment_after_segment():
  """Banks, receipts, reads and their effect on what is evicted, to the bit."""
  rules = dataclasses.replace(SMALL, slots=3)
  rng = np.random.default_rng(1)
  events = arrays(rules, draw(rules, rng, 3, 6, 4, busy=[sl.WRITE] * 20))
  now = jnp.broadcast_to(10 * jnp.arange(6) + 4, (3, 6))
  ask = asks(rules, rng, (3, 6, 5), now - 5)
  sight = recall.Sight(shift=2.)

  def turn(slot, alias, ask):
    found = recall.look(slot, alias, ask, sight, 2)
    return recall.note(slot, ask, found), found

  start = sl.empty(rules, 3)
  last, before, receipts, found = jax.jit(
      lambda *a: lifecycle.segments(rules, *a, turn, ask))(start, events, now)
  bank, together = start, []
  for s in range(6):
    for field in dataclasses.fields(bank):
      np.testing.assert_array_equal(
          getattr(before, field.name)[:, s], getattr(bank, field.name),
          err_msg=f'{s} {field.name}')
    here = jax.tree.map(lambda x, s=s: x[:, s], ask)
    chosen = recall.choose(bank, here, sight, 2)
    jax.tree.map(lambda a, b, s=s: np.testing.assert_array_equal(a[:, s], b),
                 found, chosen)
    bank = recall.noted(bank, here, chosen)
    part = jax.tree.map(lambda x, s=s: x[:, s], events)
    bank, receipt = lifecycle.commit(rules, bank, part, now[:, s])
    together.append(receipt)
  assert not _different(bank, last)
  jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, np.stack(b, 1)),
               receipts, *together)
  assert int(jnp.max(bank.reads)) > 0 and int(jnp.max(receipts.evicted)) >= 0


def asks(rules, rng, shape, time):
  """Random questions, near to the keys that `draw` makes of a seed."""
  query = rng.normal(size=(*shape, rules.key))
  query = sl.unit(jnp.asarray(query, jnp.float32))
  integers = lambda low, high: jnp.asarray(
      rng.integers(low, high, size=shape), jnp.int32)
  when = time[..., None] + jnp.asarray(np.broadcast_to(
      np.arange(shape[-1]), shape))
  return recall.Ask(query, integers(-1, 1), when.astype(jnp.int32),
                    integers(0, rules.ring + 2), integers(0, 5) > 0)


def _different(a, b):
  return [p for (p, x, _, _), (_, y, _, _) in zip(st.leaves(a), st.leaves(b))
          if not np.array_equal(x, y)]


@pytest.mark.slow
def test_a_row_is_its_own():
  """Row permutation, and one row alone, to the bit."""
  rng = np.random.default_rng(2)
  events = arrays(SMALL, draw(SMALL, rng, 4, 1, 30))
  events = jax.tree.map(lambda x: x[:, 0], events)
  pick = lambda tree, rows: jax.tree.map(lambda x: x[rows], tree)
  run = jax.jit(lifecycle.commit, static_argnums=0)
  whole, _ = run(SMALL, sl.empty(SMALL, 4), events, jnp.full(4, 9))
  for rows in ([2, 0, 3, 1], [3]):
    part, _ = run(SMALL, sl.empty(SMALL, len(rows)),
                  pick(events, jnp.array(rows)), jnp.full(len(rows), 9))
    assert not _different(part, pick(whole, jnp.array(rows)))


def test_null_changes_no_bit():
  rng = np.random.default_rng(3)
  events = arrays(SMALL, draw(SMALL, rng, 2, 1, 30))
  events = jax.tree.map(lambda x: x[:, 0], events)
  run = jax.jit(lifecycle.commit, static_argnums=0)
  bank, _ = run(SMALL, sl.empty(SMALL, 2), events, jnp.zeros(2, jnp.int32))
  bank = dataclasses.replace(bank, value=bank.value.at[0, 0].set(jnp.nan),
                             expires=jnp.full_like(bank.expires, -1))
  null = dataclasses.replace(events, op=jnp.zeros_like(events.op))
  after, receipts = run(SMALL, bank, null, jnp.full(2, 99, jnp.int32))
  for (path, x, _, _), (_, y, _, _) in zip(st.leaves(bank), st.leaves(after)):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
  assert (receipts.outcome == sl.UNUSED).all()


def test_slots_are_the_delta_rule_with_one_hot_keys():
  """S (I - beta k k^T) + beta v k^T with k = e_slot, beta = not protected."""
  rules = c.SlotRules(slots=5, key=4, value=6, ring=0, span=1, key_span=1,
                   mode='router')
  rng = np.random.default_rng(4)
  count = 60
  slot = jnp.asarray(rng.integers(5, size=(1, count)), jnp.int32)
  v = jnp.asarray(rng.normal(size=(1, count, 6)), jnp.float32)
  lock = rng.random((1, count)) < 0.1
  events = sl.events(
      rules, np.where(lock, sl.LOCK, sl.WRITE), slot=slot, value=v,
      key=jnp.ones((1, count, 4)),
      span=jnp.arange(count, dtype=jnp.int32)[None, :, None])
  bank, receipts = lifecycle.commit(
      rules, sl.empty(rules, 1), events, jnp.zeros(1, jnp.int32))
  written = (receipts.outcome == sl.COMMITTED) & ~lock
  assert int(jnp.sum(receipts.outcome == sl.LOCKED)) > 5
  k = jax.nn.one_hot(slot, 5, dtype=jnp.float32)
  beta = written[..., None].astype(jnp.float32)
  _, state = ops.delta_rule_recurrent(
      *(x[:, :, None] for x in (k, k, v)), jnp.zeros_like(beta), beta, beta,
      jnp.zeros((1, 1, 5, 6)))
  got = np.asarray(bank.value[0, :, 0])
  # Our op adds the residual v - S k to S, which rounds once more.
  np.testing.assert_allclose(got, state[0, 0], atol=1e-6)
  want = np.zeros((5, 6), np.float32)
  for one, new, gate in zip(*map(np.asarray, (k[0], v[0], beta[0]))):
    want = want - np.outer(gate * one, one @ want) + np.outer(gate * one, new)
  np.testing.assert_array_equal(got, want)


def test_the_gradient_of_a_value_goes_to_its_event():
  rules = c.SlotRules(slots=2, key=4, value=3, ring=1, span=1, key_span=1)
  key = jnp.eye(4)[jnp.array([0, 1, 0, 0])][None]
  tokens = jnp.array([1, 2, 3, 3])[None, :, None]
  def total(value):
    events = sl.events(rules, [[sl.WRITE] * 4], key=key, value=value,
                       span=tokens)
    bank, _ = lifecycle.commit(rules, sl.empty(rules, 1), events,
                               jnp.zeros(1, jnp.int32))
    now, before = bank.value[0, 0]
    return jnp.sum(now) + 10 * jnp.sum(before)
  grad = jax.grad(total)(jnp.ones((1, 4, 3)))
  # The third event replaced the first; the fourth says the same again.
  assert grad[0, :, 0].tolist() == [10., 0., 1., 0.]


def test_another_name_means_the_object():
  """Written, aliased, written, deleted and asked for by the other name; once
  the object is gone the name is free."""
  rules = dataclasses.replace(SMALL, slots=2)
  key = jnp.eye(8)[jnp.array([0, 0, 1, 1, 1])][None]
  op = [[sl.WRITE, sl.ALIAS, sl.WRITE, sl.ROLLBACK, sl.DELETE]]
  events = sl.events(
      rules, op, key=key, name=jnp.broadcast_to(jnp.eye(8)[1], key.shape),
      steps=[[1] * 5], span=jnp.arange(10, dtype=jnp.int32).reshape(1, 5, 2))
  bank, receipts = lifecycle.commit(rules, sl.empty(rules, 1), events,
                                    jnp.zeros(1, jnp.int32))
  assert (receipts.outcome == sl.COMMITTED).all()
  assert receipts.slot.tolist() == [[0] * 5]
  assert receipts.version.tolist() == [[1, 1, 2, 3, 4]]
  purge = sl.events(rules, [[sl.PURGE, sl.WRITE]], key=key[:, 2:4],
                    host=[[True, False]],
                    span=jnp.ones((1, 2, 2), jnp.int32))
  bank, receipts = lifecycle.commit(rules, bank, purge,
                                    jnp.zeros(1, jnp.int32))
  assert receipts.oid.tolist() == [[0, 1]]
  assert bank.alias_oid.tolist() == [[-1, -1]] and not bank.alias_key.any()


def test_rules_say_what_is_wrong():
  with pytest.raises(ValueError, match='SlotRules.policy: expected one of'):
    c.SlotRules(policy='fifo')
  with pytest.raises(ValueError, match='multiple of ways'):
    c.SlotRules(slots=5, ways=2)
  with pytest.raises(ValueError, match=r'events: key: expected \(1, 1, 64\)'):
    sl.events(c.SlotRules(), [[sl.WRITE]], key=jnp.zeros((1, 64)))
  with pytest.raises(ValueError, match="unknown fields \\['keys'\\]"):
    sl.events(c.SlotRules(), [[sl.WRITE]], keys=1)


def one(rules, bank, op, key, **fields):
  """The bank after one event of a key, and its outcome."""
  shape = lambda x: jnp.asarray(x)[None, None]
  events = sl.events(rules, [[op]], key=key[None, None], **{
      n: shape(x) for n, x in ({'span': jnp.zeros(2, jnp.int32)} | fields
                               ).items()})
  bank, receipts = lifecycle.commit(rules, bank, events,
                                    jnp.zeros(1, jnp.int32))
  return bank, sl.OUTCOMES[int(receipts.outcome[0, 0])]


def names(*tokens):
  return jnp.array(tokens, jnp.int32)


@pytest.mark.parametrize('mode', ['content', 'hashed'])
def test_no_two_slots_get_one_address(mode):
  rules = dataclasses.replace(SMALL, mode=mode, ways=2)
  # Of the names 0 to 9 some have one half of the slots, some the other.
  half = [int(x) % 2 for x in lifecycle.hash_tokens(jnp.stack(
      [names(i, 0) for i in range(10)]))]
  here = [i for i in range(10) if half[i] == half[0]][:3]
  far = half.index(1 - half[0])
  eye, bank = jnp.eye(8), sl.empty(rules, 1)
  for i, name in enumerate(here[:2]):
    bank, why = one(rules, bank, sl.WRITE, eye[i], key_span=names(name, 0))
    assert why == 'committed'
  rekey = lambda key, name, slot=0: one(
      rules, bank, sl.REKEY, eye[key], key_span=names(name, 0), slot=slot,
      host=True)[1]
  slot = int(jnp.argmax(bank.oid[0] == 0))
  assert rekey(1, here[1], slot) == 'invalid'
  assert rekey(0, here[0], slot) == 'committed'
  assert rekey(2, here[2], slot) == 'committed'
  # A name that is looked for elsewhere would not be found again.
  assert rekey(3, far, slot) == (
      'committed' if mode == 'content' else 'invalid')


def test_what_has_no_name_is_no_object_where_names_are_looked_for():
  rules = dataclasses.replace(SMALL, mode='hashed', ways=2)
  bank = sl.empty(rules, 1)
  assert one(rules, bank, sl.WRITE, jnp.eye(8)[0],
             source=names(3, 2))[1] == 'invalid'


def test_a_host_writes_to_what_is_called_so_or_to_nothing():
  """An address that is near enough is not enough, but another name is."""
  eye = jnp.eye(8)
  bank, _ = one(SMALL, sl.empty(SMALL, 1), sl.WRITE, eye[0],
                key_span=names(5, 6), expect=0)
  write = lambda bank, key, **more: one(
      SMALL, bank, sl.WRITE, key, span=names(4, 4), **more)[1]
  near = sl.unit(eye[0] + 0.01 * eye[1])
  assert write(bank, near, key_span=names(5, 7)) == 'conflict'
  assert write(bank, near, key_span=names(5, 7), slot=0) == 'conflict'
  assert write(bank, near, key_span=names(5, 6)) == 'committed'
  assert write(bank, near, key_span=names(5, 6), expect=0) == 'conflict'
  # The stream's own words of a name may differ.
  assert write(bank, near, key_span=names(5, 7), source=names(3, 2)) == (
      'committed')
  bank, why = one(SMALL, bank, sl.ALIAS, eye[0], name=eye[2])
  assert why == 'committed'
  assert write(bank, eye[2], key_span=names(7, 7)) == 'committed'


def test_of_many_written_at_once_the_first_goes_first():
  rules = dataclasses.replace(SMALL, slots=3)
  bank = sl.empty(rules, 1)
  for i in range(5):
    bank, _ = one(rules, bank, sl.WRITE, jnp.eye(8)[i], key_span=names(i, 0))
  assert sorted(bank.oid[0].tolist()) == [2, 3, 4]
