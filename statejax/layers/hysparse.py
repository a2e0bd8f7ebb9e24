"""Sparse layers that see what a full layer before them looked at."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import HySparseConfig
from statejax.layers import attention, block_sparse, common
from statejax.layers.common import Proj
from statejax.ops import attend, candidates, stream

_BRANCHES = 2


class HySparse(nn.Module):
  """A full layer that lends its keys and choice, or a layer that reads them.

    owner:  y = attention to everything, p its probabilities
            chosen(t, g) = the k blocks of the largest max of p_htj over the
            tokens j of the block and the heads h of the group g
    reader: y = out(sigmoid(gate_1 x) attention to chosen keys of the owner +
            sigmoid(gate_2 x) attention to a window of its own keys)

  A reader has queries of its own for both branches, the same; it keeps no
  store. The choice has no gradient; the owner learns as any attention does, and
  from its readers through its keys and values.

  Reference: arXiv 2602.03560.
  """

  config: HySparseConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `StoreState`, or for a reader a `RingState`, of `Spec`."""
    return attention.Attention.state(
        dataclasses.replace(config.attention, window=config.window),
        rows, capacity, dtype)

  @nn.compact
  def __call__(self, x, state, context):
    run = self._owner if self.config.owner is None else self._reader
    return run(x, state, context)

  def _owner(self, x, state, context):
    c, a = self.config, self.config.attention
    q, k, v = attention.project(a, x, context.positions)
    k, v = (y.astype(state.k.data.dtype) for y in (k, v))
    past, state = attention.remember(state, k, v, context)
    scale = a.key ** -0.5
    y, lse = stream.attend(
        q, attend.Segment(*past),
        [attend.Segment(k, v, context.visible_chunk(), causal=True)],
        scale=scale, sink=attention.sink(self, a), last=context.last)

    plan = context.blocks(c.block)
    tokens = past[0].shape[2]
    best = block_sparse.best_scores(
        jax.lax.stop_gradient(q), (past[0], past[2]), k, plan, context)
    # Of exponentials of a common sum the largest is that of the largest score.
    lse = jax.lax.stop_gradient(lse).swapaxes(1, 2)[..., None]
    p = jnp.exp(jnp.minimum(scale * best - lse, 0.0))
    groups = a.kv_heads
    p = jnp.max(p.reshape(p.shape[0], groups, -1, *p.shape[2:]), axis=2)
    seen = candidates.visible(plan, candidates.count(tokens, c.block))
    common.lend(self, blocks=candidates.choose(p, seen, c.k), past=past,
                new=(k, v), plan=plan)
    return attention.output(a, x, y), state

  def _reader(self, x, state, context):
    c, a = self.config, self.config.attention
    q, k, v = attention.project(a, x, context.positions)
    k, v = (y.astype(state.k.dtype) for y in (k, v))
    lent = {name: context.borrow(c.owner, name)
            for name in ('blocks', 'past', 'new', 'plan')}
    self._check(lent['new'], k, v)
    if lent['plan'].size != c.block:
      raise ValueError(
          f'HySparse: a reader has the block of its owner {c.owner!r}, '
          f"expected block={lent['plan'].size}, got {c.block}.")
    scale = a.key ** -0.5
    far = block_sparse.attend_to(
        q, lent['past'], lent['new'], lent['blocks'], lent['plan'], context,
        scale=scale, sink=attention.sink(self, a))

    segments, new = attention.recent(state, k, v, context)
    near, _ = attend.attend(q, segments, scale=scale,
                            sink=attention.sink(self, a, 'sink_window'))
    gates = Proj((_BRANCHES, a.heads), ('embed', 'branches', 'heads'),
                 name='gates')(x)
    gates = jax.nn.sigmoid(gates)[..., None]
    y = gates[:, :, 0] * far + gates[:, :, 1] * near
    return attention.output(a, x, y), new

  def _check(self, lent, k, v):
    have, want = ([y.shape[1::2] for y in pair] for pair in (lent, (k, v)))
    if have != want:
      raise ValueError(
          f'HySparse: a reader of {self.config.owner!r} has the key/value '
          f'heads and widths of its owner: expected {have}, got {want}.')
