"""Where a sparse or compressed form becomes another one, exactly, and reach."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import single

from pallas_kernels import KERNELS
from statejax import config as c
from statejax.layers import common
from statejax.ops import blocks, compress, gather, index, stream

A = c.AttentionConfig(heads=4, kv_heads=2, key=8, value=6, sink=True)
CSA = c.CompressedConfig(
    heads=4, width=16, q_rank=12, window=5, out_groups=2, out_rank=6, ratio=3,
    index=c.IndexConfig(k=100, heads=5, width=12))

MLA = c.MLAConfig(heads=3, nope=8, rope_width=8, value=6, rank=16)
INDEX = dict(index_heads=8, index_width=8)


@pytest.fixture
def fresh():
  """What is put in place of an op is traced, and not kept."""
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.mark.slow
def test_a_window_of_everything_is_attention():
  params, x = single.draw(A, 24)
  ring = dataclasses.replace(A, window=30)
  for cuts in ((), (13, 14)):
    want, _ = single.run(A, params, x, cuts)
    y, _ = single.run(ring, params, x, cuts)
    np.testing.assert_allclose(y, want, atol=2e-6)


@pytest.mark.slow
def test_enough_entries_need_no_index():
  params, x = single.draw(CSA, 24)
  plain = dataclasses.replace(CSA, index=None)
  mine = {n: p for n, p in params.items() if not n.startswith('index')}
  for cuts in ((), (13, 14)):
    y, _ = single.run(CSA, params, x, cuts)
    want, _ = single.run(plain, mine, x, cuts)
    np.testing.assert_allclose(y, want, atol=2e-6)


def test_a_window_does_not_know_where_it_is():
  """The same tokens later in the document; rotations are relative."""
  ring = dataclasses.replace(A, window=4)
  params, x = single.draw(ring, 24)
  early, _ = single.run(ring, params, x[:, :14])
  late, _ = single.run(ring, params, np.concatenate(
      [x[:, 14:25], x[:, :14]], axis=1))
  np.testing.assert_allclose(early[:, 3:], late[:, 14:], atol=5e-6)
  assert np.abs(early[:, :3] - late[:, 11:14]).max() > 1e-3


def plan_of(steps, size):
  full = lambda n: jnp.full((1,), n, jnp.int32)
  k = common.context(full(0), full(steps), None, steps)
  return blocks.plan(k.length, k.n_valid, k.positions, k.document, k.start,
                     k.base, size)


def test_blocks_of_one_token_are_the_tokens():
  x = jax.random.normal(jax.random.key(0), (1, 7, 5))
  pool = compress.Pool(*(jnp.zeros((1, 5)),) * 3)
  made, _ = compress.gated(x, jnp.cos(9 * x), pool, plan_of(7, 1))
  np.testing.assert_array_equal(made, x)
  made, _ = compress.mean(x, jnp.zeros((1, 5)), plan_of(7, 1))
  np.testing.assert_array_equal(made, x)


def test_an_overlapping_entry_reaches_one_block_back():
  """Entry w is of blocks w - 1 and w: all of their tokens, no other."""
  size, steps, width = 3, 15, 2
  empty = compress.Pool(jnp.full((1, width), compress.EMPTY),
                        *(jnp.zeros((1, width)),) * 2)
  plan = plan_of(steps, size)

  @functools.partial(jax.jit)
  def entries(x):
    made, _ = compress.gated_overlap(
        x, jnp.sin(x), compress.Overlap(empty, empty), plan)
    return jnp.sum(made, axis=-1)[0]

  x = jax.random.normal(jax.random.key(0), (1, steps, 2 * width))
  seen = np.any(jax.jacrev(entries)(x)[:, 0] != 0, axis=-1)
  for w in range(steps // size):
    token = np.arange(steps)
    np.testing.assert_array_equal(
        seen[w], (token // size == w) | (token // size == w - 1))


@pytest.mark.parametrize('config', [
    c.DSAConfig(MLA, k=4, **INDEX),
    pytest.param(c.PooledDSAConfig(MLA, block=3, k=2, **INDEX),
                 marks=pytest.mark.slow),
    pytest.param(c.QSAConfig(dataclasses.replace(A, sink=False), block=3, k=2,
                             **INDEX), marks=pytest.mark.slow),
    pytest.param(
        dataclasses.replace(CSA, index=c.IndexConfig(k=3, heads=5, width=12)),
        marks=pytest.mark.slow),
], ids=lambda x: type(x).__name__)
def test_scores_past_the_count_do_not_matter(config, fresh, monkeypatch):
  """A kernel reads index keys up to the count alone; none of them is missed."""
  params, x = single.draw(config, 24)
  want, _ = single.run(config, params, x, (10, 20))
  jax.clear_caches()

  def scores(q, w, k, *, count, relu=True):
    late = jnp.arange(k.shape[1])[None, None] >= count[:, None, None]
    return jnp.where(late, 1e9, index.scores(q, w, k, relu=relu))

  monkeypatch.setattr(gather, 'index_scores', scores)
  got, _ = single.run(config, params, x, (10, 20))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('config', [
    A, pytest.param(MLA, marks=pytest.mark.slow),
    pytest.param(dataclasses.replace(MLA, rope_width=0, rope=None),
                 marks=pytest.mark.slow)], ids=str)
def test_long_stores_are_read_in_pieces_and_blocks(config, fresh, monkeypatch):
  """With the TPU kernel, interpreted, for the single token."""
  params, x = single.draw(config, 24)
  want, _ = single.run(config, params, x, (14, 15, 16))
  jax.clear_caches()
  used = []

  def kernel(op, implementation):
    used.append(op)
    return functools.partial(KERNELS[op][implementation], interpret=True)

  monkeypatch.setattr(stream, '_SIZE', 6)
  monkeypatch.setattr(stream, '_BLOCK', 8)
  monkeypatch.setattr(gather.dispatch, 'kernel', kernel)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  got, _ = single.run(config, params, x, (14, 15, 16))
  np.testing.assert_allclose(got, want, atol=2e-6)
  assert used == ['gather_attend']
