"""Shadows of spans, zero-writes, and an attacker who knows all keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit, make

from statejax.ops import delta_rule, shadow


@pytest.mark.parametrize('gates', [
    ('channel', 'head'), pytest.param(('head', 'channel'),
                                      marks=pytest.mark.slow),
    pytest.param((0, 2), marks=pytest.mark.slow),
    pytest.param(('head', 0), marks=pytest.mark.slow)], ids=str)
def test_a_shadow_is_the_difference_of_two_streams(gates):
  """Of as many as it has, in tokens, documents and padding alike."""
  args = make(*gates, length=13)
  rng = np.random.default_rng(1)
  parts = rng.standard_normal((2, 3, 4, 8, 6)).astype(np.float32)
  n_valid = np.array([13, 9], np.int32)
  segments = np.array([[0] * 13, [0] * 6 + [1] * 7], np.int32)
  names = [n for n, x in args.items() if not isinstance(x, int)]
  fixed = {n: x for n, x in args.items() if isinstance(x, int)}
  @jit
  def run(arrays, segments):
    args = arrays | fixed
    fade = shadow.fade(parts, args['k'], args['log_decay'], args['erase'],
                       n_valid, segments, chunk_size=8)
    rule = lambda s: delta_rule(**args | {'state': s}, n_valid=n_valid,
                                segment_ids=segments, chunk_size=8)[1]
    return fade, [rule(args['state']) - rule(args['state'] - parts[:, i])
                  for i in range(3)]
  for ids in (np.zeros((2, 13), np.int32), segments):
    fade, want = run({n: args[n] for n in names}, ids)
    assert float(jnp.abs(fade - jnp.stack(want, axis=1)).max()) < 1e-5
  # The document of the second row is over, and what it has changed.
  assert not fade[1].any() and fade[0].any()


def test_a_zero_write_answers_nothing_and_leaves_the_rest():
  keys, values = np.eye(4, dtype=np.float32), np.ones((1, 1, 1, 3), np.float32)
  near = np.array([0.6, 0.8, 0, 0], np.float32)
  write = lambda s, k, b: delta_rule(k, k, values, 0, b, b, s)[1]
  row = lambda k: k[None, None, None]
  state = write(jnp.zeros((1, 1, 4, 3)), row(keys[0]), 1.)
  # With keys as slots have them nothing is left of it.
  slots = write(state, row(keys[1]), 1.)
  gone = shadow.zero_write(slots, row(keys[0]))
  assert not gone[0, 0, 0].any() and (gone[0, 0, 1] == slots[0, 0, 1]).all()
  # Else what a later key has carried away is not erased: .6 of it, once more
  # less what lies along the key.
  later = write(state, row(near), 1.) - write(0 * state, row(near), 1.)
  left = shadow.zero_write(later, row(keys[0]))
  assert not left[0, 0, 0].any()
  np.testing.assert_allclose(left[0, 0, 1], -.48, atol=1e-6)


@functools.cache
def attacks(later=8, trials=2000, width=64, decoys=20):
  """AUC of a matched filter for each delete, after so many dense writes."""
  rng = np.random.default_rng(0)
  def unit(*shape):
    x = rng.standard_normal((trials, *shape, width), np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
  k, v, other = unit(later + 1, 1), unit(later + 1, 1), unit(decoys)
  # Each stream has its own past of 4 writes.
  past_k, past_v = unit(4, 1), unit(4, 1)
  @jax.jit
  def run(k, v):
    write = lambda s, k, v: delta_rule(k, k, v, 0, 1., 1., s)[1]
    begun = write(jnp.zeros((trials, 1, width, width)), past_k, past_v)
    seen = write(begun, k[:, :1], v[:, :1])
    twice = lambda x: jnp.concatenate([x, x])
    held, never = jnp.split(write(jnp.concatenate([seen, begun]), twice(
        k[:, 1:]), twice(v[:, 1:])), 2)
    after = lambda d: shadow.fade(d[:, None], k[:, 1:], 0, 1.)[:, 0]
    along = after(jnp.swapaxes(k[:, :1], 2, 3))
    zero = lambda s: shadow.zero_write(s, k[:, :1])
    states = {'before': (held, along), 'suppress': (zero(held), zero(along)),
              'revoke': (held - after(seen - begun), along),
              'replay': (never, along)}
    reads = {n: jnp.einsum('nhko,nhkv->nv', c, s)
             for n, (s, c) in states.items()}
    return reads, jnp.abs(states['revoke'][0] - never).max()
  reads, far = run(k, v)
  values = np.concatenate([v[:, 0], other], axis=1)
  score = {n: np.einsum('nv,ncv->nc', x, values) for n, x in reads.items()}
  return {n: np.mean(s[:, :1] > s[:, 1:]) for n, s in score.items()}, far


def test_who_knows_all_keys_finds_what_was_suppressed_and_no_more():
  found, far = attacks()
  assert found['before'] > .99 and found['suppress'] > .6
  assert abs(found['revoke'] - .5) <= .02 and abs(found['replay'] - .5) <= .02
  assert far < 1e-5
