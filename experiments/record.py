"""Trainings that are done, in a results file that goes on where it stopped."""

import hashlib
import json
import os
import pathlib

from experiments import report


class Record:
  """Finished trainings by name, in the results file as soon as they end."""

  def __init__(self, path, command, digest):
    """Reads what is there already.

    Args:
      path: the results file.
      command: that makes all of it.
      digest: tells of a key what its settings are, None of one that is no
        more; results of other settings are left out, and so made again.
    """
    self.path, self.command = pathlib.Path(path), command
    self.digest = digest
    old = (json.loads(self.path.read_text()).get('cells', {})
           if self.path.exists() else {})
    self.cells = {key: facts for key, facts in old.items()
                  if facts['of'] == digest(key)}

  def get(self, key, make):
    """Returns the facts of `key`, made now if they are missing."""
    if key not in self.cells:
      self.cells[key] = {'of': self.digest(key), 'on': _here(), **make()}
      print(f'  {key}: {json.dumps(self.cells[key])}', flush=True)
      self.write([])
    return self.cells[key]

  def write(self, rows, **facts):
    """Replaces the file as a whole."""
    new = self.path.with_name(f'.{self.path.name}.new')
    self.path.parent.mkdir(parents=True, exist_ok=True)
    report.write(new, rows, self.command, cells=self.cells, **facts)
    os.replace(new, self.path)


def _here():
  """Where a cell was made: one file may hold those of several machines."""
  import jax
  cores = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
           else os.cpu_count())
  return (f'{jax.devices()[0].device_kind}, {cores} cores, jax '
          f'{jax.__version__}')


def digest(facts):
  """Returns 12 hexadecimal digits of whatever JSON can say."""
  text = json.dumps(facts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]
