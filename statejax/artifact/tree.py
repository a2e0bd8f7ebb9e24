"""What a tree digest is made of, as far as it needs no arrays and no numpy."""

import hashlib
import math

TILE_BYTES = 4 << 20

# Bytes of one element as it is hashed: below eight bits, one each.
ITEM_BYTES = {
    'bool': 1, 'int8': 1, 'int16': 2, 'int32': 4, 'uint8': 1, 'uint16': 2,
    'uint32': 4, 'float16': 2, 'bfloat16': 2, 'float32': 4,
    'float8_e4m3fn': 1, 'float8_e5m2': 1, 'int4': 1, 'uint4': 1,
    'key:threefry2x32': 4, 'key:rbg': 4,
}


def tile_shape(shape, item_bytes):
  """Returns the tile: the shape, its largest axis halved until it fits.

  >>> tile_shape((8, 1024, 2752), 2)
  (8, 512, 344)
  """
  tile = list(shape)
  while math.prod(tile) * item_bytes > TILE_BYTES:
    axis = tile.index(max(tile))
    tile[axis] = -(-tile[axis] // 2)
  return tuple(tile)


def combine(digests) -> str:
  """Returns the tree digest of {path: leaf digest}."""
  leaves = b''.join(bytes.fromhex(digests[path]) for path in sorted(digests))
  return hashlib.sha256(
      b'statejax.tree.v1\0' + len(digests).to_bytes(8, 'little') + leaves
  ).hexdigest()
