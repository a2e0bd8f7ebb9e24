"""Blocks that a query may choose: what it may choose, and what that means.

The columns of a choice are J = E + W + 1 candidates: the E blocks of a store
that were complete before the step, the W blocks that the step completes, and
last the query's own block while it is open. They follow each other by position,
so that the tie rule of `select` holds. Functions here go between them and the
N + T tokens, [tokens of the store, tokens of the step]; see `ops.blocks` for
the plan of a step.
"""

import jax.numpy as jnp

from statejax.ops import blocks as bk
from statejax.ops import select


def count(tokens, size):
  """Returns E, the blocks that a store of so many tokens can hold."""
  return -(-tokens // size)


def visible(plan, entries):
  """Which candidates each query sees, [B, T, E + W + 1] bool."""
  return jnp.concatenate([
      bk.visible_old(plan, entries), bk.visible_new(plan),
      (plan.valid & _is_open(plan))[..., None]], axis=-1)


def newest(plan, entries, local):
  """Which candidates are the query's own block or one of the `local` - 1 before
  it, [B, T, E + W + 1] bool; of its document where it also sees them."""
  number = plan.positions // plan.size
  old = jnp.broadcast_to(jnp.arange(entries, dtype=jnp.int32),
                         (number.shape[0], entries))
  block = jnp.concatenate([old, plan.block], axis=1)[:, None]
  age = number[..., None] - block
  near = jnp.concatenate(
      [(age >= 0) & (age < local),
       jnp.full((*number.shape, 1), local > 0)], axis=-1)
  return near & visible(plan, entries)


def reduce(x, plan, tokens, how, empty):
  """Reduces tokens to candidates.

  Args:
    x: [B, S, T, N + T]; `empty` wherever a query does not see the token.
    plan: `Blocks` of the step.
    tokens: N.
    how: 'max' or 'sum'.
    empty: neutral element of it.

  Returns:
    [B, S, T, E + W + 1], E = count(N); `empty` where nothing is seen.
  """
  old = reduce_store(x[..., :tokens], plan.size, how, empty)
  return reduce_step(old, x[..., tokens:], plan, how, empty)


_HOW = {'max': (jnp.max, jnp.maximum), 'sum': (jnp.sum, jnp.add)}


def reduce_store(x, size, how, empty):
  """Reduces the tokens of a store, [..., N], to its blocks [..., E]."""
  entries = count(x.shape[-1], size)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, entries * size - x.shape[-1])],
              constant_values=jnp.asarray(empty, x.dtype))
  return _HOW[how][0](x.reshape(*x.shape[:-1], entries, size), axis=-1)


def reduce_step(old, new, plan, how, empty):
  """`reduce` of blocks of a store [B, S, T, E] and tokens of the step
  [B, S, T, T]."""
  run, join = _HOW[how]
  empty = jnp.asarray(empty, new.dtype)
  size, entries = plan.size, old.shape[-1]
  # What the state holds of the block that it left open.
  begun = jnp.full(old.shape[:3], empty, new.dtype)
  if entries:
    at = jnp.minimum(plan.length // size, entries - 1)[:, None, None, None]
    partly = (plan.length % size > 0)[:, None, None]
    found = jnp.take_along_axis(old, at, axis=-1)[..., 0]
    begun = jnp.where(partly, found, empty)

  index, mask = bk.members(plan)
  flat = index.reshape(index.shape[0], 1, 1, -1)
  done = jnp.take_along_axis(new, flat, axis=-1)
  done = done.reshape(*new.shape[:3], *index.shape[1:])
  done = run(jnp.where(mask[:, None, None], done, empty), axis=-1)
  spans = plan.spans[:, None, None]
  first = join(done[..., 0], jnp.where(spans, begun, empty))
  done = jnp.concatenate([first[..., None], done[..., 1:]], axis=-1)

  mine = (bk.own_block(plan, 0) & _is_open(plan)[..., None])[:, None]
  last = run(jnp.where(mine, new, empty), axis=-1)
  same = plan.positions // size == (plan.length // size)[:, None]
  same &= _is_open(plan)
  last = join(last, jnp.where(same[:, None], begun, empty))
  # A block that is still open to a query is the last column alone.
  whole = jnp.concatenate([old, done, last[..., None]], axis=-1)
  return jnp.where(visible(plan, entries)[:, None], whole, empty)


def tokens_of(chosen, plan, tokens):
  """The tokens of chosen blocks, [B, S, T, N + T] bool.

  Later tokens of the query's own block too: combine it with what is seen.

  Args:
    chosen: [B, S, T, E + W + 1] bool, true of visible ones only.
    plan: `Blocks` of the step.
    tokens: N.
  """
  entries = chosen.shape[-1] - plan.end.shape[1] - 1
  column = bk.entry_of_column(plan, tokens, entries)
  whole = bk.spread(chosen[..., :-1], column)
  return whole | (chosen[..., -1:] & bk.own_block(plan, tokens)[:, None])


def blocks_of(ids, plan, entries):
  """The same of one query per row, as numbers of blocks.

  Args:
    ids: [B, S, k] int32 candidates, -1 for none.
    plan: `Blocks` of a step of T = 1 token.
    entries: E.

  Returns:
    numbers: blocks of the token store, [B, S, k] int32, -1 for none; the
      query's own block may not have begun there.
    itself: whether that is chosen, [B, S] bool. The query is no token of the
      store.
  """
  own = (plan.length // plan.size)[:, None, None]
  return jnp.where(ids >= entries, own, ids), jnp.any(ids >= entries, axis=-1)


def choose(scores, seen, k, *, forced=None, tail=False):
  """The k best candidates, see `select.choose`.

  Args:
    scores: [B, S, T, J].
    seen: [B, T, J] bool.
    k: at most so many.
    forced: [B, T, J] bool or None: taken before all others, inside k.
    tail: the last column is no candidate, but taken beside the k where seen.

  Returns:
    [B, S, T, J] bool; of one query of more than k candidates ids [B, S, k],
    or with a tail [B, S, k + 1].
  """
  wide = lambda x: jnp.broadcast_to(x[:, None], scores.shape)
  seen = wide(seen)
  if not tail:
    return select.choose(scores, seen, k,
                         None if forced is None else wide(forced))
  last = seen[..., -1:]
  chosen = select.choose(scores[..., :-1], seen[..., :-1], k)
  if chosen.dtype == bool:
    return jnp.concatenate([chosen, last], axis=-1)
  own_id = jnp.where(last[:, :, 0], scores.shape[-1] - 1, -1)
  return jnp.concatenate([chosen, own_id], axis=-1)


def all_of(seen, sets):
  """Everything seen as a choice, [B, S, T, J] bool."""
  batch, length, columns = seen.shape
  return jnp.broadcast_to(seen[:, None], (batch, sets, length, columns))


def _is_open(plan):
  """Whether a query's block has tokens after it, [B, T] bool."""
  return (plan.positions + 1) % plan.size != 0
