"""Token by token, for recurrences without a parallel form here."""

import jax
import jax.numpy as jnp


def fold(step, tokens, state, n_valid=None, resets=None):
  """Folds `step(state, *tokens_t) -> (state, y_t)` over time.

  Padding is zeroed before it is read, so that not even NaN in it reaches a
  value or a gradient; a reset empties the state by selection.

  Args:
    step: pure function of the state [B, ...] and tokens [B, ...].
    tokens: tuple of arrays [B, T, ...].
    state: [B, ...].
    n_valid: real tokens of each row, [B] int32; None means T.
    resets: [B, T] bool, where the state is emptied first; None for never.

  Returns:
    y: [B, T, ...], zero past n_valid.
    state: after n_valid tokens; where n_valid is 0, bit-equal to the input.
  """
  length = tokens[0].shape[1]
  if n_valid is None:
    n_valid = jnp.full(tokens[0].shape[:1], length, jnp.int32)
  valid = jnp.arange(length, dtype=jnp.int32)[None] < n_valid[:, None]
  resets = jnp.zeros_like(valid) if resets is None else resets & valid
  tokens = tuple(_select(valid, x, jnp.zeros((), x.dtype)) for x in tokens)

  def body(state, inputs):
    tokens, valid, reset = inputs
    begin = _select(~reset, state, jnp.zeros((), state.dtype))
    after, y = step(begin, *tokens)
    return (_select(valid, after, state),
            _select(valid, y, jnp.zeros((), y.dtype)))

  by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0),
                         (tokens, valid, resets))
  state, y = jax.lax.scan(body, state, by_time)
  return jnp.moveaxis(y, 0, 1), state


def _select(where, x, other):
  """`jnp.where` of a mask over the first axes of x."""
  return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)),
                   x, other)
