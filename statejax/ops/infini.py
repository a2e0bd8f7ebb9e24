"""The matrix of Infini-attention: written once a segment, read by its sums."""

import jax
import jax.numpy as jnp


def features(x):
  """`elu(x) + 1`, above 0, in float32."""
  return jax.nn.elu(x.astype(jnp.float32)) + 1


def read(q, memory, mass, *, eps):
  """Mean of what was written, by likeness: `q M / (q z + eps)`.

  Args:
    q: features of queries, [..., N, K] float32.
    memory: M, [..., K, V] float32.
    mass: z, [..., K] float32.
    eps: makes the read of an empty matrix 0.

  Returns:
    [..., N, V] float32.
  """
  total = _dot('...nk,...k->...n', q, mass)
  return _dot('...nk,...kv->...nv', q, memory) / (total[..., None] + eps)


def write(k, v, memory, mass, *, delta, eps):
  """Adds a segment: `M + k^T u`, `z + sum k`.

  u is v, or with `delta` v less what the matrix recalls of k. That is no
  overwrite, since z counts visits: of a key with features of its own written
  with v1, then in another segment with v2, it recalls v2 / 2.

  Args:
    k: features of keys, [..., N, K] float32.
    v: values, [..., N, V] float32.
    memory: M, [..., K, V] float32.
    mass: z, [..., K] float32.
    delta: static.
    eps: of the read.

  Returns:
    M and z behind the segment.

  Reference: arXiv 2404.07143.
  """
  if delta:
    v = v - read(k, memory, mass, eps=eps)
  return (memory + _dot('...nk,...nv->...kv', k, v), mass + k.sum(axis=-2))


def _dot(equation, a, b):
  return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST,
                    preferred_element_type=jnp.float32)
