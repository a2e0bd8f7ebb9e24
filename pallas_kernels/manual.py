"""Kernels inside `jax.shard_map`: over which mesh axes their arrays vary.

JAX converts the operands of its own operations where some vary over an axis and
others do not; those of a kernel, and the types of its results, are up to us.
"""

import jax


def alike(*trees):
  """Lets every array vary over all mesh axes over which one of them does.

  Gradients of those that did not are summed over the axes they gained. Outside
  `jax.shard_map`, and under `check_vma=False`, nothing changes.
  """
  axes = set().union(*map(_varying, jax.tree.leaves(trees)))

  def cast(x):
    missing = tuple(sorted(axes - _varying(x), key=str))
    return _cast(x, missing) if missing else x

  return jax.tree.map(cast, trees)


def struct(shape, dtype, like):
  """A result of a kernel, varying as `like` does."""
  kind = jax.typeof(like)
  how = {_name(kind): getattr(kind, _name(kind))}
  return jax.ShapeDtypeStruct(shape, dtype, **how)


def _name(kind):
  """Older versions of JAX have a set of axes, newer ones a type of them."""
  return 'vma' if hasattr(kind, 'vma') else 'manual_axis_type'


def _varying(x):
  axes = getattr(jax.typeof(x), _name(jax.typeof(x)))
  return getattr(axes, 'varying', axes)


def _cast(x, axes):
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(x, axes, to='varying')
  return jax.lax.pvary(x, axes)  # pyrefly: ignore
