"""Shared by the delta-rule mixers: state, short convolutions, gates."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from statejax.layers import common, weights
from statejax.ops import conv, norm, shadow
from statejax.ops import delta_rule as delta_rule
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState:
  """Carried state of a delta-rule layer.

  Attributes:
    matrix: the recurrent matrix S, [B, HV, K, V] float32.
    tail_q: last taps-1 inputs of the query convolution, [B, taps-1, HK, K].
    tail_k: of the key convolution, [B, taps-1, HK, K].
    tail_v: of the value convolution, [B, taps-1, HV, V].
    shadow: what R spans have changed in S, [B, R, HV, K, V] float32, or None
      where no span is followed; see `statejax.forget`.
  """

  matrix: Array = leaf('batch heads key value')
  tail_q: Array = leaf('batch taps key_heads key')
  tail_k: Array = leaf('batch taps key_heads key')
  tail_v: Array = leaf('batch taps heads value')
  shadow: Array | None = leaf('batch spans heads key value', default=None,
                              kw_only=True)


def state_specs(rows, heads, value_heads, key, value, taps, dtype):
  """Returns the `DeltaState` of `Spec`; the matrix is float32 always."""
  past = taps - 1
  return DeltaState(
      matrix=Spec((rows, value_heads, key, value), 'float32'),
      tail_q=Spec((rows, past, heads, key), dtype),
      tail_k=Spec((rows, past, heads, key), dtype),
      tail_v=Spec((rows, past, value_heads, value), dtype))


class HeadConv(nn.Module):
  """Short convolution with SiLU over [B, T, heads, width] channels."""

  taps: int
  axes: tuple[str, str]
  bias: bool = False

  @nn.compact
  def __call__(self, x, tail, context):
    batch, length, heads, width = x.shape
    # Small, so that SiLU begins linear: recall is learned in fewer updates
    # than from the 0.5 that is usual for four taps.
    w = weights.weight(self, 'weight', ('taps', *self.axes),
                       (self.taps, heads, width), weights.symmetric(0.1))
    bias = None
    if self.bias:
      bias = weights.weight(self, 'bias', self.axes, (heads, width),
                            weights.zeros).reshape(-1)
    # Not -1: one tap has no tail.
    y, tail = conv.short_conv(
        x.reshape(batch, length, -1),
        tail.reshape(batch, self.taps - 1, heads * width),
        w.reshape(self.taps, -1), context.n_valid,
        document=context.document,
        start=None if context.document is None else context.start, bias=bias)
    return (y.reshape(x.shape),
            tail.reshape(batch, self.taps - 1, heads, width))


def rate_init(low, high):
  """A_log whose exponential is uniform in (low, high)."""
  return lambda u: jnp.log(low + (high - low) * u)


def step_init(low=1e-3, high=1e-1):
  """Bias whose softplus is log-uniform in [low, high] (arXiv 2405.21060)."""
  def init(u):
    step = low * jnp.exp(np.log(high / low) * u)
    return step + jnp.log(-jnp.expm1(-step))
  return init


def log_decay(x, rate, bias, lower_bound=None):
  """`-exp(rate) softplus(x + bias)`, float32 throughout.

  With a lower bound `lower_bound * sigmoid(exp(rate) (x + bias))`.

  Args:
    x: [B, T, H] or [B, T, H, K].
    rate: A_log, [H].
    bias: dt_bias, [H] or [H, K].
    lower_bound: of the result; negative, or None.

  Returns:
    log gate <= 0 of the shape of x, float32.
  """
  wide = (jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  scale = jnp.exp(rate).reshape((1, 1, -1) + (1,) * (x.ndim - 3))
  x = x.astype(wide) + bias[None, None]
  if lower_bound is not None:
    return lower_bound * jax.nn.sigmoid(scale * x)
  return -scale * jax.nn.softplus(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixState:
  """Carried state of a layer without short convolutions.

  Attributes:
    matrix: the recurrent matrix S, [B, HV, K, V] float32.
    shadow: see `DeltaState`.
  """

  matrix: Array = leaf('batch heads key value')
  shadow: Array | None = leaf('batch spans heads key value', default=None,
                              kw_only=True)


def carry(state, q, k, v, log_decay, erase, write, n_valid, document, *,
          scale=None, chunk_size=None):
  """Runs the delta rule over a layer's matrix, and over its shadows.

  Args:
    state: of the layer; `matrix` and `shadow` are read.
    q, k, v, log_decay, erase, write, n_valid, document, scale, chunk_size: as
      of `statejax.ops.delta_rule`.

  Returns:
    y [B, T, HV, V] and the dict of the new matrix and shadow.
  """
  y, matrix = delta_rule(
      q, k, v, log_decay, erase, write, state.matrix, n_valid, document,
      scale=scale, chunk_size=chunk_size)
  # Apart, so that following a span changes no bit of the stream.
  return y, {'matrix': matrix, 'shadow': faded(
      state, k, log_decay, erase, n_valid, document, chunk_size=chunk_size)}


def faded(state, k, log_decay, erase, n_valid, document, *, chunk_size=None):
  """Returns a layer's shadows after some tokens, or None where it has none."""
  if state.shadow is None:
    return None
  return shadow.fade(state.shadow, k, log_decay, erase, n_valid, document,
                     chunk_size=chunk_size)


# Parts of mixers. Called from a compact method, they declare the parameters in
# the module that calls; `module` is that one.


def query_key_value(x, state, context, *, query, key, value, taps,
                    key_axes=('heads', 'key'), bias=False):
  """Projects x three times, each through its own short convolution.

  Args:
    x: [B, T, D].
    state: `DeltaState`; its tails are read.
    context: `statejax.layers.common.Context`.
    query: heads and width of the queries.
    key: of the keys.
    value: of the values.
    taps: of the convolutions.
    key_axes: logical names of (heads, width) of queries and keys.
    bias: whether the convolutions have one.

  Returns:
    q, k, v, each [B, T, heads, width], and the dict of the new tails.
  """
  out, tails = [], {}
  for name, shape, axes in (('q', query, key_axes), ('k', key, key_axes),
                            ('v', value, ('heads', 'value'))):
    y = common.Proj(shape, ('embed', *axes), name=name)(x)
    tail = f'tail_{name}'
    y, tails[tail] = HeadConv(taps, axes, bias, name=f'conv_{name}')(
        y, getattr(state, tail), context)
    out.append(y)
  return *out, tails


def unit(x):
  """l2-normalises in float32 and returns x.dtype."""
  return norm.l2_norm(x).astype(x.dtype)


def beta(x, heads, limit):
  """Returns `limit * sigmoid(b x)`, [B, T, heads] float32."""
  b = common.Proj((heads,), ('embed', 'heads'), name='beta')(x)
  return limit * jax.nn.sigmoid(b.astype(jnp.float32))


def constant(values, x):
  """Gates that depend on the head alone: [H] to [B, T, H] float32."""
  return jnp.broadcast_to(
      jnp.asarray(values, jnp.float32)[None, None],
      (*x.shape[:2], len(values)))


def low_rank(module, x, name, rank, shape, axes, *, bias=False):
  """Returns `b(a(x))` through `rank` channels, [B, T, *shape]."""
  low = common.Proj((rank,), ('embed', 'rank'), name=f'{name}_a')(x)
  y = common.Proj(shape, ('rank', *axes), name=f'{name}_b')(low)
  if bias:
    b = weights.weight(module, f'{name}_bias', axes, shape, weights.zeros)
    y = y + b.astype(y.dtype)[None, None]
  return y


def decay_gate(module, x, axes, *, rate_min=1.0, dt_bias=None,
               lower_bound=None):
  """`log_decay` of x with the parameters a_log [H] and dt_bias.

  Args:
    module: the mixer.
    x: [B, T, H] or [B, T, H, K].
    axes: logical names of (H,) or (H, K).
    rate_min: exp(a_log) is drawn from (rate_min, 16).
    dt_bias: initial value; None for `step_init`.
    lower_bound: see `log_decay`; a_log then begins at 0.
  """
  rate = (rate_init(rate_min, 16.0) if lower_bound is None else
          weights.zeros)
  step = step_init() if dt_bias is None else weights.constant(dt_bias)
  a = weights.weight(module, 'a_log', axes[:1], x.shape[2:3], rate)
  bias = weights.weight(module, 'dt_bias', axes, x.shape[2:], step)
  return log_decay(x, a, bias, lower_bound)


def output(module, y, gate, width, *, eps, activation=jax.nn.silu,
           groups=None, order=norm.gated_rms_norm):
  """Norm, gate and output projection, [B, T, width].

  Args:
    module: the mixer.
    y: [B, T, H, V].
    gate: [B, T, H, V], or None for the norm alone.
    width: D.
    eps: of the norm.
    activation: of the gate.
    groups: the norm is over each head with one weight [V] for all; or, given
      a number, over each of so many groups of heads with a weight [H, V].
    order: `norm.gated_rms_norm` or `norm.norm_of_gated`.
  """
  heads, value = y.shape[2:]
  axes, shape, view = ('value',), (value,), y.shape
  if groups is not None:
    axes, shape = ('heads', 'value'), (heads, value)
    view = (*y.shape[:2], groups, heads // groups * value)
  w = weights.weight(module, 'norm', axes, shape, weights.ones)
  if groups is not None:
    w = w.reshape(view[2:])
  if gate is None:
    y = norm.rms_norm(y.reshape(view), w, eps=eps)
  else:
    y = order(y.reshape(view), gate.reshape(view), w, eps=eps,
              activation=activation)
  return common.Proj((width,), ('heads', 'value', 'embed'), contract=2,
                     name='out')(y.reshape(*view[:2], heads, value))
