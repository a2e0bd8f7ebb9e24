"""The identity of a tree of arrays, independent of how it is sharded.

    tile = H("statejax.tile.v1\0" + bytes)
    leaf = H("statejax.leaf.v1\0" + u64 length + CJ{dtype, path, shape, tile}
             + tile digests in row-major order)
    tree = H("statejax.tree.v1\0" + u64 count + leaf digests by path)

H is SHA-256, CJ canonical JSON, integers are little-endian. A file digest says
that a file is the one that was written; a tree digest says that the arrays in
memory are, whatever wrote, moved or resharded them in between.
"""

import hashlib
import itertools
import math
import re
import sys
import threading

import numpy as np

from statejax.artifact.canonical import dumps as canonical
from statejax.artifact.tree import combine, tile_shape

__all__ = ['canonical', 'combine', 'describe', 'leaf_digest',
           'leaf_digests', 'leaf_path', 'named_leaves', 'tile_shape',
           'tree_digest']
_COMPONENT = re.compile(r'[A-Za-z0-9_.-]+')

# Stored one element per byte. The bits above an element's own are not defined
# by the libraries, so that they are cleared before hashing.
_SUB_BYTE_BITS = {
    'int2': 2, 'uint2': 2, 'int4': 4, 'uint4': 4, 'float4_e2m1fn': 4,
    'float6_e2m3fn': 6, 'float6_e3m2fn': 6,
}


def leaf_path(keys):
  """Returns the name of a leaf in its tree, e.g. 'delta/conv'.

  Args:
    keys: a key path, as `jax.tree_util.tree_flatten_with_path` gives it.

  Raises:
    ValueError: a key is no plain name, or there is none.
  """
  from jax import tree_util

  parts = [tree_util.keystr((key,), simple=True) for key in keys]
  if not parts or not all(map(_COMPONENT.fullmatch, parts)):
    raise ValueError(
        f'leaf {"/".join(parts)!r}: expected keys made of letters, digits, '
        '"_", "." and "-", in a container; rename the key, or put a bare array '
        'into a dict.')
  return '/'.join(parts)


def named_leaves(tree):
  """Returns {path: leaf}, sorted by path.

  Args:
    tree: a pytree of arrays or of `jax.ShapeDtypeStruct`. None is no leaf.

  Raises:
    ValueError: a leaf has no plain name, or is no array of numbers.
  """
  from jax import tree_util

  named = {}
  for keys, leaf in tree_util.tree_flatten_with_path(tree)[0]:
    path = leaf_path(keys)
    if path in named:
      raise ValueError(f'leaf {path!r}: expected one leaf of this path, got '
                       'two; rename one of the keys.')
    if not _is_numeric(leaf):
      raise ValueError(f'leaf {path!r}: expected an array of numbers, got '
                       f'{type(leaf).__name__} {leaf!r}; give it a dtype, e.g. '
                       'jnp.asarray(x, jnp.int32).')
    named[path] = leaf
  return dict(sorted(named.items()))


def describe(leaf):
  """Returns (dtype name, shape) of an array, or of an abstract one.

  A typed PRNG key counts as its key data, e.g. ('key:threefry2x32', (2,)).
  """
  if not _is_key(leaf):
    return leaf.dtype.name, tuple(map(int, leaf.shape))
  import jax

  names = []

  def data(keys):  # key_impl takes tracers, but no ShapeDtypeStruct
    names.append(jax.random.key_impl(keys))
    return jax.random.key_data(keys)

  shape = jax.eval_shape(data, leaf).shape
  return f'key:{names[0]}', tuple(map(int, shape))


def leaf_digest(path, leaf, each=map):
  """Returns the digest of one array at a path, 64 hex digits.

  Args:
    path: where the leaf stands in its tree, e.g. 'delta/conv'.
    leaf: a numpy or jax array. One that spans processes is gathered: then all
      of them must call this together.
    each: how the tiles are gone through, e.g. the `map` of an executor.
  """
  dtype, shape = describe(leaf)
  array = _to_host(leaf)
  tile = tile_shape(shape, array.dtype.itemsize)
  head = canonical({'dtype': dtype, 'path': path, 'shape': list(shape),
                    'tile': list(tile)})
  result = hashlib.sha256(b'statejax.leaf.v1\0' + _u64(len(head)) + head)
  # An empty array has no tile, a scalar has one.
  corners = itertools.product(
      *(range(0, n, step or 1) for n, step in zip(shape, tile)))
  # One piece of memory of a thread for all tiles that do not lie in one: new
  # memory costs more than hashing it.
  spares = threading.local()

  def tile_digest(corner):
    piece = array[tuple(slice(i, i + step) for i, step in zip(corner, tile))]
    if not piece.flags.c_contiguous:
      if not hasattr(spares, 'memory'):
        spares.memory = np.empty(math.prod(tile), array.dtype)
      held = spares.memory[:piece.size].reshape(piece.shape)
      _copy(held, piece)
      piece = held
    found = hashlib.sha256(b'statejax.tile.v1\0')
    found.update(_bytes_of(piece).reshape(-1).data)
    return found.digest()

  for found in each(tile_digest, corners):
    result.update(found)
  return result.hexdigest()


def _copy(target, source):
  """Copies into a contiguous array, by whole runs of the last axis if it can:
  that is faster."""
  if source.size and source.strides[-1] == source.itemsize:
    run = f'V{source.shape[-1] * source.itemsize}'
    target, source = target.view(run), source.view(run)
  np.copyto(target, source)


def leaf_digests(tree):
  """Returns {path: digest} of every leaf, sorted by path."""
  return {path: leaf_digest(path, leaf)
          for path, leaf in named_leaves(tree).items()}


def tree_digest(tree):
  """Returns the digest of a tree of arrays, 64 hex digits."""
  return combine(leaf_digests(tree))


def _is_numeric(leaf):
  if not hasattr(leaf, 'dtype') or not hasattr(leaf, 'shape'):
    return False
  # Objects, text, dates and records have no bytes that mean the same anywhere.
  dtype = leaf.dtype
  return getattr(dtype, 'kind', '') not in tuple('OSUMm') and not getattr(
      dtype, 'fields', None)


def _is_key(leaf):
  if isinstance(leaf.dtype, np.dtype):
    return False
  import jax

  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(leaf):
  if _is_key(leaf):
    import jax

    leaf = jax.random.key_data(leaf)
  if not getattr(leaf, 'is_fully_addressable', True):
    from jax.experimental import multihost_utils

    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(leaf)


def _bytes_of(array):
  """Returns uint8 [*shape, item bytes], little-endian, spare bits cleared."""
  if array.dtype.byteorder == '>' or (
      array.dtype.byteorder == '=' and sys.byteorder == 'big'):
    array = array.astype(array.dtype.newbyteorder('<'))
  # The view needs a last axis of its own, also for scalars.
  data = np.ascontiguousarray(array).reshape(array.shape + (1,)).view(np.uint8)
  bits = _SUB_BYTE_BITS.get(array.dtype.name)
  return data & np.uint8((1 << bits) - 1) if bits else data


def _u64(number):
  return number.to_bytes(8, 'little')
