"""Softmax attention over a growing store, or over a sliding-window ring."""

import dataclasses

import flax.linen as nn
import jax

from statejax.config import AttentionConfig
from statejax.layers import rotary, weights
from statejax.layers.common import Proj, RMSNorm
from statejax.ops import attend, band, stream, window
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoreState:
  """Keys and values of every token of the row's document.

  Attributes:
    k: after norm and rope, [B, G, N, K], store dtype; growing.
    v: [B, G, N, V], store dtype; growing.
  """

  k: Array = leaf('batch kv_heads capacity key', 'growing')
  v: Array = leaf('batch kv_heads capacity value', 'growing')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingState:
  """Keys and values of the last W tokens; position p is in slot p mod W.

  Attributes:
    k: after norm and rope, [B, G, W, K], store dtype; fixed.
    v: [B, G, W, V], store dtype; fixed.
  """

  k: Array = leaf('batch kv_heads window key')
  v: Array = leaf('batch kv_heads window value')


class Attention(nn.Module):
  """Grouped-query attention, optionally windowed, with sinks and a gate.

  A query sees itself and the tokens before it in its document, with a window
  W those less than W tokens back.
  """

  config: AttentionConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `StoreState`, or with a window a `RingState`, of `Spec`."""
    c = config
    kind = StoreState if c.window is None else RingState
    slots = capacity if c.window is None else c.window
    return kind(k=Spec((rows, c.kv_heads, slots, c.key), dtype),
                v=Spec((rows, c.kv_heads, slots, c.value), dtype))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    q, k, v = project(c, x, context.positions)
    # Keys enter this step as they enter the store, so that a token is the same
    # key whether a query meets it now or later.
    stored = (state.k.data if c.window is None else state.k).dtype
    k, v = k.astype(stored), v.astype(stored)
    how = dict(scale=c.key ** -0.5, sink=sink(self, c))
    if c.window is None:
      past, state = remember(state, k, v, context)
      chunk = attend.Segment(k, v, context.visible_chunk(), causal=True)
      y, _ = stream.attend(q, attend.Segment(*past), [chunk],
                           last=context.last, **how)
    else:
      (past, chunk), new = recent(state, k, v, context)
      if x.shape[1] > c.window:
        y = band.attend_band(q, past, k, v, context.visible_band(c.window),
                             **how)
      else:
        y, _ = attend.attend(q, [past, chunk], **how)
      state = new
    return output(c, x, y), state


# Parts of mixers. Called from a compact method, they declare the parameters in
# the module that calls.


def project(config, x, positions):
  """Returns q [B, T, H, K], k [B, G, T, K] and v [B, G, T, V] after norm and
  rope, in x.dtype."""
  c = config
  q = queries(c, x, positions)
  k = Proj((c.kv_heads, c.key), ('embed', 'kv_heads', 'key'), name='k')(x)
  v = Proj((c.kv_heads, c.value), ('embed', 'kv_heads', 'value'), name='v')(x)
  if c.qk_norm:
    k = RMSNorm(c.eps, axis='key', name='norm_k')(k)
  k = rotary.rotation(c.rope, c.key)(k, positions)
  return q, k.swapaxes(1, 2), v.swapaxes(1, 2)


def queries(config, x, positions):
  """Returns q [B, T, H, K] after norm and rope."""
  c = config
  q = Proj((c.heads, c.key), ('embed', 'heads', 'key'), name='q')(x)
  if c.qk_norm:
    q = RMSNorm(c.eps, axis='key', name='norm_q')(q)
  return rotary.rotation(c.rope, c.key)(q, positions)


def sink(module, config, name='sink'):
  """Returns the learned logits [H], or None."""
  if not config.sink:
    return None
  return weights.weight(module, name, ('heads',), (config.heads,),
                        weights.zeros)


def output(config, x, y):
  """Gate and output projection of [B, T, H, V], back to x's width."""
  c = config
  if c.output_gate:
    gate = Proj((c.heads, c.value), ('embed', 'heads', 'value'),
                name='gate')(x)
    y = y * jax.nn.sigmoid(gate)
  return Proj(x.shape[-1:], ('heads', 'value', 'embed'), contract=2,
              name='out')(y)


# Functions of arrays.


def recent(state, k, v, context):
  """The last W tokens of every query, and the ring after the step.

  Args:
    state: `RingState` of W slots.
    k: keys of the step, [B, G, T, K].
    v: [B, G, T, V].
    context: `Context`.

  Returns:
    segments for `statejax.ops.attend.attend`, and the new `RingState`.
  """
  size = state.k.shape[2]
  held = window.positions(context.length, size)
  where = (context.base, context.start, context.n_valid)
  # What the queries need is the ring before it is written.
  return [
      attend.Segment(state.k, state.v, context.visible_past(held, size)),
      attend.Segment(k, v, context.visible_chunk(size), causal=True)], (
          RingState(window.write(state.k, k, *where),
                    window.write(state.v, v, *where)))


def remember(state, k, v, context):
  """Appends a step's keys and values to the stores.

  Returns:
    what was in them, as (k [B, G, N, K], v [B, G, N, V], visible [B, T, N]),
    and the new `StoreState`.
  """
  old_k, new_k = context.append(state.k, k)
  old_v, new_v = context.append(state.v, v)
  seen = context.visible_store(old_k.shape[2])
  return (old_k, old_v, seen), StoreState(new_k, new_v)
