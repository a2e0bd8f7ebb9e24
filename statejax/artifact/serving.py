"""Serving states on disk, bound to the model they belong to."""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from statejax import config as cfg
from statejax import state as st
from statejax.artifact import commit, digest, grammar, manifest, store

FORMAT = 'statejax-serving-state'
ABOUT = 'about.json'
_EDITS = grammar.Items(manifest.EDIT, 1 << 20)  # of a row


def state_digest(state) -> str:
  """Digest of what a `ServingState` means: live prefixes only, whatever its
  capacity."""
  rows = {f'row_{i}': st.live(state, i) for i in range(st.rows(state))}
  return digest.tree_digest(rows)


def save_state(path, model, params, state, *, edits=None):
  """Writes a serving state as a new directory; never overwrites one.

  Args:
    path: directory to create; its parent must exist.
    model: `LanguageModel` of the state.
    params: its parameters; their digest binds the state to them.
    state: `ServingState`; stays usable.
    edits: (length, 64 hex) of each edit, of every row; see `names.witness` and
      `edits`. None where no row was edited.

  Returns:
    The state's digest, see `state_digest`.

  Raises:
    ValueError: the state is not of this model, `path` exists or has no parent,
      or edits of another number of rows.
  """
  parent = pathlib.Path(path).absolute().parent
  if not parent.is_dir():
    raise ValueError(f'{path}: expected {parent} to be a directory; make it '
                     'first.')
  capacity = st.capacity(state)
  schema = model.state_schema(st.rows(state), capacity or 0,
                              logits=state.logits is not None,
                              spans=st.spans(state))
  st.validate(state, schema)
  length = np.asarray(state.length)
  if capacity is not None and length.max() > capacity:
    raise ValueError(f'state: a row absorbed {length.max()} tokens, its stores '
                     f'have room for {capacity}; it is incomplete and cannot '
                     'be saved.')
  edits = _checked([()] * len(length) if edits is None else edits, length,
                   'edits')
  # An Orbax leaf cannot be empty, so an empty store keeps one slot.
  kept = max(1, int(length.max()))
  about = {
      'format': FORMAT, 'version': 1,
      'config': cfg.to_dict(model.config),
      'params': digest.tree_digest(model.stack(params)),
      'digest': state_digest(state),
      'rows': st.rows(state), 'capacity': capacity, 'stored': kept,
      'logits': state.logits is not None, 'spans': st.spans(state),
      'length': length.tolist(),
      'pending': np.asarray(state.pending).tolist(),
      'bytes': st.nbytes(state), 'edits': edits,
      'jax': jax.__version__,
  }
  with commit.publish(path) as folder:
    store.write_tree(folder, _cut(state, kept))
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + '\n')
  return about['digest']


def _cut(state, tokens):
  strides = dict(state.strides)
  def one(path, axes, kind, x):
    if kind == 'fixed':
      return x
    axis, slots = axes.index('capacity'), -(-tokens // strides.get(path, 1))
    return jax.lax.slice_in_dim(x, 0, min(slots, x.shape[axis]), axis=axis)
  cut = st.map_leaves(one, state)
  return cut if state.capacity is None else dataclasses.replace(
      cut, capacity=min(tokens, state.capacity))


def about(path) -> dict:
  """Returns what a saved state says of itself, after checking its files."""
  commit.check(path)
  try:
    facts = json.loads((pathlib.Path(path) / ABOUT).read_text())
    if facts['format'] == FORMAT and facts['version'] == 1:
      return facts
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    pass
  raise ValueError(f'{path}: expected a saved serving state (version 1), got '
                   'something else; it must come from save_state.')


def edits(path) -> list[tuple[tuple[int, str], ...]]:
  """Returns the edits of each row of a saved state: (length, 64 hex) of each.

  What an earlier release has saved says of none.

  Args:
    path: what `save_state` has made.

  Raises:
    ValueError: damaged files, or no such edits.
  """
  facts = about(path)
  length = facts['length']
  rows = _checked(facts.get('edits', [()] * len(length)), length,
                  f'{path}: edits')
  return [tuple((at, mark) for at, mark in row) for row in rows]


def _checked(edits, length, name):
  """Edits as lists; raises ValueError unless they can be those of the rows."""
  rows = [[[at, mark] for at, mark in row] for row in edits]
  if len(rows) != len(length):
    raise ValueError(f'{name}: expected those of {len(length)} rows, got '
                     f'{len(rows)}.')
  for i, (row, end) in enumerate(zip(rows, length)):
    _EDITS(row, f'{name}[{i}]')
    at = [at for at, _ in row]
    if at != sorted(at) or (at and at[-1] > end):
      raise ValueError(f'{name}[{i}]: expected them in order, none past length '
                       f'{end}, got {at[:8]}.')
  return rows


def load_state(path, model, params, *, capacity: int | None = None):
  """Reads a serving state back.

  Continuing from it is bit-identical to never having stopped: with the same
  params, capacity, program and topology. Another capacity is another program,
  equal within rounding.

  Args:
    path: what `save_state` has made.
    model: `LanguageModel` of the same config.
    params: the same parameters.
    capacity: slots for the growing leaves; None means as saved.

  Raises:
    ValueError: damaged files, another config or other parameters (says which),
      or not enough capacity.
  """
  facts = about(path)
  # Recomputing activations or not changes no state.
  saved = cfg.renewed(facts['config'], model.config)
  mine = {**cfg.to_dict(model.config), 'remat': saved.get('remat')}
  _same_config(path, saved, mine)
  mine = digest.tree_digest(model.stack(params))
  if mine != facts['params']:
    raise ValueError(f'{path}: expected parameters with digest '
                     f'{facts["params"]}, got {mine}; a state is only valid '
                     'with the parameters that made it.')
  capacity = facts['capacity'] if capacity is None else capacity
  if facts['capacity'] is not None and capacity < max(facts['length']):
    raise ValueError(f'{path}: expected capacity >= {max(facts["length"])}, '
                     f'the longest row, got {capacity}.')
  target = model.state_schema(facts['rows'], min(
      facts['stored'], facts['capacity'] or 0), logits=facts['logits'],
                              spans=facts.get('spans', 0))
  state = store.read_tree(path, st.abstract(target))
  if facts['capacity'] is not None:
    # Every length fits; what is past it may go.
    state = st.grow(_cut(state, capacity), capacity)
  got = state_digest(state)
  if got != facts['digest']:
    raise ValueError(f'{path}: expected state digest {facts["digest"]}, got '
                     f'{got}; use another copy.')
  return state


def _same_config(path, saved, mine, where='config'):
  if saved == mine:
    return
  if isinstance(saved, dict) and isinstance(mine, dict):
    for key in sorted(saved.keys() | mine.keys()):
      _same_config(path, saved.get(key), mine.get(key), f'{where}.{key}')
  elif isinstance(saved, list) and isinstance(mine, list) and (
      len(saved) == len(mine)):
    for i, (a, b) in enumerate(zip(saved, mine)):
      _same_config(path, a, b, f'{where}.{i}')
  raise ValueError(f'{path}: the state was saved with {where}={saved!r}, this '
                   f'model has {mine!r}; load it with its own config.')
