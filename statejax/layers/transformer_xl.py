"""Transformer-XL: attention to a segment and to layer inputs before it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import TransformerXLConfig
from statejax.layers import common, weights
from statejax.layers.common import Proj
from statejax.ops import attend, window
from statejax.ops.product import einsum
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HiddenState:
  """The layer's inputs of the memory and of the open segment.

  Attributes:
    hidden: position p is in slot p mod N, N = M + S, [B, N, D], store dtype;
      fixed.
  """

  hidden: Array = leaf('batch window channels')


class TransformerXL(nn.Module):
  """Attention to the own segment and to the M tokens before it.

    score(t, j) = (q_t + u) . k_j + (q_t + v) . W_r r_{t-j}
    r_d = [sin(w_f d), cos(w_f d)], w_f = 10000^(-2 f / width)

  u and v are learned per head. Keys and values are made anew in each step from
  the layer inputs that the state keeps; into those of earlier segments no
  gradient runs, unless the config says so. Segments begin at multiples of S in
  the document, wherever steps end.

  Reference: arXiv 1901.02860.
  """

  config: TransformerXLConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `HiddenState` of `Spec`."""
    return HiddenState(Spec((rows, config.slots, config.width), dtype))

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    new, both = joined(c, x, state.hidden)
    queries, keys = relative(self, c, x, context)
    own, memory, far = sights(c, context)
    segments = [keys(both, far, own),
                keys(cut(c, both), far, memory)]
    y, _ = attend.attend(queries, segments, scale=c.key ** -0.5)
    return output(x, y), HiddenState(write(state.hidden, new, context))


# Parts of mixers. Called from a compact method, they declare the parameters in
# the module that calls.


def relative(module, config, x, context):
  """Projections with relative positions.

  Returns:
    queries: for `attend`, in two parts.
    keys: function of (rows [B, N, D], their distances from the document's
      anchor [B, N], visible [B, T, N]) that gives an `attend.Segment`, by
      weights that have gone `through` a function.
  """
  c, heads = config, ('heads', 'key')
  q = Proj((c.heads, c.key), ('embed', *heads), name='q')(x)
  u, v = (weights.weight(module, name, heads, (c.heads, c.key), weights.zeros)
          .astype(x.dtype)[None, None] for name in ('content', 'position'))
  w = _kernel(module, 'distance', ('rank', *heads),
              (c.relative, c.heads, c.key))
  # What a query asks of r_d, turned so that keys bear their own place alone:
  # sin and cos of a difference are products of those of its terms.
  asked = einsum('bthk,rhk->bthr', (q + v).astype(jnp.float32), w)
  sine, cosine = jnp.split(asked, 2, axis=-1)
  sin, cos = jnp.split(angles(
      context.positions - anchor(context), c.relative)[:, :, None], 2, axis=-1)
  turned = jnp.concatenate(
      [cosine * sin - sine * cos, sine * sin + cosine * cos], axis=-1)
  k, v = (_kernel(module, name, ('embed', 'kv_heads', side),
                  (x.shape[-1], c.kv_heads, size))
          for name, side, size in (('k', 'key', c.key),
                                   ('v', 'value', c.value)))

  def keys(rows, far, visible, through=lambda w: w):
    own, value = (common.project(rows, through(w)).swapaxes(1, 2)
                  for w in (k, v))
    places = angles(far, c.relative)[:, None]
    return attend.Segment((own, places), value, visible)
  return (q + u, turned), keys


def _kernel(module, name, axes, shape):
  return weights.weight(module, f'kernel_{name}', axes, shape,
                        weights.truncated_normal(shape[0] ** -0.5))


def output(x, y):
  """Projects [B, T, H, V] to x's width."""
  return Proj(x.shape[-1:], ('heads', 'value', 'embed'), contract=2,
              name='out')(y)


# Functions of arrays.


def check_width(config, x):
  """Raises ValueError unless x [B, T, D] has the width of the config."""
  if x.shape[-1] != config.width:
    raise ValueError(
        f'{type(config).__name__}.width: expected the width of the model, '
        f'{x.shape[-1]}, got {config.width}; what is remembered is as wide as '
        'what the layer reads.')


def joined(config, x, ring):
  """Returns x as it enters the ring, and all rows [ring, step], [B, N + T, D]
  in x.dtype."""
  check_width(config, x)
  new = x.astype(ring.dtype)
  return new, jnp.concatenate([ring, new], axis=1).astype(x.dtype)


def cut(config, rows):
  """The rows as later segments see them."""
  return jax.lax.stop_gradient(rows) if config.detach else rows


def sights(config, context):
  """What each query sees of the rows [ring, step].

  Returns:
    of the own segment and of the memory, [B, T, N + T] bool each, and the
    places of the rows from their anchors, [B, N + T] int32.
  """
  held = window.positions(context.length, config.slots)
  at = jnp.concatenate([held, context.positions], axis=1)
  seen = jnp.concatenate(
      [context.visible_past(held), context.visible_chunk()], axis=2)
  begin = begins(config, context)
  own = at[:, None, :] >= begin
  near = at[:, None, :] >= begin - config.memory
  far = jnp.concatenate([held - context.length[:, None],
                         context.positions - anchor(context)], axis=1)
  return seen & own, seen & ~own & near, far


def begins(config, context):
  """Position of the first token of each query's segment, [B, T, 1]."""
  return (context.positions // config.segment * config.segment)[..., None]


def anchor(context):
  """The position from which those of a document are counted, [B, T]: in its
  own document the row's length, so that angles stay small and exact."""
  length = context.length[:, None]
  if context.document is None:
    return jnp.broadcast_to(length, context.positions.shape)
  return jnp.where(context.document == 0, length, 0)


def angles(places, width):
  """`[sin(w_f p), cos(w_f p)]` of places [B, N]: [B, N, width] float32."""
  half = width // 2
  rate = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  turn = places.astype(jnp.float32)[..., None] * rate[None, None]
  return jnp.concatenate([jnp.sin(turn), jnp.cos(turn)], axis=-1)


def write(ring, new, context):
  """The ring [B, N, D] after the step's rows [B, T, D]."""
  return window.write(ring[:, None], new[:, None], context.base, context.start,
                      context.n_valid)[:, 0]
