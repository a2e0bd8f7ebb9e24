"""The delta rule token by token, in plain JAX: what the kernels must equal."""

import jax.numpy as jnp
from jax import lax


def delta_rule(q, k, v, log_decay, erase, write, state, n_valid=None, *, scale):
  """The recurrence that kernels are timed against and fall back on.

  D = diag(exp(log_decay)) S;  r = write * v - D^T (erase * k)
  S' = D + k r^T;  y = scale * S'^T q

  Args, Returns: see `pallas_kernels.delta_rule_step_tpu.delta_rule_step`, with
    T tokens.
  """
  length, heads = v.shape[1:3]
  groups = heads // q.shape[2]
  valid = jnp.ones((q.shape[0], length), bool)
  if n_valid is not None:
    valid = jnp.arange(length)[None] < n_valid[:, None]

  def by_token(x):
    if x is None:
      return None
    x = x[..., None] if x.ndim == 3 else x
    x = jnp.where(valid[:, :, None, None], x.astype(jnp.float32), 0)
    x = jnp.repeat(x, heads // x.shape[2], axis=2) if groups > 1 else x
    return jnp.moveaxis(x, 1, 0)

  def recall(key, matrix):
    return jnp.einsum('bhk,bhkv->bhv', key, matrix,
                      precision=lax.Precision.HIGHEST)

  def body(state, token):
    real, q, k, v, log_decay, erase, write = token
    decayed = state
    if log_decay is not None:
      decayed = jnp.exp(log_decay)[..., None] * state
    residual = v if write is None else write * v
    if erase is not None:
      residual = residual - recall(erase * k, decayed)
    after = decayed + k[..., None] * residual[..., None, :]
    return (jnp.where(real[:, None, None, None], after, state),
            recall(scale * q, after))

  inputs = [by_token(x) for x in (q, k, v, log_decay, erase, write)]
  state, y = lax.scan(body, state, (valid.T, *inputs))
  return jnp.moveaxis(y, 0, 1).astype(v.dtype), state
