"""Training checkpoints: one published directory per step, never overwritten."""

import json
import pathlib
import re
import shutil

from statejax.artifact import commit, store

ABOUT = 'about.json'


def _name(step):
  return f'step_{step:08d}'


def steps(folder) -> list[int]:
  """Published steps, ascending."""
  found = (re.fullmatch(r'step_(\d{8,})', path.name)
           for path in pathlib.Path(folder).glob('step_*'))
  return sorted(int(name[1]) for name in found if name)


def save(folder, step: int, state, about: dict, *, keep: int):
  """Publishes `state` and `about` together, then drops the oldest.

  Args:
    folder: holds all checkpoints of a run; made if missing.
    step: updates done.
    state: pytree of arrays.
    about: JSON facts: config, data position.
    keep: newest checkpoints that stay.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with commit.publish(folder / _name(step)) as place:
    store.write_tree(place, state)
    (place / ABOUT).write_text(json.dumps(about, indent=1) + '\n')
  for old in steps(folder)[:-keep]:
    # Renamed first: a kill in between leaves no half checkpoint to be found.
    trash = folder / f'.trash-{_name(old)}'
    (folder / _name(old)).rename(trash)
    shutil.rmtree(trash)


def sweep(folder):
  """Removes what killed processes left."""
  folder = pathlib.Path(folder)
  if folder.exists():
    commit.sweep(folder)
    for trash in folder.glob('.trash-*'):
      shutil.rmtree(trash)


def about(folder, step: int) -> dict:
  """Returns the JSON facts of one checkpoint, after checking its files."""
  place = pathlib.Path(folder) / _name(step)
  commit.check(place)
  return json.loads((place / ABOUT).read_text())


def load(folder, step: int, abstract):
  """Reads one checkpoint.

  Args:
    folder: of the run.
    step: one of `steps(folder)`.
    abstract: the tree of shapes, dtypes and shardings to read into.

  Raises:
    ValueError: damaged files, or a tree of another config.
  """
  return store.read_tree(pathlib.Path(folder) / _name(step), abstract)
