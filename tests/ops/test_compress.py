"""Compressors against one token after the other in float64."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit

from statejax.layers import common
from statejax.ops import blocks as bk
from statejax.ops import compress as cp

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
EPS = float(np.finfo(np.float32).eps)
EMPTY = cp.EMPTY
WIDTH = 3


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


def compress(residual, values, gates, length, n_valid, document, size):
  """All compressors in one step: gated, overlapping, mean, extremes."""
  c = common.context(length, n_valid, document, values.shape[1])
  b = bk.plan(c.length, c.n_valid, c.positions, c.document, c.start, c.base,
              size)
  own_values, own_gates = values[..., WIDTH:], gates[..., WIDTH:]
  pool, overlap, total, bounds = residual
  out = [cp.gated(own_values, own_gates, pool, b),
         cp.gated_overlap(values, gates, overlap, b),
         cp.mean(own_values, total, b), cp.extremes(own_values, bounds, b)]
  entries, residual = zip(*out)
  return entries, residual, b.count, c.new_length


run = functools.partial(jit, static_argnames='size')(compress)
run_optimized = jax.jit(compress, static_argnames='size')


def empty(rows, dtype=np.float32):
  zero, low = np.zeros((rows, WIDTH), dtype), np.full((rows, WIDTH), EMPTY,
                                                      dtype)
  pool = cp.Pool(low, zero, zero)
  return pool, cp.Overlap(pool, pool), zero, cp.Extremes(-low, low)


class Row:
  """A document token by token, keeping every token."""

  def __init__(self, size):
    self.size, self.tokens = size, []

  def block(self, number):
    """Tokens (gates, values) of a block, [n, 2, 2 WIDTH] float64."""
    at = self.tokens[number * self.size:(number + 1) * self.size]
    return np.reshape(np.array(at, np.float64), (len(at), 2, 2 * WIDTH))

  def parts(self, number):
    """What the entry of a block pools: plain, and with the left half."""
    here = self.block(number)
    own = here[..., WIDTH:]
    # A document's block 0 has no block before it.
    left = self.block(number - 1)[..., :WIDTH] if number else own[:0]
    return own, np.concatenate([left, own]), here[..., :WIDTH]

  def absorb(self, gate, value):
    """Returns the entries of the block that this token completes, or None."""
    self.tokens.append((gate, value))
    if len(self.tokens) % self.size:
      return None
    own, both, _ = self.parts(len(self.tokens) // self.size - 1)
    return (entry(own), entry(both), own[:, 1].mean(0),
            (own[:, 1].min(0), own[:, 1].max(0)))

  def residual(self):
    own, both, left = self.parts(len(self.tokens) // self.size)
    low = own[:, 1].min(0, initial=-EMPTY), own[:, 1].max(0, initial=EMPTY)
    return (pool(own), (pool(both), pool(left)), own[:, 1].sum(0), low)


def pool(tokens):
  gates, values = tokens[:, 0], tokens[:, 1]
  m = gates.max(0, initial=EMPTY)
  weight = np.exp(gates - m)
  return m, weight.sum(0), (weight * values).sum(0)


def entry(tokens):
  _, total, weighted = pool(tokens)
  return weighted / total


def close(got, want, tolerance=20 * EPS):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def row_of(tree, b, w=None):
  return jax.tree.map(lambda x: np.asarray(x)[b] if w is None
                      else np.asarray(x)[b, w], tree)


@pytest.mark.parametrize('size, steps, packed', [
    (4, 1, False), (4, 6, False), (1, 6, True), (3, 6, True), (4, 6, True),
    (8, 6, True)])
def test_stream(size, steps, packed):
  """Rows of all phases through chunks of random length, NaN as padding."""
  rng = np.random.default_rng(10 * size + steps)
  rows = 6
  past = [Row(size) for _ in range(rows)]
  residual, length = empty(rows), np.zeros((rows,), np.int32)
  for turn in range(40 if steps == 1 else 20):
    n_valid = rng.integers(0, steps + 1, rows).astype(np.int32)
    n_valid[turn % rows] = steps
    document = np.cumsum(rng.random((rows, steps)) < 0.2, 1).astype(np.int32)
    values, gates = rng.normal(
        size=(2, rows, steps, 2 * WIDTH)).astype(np.float32)
    gates *= 3
    for b, n in enumerate(n_valid):
      values[b, n:] = gates[b, n:] = np.nan
    entries, residual, count, length = run(
        residual, values, gates, length, n_valid, document if packed else None,
        size=size)
    for b, n in enumerate(n_valid):
      emitted = 0
      for t in range(n):
        if packed and t and document[b, t] != document[b, t - 1]:
          past[b] = Row(size)
        want = past[b].absorb(gates[b, t], values[b, t])
        if want is not None:
          close(row_of(entries, b, emitted), want)
          emitted += 1
      assert emitted == count[b] and length[b] == len(past[b].tokens)
      for x in entries[:3]:
        assert (np.asarray(x)[b, emitted:] == 0).all()
      close(row_of(residual, b), past[b].residual())


def states(seed, rows, dtype=np.float32):
  """Residuals full of numbers, whatever the phase says of them."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(dtype), empty(rows))


def step_of(seed, rows, steps, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, rows, steps, 2 * WIDTH)).astype(dtype)


@pytest.mark.optimized
def test_rows_without_tokens_keep_every_bit():
  raw = np.array([[0x80000000, 0x7FC01234, 0xFF800000],
                  [0x00000001, 0xF149F2CA, 0x3F800000]] * 3, np.uint32)
  held = jax.tree.map(lambda x: raw.view(np.float32), empty(6))
  values, gates = np.full((2, 6, 6, 2 * WIDTH), np.nan, np.float32)
  length = np.array([0, 3, 4, 5, 1, 2], np.int32)
  document = np.tile(np.arange(6, dtype=np.int32), (6, 1))
  _, after, count, _ = run_optimized(
      held, values, gates, length, np.zeros_like(length), document, size=4)
  assert not np.any(count)
  for x in jax.tree.leaves(after):
    np.testing.assert_array_equal(np.asarray(x).view(np.uint32), raw)


@pytest.mark.optimized
def test_a_row_knows_only_itself():
  """Other rows, other documents, and a residual of no block of the row leave
  no bit."""
  rows, steps, size = 6, 6, 4
  values, gates = step_of(0, rows, steps)
  held = states(1, rows)
  length = np.array([0, 0, 4, 5, 7, 8], np.int32)
  n_valid = np.array([6, 3, 6, 5, 1, 2], np.int32)
  document = np.array([[0, 0, 1, 1, 1, 1], [0] * 6, [0] * 6,
                       [0, 0, 0, 1, 1, 1], [0] * 6, [0] * 6], np.int32)
  args = held, values, gates, length, n_valid, document
  want = run_optimized(*args, size=size)
  order = np.array([3, 5, 0, 1, 4, 2])
  turned = run_optimized(*jax.tree.map(lambda x: x[order], args), size=size)
  for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(turned)):
    np.testing.assert_array_equal(np.asarray(x)[order], y)
  # At a block's end only the left half is carried; at position 0 nothing is.
  poison = lambda tree, at: jax.tree.map(
      lambda x: np.where(at[:, None], np.float32(np.nan), x), tree)
  pooled, overlap, total, bounds = held
  fresh, closed = length == 0, length % size == 0
  bad = (poison(pooled, closed),
         cp.Overlap(poison(overlap.current, fresh),
                    poison(overlap.following, closed)),
         poison(total, closed), poison(bounds, closed))
  for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(
      run_optimized(bad, *args[1:], size=size))):
    np.testing.assert_array_equal(x, y)
  # Rows 0 and 3 have a border; past it a NaN before it is gone.
  two = np.array([0, 3])
  before = (document == 0) & (document[:, -1:] > 0)
  spoilt = [np.where(before[..., None], np.float32(np.nan), x)
            for x in (values, gates)]
  entries, after, _, _ = run_optimized(held, *spoilt, *args[3:], size=size)
  for x, y in zip(jax.tree.leaves(want[1]), jax.tree.leaves(after)):
    np.testing.assert_array_equal(np.asarray(x)[two], np.asarray(y)[two])
  for x, y in zip(jax.tree.leaves(want[0]), jax.tree.leaves(entries)):
    np.testing.assert_array_equal(x[0], y[0])
    assert np.isnan(y[3, 0]).all()


LENGTH = np.array([0, 3, 4, 6, 10, 2], np.int32)
N_VALID = np.array([6, 6, 2, 5, 6, 4], np.int32)
BORDERS = np.array([[0] * 6, [0, 0, 0, 1, 1, 1], [0] * 6, [0, 1, 1, 1, 1, 1],
                    [0] * 6, [0] * 6], np.int32)


@jit
def pull(args, tokens, cotangents):
  """One step and its gradients; placeholders for nothing count as 0."""
  def numbers(*args):
    entries, residual, count, length = compress(*args, *tokens, 4)
    return jax.tree.map(
        lambda x: jnp.where(jnp.abs(x) > -0.1 * EMPTY, jnp.zeros_like(x), x),
        (entries, residual)), (count, length)

  out, back, (count, length) = jax.vjp(numbers, *args, has_aux=True)
  return out, count, length, back(cotangents)


def cotangents(seed):
  rng = np.random.default_rng(seed)
  pools, overlaps, means, bounds = states(seed, 6, np.float64)
  some = lambda: rng.normal(size=(6, 2, WIDTH))
  return (some(), some(), some(), cp.Extremes(some(), some())), (
      pools, overlaps, means, bounds)


def test_gradient(float64):
  """By finite differences, and through the residual of a split."""
  args = states(4, 6, np.float64), *step_of(3, 6, 6, np.float64)
  tokens = LENGTH, N_VALID, BORDERS
  d_entries, d_after = cotangents(5)
  out, _, _, grads = pull(args, tokens, (d_entries, d_after))
  inner = lambda a, b: sum(np.sum(np.multiply(x, y)) for x, y in zip(
      jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
  leaves, tree = jax.tree.flatten(args)
  for i, grad in enumerate(jax.tree.leaves(grads)):
    assert np.any(grad)
    ways, value = np.random.default_rng(i).normal(size=grad.shape), []
    for step in (1e-5, -1e-5):
      moved = [*leaves[:i], leaves[i] + step * ways, *leaves[i + 1:]]
      value.append(inner(pull(jax.tree.unflatten(tree, moved), tokens,
                              (d_entries, d_after))[0],
                         (d_entries, d_after)))
    close((value[0] - value[1]) / 2e-5, np.sum(grad * ways), 1e-7)

  # No border lies where the step is cut.
  turn = lambda x, n: np.roll(x, -n, axis=1)
  held, values, gates = args
  head = LENGTH, np.minimum(N_VALID, 2), BORDERS
  none = jax.tree.map(np.zeros_like, (d_entries, d_after))
  (first, held), count, length, _ = pull(args, head, none)
  tail = length, np.maximum(N_VALID - 2, 0), turn(BORDERS, 2)
  rest = held, turn(values, 2), turn(gates, 2)
  d_second = jax.tree.map(lambda x: np.stack(
      [np.roll(x[b], -int(n), 0) for b, n in enumerate(count)]), d_entries)
  (second, after), _, _, (d_held, *d_rest) = pull(
      rest, tail, (d_second, d_after))
  close(after, out[1], 1e-13)
  close(inner(first, d_entries) + inner(second, d_second),
        inner(out[0], d_entries), 1e-13)
  _, _, _, (d_start, *d_head) = pull(args, head, (d_entries, d_held))
  close(d_start, grads[0], 1e-12)
  for x, y, want in zip(d_head, d_rest, grads[1:]):
    close(x + turn(y, -2), want, 1e-12)


def test_gradient_stays_in_its_document(float64):
  """Exactly zero over a border and at padding, though that is NaN, and finite
  at extreme gates."""
  values, gates = step_of(3, 6, 6, np.float64)
  gates[2:] = np.where(gates[2:] > 0, 1e4, -1e4)
  pad = np.arange(6) >= N_VALID[:, None]
  values[pad] = gates[pad] = np.nan
  args = states(4, 6, np.float64), values, gates
  # Whose block ends in the step, of each row's at most two.
  owner = np.array([[0, -1], [0, -1], [-1, -1], [1, -1], [0, 0], [0, -1]])
  first, last, two = BORDERS == 0, BORDERS[:, -1], BORDERS[:, -1] > 0
  d_entries, d_after = cotangents(6)
  for document, share, other in (
      (np.zeros_like(last), 0.0, ~first), (last, 1.0, two[:, None] & first)):
    mine = (owner == document[:, None])[..., None]
    d_out = (jax.tree.map(lambda x, m=mine: x * m, d_entries),
             jax.tree.map(lambda x, s=share: x * s, d_after))
    *_, (d_held, *d_tokens) = pull(args, (LENGTH, N_VALID, BORDERS), d_out)
    for x in map(np.asarray, d_tokens):
      assert np.isfinite(x).all() and (x[pad] == 0).all()
      assert (x[other] == 0).all() and (x[~other & ~pad] != 0).any()
    for x in map(np.asarray, jax.tree.leaves(d_held)):
      assert np.isfinite(x).all()
      assert not share or (x[two] == 0).all()


def test_bfloat16_is_summed_in_float32():
  values, gates = (jnp.asarray(x, jnp.bfloat16) for x in step_of(8, 6, 6))
  got = run(states(9, 6), values, gates, LENGTH, N_VALID, BORDERS, size=4)
  want = run(states(9, 6), values.astype(jnp.float32),
             gates.astype(jnp.float32), LENGTH, N_VALID, BORDERS, size=4)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


# DeepSeek-V4 as the transformers library runs it. Its compressor also norms and
# rotates the entries, which is a layer's work and done in numpy here.


def rope_of_entries(x, size):
  """YaRN frequencies, interleaved pairs of the trailing half, at w * size."""
  rotating, theta, factor, origin = 8, 160000.0, 16.0, 64
  i = np.arange(0, rotating, 2) / rotating
  turns = lambda n: (rotating * np.log(origin / (n * 2 * np.pi))
                     / (2 * np.log(theta)))
  low, high = max(np.floor(turns(32.0)), 0), min(np.ceil(turns(1.0)), 7)
  ramp = np.clip((np.arange(4) - low) / (high - low), 0, 1)
  inverse = theta ** -i * (ramp / factor + 1 - ramp)
  angle = size * np.arange(x.shape[1])[:, None] * inverse
  cos, sin = np.cos(angle), np.sin(angle)
  x = np.array(x, np.float64)
  even, odd = x[..., -rotating::2].copy(), x[..., 1 - rotating::2].copy()
  x[..., -rotating::2] = even * cos - odd * sin
  x[..., 1 - rotating::2] = odd * cos + even * sin
  return x


def norm(x, weight):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-3) * weight


def stream(name, prefix, size, residual, compressor, cuts):
  """Entries of all chunks and the residual after each."""
  g = dict(np.load(GOLDEN / f'dsv4_{name}.npz'))
  p = lambda key: np.float64(g[f'p/compressor.{prefix}{key}'])
  x = np.float64(g['x'])
  values, gates = x @ p('kv_proj.weight').T, x @ p('gate_proj.weight').T
  values, gates = np.float32(values), np.float32(gates)
  bias, entries, after = np.float32(p('position_bias')), [], []
  step = jit(functools.partial(chunk, compressor, size))
  for begin, end in zip((0, *cuts), (*cuts, x.shape[1])):
    length = np.full((2,), begin, np.int32)
    # Chunks of one length, so that one program serves them all.
    part = [np.pad(y[:, begin:end], ((0, 0), (0, 21 - end + begin), (0, 0)),
                   constant_values=np.nan) for y in (values, gates)]
    out, residual = step(*part, bias, residual, length, length + end - begin)
    count = end // size - begin // size
    entries.append(np.asarray(out, np.float64)[:, :count])
    after.append(residual)
  entries = np.concatenate(entries, 1)
  return g, rope_of_entries(norm(entries, p('kv_norm.weight')), size), after


def chunk(compressor, size, values, gates, bias, residual, begin, end):
  c = common.context(begin, end - begin, None, values.shape[1])
  b = bk.plan(c.length, c.n_valid, c.positions, c.document, c.start, c.base,
              size)
  gates = cp.add_position_bias(gates, bias, c.positions)
  return compressor(values, gates, residual, b)


def no_pool(width):
  zero = np.zeros((2, width), np.float32)
  return cp.Pool(zero + np.float32(EMPTY), zero, zero)


# What the two libraries' float32 errors can add up to, of numbers near 1.
NEAR = 20 * EPS


def test_golden_hca():
  g, got, after = stream('hca', '', 8, no_pool(16), cp.gated, (21,))
  close(got[:, None], g['compressed_kv'], NEAR)
  close(got[:, :2], g['state_after_21/compressed_kv/compressor'], NEAR)
  gate, value = (np.float64(g[f'state_after_21/buffer_{kind}/compressor'])
                 for kind in ('gate', 'kv'))
  gate = gate + g['p/compressor.position_bias'][:5]
  for b in range(2):
    close(row_of(after[0], b), pool(np.stack([gate[b], value[b]], 1)), NEAR)


@pytest.mark.parametrize('part, prefix, width', [
    ('compressor', '', 16), ('indexer', 'indexer.', 12)])
def test_golden_csa(part, prefix, width):
  none = cp.Overlap(no_pool(width), no_pool(width))
  g, got, after = stream('csa', prefix, 4, none, cp.gated_overlap, (21,))
  if part == 'compressor':
    close(got[:, None], g['compressed_kv'], NEAR)
  close(got[:, :5], g[f'state_after_21/compressed_kv/{part}'], NEAR)
  kept = {kind: np.float64(g[f'state_after_21/{kind}/{part}']) for kind in (
      'buffer_gate', 'buffer_kv', 'overlap_gate', 'overlap_kv')}
  kept['buffer_gate'] += g[f'p/compressor.{prefix}position_bias'][:1]
  for b in range(2):
    gate, value, left_gate, left_value = (x[b] for x in kept.values())
    current = pool(np.stack([np.concatenate([left_gate, gate[:, width:]]),
                             np.concatenate([left_value, value[:, width:]])],
                            axis=1))
    following = pool(np.stack([gate[:, :width], value[:, :width]], axis=1))
    close(row_of(after[0], b), (current, following), NEAR)
