"""Serving states on disk, bound to the model they belong to."""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from statejax import config as cfg
from statejax import state as st
from statejax.artifact import commit, digest, store

FORMAT = 'statejax-serving-state'
ABOUT = 'about.json'


def state_digest(state) -> str:
  """Digest of what a `ServingState` means: live prefixes only, whatever its
  capacity."""
  rows = {f'row_{i}': st.live(state, i) for i in range(st.rows(state))}
  return digest.tree_digest(rows)


def save_state(path, model, params, state):
  """Writes a serving state as a new directory; never overwrites one.

  Args:
    path: directory to create; its parent must exist.
    model: `LanguageModel` of the state.
    params: its parameters; their digest binds the state to them.
    state: `ServingState`; stays usable.

  Returns:
    The state's digest, see `state_digest`.

  Raises:
    ValueError: the state is not of this model, or `path` exists.
  """
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
      'bytes': st.nbytes(state),
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
