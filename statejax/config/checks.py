"""What the fields of several configurations have to satisfy."""

import dataclasses


def types(config):
  """Raises ValueError unless numbers and configs are what a class declares."""
  for field in dataclasses.fields(config):
    kind, value = field.type, getattr(config, field.name)
    if kind in (int, int | None):
      wanted, ok = 'a whole number', _is(value, int)
    elif kind in (float, float | None):
      wanted, ok = 'a number', _is(value, (int, float))
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
      wanted, ok = f'a {kind.__name__}', isinstance(value, kind)
    else:
      continue
    if value is None and kind in (int | None, float | None):
      continue
    if not ok:
      raise ValueError(f'{type(config).__name__}.{field.name}: expected '
                       f'{wanted}, got {value!r}.')


def _is(value, kind):
  return isinstance(value, kind) and not isinstance(value, bool)


def positive(config, *names):
  """Raises ValueError unless every named field is a whole number >= 1, and
  all fields are of their `types`."""
  types(config)
  no_less(config, 1, *names)


def no_less(config, least, *names):
  """Raises ValueError unless every named field is at least `least`."""
  for name in names:
    if not getattr(config, name) >= least:
      raise ValueError(f'{type(config).__name__}.{name}: expected >= {least}, '
                       f'got {getattr(config, name)}.')


def divides(config, many, few):
  """Raises ValueError unless the field `many` is a multiple of `few`."""
  if getattr(config, many) % getattr(config, few):
    raise ValueError(
        f'{type(config).__name__}: {many}={getattr(config, many)} must be a '
        f'multiple of {few}={getattr(config, few)}.')


def negative(config, *names):
  """Raises ValueError unless every named field is below 0 or None."""
  for name in names:
    value = getattr(config, name)
    if value is not None and value >= 0:
      raise ValueError(f'{type(config).__name__}.{name}: expected < 0 or None, '
                       f'got {value}.')


def chunk(config):
  """Raises ValueError unless `chunk` is None or a power of two >= 2."""
  size = config.chunk
  if size is not None and (size < 2 or size & (size - 1)):
    raise ValueError(f'{type(config).__name__}.chunk: expected a power of two '
                     f'>= 2 or None, got {size}.')


def one_of(config, name, known):
  """Raises ValueError unless the field `name` is among the known values."""
  value = getattr(config, name)
  if value not in known:
    raise ValueError(f'{type(config).__name__}.{name}: expected one of '
                     f'{known}, got {value!r}.')


DECODES = ('step', 'deferred', 'bitwise')


def decodes(config):
  """Raises ValueError unless `decode` is known."""
  one_of(config, 'decode', DECODES)
