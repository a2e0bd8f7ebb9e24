"""Parameters: declared with logical axes, drawn by quantile functions.

An `init` maps uniform numbers in (0, 1) to values of the same shape. All small
parameters of a model then share one draw of random bits: XLA compiles the
generator anew for each draw, which takes longer than a small model's draw runs.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

_SHARED = 1 << 18  # elements; larger parameters are drawn, and sharded, alone


class Weight(nn.LogicallyPartitioned):
  """A parameter with its logical axes and its `init`."""

  init: Callable | None = dataclasses.field(
      default=None, metadata={'pytree_node': False})


def weight(module, name, axes, shape, init):
  """Declares a float32 parameter of a module; returns its value.

  Args:
    module: a Linen module in its compact method.
    name: of the parameter.
    axes: logical name of each dimension.
    shape: of the parameter.
    init: function of uniform numbers in (0, 1), e.g. `zeros` or `normal(1.0)`.
  """
  return module.param(name, declare, axes, shape, init)


def declare(key, axes, shape, init):
  """Returns a `Weight` drawn alone."""
  return Weight(init(uniform(key, shape)), axes, init=init)


def uniform(key, shape):
  """Uniform float32 numbers in (0, 1): odd multiples of 2**-24."""
  bits = jax.random.bits(key, shape, jnp.uint32) >> 9
  return (bits.astype(jnp.float32) + 0.5) * 2.0 ** -23


def draw(key, weights, stacked):
  """Draws parameters.

  Args:
    key: a typed key.
    weights: list of `Weight`, of shapes in place of values.
    stacked: for each the leading dimensions to add, () or (repeats,).

  Returns:
    List of float32 arrays.
  """
  shapes = [(*s, *w.value.shape)
            for s, w in zip(stacked, weights, strict=True)]
  sizes = [math.prod(s) for s in shapes]
  small = [n if n <= _SHARED else 0 for n in sizes]
  pool, at, out = uniform(jax.random.fold_in(key, 0), (sum(small),)), 0, []
  for i, (w, shape) in enumerate(zip(weights, shapes)):
    if small[i]:
      u = pool[at:at + small[i]].reshape(shape)
    else:
      u = uniform(jax.random.fold_in(key, 1 + i), shape)
    out.append(w.init(u))
    at += small[i]
  return out


# Quantile functions.


def zeros(u):
  """0."""
  return jnp.zeros_like(u)


def ones(u):
  """1."""
  return jnp.ones_like(u)


def constant(value):
  """The same value everywhere."""
  return lambda u: jnp.full_like(u, value)


def symmetric(limit):
  """Uniform in (-limit, limit)."""
  return lambda u: limit * (2 * u - 1)


def normal(deviation):
  """Normal around 0."""
  return lambda u: deviation * 2 ** 0.5 * jax.lax.erf_inv(2 * u - 1)


def truncated_normal(deviation):
  """Normal around 0 without what is beyond two of its own deviations.

  `deviation` is that of the result, as in `jax.nn.initializers`.
  """
  inside = math.erf(2 ** 0.5)
  own = deviation / 0.87962566103423978
  return lambda u: own * 2 ** 0.5 * jax.lax.erf_inv(inside * (2 * u - 1))
