"""Trees of arrays on disk: Orbax writes them, `leaves.json` says what they are.

Orbax stores and reshards arrays well, but returns flipped bits and other dtypes
silently. So shapes and dtypes are compared before a load, and the digest of
every leaf after it. Written into a directory of `commit.publish`, which adds
the safety against crashes:

    DIRECTORY/leaves.json   {path: {digest, dtype, shape}}
    DIRECTORY/state/        the Orbax checkpoint: nested dicts, by leaf path

Containers are not stored: the caller's abstract tree says what they are.
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import threading
from typing import Any

import numpy as np

from statejax.artifact import digest

TABLE = 'leaves.json'
PAYLOAD = 'state'
# Below it: the directory of the arrays, and what an array is told by.
_ITEM, _ABOUT = 'state', '/zarr.json'
# Bytes of a piece of an array, and of a file, about: so that a load reads and
# hashes on all cores, and memory for pieces is used again, not asked for anew.
# An artifact has a limited number of files; the largest states get larger ones.
_CHUNK, _FILE, _FILES = 8 << 20, 16 << 20, 1024

# Orbax numbers its operations by one counter of the process: a save beside
# another save or load, even of another path, waits for the wrong number.
_orbax = threading.Lock()


def write_tree(directory, tree):
  """Writes a tree of arrays; returns its tree digest.

  Args:
    directory: where to write; made if missing, must hold no tree yet.
    tree: a pytree of numpy or jax arrays, none of them empty. None is kept as
      part of the structure.

  Raises:
    ValueError: there is a tree already, or a leaf cannot be stored; names it.
  """
  directory = pathlib.Path(os.path.abspath(directory))
  named = digest.named_leaves(tree)
  _refuse_unstorable(named)
  directory.mkdir(exist_ok=True)
  if os.path.lexists(directory / PAYLOAD):
    raise ValueError(f'{directory}: expected no tree, got one; nothing stored '
                     'is overwritten: choose another directory.')
  digests = digest.leaf_digests(tree)
  save_payload(directory / PAYLOAD, named)
  table = {}
  for path, leaf in named.items():
    dtype, shape = digest.describe(leaf)
    table[path] = {'digest': digests[path], 'dtype': dtype, 'shape': shape}
  (directory / TABLE).write_text(json.dumps(table, indent=1) + '\n')
  return digest.combine(digests)


def read_tree(directory, abstract_tree):
  """Reads a tree back, into the containers and shardings of the target.

  It trusts `leaves.json`: of a published directory call `commit.check` first.

  Args:
    directory: where `write_tree` has written.
    abstract_tree: the tree which the caller expects. Leaves of
      `jax.ShapeDtypeStruct` or jax arrays are read onto their sharding, or
      the first device if they have none; numpy arrays as numpy arrays.

  Returns:
    the tree, every leaf bit-equal to what was written.

  Raises:
    ValueError: leaves, shapes or dtypes are not the expected ones, or the
      payload is damaged; names the leaf.
  """
  import jax

  directory = pathlib.Path(os.path.abspath(directory))
  table = read_table(directory)
  targets = digest.named_leaves(abstract_tree)
  _compare(directory, table, targets)
  try:
    loaded = load_payload(directory / PAYLOAD, targets)
  except Exception as error:  # of any type: Orbax promises none
    raise ValueError(f'{directory / PAYLOAD}: expected a readable payload, got '
                     f'{type(error).__name__}: {error}; use another copy, or '
                     'an earlier one.') from error
  for path, leaf in loaded.items():
    got, expected = digest.leaf_digest(path, leaf), table[path]['digest']
    if got != expected:
      raise ValueError(f'{directory}: leaf {path}: expected digest {expected}, '
                       f'got {got}; the payload is damaged, use another copy, '
                       'or an earlier one.')
  return jax.tree_util.tree_map_with_path(
      lambda keys, _: loaded[digest.leaf_path(keys)], abstract_tree)


def save_payload(path, named):
  """Writes {leaf path: array}, none of them empty, as a new Orbax checkpoint.

  Args:
    path: absolute; must not exist.
    named: as `digest.named_leaves` gives it.

  Raises:
    OSError: EIO: not all of it is there afterwards. And whatever Orbax raises.
  """
  from orbax.checkpoint import v1 as ocp

  total = sum(leaf.nbytes for leaf in named.values())
  with _orbax, _quiet(), _context(ocp, max(_FILE, total // _FILES)):
    ocp.save(str(path), _nest(named), checkpointable_name=_ITEM)
  _refuse_lost(path, named)


def _refuse_lost(path, named):
  """Raises unless every leaf is there, as it was meant; reads no values.

  Where a directory could not be listed, Orbax leaves all arrays in the folder
  of its process, where no load looks, and says that it is done.
  """
  meant = {stored_name(name): _stored(leaf) for name, leaf in named.items()}
  try:
    found = describe_payload(open_payload(path))
  except Exception as error:  # of any type: the library promises none
    raise OSError(errno.EIO, f'{path}: expected what was just written, got '
                  f'{type(error).__name__}: {error}') from error
  for name in sorted(meant.keys() | found.keys()):
    if meant.get(name) != found.get(name):
      raise OSError(errno.EIO, f'{path}: leaf {name}: expected '
                    f'{meant.get(name, "none")}, as just written, got '
                    f'{found.get(name, "none")}')


def _stored(leaf):
  """(dtype name, shape) of a leaf in a file: of a key those of its words."""
  dtype, shape = digest.describe(leaf)
  return 'uint32' if dtype.startswith('key:') else dtype, shape


def load_payload(path, targets):
  """Returns {leaf path: array} of a checkpoint; raises what Orbax raises.

  Neither dtypes nor bits are checked here: Orbax casts, and returns damage.

  Args:
    path: absolute.
    targets: {leaf path: array or abstract array}, exactly what is stored.
  """
  from orbax.checkpoint import v1 as ocp

  nested = _nest({name: _target(leaf) for name, leaf in targets.items()})
  with _orbax, _quiet(), _context(ocp):
    return digest.named_leaves(ocp.load(str(path), nested,
                                        checkpointable_name=_ITEM))


def open_payload(path):
  """Returns {leaf path: stored array} of a checkpoint; reads no values.

  By the library that Orbax itself reads with, without the second that Orbax
  needs to find out what lies there. Raises what that library raises.

  Args:
    path: absolute, as `save_payload` has made it.
  """
  import tensorstore

  context = tensorstore.Context()
  base = {'driver': 'ocdbt', 'base': f'file://{path}/{_ITEM}/'}
  keys = tensorstore.KvStore.open(base, context=context).result().list(
      ).result()
  names = [key.decode().removesuffix(_ABOUT) for key in keys
           if key.endswith(_ABOUT.encode())]
  if not names:
    raise ValueError('no arrays')
  found = {name: tensorstore.open(
      {'driver': 'zarr3', 'kvstore': {**base, 'path': f'{name}/'}},
      open=True, context=context) for name in names}
  return {name: one.result() for name, one in found.items()}


def describe_payload(opened):
  """Returns {stored name: (dtype name, shape)} of what `open_payload` gave."""
  return {name: (np.dtype(one.dtype.numpy_dtype).name, tuple(one.shape))
          for name, one in opened.items()}


def stored_name(path):
  """Returns the name under which Orbax stores the leaf of a path."""
  return path.replace('/', '.')


def fill(opened, arrays):
  """Reads stored arrays into memory; raises what the library raises.

  Their bits are not checked here: damage is read as it is, what is missing as
  zeros.

  Args:
    opened: see `open_payload`.
    arrays: {leaf path: numpy array of the stored dtype and shape}, written in
      place; parts of larger arrays too.
  """
  import tensorstore

  done = [tensorstore.array(x).write(opened[stored_name(path)])
          for path, x in arrays.items()]
  for one in done:
    one.result()


def read_table(directory):
  """Returns {path: {digest, dtype, shape}} of a stored tree, no arrays."""
  path = pathlib.Path(directory) / TABLE
  try:
    table = json.loads(path.read_bytes())
    return {name: {'digest': str(leaf['digest']), 'dtype': str(leaf['dtype']),
                   'shape': tuple(leaf['shape'])}
            for name, leaf in table.items()}
  except FileNotFoundError:
    raise ValueError(f'{path}: expected the table of a stored tree, got none; '
                     'give the directory which write_tree has filled.'
                     ) from None
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
        f'{path}: expected {{path: {{digest, dtype, shape}}}}, got something '
        'else; use another copy.') from error


def _compare(directory, table, targets):
  """Refuses a target which is not exactly what is stored."""
  wrong = []
  for path in sorted(table.keys() | targets.keys()):
    got = expected = 'nothing'
    if path in table:
      got = f'{table[path]["dtype"]} {list(table[path]["shape"])}'
    if path in targets:
      dtype, shape = digest.describe(targets[path])
      expected = f'{dtype} {list(shape)}'
    if got != expected:
      wrong.append(f'leaf {path}: expected {expected}, got {got}')
  if wrong:
    more = f'\n... and {len(wrong) - 8} more' if len(wrong) > 8 else ''
    raise ValueError(
        f'{directory}: the stored tree is not the expected one; build the '
        'target from the config it was stored with, or convert it '
        'explicitly.\n' + '\n'.join(wrong[:8]) + more)


def _refuse_unstorable(named):
  """Says what Orbax would say too late, or not at all."""
  if not named:
    raise ValueError('tree: expected at least one array, got none; there is '
                     'nothing to store.')
  seen = {}
  for path, leaf in named.items():
    if 0 in leaf.shape:
      raise ValueError(f'leaf {path}: expected a size above zero, got shape '
                       f'{tuple(leaf.shape)}; use None for an absent array.')
    other = seen.setdefault(stored_name(path), path)
    if other != path:
      raise ValueError(f'leaf {path}: expected a name of its own, got the one '
                       f'of {other}, as Orbax joins keys by "."; rename it.')


def _target(leaf):
  if isinstance(leaf, (np.ndarray, np.generic)):
    return np.asarray(leaf)
  import jax

  # Without a sharding Orbax would take the one that was saved.
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _nest(named) -> Any:
  nested = {}
  for path, leaf in named.items():
    *parents, name = path.split('/')
    here = nested
    for parent in parents:
      here = here.setdefault(parent, {})
    # Orbax refuses numpy scalars.
    here[name] = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
  return nested


def _context(ocp, file_bytes=None):
  context = ocp.Context()
  # States hardly compress, and a small file must not unpack to a huge one.
  context.array.saving.use_compression = False
  context.array.saving.storage_options.chunk_byte_size = _CHUNK
  context.array.saving.ocdbt_target_data_file_size = file_bytes
  # As it is by default; `open_payload` relies on it.
  context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True
  return context


@contextlib.contextmanager
def _quiet():
  """Keeps Orbax's progress reports, dozens per save, out of the log."""
  def wanted(record):
    return record.levelno >= logging.WARNING or (
        os.path.join('orbax', 'checkpoint') not in record.pathname)

  logger = logging.getLogger('absl')
  logger.addFilter(wanted)
  try:
    yield
  finally:
    logger.removeFilter(wanted)
