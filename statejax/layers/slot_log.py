"""What was said of a key, beyond what a bank of slots can hold."""

import jax.numpy as jnp

from statejax.layers import attention, block_sparse
from statejax.ops import candidates
from statejax.state import Spec


def state(config, rows, capacity, rules, dtype):
  """Returns the `attention.StoreState` of `Spec`: address and salience of every
  token, and its value."""
  del config
  return attention.StoreState(
      k=Spec((rows, 1, capacity, rules.key + 1), dtype),
      v=Spec((rows, 1, capacity, rules.value), dtype))


def read(config, kappa, query, key, salience, value, held, context):
  """Attention to the values of the best blocks, by the addresses of slots.

    score_tj  = kappa q_t . key_j + salience_j
    chosen(t) = the k blocks whose best token scores highest
    y_t       = sum_j softmax_j(score_tj) value_j over tokens j <= t of those

  Args:
    config: `LogConfig`.
    kappa: inverse temperature, float32 scalar.
    query: unit vectors, [B, T, K] float32.
    key: the same.
    salience: [B, T] float32.
    value: [B, T, V].
    held: `attention.StoreState` of the tokens before.
    context: `Context`.

  Returns:
    y [B, T, V] in the values' dtype, and the new `StoreState`.
  """
  wide = lambda x, more: jnp.concatenate([x, more[..., None]], axis=-1)
  q = wide(kappa * query, jnp.ones_like(salience))[:, :, None]
  k = wide(key, salience).astype(held.k.data.dtype)[:, None]
  q = q.astype(k.dtype)
  v = value.astype(held.v.data.dtype)[:, None]
  past, held = attention.remember(held, k, v, context)
  plan = context.blocks(config.block)
  entries = candidates.count(past[0].shape[2], config.block)
  seen = candidates.visible(plan, entries)
  if seen.shape[-1] <= config.k:
    chosen = candidates.all_of(seen, 1)
  else:
    scores = block_sparse.best_scores(q, (past[0], past[2]), k, plan, context)
    chosen = candidates.choose(scores, seen, config.k)
  y = block_sparse.attend_to(q, past, (k, v), chosen, plan, context, scale=1.)
  return y[:, :, 0].astype(value.dtype), held
