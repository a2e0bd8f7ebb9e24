"""Selection against numpy's sort: score descending, position ascending."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit

from statejax.ops import select


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


def coarse(x):
  """Rounded to 13 significant bits, ties to even."""
  x = np.array(x, np.float32)
  bits = x.view(np.uint32)
  even = (bits >> 11) & 1
  near = ((bits + 1023 + even) & ~np.uint32(2047)).view(np.float32)
  return np.where(np.isfinite(x), near, x)


def oracle(scores, visible, k, forced=None):
  """Ids [..., k], sorted row by row, padded with -1."""
  key, info = coarse(scores), np.finfo(np.float32)
  largest = coarse(np.float32(1.9998 * 2.0 ** 127))
  with np.errstate(invalid='ignore'):
    key[np.isnan(key) | (key > largest)] = largest
    key[(key < -largest) & (np.asarray(scores) > -np.inf)] = -largest
    key[np.abs(key) < info.tiny] = 0
  first = np.zeros(key.shape, bool) if forced is None else forced
  key[first] = np.inf
  ids = np.full((*key.shape[:-1], k), -1, np.int32)
  for at in np.ndindex(key.shape[:-1]):
    position = np.arange(key.shape[-1])
    order = np.lexsort((position, -key[at]))
    order = order[(visible[at] & (key[at] > -np.inf))[order]][:k]
    ids[at][:len(order)] = order
  return ids


@functools.partial(jit, static_argnames='k')
def run(scores, visible, forced, *, k):
  ids = select.top(scores, visible, k, forced)
  return (ids,
          [select.top_two_stage(scores, visible, k, parts, forced)
           for parts in (3, 20)],
          select.top_mask(scores, visible, k, forced),
          select.to_mask(ids, scores.shape[-1]))


def check(scores, visible, k, forced=None):
  ids, staged, mask, back = run(scores, visible, forced, k=k)
  want = oracle(scores, visible, k, forced)
  for got in (ids, *staged):
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)
  chosen = np.zeros(scores.shape, bool)
  for at in np.ndindex(want.shape[:-1]):
    chosen[at][want[at][want[at] >= 0]] = True
  assert mask.dtype == bool
  np.testing.assert_array_equal(mask, chosen)
  np.testing.assert_array_equal(back, chosen)
  return want


def make(kind, rng, shape=(8, 13)):
  if kind == 'ties':
    # Few values, both zeros among them.
    return rng.choice(np.float32([-1.5, -0.0, 0.0, 0.0, 1.0, 2.5]), shape)
  if kind == 'relu':
    return np.maximum(rng.normal(size=shape), 0).astype(np.float32)
  if kind == 'zero':
    return np.where(rng.random(shape) < 0.5, np.float32(0), np.float32(-0.0))
  # Any number there is, with every infinity, NaN and denormal.
  bits = rng.integers(0, 2 ** 32, shape, np.uint32)
  bits[0, :8] = [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x00000001,
                 0x807FFFFF, 0x7F7FFFFF, 0x00800000]
  return bits.view(np.float32)


@pytest.mark.parametrize('k, with_forced', [
    (0, True), (1, False), (5, False), (5, True), (13, False), (16, True)])
def test_sort(k, with_forced):
  rng = np.random.default_rng(k)
  for kind in ('ties', 'relu', 'zero', 'any'):
    for density in (0.0, 0.3, 0.8, 1.0):
      scores = make(kind, rng)
      visible = rng.random(scores.shape) < density
      forced = rng.random(scores.shape) < 0.2 if with_forced else None
      want = check(scores, visible, k, forced)
      if density == 1.0 and kind == 'zero' and forced is None:
        # Nothing but ties: the lowest positions.
        first = [i if i < 13 else -1 for i in range(k)]
        assert want.tolist() == [first] * 8


def test_long_rows_full_of_ties():
  rng = np.random.default_rng(0)
  scores = rng.integers(-3, 9, (2, 3000)).astype(np.float32)
  scores = np.maximum(scores, 0)
  check(scores, rng.random(scores.shape) < 0.7, 700)


def test_noise_of_rounding_makes_no_choice():
  """Equal keys whose scores differ in their last bits are a tie."""
  rng = np.random.default_rng(4)
  scores = np.tile(rng.normal(size=(8, 5)), (1, 40))
  noise = 1 + 2e-7 * rng.uniform(-1, 1, scores.shape)
  visible = np.ones(scores.shape, bool)
  for k in (3, 50):
    want = check(scores.astype(np.float32), visible, k)
    got = check((scores * noise).astype(np.float32), visible, k)
    np.testing.assert_array_equal(got, want)


def test_the_least_number_is_still_a_number():
  least = np.finfo(np.float32).min
  scores = np.float32([[-np.inf, least, np.float32(-3.4e38), least, 0]])
  want = check(np.repeat(scores, 2, axis=0), np.ones((2, 5), bool), 5)
  assert want[0].tolist() == [4, 2, 1, 3, -1]


def test_hidden_scores_leave_no_trace():
  rng = np.random.default_rng(1)
  scores = make('ties', rng)
  visible = rng.random(scores.shape) < 0.5
  loud = np.where(visible, scores, rng.choice(
      np.float32([np.nan, np.inf, -np.inf, 3e38]), scores.shape))
  for k in (1, 5):
    np.testing.assert_array_equal(
        check(loud, visible, k), check(scores, visible, k))


def test_forced_members_count_inside_k():
  scores = np.tile(np.float32(range(13, 0, -1)), (8, 1))
  forced, visible = np.zeros((2, 8, 13), bool)
  visible[:, :12] = forced[:, [9, 11, 12]] = True
  want = check(scores, visible, 5, forced)
  assert want.tolist() == [[9, 11, 0, 1, 2]] * 8
  # Also of the least score there is.
  least = np.full_like(scores, -np.inf)
  want = check(least, visible, 5, forced)
  assert want.tolist() == [[9, 11, -1, -1, -1]] * 8
  # More of them than k: the first ones.
  forced[:, 3:] = True
  want = check(scores, visible, 5, forced)
  assert want.tolist() == [[3, 4, 5, 6, 7]] * 8


def test_rows_and_chunks_choose_alike():
  """[B, T, G, N] in one call, row by row, and query by query."""
  rng = np.random.default_rng(2)
  scores = make('relu', rng, (2, 4, 2, 13))
  visible = rng.random(scores.shape) < 0.7
  choose = jit(lambda *x: (select.top(*x, 5), select.top_mask(*x, 5),
                           select.top_two_stage(*x, 5, 4)))
  whole = [np.asarray(x) for x in choose(scores, visible)]
  for at in (np.s_[:1], np.s_[1:], *(np.s_[:, t:t + 1] for t in range(4))):
    for got, want in zip(choose(scores[at], visible[at]), whole):
      np.testing.assert_array_equal(got, want[at])


@pytest.mark.parametrize('spec', [(None, 'd'), ('d', None)])
def test_shards_choose_alike(spec):
  """Columns, or rows, over eight devices: ids are those of one."""
  mesh = jax.make_mesh((8,), ('d',), (jax.sharding.AxisType.Auto,))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  rng = np.random.default_rng(5)
  scores = make('relu', rng, (16, 64))
  visible = rng.random(scores.shape) < 0.8
  choose = jit(lambda *x: (select.top(*x, 9), select.top_mask(*x, 9),
                           select.top_two_stage(*x, 9, 8)))
  for got, want in zip(choose(*jax.device_put((scores, visible), place)),
                       choose(scores, visible)):
    np.testing.assert_array_equal(got, want)


def test_coarser_scores_are_compared_in_float32():
  scores = jnp.asarray([[1.0, 1.001, 0.5, 3.0]], jnp.bfloat16)
  visible = np.ones((1, 4), bool)
  # 1.001 is 1.0 in bfloat16, and the earlier one wins.
  assert select.top(scores, visible, 3).tolist() == [[3, 0, 1]]


def test_no_columns():
  scores, visible = np.zeros((2, 0), np.float32), np.zeros((2, 0), bool)
  assert check(scores, visible, 3).tolist() == [[-1, -1, -1]] * 2


def test_no_gradient_runs_through_a_choice():
  scores = make('relu', np.random.default_rng(3))
  visible = np.ones(scores.shape, bool)

  def total(scores):
    ids = select.top(scores, visible, 4)
    mask = select.top_mask(scores, visible, 4)
    taken = jnp.take_along_axis(scores, ids, axis=-1)
    return jnp.sum(taken) + jnp.sum(jnp.where(mask, scores, jnp.zeros_like(
        scores)))

  got = jit(jax.grad(total))(scores)
  mask = np.asarray(select.top_mask(scores, visible, 4))
  np.testing.assert_array_equal(got, np.float32(2) * mask)


@pytest.mark.parametrize('choose', [
    select.top, select.top_mask,
    functools.partial(select.top_two_stage, parts=2)])
def test_bad_input(choose):
  scores, visible = np.zeros((2, 5), np.float32), np.ones((2, 5), bool)
  with pytest.raises(ValueError, match='k=-1'):
    choose(scores, visible, k=-1)
  for wrong in (dict(visible=visible[:1]),
                dict(visible=visible, forced=visible[:, :3])):
    with pytest.raises(ValueError, match='of one shape'):
      choose(scores, **wrong, k=2)
  with pytest.raises(ValueError, match='parts >= 1, got 0'):
    select.top_two_stage(scores, visible, 2, 0)
