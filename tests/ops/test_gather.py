"""Chosen parts of a store: gathered, masked and streamed forms agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import jit

from statejax.ops import attend, gather, index, select


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion('strict'):
    yield


def make(batch=2, length=3, heads=4, groups=2, width=5, value=3, slots=22,
         block=4, count=3, sets=None, dtype=np.float32):
  """Random arrays; the first query names nothing, some ids are -1."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
  blocks, sets = -(-slots // block), sets or groups
  ids = np.stack([rng.permutation(blocks)[:count]
                  for _ in range(batch * length * sets)])
  ids = ids.reshape(batch, length, sets, count).astype(np.int32)
  ids[0, 0] = -1
  ids[1, 1, :, 1] = -1
  last = rng.integers(0, slots, (batch, length)).astype(np.int32)
  last[1, 2] = -1
  return dict(q=normal(batch, length, heads, width),
              k=normal(batch, groups, slots, width),
              v=normal(batch, groups, slots, value), ids=ids, last=last,
              sink=normal(heads))


def oracle(x, block, scale, sink):
  """Row by row in float64, from the set of slots."""
  q, k, v = (np.asarray(x[n], np.float64) for n in 'qkv')
  batch, length, heads, _ = q.shape
  each = heads // k.shape[1]
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  lse = np.full(q.shape[:3], -1e30)
  for b, t, h in np.ndindex(*q.shape[:3]):
    ids = x['ids'][b, t, h * x['ids'].shape[2] // heads]
    named = {i * block + j for i in ids[ids >= 0] for j in range(block)}
    at = sorted(j for j in named if j <= x['last'][b, t] and j < k.shape[2])
    s = scale * k[b, h // each, at] @ q[b, t, h]
    total = np.exp(s).sum() + (np.exp(x['sink'][h]) if sink else 0)
    if total:
      lse[b, t, h] = np.log(total)
      out[b, t, h] = np.exp(s) @ v[b, h // each, at] / total
  return out, lse


@functools.partial(jit, static_argnames=('block', 'implementation', 'sink'))
def run(x, *, block, implementation, sink):
  return gather.gather_attend(
      x['q'], x['k'], x['v'], x['ids'], x['last'], block=block, scale=0.4,
      sink=x['sink'] if sink else None, implementation=implementation)


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
@pytest.mark.parametrize('block, sink, sets', [
    (4, False, None), (1, True, None), (4, True, 4)])
def test_values(implementation, block, sink, sets, float64):
  x = make(block=block, dtype=np.float64, count=4, sets=sets,
           heads=2 * (sets or 2))
  got = run(x, block=block, implementation=implementation, sink=sink)
  for a, b in zip(got, oracle(x, block, 0.4, sink), strict=True):
    assert a.dtype == np.float64
    np.testing.assert_allclose(a, b, 1e-12, 1e-12)


def test_pieces_of_the_queries(monkeypatch):
  x = make(length=5)
  whole = run(x, block=4, implementation='xla', sink=True)
  monkeypatch.setattr(gather, '_GATHERED', 2 * (2 * 2 * 3 * 4 * 8))
  loss = lambda q, form: sum(
      jnp.sum(y ** 2) for y in gather.gather_attend(
          q, x['k'], x['v'], x['ids'], x['last'], block=4, scale=0.4,
          sink=jnp.asarray(x['sink']), implementation=form))
  pieces = jit(lambda: gather.gather_attend(
      *(jnp.asarray(x[n]) for n in ('q', 'k', 'v', 'ids', 'last')), block=4,
      scale=0.4, sink=jnp.asarray(x['sink']), implementation='xla'))()
  for a, b in zip(whole, pieces, strict=True):
    np.testing.assert_allclose(a, b, 1e-6, 1e-6)
  got, want = (jit(jax.grad(functools.partial(loss, form=form)))(x['q'])
               for form in ('xla', 'reference'))
  np.testing.assert_allclose(got, want, 1e-4, 1e-5)


def test_gradients_agree_and_are_finite():
  x = make(block=1, count=6)
  x['v'], x['k'] = None, (x['k'], x['v'])
  x['q'] = (x['q'], x['q'][..., :3])
  names = 'q', 'k', 'sink'

  def loss(floats, form):
    out, lse = gather.gather_attend(
        floats['q'], floats['k'], None, x['ids'], x['last'], block=1,
        scale=0.4, sink=floats['sink'], implementation=form)
    return jnp.sum(out ** 2) + jnp.sum(jnp.sin(lse))

  floats = {n: x[n] for n in names}
  got, want = (jit(jax.grad(functools.partial(loss, form=form)))(floats)
               for form in ('xla', 'reference'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5),
               got, want)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(got))


def test_is_attention_with_the_choice_as_a_mask():
  x = make(block=1, groups=1, count=4)
  at = np.where(x['ids'][:, :, 0] <= x['last'][..., None], x['ids'][:, :, 0],
                -1)
  want = jit(lambda q, k, v, at: attend.attend(
      q, [attend.Segment(k, v, select.to_mask(at, 22))], scale=0.4))(
          x['q'], x['k'], x['v'], at)
  got = run(x, block=1, implementation='xla', sink=False)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, 1e-5, 1e-6)


@pytest.mark.parametrize('change, text', [
    (dict(ids=np.zeros((2, 3, 1, 3), np.int32)), 'expected ids'),
    (dict(ids=np.zeros((2, 3, 8, 3), np.int32)), 'that divides 4 heads'),
    (dict(ids=np.zeros((2, 3, 2, 3), np.int64)), 'expected ids'),
    (dict(last=np.zeros((2,), np.int32)), 'expected last'),
    (dict(q=np.zeros((2, 3, 4, 6), np.float32)), 'of the same widths'),
    (dict(v=np.zeros((2, 2, 21, 3), np.float32)), 'k and v of one'),
    (dict(block=0), 'block >= 1'),
    (dict(implementation='pallas_tpu'), 'needs a TPU'),
])
def test_errors(change, text):
  x = dict(make(), block=4, scale=0.4) | change
  with pytest.raises(ValueError, match=text):
    gather.gather_attend(**x)


# The indexer.


def indexed(slots=70, heads=3, length=2, zero=False):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  q, w = normal(2, length, heads, 4), normal(2, length, heads)
  visible = rng.random((2, length, slots)) < 0.7
  visible[0, 0, 5:] = False
  # Keys that repeat give exact ties, of which only the place decides.
  k = np.repeat(normal(2, -(-slots // 5), 4), 5, axis=1)[:, :slots]
  return (-np.abs(q) if zero else q), w, (np.abs(k) if zero else k), visible


@pytest.mark.parametrize('zero', [False, True])
def test_every_form_chooses_the_same(zero, monkeypatch):
  monkeypatch.setattr(gather, '_SCORED', 16)
  q, w, k, visible = indexed(zero=zero)
  found = [jit(functools.partial(
      gather.index_topk, k_count=12, parts=parts, implementation=form))(
          q, w, k, visible)
           for form, parts in (('reference', None), ('xla', None), ('xla', 7))]
  want = jit(lambda q, w, k, visible: select.top(
      index.scores(q, w, k), visible, 12))(q, w, k, visible)
  for ids in found:
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, want)
  if zero:  # the first visible ones
    np.testing.assert_array_equal(
        want[1, 0], np.flatnonzero(visible[1, 0])[:12])


def test_tiles_change_no_score(monkeypatch):
  monkeypatch.setattr(gather, '_SCORED', 16)
  q, w, k, _ = map(jnp.asarray, indexed(slots=67))
  for weights in (w, None):
    got, want = (jit(functools.partial(
        gather.index_scores, implementation=form, relu=False))(q, weights, k)
                 for form in ('xla', 'reference'))
    np.testing.assert_allclose(got, want, 1e-6, 1e-6)


def test_the_indexer_says_what_it_expects():
  q, w, k, visible = map(jnp.asarray, indexed())
  with pytest.raises(ValueError, match='expected q'):
    gather.index_scores(q, w[:, :1], k)
  with pytest.raises(ValueError, match='needs a TPU'):
    gather.index_topk(q, w, k, visible, 3, implementation='pallas_tpu')
