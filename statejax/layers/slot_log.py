"""What was said of a key, beyond what a bank of slots can hold."""

import jax
import jax.numpy as jnp

from statejax.layers import attention, block_sparse, common
from statejax.ops import candidates, select
from statejax.state import Spec

# Slots of a store from which on those who ask look one by one.
_LONG = 2 ** 16


def state(config, rows, capacity, rules, dtype):
  """Returns the `attention.StoreState` of `Spec`: address and salience of every
  token, and its value."""
  del config
  return attention.StoreState(
      k=Spec((rows, 1, capacity, rules.key + 1), dtype),
      v=Spec((rows, 1, capacity, rules.value), dtype))


def read(config, kappa, query, key, salience, value, held, context, asked=None):
  """Attention to the values of the best blocks, by the addresses of slots.

    score_tj  = kappa q_t . key_j + salience_j
    chosen(t) = the k blocks whose best token scores highest
    y_t       = sum_j softmax_j(score_tj) value_j over tokens j <= t of those

  A step in which nobody asks looks at nothing. Into a long store those who ask
  look one after the other, each as in a step of its own: masks of all queries
  of a step would outgrow any memory. Borders of documents prevent that, as the
  store is that of the last document.

  Args:
    config: `LogConfig`.
    kappa: inverse temperature, float32 scalar.
    query: unit vectors, [B, T, K] float32.
    key: the same.
    salience: [B, T] float32.
    value: [B, T, V].
    held: `attention.StoreState` of the tokens before.
    context: `Context`.
    asked: tokens that are answered, [B, T] bool, or None: all. The others get
      exactly 0.

  Returns:
    y [B, T, V] in the values' dtype, the new `StoreState`, and how many blocks
    each token looked at, [B, T] int32.
  """
  wide = lambda x, more: jnp.concatenate([x, more[..., None]], axis=-1)
  k = wide(key, salience).astype(held.k.data.dtype)
  q = wide(kappa * query, jnp.ones_like(salience)).astype(k.dtype)
  v = value.astype(held.v.data.dtype)
  past, held = attention.remember(held, k[:, None], v[:, None], context)
  new, store = {'q': q, 'k': k, 'v': v}, past[:2]
  if asked is None:
    y, active = _look(config, new, store, context)
  else:
    asked &= context.valid
    alone = (store[0].shape[2] > _LONG and q.shape[1] > 1
             and context.document is None)
    look = _one_by_one if alone else _look_if_any
    y, active = look(config, new | {'asked': asked}, store, context)
    y = jnp.where(asked[..., None], y, jnp.zeros((), y.dtype))
    active = jnp.where(asked, active, 0)
  return y.astype(value.dtype), held, active


def _look(config, new, store, context):
  """y [B, T, V] and the number of blocks, [B, T]; `store` as it is before the
  step, or as it leaves it where there are no borders."""
  past = (*store, context.visible_store(store[0].shape[2]))
  q, k, v = new['q'][:, :, None], new['k'][:, None], new['v'][:, None]
  plan = context.blocks(config.block)
  entries = candidates.count(past[0].shape[2], config.block)
  seen = candidates.visible(plan, entries)
  if seen.shape[-1] <= config.k:
    chosen = candidates.all_of(seen, 1)
  else:
    scores = block_sparse.best_scores(q, (past[0], past[2]), k, plan, context)
    chosen = candidates.choose(scores, seen, config.k)
  y = block_sparse.attend_to(q, past, (k, v), chosen, plan, context, scale=1.)
  if chosen.dtype != bool:  # numbers, of a step of one token
    chosen = select.to_mask(chosen, seen.shape[-1])[:, :, None]
  return y[:, :, 0], jnp.sum(chosen[:, 0], axis=-1, dtype=jnp.int32)


def _look_if_any(config, new, store, context):
  look = lambda: _look(config, new, store, context)
  shapes = jax.eval_shape(look)
  return jax.lax.cond(
      jnp.any(new['asked']), look,
      lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def _one_by_one(config, new, store, context):
  def one(_, t):
    mine = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1), new)
    n = (t < context.n_valid).astype(jnp.int32)
    itself = common.context(context.length + t, n, None, 1)
    y, active = _look_if_any(config, mine, store, itself)
    return None, (y[:, 0], active[:, 0])

  steps = jnp.arange(new['q'].shape[1], dtype=jnp.int32)
  _, (y, active) = jax.lax.scan(one, None, steps)
  return jnp.moveaxis(y, 0, 1), active.swapaxes(0, 1)
