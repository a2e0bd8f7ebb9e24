"""Shared by the delta-rule mixers: state, short convolutions, gates."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from statejax.layers import common
from statejax.ops import conv
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
  """

  matrix: Array = leaf('batch heads key value')
  tail_q: Array = leaf('batch taps key_heads key')
  tail_k: Array = leaf('batch taps key_heads key')
  tail_v: Array = leaf('batch taps heads value')


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

  @nn.compact
  def __call__(self, x, tail, context):
    batch, length, heads, width = x.shape
    init = nn.initializers.variance_scaling(
        1.0, 'fan_in', 'uniform', in_axis=0, out_axis=())
    w = common.weight(self, 'weight', ('taps', *self.axes),
                      (self.taps, heads, width), init)
    y, tail = conv.short_conv(
        x.reshape(batch, length, -1),
        tail.reshape(batch, self.taps - 1, -1),
        w.reshape(self.taps, -1), context.n_valid,
        document=context.document,
        start=None if context.document is None else context.start)
    return (y.reshape(x.shape),
            tail.reshape(batch, self.taps - 1, heads, width))


def rate_init(low, high):
  """A_log whose exponential is uniform in [low, high]."""
  def init(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, low, high))
  return init


def step_init(low=1e-3, high=1e-1):
  """Bias whose softplus is log-uniform in [low, high] (arXiv 2405.21060)."""
  def init(key, shape, dtype):
    step = jnp.exp(jax.random.uniform(
        key, shape, dtype, np.log(low), np.log(high)))
    return step + jnp.log(-jnp.expm1(-step))
  return init


def log_decay(x, rate, bias):
  """`-exp(rate) softplus(x + bias)`, float32 throughout.

  Args:
    x: [B, T, H] or [B, T, H, K].
    rate: A_log, [H].
    bias: dt_bias, [H] or [H, K].

  Returns:
    log gate <= 0 of the shape of x, float32.
  """
  wide = (jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  scale = jnp.exp(rate).reshape((1, 1, -1) + (1,) * (x.ndim - 3))
  return -scale * jax.nn.softplus(x.astype(wide) + bias[None, None])
