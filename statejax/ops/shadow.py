"""The shadow of a span: what it has changed in a delta-rule matrix.

The rule is affine in its matrix, `S_t = A_t S_{t-1} + B_t`, so that of two
streams which differ in S alone the difference `D` runs through the same A_t
with B_t = 0. Keep `D = S_b - S_{a-1}` of the tokens a..b, and `S_T - D_T` is
the matrix without them, given the keys and gates that came after.
"""

import jax.numpy as jnp

from statejax.ops.delta_rule import delta_rule


def fade(shadow, k, log_decay, erase, n_valid=None, segment_ids=None, *,
         chunk_size=None):
  """Runs differences of matrices through tokens that write nothing.

    D_t = (I - k_t (erase_t * k_t)^T) diag(exp(log_decay_t)) D_{t-1}

  Args:
    shadow: D_0, R of them a row, [B, R, HV, K, V].
    k, log_decay, erase, n_valid, segment_ids, chunk_size: as of
      `statejax.ops.delta_rule`.

  Returns:
    D_T of the shape of D_0; bit-equal to it where n_valid is 0.
  """
  rows, spans, heads, _, value = shadow.shape
  each = lambda x: x if x is None or jnp.ndim(x) == 0 else jnp.repeat(
      jnp.asarray(x), spans, axis=0)
  k = jnp.repeat(jnp.asarray(k), spans, axis=0)
  v = jnp.zeros((rows * spans, k.shape[1], heads, value), k.dtype)
  _, new = delta_rule(
      k, k, v, each(log_decay), each(erase), 1,
      shadow.reshape(-1, *shadow.shape[2:]), each(n_valid), each(segment_ids),
      chunk_size=chunk_size)
  return new.reshape(shadow.shape)


def zero_write(matrix, k, erase=1.0):
  """Writes nothing at some keys, one after the other: S - erase k (k^T S).

  Reading with one of the keys then finds nothing, if they are orthogonal and
  erase is 1. It is no deletion: what later keys have carried elsewhere stays,
  and what others have written along k goes.

  >>> import jax
  >>> k = jnp.eye(4)[None, :1, None]
  >>> matrix = zero_write(jnp.ones((1, 1, 4, 2)), k)
  >>> matrix[0, 0, :, 0].tolist()
  [0.0, 1.0, 1.0, 1.0]

  Args:
    matrix: S, [B, HV, K, V], float32.
    k: keys of unit length, [B, T, HK, K].
    erase: gate in [0, 2], a number or as of `statejax.ops.delta_rule`.

  Returns:
    [B, HV, K, V].
  """
  return fade(matrix[:, None], k, 0, erase)[:, 0]
