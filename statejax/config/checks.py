"""What the fields of several configurations have to satisfy."""


def positive(config, *names):
  """Raises ValueError unless every named field is at least 1."""
  for name in names:
    if getattr(config, name) < 1:
      raise ValueError(f'{type(config).__name__}.{name}: expected >= 1, got '
                       f'{getattr(config, name)}.')


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
