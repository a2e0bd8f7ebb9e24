"""Prefill, decode and sampling: host loops over the one step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from statejax import model as lm
from statejax import state as st


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    temperature: 0.0 takes the most likely token (the lowest id of equals).
    top_k: draw among the k most likely tokens; None among all.
    top_p: draw among the fewest tokens whose probabilities reach p, after
      `top_k`; None among all.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not (self.temperature == 0 or self.temperature >= 1e-6):
      raise ValueError('temperature: expected 0, which is greedy, or at least '
                       f'1e-6, got {self.temperature}.')
    if self.top_k is not None and (
        not isinstance(self.top_k, int) or self.top_k < 1):
      raise ValueError(f'top_k: expected an integer >= 1 or None, got '
                       f'{self.top_k}.')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(f'top_p: expected 0 < p <= 1, got {self.top_p}.')


GREEDY = Sampling(temperature=0.0)


def sample(logits, key, position, sampling: Sampling):
  """Draws one token per row.

  The draw depends on the row's key and the position alone, so that a restored
  state draws what the uninterrupted one would have drawn.

  Args:
    logits: [B, P] float32.
    key: sampler key data, [B, 2] uint32.
    position: of the token to be drawn, [B] int32.
    sampling: static.

  Returns:
    [B] int32; -1, which is no token, where a logit is NaN.
  """
  drawn = _draw_any(logits, key, position, sampling)
  return jnp.where(jnp.isnan(logits).any(axis=-1), -1, drawn)


def _draw_any(logits, key, position, sampling):
  if sampling.temperature == 0.0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # Below zero a small temperature overflows to probability 0, above to a tie.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  # Descending, equal values by ascending id.
  values, ids = jax.lax.top_k(
      logits / sampling.temperature,
      min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
  if sampling.top_p is not None:
    p = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    values = jnp.where(before < sampling.top_p, values, -jnp.inf)
  def draw(key, position, values):
    key = jax.random.fold_in(
        jax.random.wrap_key_data(key, impl='threefry2x32'), position)
    return jnp.argmax(values + jax.random.gumbel(key, values.shape))
  at = jax.vmap(draw)(key, position, values)
  return jnp.take_along_axis(ids, at[:, None], axis=1)[:, 0].astype(jnp.int32)


def prefill(model, params, state, tokens, n_valid=None, *, chunk: int = 256,
            sampling: Sampling = GREEDY):
  """Absorbs prompts chunk by chunk and draws each row's next token.

  Args:
    model: `LanguageModel`.
    params: its parameters.
    state: `ServingState` of B rows; stays usable.
    tokens: prompts, [B, T] integers, T >= 1.
    n_valid: real tokens of each prompt, [B]; None means all. A row with 0
      keeps its state and pending token.
    chunk: tokens per step.
    sampling: for the pending token.

  Returns:
    The state after the prompts, `pending` set where tokens were absorbed.

  Raises:
    ValueError: as `LanguageModel.step`; a row that already holds a pending
      token; chunk < 1.
  """
  tokens = np.asarray(tokens)
  if chunk < 1:
    raise ValueError(f'chunk: expected >= 1, got {chunk}.')
  n_valid = None if n_valid is None else np.asarray(n_valid)
  model._check(params, state, tokens, n_valid, None)
  rows, steps = tokens.shape
  n = np.full(rows, steps) if n_valid is None else n_valid
  model._check_values(state, tokens, n, None)
  waiting = (np.asarray(state.pending) >= 0) & (n > 0)
  if waiting.any():
    raise ValueError(
        f'prefill: row {int(np.argmax(waiting))} has a pending token '
        f'{int(state.pending[int(np.argmax(waiting))])}; put it in front of '
        'the prompt and set pending to -1, or continue with generate.')
  state = _own(state)
  # Of prompts below a chunk, only the power of two makes a new program.
  chunk = min(chunk, 1 << (steps - 1).bit_length())
  last = jnp.zeros((rows, model.config.vocab), jnp.float32)
  for begin in range(0, steps, chunk):
    piece = tokens[:, begin:begin + chunk]
    pad = chunk - piece.shape[1]
    piece = np.pad(piece, ((0, 0), (0, pad))).astype(np.int32)
    count = np.clip(n - begin, 0, chunk).astype(np.int32)
    last, state = _absorb(model, params, state, last, piece, count)
  return _draw(state, last, jnp.asarray(n > 0), sampling)


def decode(model, params, state, sampling: Sampling = GREEDY,
           stop: tuple[int, ...] = ()):
  """Absorbs each row's pending token and draws the next; consumes `state`.

  A row without a pending token stays bit-identical. So does one whose pending
  token is in `stop`, but for `pending`, which becomes -1: the row has ended.

  Args:
    model: `LanguageModel`.
    params: its parameters.
    state: `ServingState`; its buffers are donated.
    sampling: static.
    stop: static token ids.

  Returns:
    tokens: the tokens that were pending, [B] int32, -1 where none was.
    state: one token further.
  """
  return _decode(model, params, state, sampling, _ids(stop))


def generate(model, params, state, steps: int, *,
             sampling: Sampling = GREEDY, stop: tuple[int, ...] = (),
             callback=None):
  """Emits up to `steps` tokens per row, beginning with the pending ones.

  Saving the returned state and generating on from it gives the same tokens as
  one longer call.

  Args:
    model: `LanguageModel`.
    params: its parameters; see `LanguageModel.unstack` for CPUs.
    state: `ServingState` with pending tokens; stays usable.
    steps: tokens per row, >= 1.
    sampling: how tokens are drawn.
    stop: a row ends after emitting one of these. It is not absorbed, and
      nothing is pending then: a next prompt may begin with it.
    callback: called as `callback(tokens)` with [B] int32 numpy per step, -1
      where a row has ended.

  Returns:
    tokens: [B, n] int32 numpy, n <= steps, -1 after a row's end.
    state: after the emitted tokens; `pending` is the next one, -1 where the
      row has ended.

  Raises:
    ValueError: no pending token, not enough capacity, a consumed state.
  """
  model._check_carried(params, state)
  alive = np.asarray(state.pending) >= 0
  pending = np.asarray(state.pending)
  if steps < 1:
    raise ValueError(f'generate: expected steps >= 1, got {steps}.')
  if not alive.any() or (pending >= model.config.vocab).any():
    raise ValueError(
        'generate: expected a pending token in some row, and none outside '
        f'vocab={model.config.vocab}, got {pending.tolist()}; call prefill '
        'first.')
  room = st.capacity(state)
  need = int(np.max(np.where(alive, np.asarray(state.length), 0))) + steps
  if room is not None and need > room:
    raise ValueError(f'capacity: expected room for {need} tokens, got {room}; '
                     f'use statejax.state.grow(state, {need}) first.')
  state, stop = _own(state), _ids(stop)
  out, waiting = [], None
  for _ in range(steps):
    tokens, state = _decode(model, params, state, sampling, stop)
    # One step runs ahead of the host, which reads the tokens before it.
    if waiting is not None:
      alive = _emit(waiting, alive, stop, out, callback)
      if not alive.any():
        return np.stack(out, axis=1), state
    waiting = tokens
  _emit(waiting, alive, stop, out, callback)
  return np.stack(out, axis=1), state


def _emit(tokens, alive, stop, out, callback):
  tokens = np.where(alive, np.asarray(tokens), -1).astype(np.int32)
  if (alive & (tokens < 0)).any():
    raise ValueError(
        f'generate: row {int(np.argmax(alive & (tokens < 0)))}: the logits are '
        'NaN; look at the parameters, or clear the row.')
  out.append(tokens)
  if callback is not None:
    callback(tokens)
  return alive & ~np.isin(tokens, np.asarray(stop, np.int32))


def _ids(stop):
  return tuple(int(token) for token in np.atleast_1d(stop))


def _own(state):
  """A copy whose buffers may be donated."""
  return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _absorb(model, params, state, last, tokens, n_valid):
  logits, state = lm.apply(model, params, state, tokens, n_valid, keep='last')
  return jnp.where((n_valid > 0)[:, None], logits[:, 0], last), state


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _draw(state, logits, where, sampling):
  drawn = sample(logits, state.key, state.length, sampling)
  return dataclasses.replace(
      state, pending=jnp.where(where, drawn, state.pending))


@functools.partial(jax.jit, static_argnums=(0, 3, 4), donate_argnums=2)
def _decode(model, params, state, sampling, stop):
  moves = state.pending >= 0
  for token in stop:
    moves &= state.pending != token
  tokens = state.pending
  logits, state = lm.apply(model, params, state, tokens[:, None],
                           moves.astype(jnp.int32), keep='last')
  drawn = sample(logits[:, 0], state.key, state.length, sampling)
  return tokens, dataclasses.replace(
      state, pending=jnp.where(moves, drawn, -1))
