"""Logical axis names to mesh axes, and the mesh itself."""

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axis. None replicates; a name that is absent is an error,
# so that a misspelt axis cannot replicate in silence.
RULES = {
    'batch': ('data', 'fsdp'),
    'embed': 'fsdp',
    'vocab': 'tensor',
    'heads': 'tensor',
    'key_heads': 'tensor',
    'kv_heads': 'tensor',
    'hidden': 'tensor',
    'layers': None,
    'key': None,
    'value': None,
    'rank': None,
    'latent': None,
    'rope': None,
    'index': None,
    'pool': None,
    'taps': None,
    'entries': None,
    'channels': None,
    'branches': None,
    'window': None,
    'block': None,
    'entry': None,
    'capacity': None,
    'slots': None,
    'spans': None,
    'versions': None,
    'tokens': None,
    'aliases': None,
    'events': None,
    'wants': None,
    'parts': None,
    'lanes': None,
    'words': None,
}


def make_mesh(*, data=None, fsdp=1, tensor=1, devices=None):
  """Returns a mesh with axes `data`, `fsdp`, `tensor`.

  Args:
    data: size of the data axis; None takes the devices that are left. A
      number takes the first `data * fsdp * tensor` devices, no more.
    fsdp: size of the parameter-sharding axis.
    tensor: size of the head-sharding axis.
    devices: to choose from; None means all of `jax.devices()`.

  Raises:
    ValueError: a size is below 1, or they do not fit the devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = (len(devices) // max(1, fsdp * tensor) if data is None else data,
           fsdp, tensor)
  count = math.prod(sizes)
  idle = len(devices) - count
  if min(sizes) < 1 or idle < 0 or (idle and data is None):
    raise ValueError(
        'mesh: expected sizes above 0 that multiply to the number of devices, '
        f'{len(devices)}, or with a given data to less; got data={data}, '
        f'fsdp={fsdp}, tensor={tensor}.')
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3,
                       devices=devices[:count])


def spec(axes, shape, mesh, path='array', rules=None):
  """Returns the PartitionSpec of one array.

  Args:
    axes: logical names, one per dimension.
    shape: dimensions.
    mesh: a `jax.sharding.Mesh`.
    path: named in errors.
    rules: None means `RULES`.

  Raises:
    ValueError: an unknown axis, or a dimension that its mesh axes do not
      divide.
  """
  rules = RULES if rules is None else rules
  out, used = [], set()
  for name, size in zip(axes, shape):
    if name not in rules:
      raise ValueError(f'{path}: no sharding rule for axis {name!r}; rules are '
                       f'{sorted(rules)}.')
    target = rules[name]
    target = (target,) if isinstance(target, str) else (target or ())
    target = tuple(a for a in target if mesh.shape[a] > 1 and a not in used)
    parts = math.prod(mesh.shape[a] for a in target)
    if size % parts:
      raise ValueError(f'{path}: axis {name}={size} is not divisible by '
                       f'{parts} = mesh axes {target}; choose another mesh.')
    used.update(target)
    out.append(target[0] if len(target) == 1 else target or None)
  return PartitionSpec(*out)


def shardings(axes, abstract, mesh, rules=None):
  """Returns the tree of NamedSharding for a tree of arrays.

  Args:
    axes: tree of tuples of logical names, as `LanguageModel.axes()`.
    abstract: the same tree of arrays or shapes.
    mesh: a mesh.
    rules: None means `RULES`.
  """
  def one(path, names, value):
    where = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, spec(names, value.shape, mesh, where, rules))
  return jax.tree_util.tree_map_with_path(
      one, axes, abstract, is_leaf=lambda n: isinstance(n, tuple))


def state_shardings(schema, mesh, rules=None):
  """Returns the tree of NamedSharding for a state's schema."""
  from statejax import state
  return state.map_leaves(
      lambda path, names, kind, leaf: NamedSharding(
          mesh, spec(names, leaf.shape, mesh, path, rules)), schema)


def row_shardings(schema, mesh):
  """Returns the tree of NamedSharding for a state's schema of one row.

  Heads go over `tensor`, as in `state_shardings`. A single row cannot be
  divided, so that every part of `data` and `fsdp` has it whole; `statejax.state
  .put` takes it from there into a state whose rows are spread.

  Raises:
    ValueError: not the axes of `make_mesh`, or a leaf that they do not divide.
  """
  if mesh.axis_names != AXES:
    raise ValueError(f'mesh: expected the axes {AXES}, got {mesh.axis_names}; '
                     'make it with statejax.sharding.make_mesh.')
  return state_shardings(schema, mesh, RULES | {'batch': None})


def mesh_name(mesh) -> str:
  """Returns the axes above 1, e.g. 'data=2,tensor=4'; '' of one device.

  As `statejax.artifact.identity.Program` has it.
  """
  return ','.join(f'{a}={n}' for a, n in mesh.shape.items() if n > 1)
