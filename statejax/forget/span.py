"""Spans that are followed by a shadow, and subtracted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from statejax import edit_marks
from statejax import state as st
from statejax.forget import receipt as rc
from statejax.ops.delta_rule import delta_rule


def track(model, before, state, tokens, *, row=0, spot=None):
  """Begins to follow what the last tokens of a row have changed.

    D = S_b - S_{a-1}, in every layer with a `shadow`

  Steps of the state that comes back carry it on, at the cost of as many more
  matrices; they change no other bit. Where every spot of the state is taken, it
  gets one more, and its programs are compiled anew.

  Args:
    model: `LanguageModel`.
    before: state that has not seen the span, of the same rows or of the one
      row; a `statejax.state.snapshot` suffices.
    state: `ServingState` that has seen it, and nothing after.
    tokens: of the span, [N].
    row: of the state.
    spot: None takes a free one; that of another span has this one added to it:
      both are then revoked together.

  Returns:
    The state, and the spot by which `revoke` finds the span.

  Raises:
    ValueError: these tokens do not lead from one state to the other; a spot
      that follows nothing; a model without delta layers.
  """
  names = [n for n, x in state.layers.items() if hasattr(x, 'shadow')]
  if not names:
    raise ValueError('track: this model has no layer with a recurrent matrix '
                     'to follow; delete by replay_without.')
  tokens, old = rc.tokens_of(model, tokens, row), rc.row_of(before, state, row)
  begin, end = int(old.length[0]), int(state.length[row])
  if not tokens.size or begin + tokens.size != end:
    raise ValueError(
        f'track: expected the tokens from {begin}, where the state before '
        f'stands, to {end}, where row {row} stands, got {tokens.size} of them; '
        'keep the state that has not seen the span, and track at its end.')
  if not rc.stands(state, row, rc.absorb(old.witness, tokens)):
    raise ValueError('track: these tokens do not lead from the state before to '
                     f'row {row}; one of the three is of another stream, or '
                     'the row was edited in between.')
  facts = [begin, end, tokens.size]
  if spot is None:
    spans = [] if state.spans is None else np.asarray(state.spans)[row, :, 0]
    free = [i for i, at in enumerate(spans) if at < 0]
    spot = free[0] if free else st.spans(state)
    state = with_spots(model, state, max(st.spans(state), spot + 1))
  else:
    held = _followed(state, row, spot, 'track')
    if spot >= st.spans(old) or held != np.asarray(
        old.spans)[0, spot].tolist():
      raise ValueError(f'track: spot {spot}, row {row}: expected a state '
                       'before that follows the same span there, got another.')
    facts = [held[0], end, held[2] + tokens.size]
  layers = dict(state.layers)
  for name in names:
    mine, past = layers[name], old.layers[name]
    new = whole_matrix(mine)[:, row] - whole_matrix(past)[:, 0]
    if facts[0] != begin:
      new += past.shadow[:, 0, spot]
    layers[name] = dataclasses.replace(
        mine, shadow=mine.shadow.at[:, row, spot].set(new))
  return dataclasses.replace(
      state, layers=layers, spans=state.spans.at[row, spot].set(
          jnp.array(facts, jnp.int32))), spot


def revoke(model, state, spot, *, row=0, journal=None):
  """Subtracts a span that was followed from a row's matrices.

  What its other layers and the convolutions hold stays, and so does what later
  tokens have made of it; the receipt says where. The row loses its pending
  token and its logits, which become NaN, and goes on at its length. No other
  span of the row is followed from here on: each has run through this one, or
  this one through it. Spans to be revoked together share a spot.

  Args:
    model: `LanguageModel`.
    state: `ServingState`.
    spot: of `track`.
    row: of the state.
    journal: `statejax.artifact.journal.Journal`, or None.

  Returns:
    The state and a `Receipt`. Scope 'layer' where the first layer of the model
    is free of the span, 'model' if it is alone, else 'none'.

  Raises:
    ValueError: the spot follows nothing.
  """
  begin, end, _ = _followed(state, row, spot, 'revoke')
  mine = jnp.arange(st.rows(state)) == row
  def where(new, old):
    return jnp.where(mine.reshape(1, -1, *(1,) * (old.ndim - 2)), new, old)
  layers, names = dict(state.layers), []
  for name, held in state.layers.items():
    if not hasattr(held, 'shadow'):
      continue
    names.append(name)
    fresh = {'matrix': whole_matrix(held) - held.shadow[:, :, spot],
             'shadow': 0}
    # What was deferred is in the matrix now.
    fresh |= {f.name: 0 for f in dataclasses.fields(held)
              if f.name == 'count' or f.name.startswith('past_')}
    layers[name] = dataclasses.replace(held, **{
        n: where(x, getattr(held, n)) for n, x in fresh.items()})
  spans = np.asarray(state.spans)[row]
  dropped = tuple((int(a), int(b)) for i, (a, b, _) in enumerate(spans)
                  if i != spot and a >= 0)
  new = dataclasses.replace(
      state, layers=layers, pending=jnp.where(mine, -1, state.pending),
      logits=None if state.logits is None else jnp.where(
          mine[:, None], jnp.nan, state.logits),
      spans=jnp.where(mine[:, None, None], -1, state.spans))
  every = rc.carriers(state, [(i, n) for i, n in enumerate(model.config.names)
                            if n in names])
  cleared = {'pending', 'logits', 'shadows'} | _first(model, state, row, end)
  absent = rc.unused(state)
  left = [n for n in every if n not in cleared | absent]
  inside = [n for n in left if n not in rc.OUTSIDE]
  scope = 'model' if not inside else 'layer' if any(
      n.endswith('matrix[0]') for n in cleared) else 'none'
  receipt = rc.make('revoke', state, row, (begin, end), scope, cleared, absent,
                     every, dropped=dropped)
  return edit_marks.marked(new, row, rc.noted(receipt, journal)), receipt


def _first(model, state, row, end):
  """Leaves of the model's first layer that are free of tokens before `end`.

  Its inputs are embeddings, so that only its convolutions have mixed the span
  with what came after: into keys and gates, and into their own tails.
  """
  name = model.config.names[0]
  held, past = state.layers[name], _taps(model, name) - 1
  if not hasattr(held, 'shadow'):
    return set()
  fields = [f.name for f in dataclasses.fields(held)
            if getattr(held, f.name) is not None and f.name != 'shadow']
  tails = [n for n in fields if n.startswith('tail_')]
  free = [n for n in fields if n not in tails] if past == 0 else []
  if int(state.length[row]) - end >= past:
    free += tails
  return {f'layers/{name}/{n}[0]' for n in free}


def _taps(model, name):
  return getattr(model.config.layer(name).mixer, 'conv', 1)


def whole_matrix(held):
  """S of layers and rows [L, B, HV, K, V], with what is deferred in it."""
  if not hasattr(held, 'count'):
    return held.matrix
  def one(held):
    by_token = lambda x: jnp.swapaxes(x, 1, 2)
    gate = lambda x: by_token(x)[..., 0] if x.shape[-1] == 1 else by_token(x)
    erase = gate(held.past_erase) if hasattr(held, 'past_erase') else 0
    k = by_token(held.past_k)
    return delta_rule(k, k, by_token(held.past_u), gate(held.past_decay), erase,
                      1, held.matrix, held.count)[1]
  return jax.vmap(one)(held)


def _followed(state, row, spot, what):
  """[begin, end, tokens] of a span, or ValueError."""
  rc.check_row(state, row)
  spans = np.zeros((0, 3)) if state.spans is None else np.asarray(
      state.spans)[row]
  taken = [i for i, (at, _, _) in enumerate(spans) if at >= 0]
  if spot not in taken:
    raise ValueError(f'{what}: spot {spot}, row {row}: expected one that '
                     f'follows a span, {taken} do; track begins at the end of '
                     'a span, later only replay_without can delete it.')
  return spans[spot].tolist()


def untracked(state):
  """Returns the state without shadows, as before `track`."""
  layers = {n: dataclasses.replace(x, shadow=None) if hasattr(x, 'shadow')
            else x for n, x in state.layers.items()}
  return dataclasses.replace(state, layers=layers, spans=None)


def with_spots(model, state, spots):
  """The state with at least so many spots a row, the new ones empty."""
  held = st.spans(state)
  if spots <= held:
    return state
  schema = model.state_schema(st.rows(state), st.capacity(state) or 0,
                              logits=state.logits is not None, spans=spots)
  def widen(new, old, fill):
    whole = jnp.full(new.shape, fill, new.dtype)
    if not held:
      return whole
    return jax.lax.dynamic_update_slice(whole, old, (0,) * old.ndim)
  layers = {n: dataclasses.replace(x, shadow=widen(
      schema.layers[n].shadow, x.shadow, 0)) if hasattr(x, 'shadow') else x
            for n, x in state.layers.items()}
  return dataclasses.replace(
      state, layers=layers, spans=widen(schema.spans, state.spans, -1))
