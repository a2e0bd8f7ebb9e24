"""What a delete says of itself, and what all of them check."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from statejax import memory as mem
from statejax import state as st
from statejax.layers import slots as layer
from statejax.ops import witness

# Where a span may be outside of a state's layers.
OUTSIDE = ('pending', 'logits', 'shadows', 'slots.json', 'token log',
           'forks, prefix caches and artifacts')

# Outcomes of edits that have changed something.
CHANGED = ('committed', 'refreshed')


@dataclasses.dataclass(frozen=True)
class Receipt:
  """What a delete of one row has done, and what it has not.

  Attributes:
    mode: 'suppress', 'purge', 'revoke' or 'replay'.
    row: of the state.
    span: (first position, position behind the last); (-1, -1) of a slot.
    length: tokens that the row had absorbed.
    scope: the widest part of the row's state in which nothing is left of it:
      'bank', 'layer', 'model' or 'none'.
    cleared, absent, left: every leaf of the layers (one followed by its place
      among the layers where they differ) and every name of `OUTSIDE`: nothing
      of it is there now; it never was; it may be, and is not this function's
      to remove.
    dropped: other spans of the row that are no longer followed.
    edit: `statejax.memory.Receipt` of a slot's, else None.
    again: those of the edits that a replay has made again.
  """

  mode: str
  row: int
  span: tuple[int, int]
  length: int
  scope: str
  cleared: tuple[str, ...]
  absent: tuple[str, ...]
  left: tuple[str, ...]
  dropped: tuple[tuple[int, int], ...] = ()
  edit: mem.Receipt | None = None
  again: tuple[mem.Receipt, ...] = ()


def carriers(state, places=()):
  """Every place where a span may be; some layers' leaves one by one.

  Args:
    state: `ServingState`.
    places: (place in the model, name) of layers to be told apart.
  """
  apart, names = {name for _, name in places}, []
  for path, _, axes, _ in st.leaves(state):
    if not path.startswith('layers/') or 'spans' in axes:
      continue
    which = [i for i, name in places if name == path.split('/')[1]]
    names += [f'{path}[{i}]' for i in which] if path.split('/')[1] in (
        apart) else [path]
  return (*names, *OUTSIDE)


def unused(state):
  """The names of `OUTSIDE` that a state does not have."""
  out = set()
  if state.logits is None:
    out.add('logits')
  if state.spans is None:
    out.add('shadows')
  banks = [x for x in state.layers.values() if isinstance(x, layer.SlotsState)]
  if not banks:
    out.add('slots.json')
  return out


def spans(state, row):
  """The (first, behind the last) of all spans that a row follows."""
  if state.spans is None:
    return ()
  return tuple((int(a), int(b)) for a, b, _ in np.asarray(state.spans)[row]
               if a >= 0)


def make(mode, state, row, span, scope, cleared, absent, names, **more):
  """Each name in one of three lists; what is nowhere else is left."""
  absent = {n for n in names if n in absent}
  cleared = {n for n in names if n in cleared} - absent
  pick = lambda which: tuple(n for n in names if n in which)
  return Receipt(
      mode=mode, row=row, span=(int(span[0]), int(span[1])),
      length=int(state.length[row]), scope=scope, cleared=pick(cleared),
      absent=pick(absent), left=pick(set(names) - cleared - absent), **more)


def noted(receipt, journal, outcome='committed'):
  """The entry of a span's delete, in the journal if there is one."""
  entry = {'op': receipt.mode, 'row': receipt.row, 'length': receipt.length,
           'begin': receipt.span[0], 'end': receipt.span[1],
           'scope': receipt.scope, 'left': receipt.left,
           'outcome': outcome, 'forgets': ''}
  if journal is not None:
    journal.append(entry)
  return entry


def absorb(mark, tokens):
  """A witness [1, 4] after some tokens."""
  for i in range(0, tokens.size, 4096):
    piece = tokens[i:i + 4096].astype(np.int32)[None]
    mark = witness.absorb(mark, piece, jnp.array([piece.size], jnp.int32))
  return mark


def stands(state, row, mark) -> bool:
  """Whether a row has the witness [1, 4]."""
  return bool((mark[0] == state.witness[row]).all())


def check_row(state, row):
  """Raises ValueError unless the state has the row."""
  if not 0 <= row < st.rows(state):
    raise ValueError(f'row: expected 0 to {st.rows(state) - 1}, got {row}.')


def row_of(other, state, row):
  """A row of an earlier state, which may hold that row alone."""
  check_row(state, row)
  if st.rows(other) not in (1, st.rows(state)):
    raise ValueError(f'expected a state of row {row} alone or of all '
                     f'{st.rows(state)} rows, got {st.rows(other)} rows.')
  return st.take(other, row if st.rows(other) == st.rows(state) else 0)


def tokens_of(model, tokens, row):
  """Tokens of a row as numpy, or ValueError."""
  tokens, vocab = np.asarray(tokens), model.config.vocab
  if tokens.ndim != 1 or tokens.dtype.kind not in 'iu' or (
      (tokens < 0) | (tokens >= vocab)).any():
    raise ValueError(f'tokens of row {row}: expected [N] integers of 0 to '
                     f'{vocab - 1}, got {tokens.shape} {tokens.dtype}.')
  return tokens
