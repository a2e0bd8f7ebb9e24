"""Neural memory: weights that descend the error of what they recall."""

import dataclasses

import jax
import jax.numpy as jnp

# Tokens whose states a gradient keeps at once; others it makes anew.
_KEPT = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """What T tokens bring, heads apart.

  Attributes:
    q: queries, [B, T, H, K].
    k: keys, [B, T, H, K].
    v: values, [B, T, H, V].
    keep: eta, share of the momentum that stays, [B, T, H].
    rate: theta, share of the gradient that is taken, [B, T, H].
    forget: alpha, share of the weights that goes, [B, T, H].
    All are float32.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  keep: jax.Array
  rate: jax.Array
  forget: jax.Array


def recall(weights, x):
  """What the memory says of x [B, H, K]: x W_1, or silu(x W_1) W_2."""
  first, *rest = weights
  x = _rows(x, first)
  for w in rest:
    x = _rows(jax.nn.silu(x), w)
  return x


def _rows(x, w):
  return jnp.einsum('bhk,bhkv->bhv', x, w, precision=jax.lax.Precision.HIGHEST)


def neural_memory(tokens, state, first, begins, resets, valid):
  """Learns each token by a step of gradient descent, then reads.

    S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2
    M_t = (1 - alpha_t) M_{t-1} + S_t
    y_t = M_t(q_t)

  The gradient is taken at the M that the first token of the segment has found.
  With segments of one token, eta = alpha = 0 and theta = beta / 2 a matrix is
  the delta rule.

  Args:
    tokens: `Tokens`.
    state: (M at the segment's start, M, S), each a tuple of one matrix
      [B, H, K, V] or two, [B, H, K, F] and [B, H, F, V], float32. Both M are
      less `first`.
    first: weights of a memory that has learned nothing, [H, ...] each.
    begins: whether a token is the first of its segment, [B, T] bool.
    resets: of its document, in this step, [B, T] bool.
    valid: [B, T] bool; other tokens change nothing.

  Returns:
    y, [B, T, H, V] float32, and the new state.

  Reference: arXiv 2501.00663.
  """
  length = valid.shape[1]
  size = min(length, _KEPT)
  count = -(-length // size)
  def cut(x):
    """[B, T, ...] to [count, size, B, ...], with tokens that are not valid."""
    x = jnp.pad(x, ((0, 0), (0, count * size - length),
                    *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x, 1, 0).reshape(count, size, -1, *x.shape[2:])
  first = [w[None] for w in first]

  def one(state, token):
    token, *flags = token
    return _learn(token, state, first, *flags)

  def some(state, tokens):
    return jax.lax.scan(one, state, tokens)

  state, y = jax.lax.scan(
      jax.checkpoint(some, prevent_cse=False), state,
      jax.tree.map(cut, (tokens, begins, resets, valid)))
  y = jnp.moveaxis(y.reshape(count * size, *y.shape[2:]), 0, 1)
  return y[:, :length], state


def _learn(token, state, first, begins, resets, valid):
  where = lambda keep, a, b: jax.tree.map(lambda a, b: jnp.where(
      keep.reshape(-1, *(1,) * (a.ndim - 1)), a, b), a, b)
  old = state
  start, now, momentum = where(
      resets, jax.tree.map(jnp.zeros_like, state), state)
  start = where(begins, now, start)
  said, pull = jax.vjp(
      lambda w: recall([a + b for a, b in zip(w, first)], token.k), start)
  (slope,) = pull(2 * (said - token.v))
  keep, rate, forget = (a[..., None, None] for a in (
      token.keep, token.rate, token.forget))
  momentum = tuple(keep * s - rate * g for s, g in zip(momentum, slope))
  # Of the whole weights, first ones included, a share goes.
  now = tuple((1 - forget) * w - forget * w0 + s
              for w, w0, s in zip(now, first, momentum))
  y = recall([a + b for a, b in zip(now, first)], token.q)
  return where(valid, (start, now, momentum), old), y
