"""Hyper-connections on a manifold (mHC): several residual streams.

A block reads one sum of the streams and writes to all of them, and a doubly
stochastic matrix carries the streams over:

  z = scale * (kernel^T rms0(flatten X)) + bias, split in three
  pre = sigmoid(z) + eps,   post = 2 sigmoid(z),   comb = sinkhorn(z)
  y = block(sum_i pre_i X_i),   X' = comb^T X + post y

All weights are float32. Reference: arXiv 2512.24880, and DeepSeek-V4.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from statejax.config import HyperConfig
from statejax.layers import common, weights
from statejax.ops import norm

# Published: of the weights, and of the factors that keep the first mappings
# close to their biases. The last makes `comb` start close to the identity: 0.95
# on the diagonal of four streams.
_DEVIATION, _SCALE, _DIAGONAL = 0.02, 0.01, 4.0


def split(streams, kernel, bias, scale, *, norm_eps, eps=1e-6, iterations=20):
  """Returns the weights with which a block reads, writes and mixes streams.

  Args:
    streams: X, [..., S, D], any float dtype.
    kernel: [S D, (2 + S) S] float32; columns of pre, post, and of comb row by
      row.
    bias: [(2 + S) S] float32.
    scale: factors of the three parts, [3] float32.
    norm_eps: of the norm of the flattened streams.
    eps: added to pre, to comb and to the sums that divide it.
    iterations: normalisations of comb's columns; one less of its rows.

  Returns:
    pre [..., S], post [..., S], comb [..., S, S], float32 (float64 of float64
    streams). Columns of comb sum to 1, its rows nearly.

  Raises:
    ValueError: shapes disagree.
  """
  count, width = streams.shape[-2:]
  want = (count * width, (2 + count) * count)
  if kernel.shape != want:
    raise ValueError(f'split: expected a kernel of {want} for {count} streams '
                     f'of width {width}, got {kernel.shape}.')
  sizes = np.array([count, count, count ** 2])
  scale = jnp.repeat(scale, sizes, total_repeat_length=sizes.sum())
  z = _affine(streams, kernel, bias, scale, norm_eps)
  pre, post, comb = jnp.split(z, [count, 2 * count], axis=-1)
  comb = comb.reshape(*comb.shape[:-1], count, count)
  return (jax.nn.sigmoid(pre) + eps, 2 * jax.nn.sigmoid(post),
          sinkhorn(comb, eps=eps, iterations=iterations))


def sinkhorn(logits, *, eps=1e-6, iterations=20):
  """Returns a nearly doubly stochastic matrix of [..., S, S] logits.

  Softmax of each row, then columns, rows, columns, ..., columns are divided by
  their sums.
  """
  def divide(m, axis):
    return m / (jnp.sum(m, axis=axis, keepdims=True) + eps)
  first = divide(jax.nn.softmax(logits, axis=-1) + eps, -2)
  return jax.lax.fori_loop(
      1, iterations, lambda _, m: divide(divide(m, -1), -2), first)


def collapse(streams, pre):
  """Returns `sum_i pre_i X_i`, [..., D] in the dtype of the streams.

  Args:
    streams: [..., S, D].
    pre: [..., S].
  """
  y = jnp.sum(pre[..., None] * _wide(streams), axis=-2)
  return y.astype(streams.dtype)


def mix(streams, y, post, comb):
  """Returns `comb^T X + post y`, [..., S, D] in the dtype of the streams.

  Args:
    streams: X, [..., S, D].
    y: what the block returned, [..., D].
    post: [..., S].
    comb: [..., S, S]; its first S is that of X.
  """
  # Not a product of matrices: those of four rows would only be padded.
  carried = jnp.sum(
      comb[..., None] * _wide(streams)[..., :, None, :], axis=-3)
  new = carried + post[..., None] * _wide(y)[..., None, :]
  return new.astype(streams.dtype)


class Mappings(nn.Module):
  """`split` with its parameters.

  At the start each stream is read with weight 1/S, written with weight 1 and
  carried over, so that equal streams are a residual network.
  """

  config: HyperConfig
  eps: float

  @nn.compact
  def __call__(self, streams):
    c, (count, width) = self.config, streams.shape[-2:]
    number = (2 + count) * count
    kernel = weights.weight(self, 'kernel', ('embed', 'channels'),
                            (count * width, number), weights.normal(_DEVIATION))
    bias = weights.weight(self, 'bias', ('channels',), (number,),
                          _start(count, number))
    scale = weights.weight(self, 'scale', ('channels',), (3,),
                           weights.constant(_SCALE))
    return split(streams, kernel, bias, scale, norm_eps=self.eps, eps=c.eps,
                 iterations=c.iterations)


def _start(count, number):
  """Returns the quantile function of the first `number` biases."""
  def init(u):
    fill = [-math.log(count - 1)] * count + [0.0] * count
    fill += [_DIAGONAL * (i == j) for i in range(count) for j in range(count)]
    return jnp.broadcast_to(jnp.asarray(fill[:number], u.dtype), u.shape)
  return init


# The two ends of a model.


def repeat(x, count):
  """Returns `count` equal streams, [..., S, D] of [..., D]."""
  return jnp.broadcast_to(
      x[..., None, :], (*x.shape[:-1], count, x.shape[-1]))


def declare(key, config, width):
  """Returns the `Weight`s with which a model's head reads the streams."""
  count = config.count
  return {
      'kernel': weights.declare(
          key, ('embed', 'channels'), (count * width, count),
          weights.normal(_DEVIATION)),
      'bias': weights.declare(key, ('channels',), (count,),
                              _start(count, count)),
      'scale': weights.declare(key, ('channels',), (1,),
                               weights.constant(_SCALE))}


def read(params, streams, *, norm_eps, eps=1e-6):
  """Returns the sum of the streams that a model's head reads, [..., D].

    sum_i (sigmoid(scale * (kernel^T rms0(flatten X)) + bias) + eps)_i X_i

  Args:
    params: of `declare`.
    streams: X, [..., S, D].
    norm_eps: of the norm of the flattened streams.
    eps: see above.
  """
  z = _affine(streams, params['kernel'], params['bias'], params['scale'],
              norm_eps)
  return collapse(streams, jax.nn.sigmoid(z) + eps)


def _affine(streams, kernel, bias, scale, eps):
  """Returns `scale * (kernel^T rms0(flatten X)) + bias`, [..., columns]."""
  flat = _wide(streams).reshape(*streams.shape[:-2], -1)
  z = common.project(norm.rms_norm(flat, None, eps=eps), kernel)
  row = lambda a: a.astype(z.dtype).reshape(*[1] * (z.ndim - 1), -1)
  return row(scale) * z + row(bias)


def _wide(x):
  return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
