"""What a caller of the delta rule can get wrong, said in one line."""

import operator

import jax.numpy as jnp


def tokens(q, k, v, log_decay, erase, write, n_valid, segment_ids):
  """Raises ValueError unless shapes and dtypes agree.

  Returns:
    The dtype that accumulates, hence that of the state.
  """
  arrays = dict(q=q, k=k, v=v)
  if n_valid is not None:
    arrays['n_valid'] = n_valid
  if segment_ids is not None:
    arrays['segment_ids'] = segment_ids
  for name, x in arrays.items():
    _expect_array(name, x)
  if q.ndim != 4 or v.ndim != 4:
    raise ValueError(
        f'q, v: expected [B, T, HK, K] and [B, T, HV, V], got {q.shape} and '
        f'{v.shape}; heads and width are separate axes.'
    )
  _expect('q', q, q.shape)
  batch, length, key_heads, width = q.shape
  heads, values = v.shape[2:]
  if not width:
    raise ValueError('q: expected a width K >= 1, got 0.')
  if not key_heads or heads % key_heads:
    raise ValueError(
        f'v: expected HV a multiple of HK={key_heads}, got HV={heads}; every '
        'key head serves the same number of value heads.'
    )
  per_head = (batch, length, heads)
  _expect('k', k, (batch, length, key_heads, width))
  _expect('v', v, (batch, length, heads, values))
  _expect_gate('log_decay', log_decay, per_head, width)
  if isinstance(log_decay, (int, float)) and not log_decay <= 0:
    raise ValueError(
        f'log_decay: expected at most 0, got {log_decay}; it is the logarithm '
        'of the factor: 0 keeps everything.'
    )
  _expect_gate('erase', erase, per_head, width)
  _expect_gate('write', write, per_head, values)
  if n_valid is not None:
    _expect('n_valid', n_valid, (batch,), jnp.integer)
  if segment_ids is not None:
    _expect('segment_ids', segment_ids, (batch, length), jnp.integer)
  gates = [x for x in (log_decay, erase, write) if hasattr(x, 'dtype')]
  return jnp.result_type(jnp.float32, *[x.dtype for x in (q, k, v, *gates)])


def matrix(q, v, state, dtype):
  """Raises ValueError unless `state` is [B, HV, K, V] of `dtype`."""
  _expect_array('state', state)
  _expect('state', state, (q.shape[0], v.shape[2], q.shape[3], v.shape[3]))
  if state.dtype != dtype:
    raise ValueError(
        f'state: expected {dtype.name}, got {state.dtype.name}; carried state '
        'is never rounded: allocate it in this type.'
    )


def _expect(name, x, shape, kind=jnp.floating):
  if x.shape != shape or not jnp.issubdtype(x.dtype, kind):
    raise ValueError(
        f'{name}: expected {list(shape)} {kind.__name__}, got {list(x.shape)} '
        f'{x.dtype}; see the shapes in the docstring of delta_rule.'
    )


def _expect_array(name, x):
  if not hasattr(x, 'shape'):
    raise ValueError(
        f'{name}: expected an array, got {type(x).__name__}; only log_decay, '
        'erase and write may be Python scalars.'
    )


def _expect_gate(name, x, per_head, width):
  if isinstance(x, (int, float)):
    return
  _expect_array(name, x)
  if not x.ndim:
    raise ValueError(
        f'{name}: expected {list(per_head)}, one more axis, or a Python scalar,'
        ' got an array without axes; jit makes one of a scalar argument: bind '
        'it by functools.partial before.'
    )
  shape = per_head if x.ndim == 3 else (*per_head, width)
  _expect(name, x, shape)


def chunk_size(size) -> int:
  """Returns `size` as an int.

  Raises:
    ValueError: it is no power of two, or less than 2.
  """
  try:
    found = operator.index(size)
  except TypeError:
    found = 0
  if found < 2 or found & (found - 1):
    raise ValueError(
        f'chunk_size: expected a power of two >= 2, got {size!r}; of '
        'delta_rule, None lets the backend decide.'
    )
  return found


def scale(factor, width):
  """Returns the factor on q as a float, `width**-0.5` for None."""
  if factor is None:
    return width ** -0.5
  try:
    return float(factor)
  except (TypeError, ValueError) as error:
    raise ValueError(
        f'scale: expected a number that is known when the program is compiled, '
        f'got {type(factor).__name__}; multiply q by it instead.'
    ) from error
