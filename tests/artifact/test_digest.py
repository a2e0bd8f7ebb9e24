import dataclasses
import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from statejax.artifact import digest, tree

VECTOR = 'f9a722947c162d0b42a0562bbd6d695b1a656387788f070984329d9119e35aca'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  delta: dict
  absent: None
  steps: tuple


@pytest.mark.parametrize('namespace', [np, jnp])
def test_given_vector(namespace):
  tree = {'b': namespace.asarray(7, namespace.int32),
          'a': namespace.asarray([[0, 1], [2, 3]], namespace.float32)}
  assert digest.tree_digest(tree) == VECTOR


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', 'int4', 'bool'])
def test_equal_under_five_shardings(dtype):
  mesh = jax.make_mesh((2, 4), ('x', 'y'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  # More than one tile, whose borders the shards do not respect.
  value = np.arange(40 * 24 * 4608).reshape(40, 24, 4608)
  value = (value % 13 - 3).astype(jnp.dtype(dtype))
  expected = digest.leaf_digest('x', value)
  for spec in [P(), P('x'), P(None, 'y'), P('y', 'x'), P(('x', 'y'))]:
    array = jax.device_put(value, NamedSharding(mesh, spec))
    assert digest.leaf_digest('x', array) == expected


def test_tiles():
  assert digest.tile_shape((8, 1024, 2752), 2) == (8, 512, 344)
  assert digest.tile_shape((), 4) == ()
  assert digest.tile_shape((0, 3 << 20), 4) == (0, 3 << 20)
  assert digest.tile_shape((2049, 2049), 1) == (1025, 2049)


def test_several_tiles_by_hand(monkeypatch):
  def sha(*parts):
    return hashlib.sha256(b''.join(parts)).digest()

  monkeypatch.setattr(tree, 'TILE_BYTES', 8)
  x = np.arange(15, dtype='<i2').reshape(3, 5)
  head = b'{"dtype":"int16","path":"a/x","shape":[3,5],"tile":[2,2]}'
  tiles = [sha(b'statejax.tile.v1\0', x[i:i + 2, j:j + 2].tobytes())
           for i in (0, 2) for j in (0, 2, 4)]
  expected = sha(b'statejax.leaf.v1\0', len(head).to_bytes(8, 'little'), head,
                 *tiles)
  assert digest.leaf_digest('a/x', x) == expected.hex()


def test_paths_are_by_field_and_sorted():
  state = State({'k': np.zeros(2, np.float32)}, None,
                (np.int32(1), np.ones(3, bool)))
  assert list(digest.leaf_digests(state)) == ['delta/k', 'steps/0', 'steps/1']


def test_bytes_of_every_kind():
  def tile(array):
    return bytes(digest._bytes_of(np.asarray(array)).reshape(-1))

  assert tile(np.array([True, False])) == b'\1\0'
  assert tile(np.array([258], '>i4')) == b'\2\1\0\0'
  assert tile(np.array([1.0], ml_dtypes.bfloat16)) == b'\x80\x3f'
  assert tile(np.array([-1, 7], ml_dtypes.int4)) == b'\x0f\x07'
  assert tile(np.array([3], ml_dtypes.uint4)) == b'\x03'
  assert tile(np.array([[1, 2], [3, 4]], np.int8).T) == b'\1\3\2\4'
  assert tile(np.float16(1)) == b'\x00\x3c'


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
def test_typed_keys(impl):
  keys = jax.random.split(jax.random.key(3, impl=impl), 2)
  shape = jax.random.key_data(keys).shape
  assert digest.describe(keys) == (f'key:{impl}', shape)
  assert digest.describe(jax.eval_shape(lambda: keys)) == (
      f'key:{impl}', shape)
  # The same bits as plain numbers are another leaf.
  assert digest.leaf_digest('k', keys) != digest.leaf_digest(
      'k', jax.random.key_data(keys))


def test_digest_sees_value_dtype_shape_path():
  base = digest.leaf_digest('x', np.zeros((2, 3), np.int32))
  others = [('x', np.zeros((3, 2), np.int32)),
            ('y', np.zeros((2, 3), np.int32)),
            ('x', np.zeros((2, 3), np.uint32)),
            ('x', np.eye(2, 3, dtype=np.int32)),
            ('x', np.zeros((2, 0), np.int32))]
  assert len({base, *(digest.leaf_digest(*other) for other in others)}) == 6


@pytest.mark.parametrize('tree, text', [
    ({'a b': np.zeros(1)}, 'rename the key'),
    ({'a/b': np.zeros(1)}, 'rename the key'),
    (np.zeros(1), 'bare array'),
    ({'a': 7}, "'a': expected an array of numbers, got int 7"),
    ({'a': np.array(['x'])}, 'expected an array of numbers'),
    ({'1': np.zeros(1), 1: np.zeros(1)}, None),
])
def test_refuses(tree, text):
  with pytest.raises(ValueError, match=text):
    digest.tree_digest(tree)


def test_loads_no_jax():
  code = ('import sys, numpy\n'
          'from statejax.artifact import commit, digest\n'
          'digest.leaf_digest("x", numpy.zeros(3))\n'
          'assert not {"jax", "orbax"} & set(sys.modules)')
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('made', [
    lambda x: x.T, lambda x: x[:, ::2], lambda x: x[:, :, :1],
    lambda x: np.asfortranarray(x), lambda x: x[:, 3:, 5:]])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_how_an_array_lies_does_not_matter(made, dtype):
  whole = np.arange(64 * 96 * 200).reshape(64, 96, 200).astype(dtype)
  lies = made(whole)
  assert digest.leaf_digest('x', lies) == digest.leaf_digest(
      'x', np.ascontiguousarray(lies))
