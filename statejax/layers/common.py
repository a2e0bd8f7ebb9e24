"""What every layer shares: projections, weights with logical axes, context."""

import dataclasses
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.layers import weights
from statejax.ops import band, blocks, norm, store

# What a token may be told to learn or to do, see `statejax.layers.slots.Slots`.
HINTS = ('want', 'part', 'version', 'object', 'alias', 'ask', 'look', 'force',
         'force_part')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What a step knows of its rows; equal for all layers.

  Tokens are left-packed: the first `n_valid` of each row are real.

  Attributes:
    length: tokens of the row's document in the state, before this step, [B].
    n_valid: real tokens of this step, [B].
    positions: of each token in its document, [B, T].
    document: borders up to each token, [B, T]; 0 continues the state. None
      where the step has no borders.
    start: index of the first token of the row's last document, [B].
    base: position of that token; `length` or, past a border, 0, [B].
    All are int32.
    tokens: of the step, [B, T] int32; None where a layer runs alone.
    hints: {name: [B, T] int32}, of `HINTS`: what is to be learned of a token
      besides the next, -1 where nothing; for a layer that has a loss of that
      name.
    lent: what earlier layers of this step lend, {layer: {name: array}}; see
      `lend` and `borrow`.
    summary: `statejax.layers.ksa.Summaries`, the summary tokens that run with
      the text; None where there are none. All other fields are about the text.
  """

  length: jax.Array
  n_valid: jax.Array
  positions: jax.Array
  document: jax.Array | None
  start: jax.Array
  base: jax.Array
  tokens: jax.Array | None = None
  hints: dict = dataclasses.field(default_factory=dict)
  lent: dict = dataclasses.field(default_factory=dict)
  summary: typing.Any = None

  def borrow(self, layer, name):
    """Returns what the nearest earlier layer called `layer` lends.

    Raises:
      ValueError: no such layer lends it here.
    """
    found = self.lent.get(layer, {})
    if name not in found:
      have = {k: sorted(v) for k, v in self.lent.items()}
      raise ValueError(
          f'expected {name!r} of an earlier layer {layer!r}, lent are {have}. '
          'The owner has to stand before its reader in the same pattern, or in '
          'an earlier group of one repeat.')
    return found[name]

  @property
  def valid(self):
    """[B, T] bool."""
    steps = jnp.arange(self.positions.shape[1], dtype=jnp.int32)
    return steps[None] < self.n_valid[:, None]

  @property
  def real(self):
    """What is real of all that runs through the layers: the text, and behind it
    the summary tokens, [B, T + W m] bool."""
    if self.summary is None:
      return self.valid
    return jnp.concatenate([self.valid, self.summary.exists], axis=1)

  @property
  def new_length(self):
    """Length after the step, [B]."""
    return self.base + self.n_valid - self.start

  def blocks(self, size):
    """The `statejax.ops.blocks.Blocks` of `size` tokens of this step."""
    return blocks.plan(self.length, self.n_valid, self.positions, self.document,
                       self.start, self.base, size)

  @property
  def last(self):
    """The last slot of a store that each query sees, [B, T]; -1 sees none."""
    last = self.length[:, None] - 1
    if self.document is None:
      return jnp.broadcast_to(last, self.positions.shape)
    return jnp.where(self.document == 0, last, -1)

  def append(self, held, new, plan=None):
    """Appends what a step has made to a store.

    Args:
      held: `statejax.state.Store` over [layers, B, ..., N, K].
      new: [B, ..., T, K], one for every token, in the store's dtype; or with a
        plan [B, ..., W, K], one for every block that is completed.
      plan: `Blocks` of the step, or None.

    Returns:
      what queries read beside `new`, [B, ..., N, K], and the new store.
    """
    where = ((self.base, self.start, self.n_valid) if plan is None else
             (plan.slot, plan.first, plan.count))
    kept = store.append(held, new, *where)
    # Without a document border no slot that is visible is written, and reading
    # after the write lets XLA update the store in place instead of copying it.
    return (kept if self.document is None else held).read(), kept

  def visible_store(self, slots):
    """Which tokens of a store of N slots each query sees, [B, T, N]."""
    at = jnp.arange(slots, dtype=jnp.int32)[None]
    return self.visible_past(
        jnp.broadcast_to(at, (self.length.shape[0], slots)))

  def visible_chunk(self, window=None):
    """Which tokens of this step each query sees, [B, T, T]: causal, same
    document, real, and less than `window` tokens back."""
    steps = jnp.arange(self.positions.shape[1], dtype=jnp.int32)
    age = steps[:, None] - steps[None]
    near = age >= 0 if window is None else (age >= 0) & (age < window)
    seen = near[None] & self.valid[:, None, :]
    if self.document is not None:
      seen &= self.document[:, :, None] == self.document[:, None, :]
    return seen

  def visible_band(self, window):
    """Which tokens of its block of `window` and of the block before each query
    sees, less than `window` back: [B, blocks, W, 2 W], for `ops.band`."""
    steps = self.positions.shape[1]
    count = -(-steps // window)
    at = jnp.arange(count * window, dtype=jnp.int32).reshape(count, window, 1)
    near = jnp.arange(-window, window, dtype=jnp.int32)
    key = at[:, :1] + near[None, None]
    seen = (key >= 0) & (key <= at) & (at - key < window)
    seen = seen[None] & (key[None] < self.n_valid[:, None, None, None])
    if self.document is not None:
      of = band.pairs(self.document, window, 1)
      seen &= of[:, :, window:, None] == of[:, :, None]
    return seen

  def visible_past(self, positions, window=None):
    """Which stored tokens each query sees, [B, T, N].

    Args:
      positions: of the stored tokens, [B, N]; negative where empty.
      window: visible tokens including the query, or None.
    """
    seen = (positions >= 0) & (positions < self.length[:, None])
    seen = seen[:, None, :]
    if window is not None:
      seen &= positions[:, None, :] > self.positions[:, :, None] - window
    if self.document is not None:
      seen &= (self.document == 0)[:, :, None]
    return jnp.broadcast_to(
        seen, (*self.positions.shape, positions.shape[1]))


def context(length, n_valid, document, steps):
  """Builds the `Context` of a step of `steps` left-packed tokens."""
  index = jnp.arange(steps, dtype=jnp.int32)[None]
  if document is None:
    zero = jnp.zeros_like(length)
    return Context(length, n_valid, length[:, None] + index, None, zero, length)
  border = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)))
  border &= index < n_valid[:, None]
  begin = jax.lax.cummax(jnp.where(border, index, 0), axis=1)
  start = jnp.max(begin, axis=1)
  count = jnp.cumsum(border, axis=1, dtype=jnp.int32)
  old = jnp.where(count == 0, length[:, None], 0)
  base = jnp.where(start == 0, length, 0)
  return Context(length, n_valid, old + index - begin, count, start, base)


def checked_hints(hints, shape):
  """Returns the hints of a step of tokens of this shape; {} for None.

  Raises:
    ValueError: a name that no layer knows, another shape, or no integers.
  """
  for name, x in (hints or {}).items():
    if name not in HINTS:
      raise ValueError(f'hints: expected some of {", ".join(HINTS)}; got '
                       f'{name!r}.')
    if x.shape != shape or x.dtype.kind not in 'iub':
      raise ValueError(f'hints: {name}: expected integers of shape {shape}, as '
                       f'the tokens have, got {x.dtype} {x.shape}.')
  return dict(hints or {})


def lend(module, **arrays):
  """Lets later layers of this step read arrays of a mixer; never stored."""
  for name, x in arrays.items():
    _sow(module, 'lent', name, x)


def add_loss(module, name, total):
  """Adds a sum over real tokens to the training loss.

  The trainer divides it by the number of real tokens, or by those with a label
  where it is called after that. Where only logits are asked for, XLA computes
  none of it.

  Args:
    module: the mixer.
    name: of the loss; 'want_loss' where a hint 'want' is learned.
    total: float32 scalar.
  """
  _sow(module, 'losses', name, total)


def _sow(module, collection, name, x):
  module.sow(collection, name, x, reduce_fn=lambda _, new: new,
             init_fn=lambda: None)


class Proj(nn.Module):
  """Linear map of the last axes of x, without bias, as one einsum.

  Attributes:
    shape: output dimensions.
    axes: logical names of (input dimensions, output dimensions).
    contract: number of trailing input dimensions that are summed over.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  contract: int = 1

  @nn.compact
  def __call__(self, x):
    inner = x.shape[x.ndim - self.contract:]
    init = weights.truncated_normal(math.prod(inner) ** -0.5)
    kernel = weights.weight(
        self, 'kernel', self.axes, (*inner, *self.shape), init)
    return project(x, kernel, self.contract)


def project(x, kernel, contract=1, out_dtype=None):
  """Contracts the last `contract` axes of x with the first of the kernel.

  Both are flattened to one product of two matrices, which XLA's CPU backend
  differentiates much faster than a batched one: x.dtype operands, float32 sums.
  On a TPU axes stay: a flattened kernel lies otherwise in memory, and every
  step would copy it.
  """
  outer, inner = x.shape[:x.ndim - contract], x.shape[x.ndim - contract:]
  wide = (jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  kernel, how = kernel.astype(x.dtype), dict(
      precision=jax.lax.Precision.HIGHEST if x.dtype == wide else None,
      preferred_element_type=wide)
  if jax.default_backend() == 'tpu':
    y = jnp.tensordot(x, kernel, contract, **how)
  else:
    size = math.prod(inner)
    y = jnp.matmul(x.reshape(-1, size), kernel.reshape(size, -1), **how)
    y = y.reshape(*outer, *kernel.shape[contract:])
  return y.astype(out_dtype or x.dtype)


class RMSNorm(nn.Module):
  """`statejax.ops.norm.rms_norm` with its weight, over the last axis."""

  eps: float
  offset: float = 0.0
  axis: str = 'embed'

  @nn.compact
  def __call__(self, x):
    w = weights.weight(self, 'weight', (self.axis,), (x.shape[-1],),
                       weights.constant(1.0 - self.offset))
    return norm.rms_norm(x, w, eps=self.eps, offset=self.offset)
