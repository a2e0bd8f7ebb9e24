import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import generate as gen
from statejax import model as lm
from statejax import state as st
from statejax.artifact import serving

MODEL = lm.LanguageModel(c.ModelConfig(
    vocab=32, width=16,
    layers=(
        c.LayerConfig('kda', c.KDAConfig(heads=2, key=4, value=4, rank=4),
                      c.SwiGLUConfig(16)),
        c.LayerConfig('ring', c.AttentionConfig(
            heads=2, kv_heads=1, key=8, value=8, window=3), c.SwiGLUConfig(16)),
        c.LayerConfig('full', c.AttentionConfig(
            heads=2, kv_heads=1, key=8, value=8), c.SwiGLUConfig(16))),
    groups=(c.GroupConfig(('kda', 'ring', 'full')),)))
ROWS, STEPS, CAPACITY, CHUNK = 3, 7, 24, 4
PROMPTS = np.random.default_rng(0).integers(1, 32, (ROWS, STEPS))
DRAWN = gen.Sampling(temperature=0.9, top_k=20, top_p=0.95)


@functools.cache
def params():
  return MODEL.unstack(MODEL.init(jax.random.key(1)))


def fresh(capacity=CAPACITY):
  return MODEL.init_state(ROWS, capacity, key=jax.random.key(5))


def absorbed(sampling=gen.GREEDY, n_valid=None, chunk=CHUNK):
  return gen.prefill(MODEL, params(), fresh(), PROMPTS, n_valid, chunk=chunk,
                     sampling=sampling)


def run(state, steps, **options):
  return gen.generate(MODEL, params(), state, steps, **options)


# Prefill and decode are the one step.


def test_greedy_equals_full_recompute():
  tokens, _ = run(absorbed(), 8)
  seen = np.zeros((ROWS, STEPS + 8), np.int32)
  seen[:, :STEPS] = PROMPTS
  for n in range(STEPS, STEPS + 8):
    logits, _ = MODEL.step(params(), fresh(), seen, np.full(ROWS, n),
                           keep='last')
    seen[:, n] = np.argmax(logits[:, 0], axis=-1)
  assert (tokens == seen[:, STEPS:]).all() and tokens.dtype == np.int32


@pytest.mark.parametrize('chunk', [
    1, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (STEPS, 100))])
def test_prefill_in_any_chunks(chunk):
  state = absorbed(chunk=chunk)
  assert st.diff(state, absorbed(), tolerance=1e-5) is None
  assert (state.pending == absorbed().pending).all()
  assert state.length.tolist() == [STEPS] * ROWS


def test_ragged_prompts():
  state = absorbed(n_valid=np.array([STEPS, 0, 5]))
  assert state.length.tolist() == [STEPS, 0, 5]
  assert st.diff(st.take(state, 0), st.take(absorbed(), 0)) is None
  # A row without a prompt is as it was.
  assert st.diff(st.take(state, 1), st.take(fresh(), 1)) is None
  short = gen.prefill(MODEL, params(), fresh(), PROMPTS[:, :5], chunk=CHUNK)
  assert st.diff(st.take(state, 2), st.take(short, 2)) is None


def test_two_prefills_equal_one():
  first = gen.prefill(MODEL, params(), fresh(), PROMPTS[:, :CHUNK], chunk=CHUNK)
  first = dataclasses.replace(first, pending=jnp.full(ROWS, -1, jnp.int32))
  second = gen.prefill(MODEL, params(), first, PROMPTS[:, CHUNK:], chunk=CHUNK)
  assert st.diff(second, absorbed(), tolerance=1e-5) is None


@pytest.mark.parametrize('sampling', [gen.GREEDY, DRAWN])
def test_two_calls_equal_one_bit_for_bit(sampling):
  state = absorbed(sampling)
  tokens, end = run(state, 9, sampling=sampling)
  first, middle = run(state, 4, sampling=sampling)
  second, other = run(middle, 5, sampling=sampling)
  assert (np.concatenate([first, second], axis=1) == tokens).all()
  assert serving.state_digest(other) == serving.state_digest(end)
  assert end.length.tolist() == [STEPS + 9] * ROWS
  # None of the states that went in was consumed.
  assert (run(state, 9, sampling=sampling)[0] == tokens).all()


def test_callback_sees_what_is_returned():
  seen = []
  tokens, _ = run(absorbed(), 5, callback=seen.append)
  assert (np.stack(seen, axis=1) == tokens).all()
  assert all(s.shape == (ROWS,) and s.dtype == np.int32 for s in seen)


def test_decode_consumes_its_state():
  state = absorbed()
  pending = state.pending.tolist()
  tokens, new = gen.decode(MODEL, params(), state)
  assert tokens.tolist() == pending
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  with pytest.raises(ValueError, match='already consumed by an earlier step'):
    run(state, 1)
  assert run(new, 1)[0].shape == (ROWS, 1)


# Rows end.


def test_stop_tokens():
  free, _ = run(absorbed(), 6)
  stop = (int(free[0, 2]), int(free[1, 4]))
  ends = [next((i for i, t in enumerate(row) if t in stop), 6) for row in free]
  assert ends[0] <= 2  # else nothing is tested
  expected = np.where(np.arange(6) <= np.array(ends)[:, None], free, -1)
  tokens, state = run(absorbed(), 6, stop=stop)
  wide = np.full((ROWS, 6), -1)
  wide[:, :tokens.shape[1]] = tokens
  assert (wide == expected).all()
  # The stop token is emitted, and not absorbed.
  length = STEPS + np.minimum(ends, 6)
  assert state.length.tolist() == length.tolist()
  assert ((np.asarray(state.pending) < 0) == (np.array(ends) < 6)).all()
  # In two calls too, although a row ends in the first.
  first, middle = run(absorbed(), 3, stop=stop)
  second, other = run(middle, 3, stop=stop)
  both = np.concatenate([first, second], axis=1)
  assert (both == expected[:, :both.shape[1]]).all()
  assert serving.state_digest(other) == serving.state_digest(state)


def test_ends_early_when_all_rows_have_ended():
  free, _ = run(absorbed(), 2)
  tokens, state = run(absorbed(), 6, stop=tuple(set(free[:, 1].tolist())))
  assert tokens.shape[1] <= 2 and (np.asarray(state.pending) == -1).all()
  with pytest.raises(ValueError, match='call prefill first'):
    run(state, 1)


# Sampling.


def draws(logits, sampling, count=2000):
  """Token frequencies over many positions of one row."""
  logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None],
                            (count, len(logits)))
  key = jnp.zeros((count, 2), jnp.uint32)
  at = gen.sample(logits, key, jnp.arange(count, dtype=jnp.int32), sampling)
  assert at.dtype == jnp.int32
  return np.bincount(at, minlength=logits.shape[1]) / count


P = np.array([0.15, 0.5, 0.05, 0.3])


@pytest.mark.parametrize('sampling, expected', [
    (gen.Sampling(), P),
    (gen.Sampling(temperature=0.5), P**2 / np.sum(P**2)),
    (gen.Sampling(temperature=2.0), P**0.5 / np.sum(P**0.5)),
    (gen.Sampling(top_k=2), [0, 0.625, 0, 0.375]),
    (gen.Sampling(top_k=99), P),
    (gen.Sampling(top_p=0.4), [0, 1, 0, 0]),
    (gen.Sampling(top_p=0.6), [0, 0.625, 0, 0.375]),
    (gen.Sampling(top_p=0.9), np.array([0.15, 0.5, 0, 0.3]) / 0.95),
    (gen.Sampling(top_p=1.0), P),
    # p counts among the k: the first alone has 0.625 of them.
    (gen.Sampling(top_k=2, top_p=0.6), [0, 1, 0, 0]),
    (gen.Sampling(top_k=1), [0, 1, 0, 0]),
    (gen.GREEDY, [0, 1, 0, 0]),
    (gen.Sampling(temperature=1e-4), [0, 1, 0, 0]),
])
def test_frequencies(sampling, expected):
  got = draws(np.log(P), sampling)
  np.testing.assert_allclose(got, expected, rtol=0, atol=0.035)
  assert (got[np.equal(expected, 0)] == 0).all()


@pytest.mark.parametrize('sampling', [
    gen.GREEDY, gen.Sampling(top_k=1), gen.Sampling(top_p=0.1)])
def test_equal_logits_go_to_the_lower_id(sampling):
  assert draws([0.0, 2.0, 2.0, 2.0], sampling, 20).tolist() == [0, 1, 0, 0]


def test_a_draw_depends_on_key_and_position_alone():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(6, 32)).astype(np.float32)
  key = rng.integers(0, 2**32, (6, 2), np.uint32)
  position = np.arange(6, dtype=np.int32) * 3
  whole = gen.sample(logits, key, position, DRAWN)
  for order in ([4], [5, 0], [3, 2, 1, 0, 5, 4]):
    part = gen.sample(logits[order], key[order], position[order], DRAWN)
    assert (part == whole[np.array(order)]).all()
  flat = jnp.zeros((200, 32))
  keys = jnp.tile(jnp.asarray(key[:1]), (200, 1))
  by_position = gen.sample(flat, keys, jnp.arange(200), gen.Sampling())
  by_key = gen.sample(flat, jnp.arange(400, dtype=jnp.uint32).reshape(200, 2),
                      jnp.zeros(200, jnp.int32), gen.Sampling())
  assert len(set(by_position.tolist())) > 25 and len(set(by_key.tolist())) > 25


def test_a_row_draws_the_same_in_any_batch():
  state = absorbed(DRAWN)
  tokens, _ = run(state, 5, sampling=DRAWN)
  alone, _ = run(st.take(state, [2, 0]), 5, sampling=DRAWN)
  assert (alone == tokens[[2, 0]]).all()


# What is refused.


@pytest.mark.parametrize('options, text', [
    (dict(temperature=-1.0), 'temperature: expected 0, .* got -1.0'),
    (dict(temperature=float('nan')), 'temperature: expected 0, .* got nan'),
    (dict(temperature=1e-37), 'at least 1e-6, got 1e-37'),
    (dict(top_k=0), 'top_k: expected an integer >= 1 or None, got 0'),
    (dict(top_k=1.5), 'top_k: expected an integer'),
    (dict(top_p=0.0), 'top_p: expected 0 < p <= 1, got 0.0'),
    (dict(top_p=1.5), 'top_p: expected 0 < p <= 1, got 1.5'),
])
def test_bad_sampling(options, text):
  with pytest.raises(ValueError, match=text):
    gen.Sampling(**options)


@pytest.mark.parametrize('options, text', [
    (dict(chunk=0), 'chunk: expected >= 1, got 0'),
    (dict(n_valid=np.array([1, 2])), r'n_valid: expected \(3,\) integers'),
    (dict(n_valid=np.array([1, 2, 8])), r'n_valid: expected 0\.\.7'),
    (dict(tokens=PROMPTS + 31), 'expected 0 <= token < vocab=32'),
    (dict(tokens=PROMPTS[0]), r'tokens: expected \[B, T\]'),
    (dict(capacity=6), r'room for 6; use statejax.state.grow\(state, 7\)'),
])
def test_bad_prefill(options, text):
  options = {'tokens': PROMPTS, **options}
  state = fresh(options.pop('capacity', CAPACITY))
  with pytest.raises(ValueError, match=text):
    gen.prefill(MODEL, params(), state, **options)


def test_prefill_refuses_a_pending_token():
  state = absorbed()
  with pytest.raises(ValueError, match='row 1 has a pending token'):
    gen.prefill(MODEL, params(), state, PROMPTS, np.array([0, 2, 1]))


def test_a_small_temperature_is_greedy():
  logits = jnp.array([[50.0, 60.0, 10.0], [-9e5, -9.1e5, 0.0]])
  key = jnp.zeros((2, 2), jnp.uint32)
  drawn = gen.sample(logits, key, jnp.zeros(2, jnp.int32), gen.Sampling(1e-6))
  assert drawn.tolist() == [1, 2]


def test_one_stop_token_needs_no_tuple():
  state = absorbed()
  want, _ = run(state, STEPS)
  stop = int(want[0, 2])
  got, _ = run(state, STEPS, stop=stop)
  assert (got == run(state, STEPS, stop=(stop,))[0]).all()


def test_bad_generate():
  with pytest.raises(ValueError, match=r'got \[-1, -1, -1\]; call prefill'):
    run(fresh(), 1)
  with pytest.raises(ValueError, match=r'outside vocab=32, got \[0, 32, 1'):
    run(dataclasses.replace(fresh(), pending=jnp.array([0, 32, 1])), 1)
  state = absorbed()
  with pytest.raises(ValueError, match='expected steps >= 1, got 0'):
    run(state, 0)
  with pytest.raises(ValueError, match=r'room for 25 tokens, got 24; use '
                                       r'statejax.state.grow\(state, 25\)'):
    run(state, CAPACITY - STEPS + 1)
  grown, _ = run(st.grow(state, 25), CAPACITY - STEPS + 1)
  exact, _ = run(state, CAPACITY - STEPS)
  assert (grown[:, :-1] == exact).all()
