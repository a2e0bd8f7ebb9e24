"""The log again, without a span or an edit."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from statejax import edit_marks
from statejax import state as st
from statejax.forget import receipt as rc
from statejax.forget import span as sp


@dataclasses.dataclass(frozen=True)
class Edit:
  """An edit since a snapshot, for `replay_without`.

  Attributes:
    entry: of the journal.
    again: function from a state to what `statejax.memory` returns of such an
      edit, which makes it anew; None leaves it out. Without the span slots may
      have other numbers: it has to find its own by key.
  """

  entry: dict
  again: Callable | None = None


def last_before(snapshots, position, row=0):
  """Returns the last of some snapshots that has seen nothing from a position.

  Args:
    snapshots: states or `statejax.state.snapshot`s. Of equally long ones the
      first is taken: an edit makes no state longer, so give the oldest first.
    position: first token that must not be in it.
    row: of them.

  Raises:
    ValueError: all of them have.
  """
  found = [s for s in snapshots if int(s.length[row]) <= position]
  if not found:
    raise ValueError(
        f'last_before: expected a snapshot of at most {position} tokens, got '
        f'{sorted(int(s.length[row]) for s in snapshots)}; keep one from '
        'before, or replay from an empty state.')
  return max(found, key=lambda s: int(s.length[row]))


def replay_without(model, params, state, snapshot, log, span=None, *, row=0,
                   edits=(), chunk=256, journal=None):
  """Reads a row's log again from a snapshot, without a span of it.

  The row is then bit for bit that of a stream which has absorbed the rest on
  the same grid: in pieces of a batch of this size that end where its length is
  a multiple of `chunk`. What its stores held behind its new end is zeroed.

  Args:
    model: `LanguageModel`.
    params: its parameters.
    state: `ServingState`; other rows keep every bit.
    snapshot: state of this row or of the same rows, from before the span.
    log: all tokens that the row has absorbed since, [N].
    span: (first position, position behind the last) to leave out; None where
      only an edit is left out.
    row: of the state.
    edits: `Edit` of every change since the snapshot, in order.
    chunk: tokens per step, at most. Bits are those of a stream in the same
      programs: steps of this shape with `n_valid`.
    journal: `statejax.artifact.journal.Journal` for this delete, or None.

  Returns:
    The state and a `Receipt` of scope 'model', with those of the edits made
    again.

  Raises:
    ValueError: a span that the log does not hold or that the snapshot has seen;
      a log or edits that do not lead from the snapshot to the row; an edit that
      changed something, and now nothing.
  """
  if chunk < 1:
    raise ValueError(f'chunk: expected >= 1, got {chunk}.')
  log, held = rc.tokens_of(model, log, row), rc.row_of(snapshot, state, row)
  first, last = int(held.length[0]), int(state.length[row])
  try:
    begin, end = (last, last) if span is None else map(int, span)
  except (TypeError, ValueError):
    raise ValueError('span: expected (first position, position behind the '
                     f'last), got {span!r}.') from None
  if span is not None and not first <= begin < end <= last:
    raise ValueError(
        f'span: expected positions {first} <= first < last <= {last} of the '
        f'log since the snapshot, got {tuple(span)}; a span that the snapshot '
        'has seen wants an earlier one.')
  if span is None and all(e.again for e in edits):
    raise ValueError('span: expected a span or an edit to leave out, got '
                     'neither.')
  _check_log(held, state, log, edits, row)
  fresh = sp.with_spots(model, sp.untracked(held), st.spans(state))
  fresh = _emptied(st.restore_fixed(st.take(state, row), fresh))
  new = st.put(state, row, dataclasses.replace(
      fresh, pending=jnp.full_like(fresh.pending, -1)))
  keep = np.ones(log.size, bool)
  keep[begin - first:end - first] = False
  at, made = 0, []
  for edit in edits:
    stop = edit.entry['length'] - first
    new = _feed(model, params, new, log[at:stop][keep[at:stop]], row, chunk)
    at = stop
    if edit.again is not None:
      new, found = edit.again(new)
      found = list(found.values()) if isinstance(found, dict) else [found]
      if edit.entry['outcome'] in rc.CHANGED and not any(
          one.changed for one in found):
        raise ValueError(
            f'edits: expected that of {edit.entry["length"]} tokens, a '
            f'{edit.entry["op"]}, to change something again, it has come to '
            f'{", ".join(one.outcome for one in found) or "nothing"}. Without '
            'the span there may be nothing to edit; leave the edit out then.')
      made += found
  new = _feed(model, params, new, log[at:][keep[at:]], row, chunk)
  names = rc.carriers(state)
  absent = rc.unused(state)
  cleared = {n for n in names if n not in rc.OUTSIDE or n in (
      'pending', 'logits', 'shadows')}
  receipt = rc.make(
      'replay', state, row, (-1, -1) if span is None else (begin, end), 'model',
      cleared, absent, names, dropped=rc.spans(state, row),
      again=tuple(made))
  # The witness knows nothing of it: it is that of the other stream.
  rc.noted(receipt, journal, 'replayed')
  return new, receipt


def _check_log(held, state, log, edits, row):
  """Raises unless log and edits lead from a snapshot to the row."""
  first, last = int(held.length[0]), int(state.length[row])
  at, mark = first, held.witness
  if log.size != last - first:
    raise ValueError(f'log: expected the {last - first} tokens from {first}, '
                     f'where the snapshot stands, to {last}, got {log.size}.')
  for edit in edits:
    stop = edit.entry['length']
    if not at <= stop <= last or edit.entry['row'] != row:
      raise ValueError(
          f'edits: expected those of row {row} in order, from {at} to {last} '
          f'tokens, got one of row {edit.entry["row"]} at {stop}.')
    mark = rc.absorb(mark, log[at - first:stop - first])
    if edit.entry['outcome'] in rc.CHANGED:
      mark = rc.absorb(mark, np.array([edit_marks.element(edit.entry)]))
    at = stop
  if not rc.stands(state, row, rc.absorb(mark, log[at - first:])):
    raise ValueError(
        'log: these tokens and edits do not lead from the snapshot to row '
        f'{row}: its witness is another. Tokens are missing or of another '
        'stream, or an edit of the journal is not among `edits`.')


def _feed(model, params, state, tokens, row, chunk):
  """Absorbs tokens into one row, on the grid of its length."""
  at, rows = int(state.length[row]), st.rows(state)
  while tokens.size:
    count = min(chunk - at % chunk, tokens.size)
    piece, n_valid = np.zeros((rows, chunk), np.int32), np.zeros(rows, np.int32)
    piece[row, :count], n_valid[row] = tokens[:count], count
    _, state = model.step(params, state, piece, n_valid, keep='last')
    tokens, at = tokens[count:], at + count
  return state


def _emptied(state):
  """The state of one row, its stores zero where they mean nothing."""
  strides, length = dict(state.strides), int(state.length[0])
  def one(path, axes, kind, x):
    if kind == 'fixed':
      return x
    axis = axes.index('capacity')
    at = jnp.arange(x.shape[axis]).reshape(-1, *(1,) * (x.ndim - 1 - axis))
    live = (at < length // strides.get(path, 1))[(None,) * axis]
    return jnp.where(live, x, jnp.zeros((), x.dtype))
  return st.map_leaves(one, state)
