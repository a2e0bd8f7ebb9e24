"""The arrays of an artifact, checked without a model. Imports no jax."""

import pathlib

import numpy as np

from statejax.artifact import digest, manifest, store
from statejax.artifact.outcome import Refused


def check(folder, about: dict, plain: dict):
  """V12 and V14 without a model: raises unless the arrays are what they were.

  Args:
    folder: the artifact in clear, its files checked.
    about: its manifest.
    plain: its `plain.json`.

  Raises:
    Refused: E_PAYLOAD, E_SCHEMA, E_DIGEST; names the leaf.
    ImportError: tensorstore is not installed.
  """
  try:
    opened = store.open_payload(
        pathlib.Path(folder).absolute() / manifest.PAYLOAD)
    stored = store.describe_payload(opened)
  except ImportError:
    raise
  except Exception as error:  # of any type: the library promises none
    raise Refused('E_PAYLOAD', f'expected readable arrays, got '
                  f'{type(error).__name__}: {error}') from error
  listed = {leaf['path']: (leaf['dtype'], tuple(leaf['shape']))
            for leaf in about['state']['leaves']}
  expected = {store.stored_name(path): one for path, one in listed.items()
              if 0 not in one[1]}
  for name in sorted(expected.keys() | stored.keys()):
    if expected.get(name) != stored.get(name):
      raise Refused('E_SCHEMA', f'payload: leaf {name}: expected '
                    f'{expected.get(name, "none")}, got '
                    f'{stored.get(name, "none")}')
  for path, (dtype, shape) in listed.items():
    array = np.zeros(shape, np.dtype(dtype))
    if array.size:
      try:
        store.fill(opened, {path: array})
      except Exception as error:  # as above
        raise Refused('E_PAYLOAD', f'leaf {path}: {error}') from error
    got = digest.leaf_digest(path, array)
    if got != plain['leaves'][path]:
      raise Refused('E_DIGEST', f'leaf {path}: expected '
                    f'{plain["leaves"][path]}, got {got}')
