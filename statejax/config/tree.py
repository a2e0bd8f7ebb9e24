"""Configurations as nested dicts, for JSON, and back."""

import dataclasses
import typing

from statejax.config import (
  attention,
  block_sparse,
  compressed,
  delta,
  dsa,
  ksa,
  linear,
  loza,
  mla,
  model,
  nsa,
  segment,
  slots,
  train,
)

_MODULES = (attention, block_sparse, compressed, delta, dsa, ksa, linear, loza,
            mla, model, nsa, segment, slots, train)
_KNOWN = {name: value for module in _MODULES
          for name, value in vars(module).items()
          if dataclasses.is_dataclass(value)}


def to_dict(config) -> typing.Any:
  """Returns `config` as nested dicts and lists that JSON can hold.

  Every dataclass carries its type under `type`, so that two mixers with equal
  fields differ.
  """
  if dataclasses.is_dataclass(config):
    fields = {f.name: to_dict(getattr(config, f.name))
              for f in dataclasses.fields(config)}
    return {'type': type(config).__name__, **fields}
  if isinstance(config, tuple | list):
    return [to_dict(item) for item in config]
  return config


def essence(config) -> typing.Any:
  """Returns `to_dict` without the fields that hold their defaults.

  What digests of configs are taken of: a field that is added later, with a
  default under which all is computed as before, changes none of them. So no
  default may ever change (`tests/golden/defaults.json`).
  """
  if dataclasses.is_dataclass(config):
    fields = {f.name: essence(getattr(config, f.name))
              for f in dataclasses.fields(config)
              if getattr(config, f.name) != f.default}
    return {'type': type(config).__name__, **fields}
  if isinstance(config, tuple | list):
    return [essence(item) for item in config]
  return config


def renewed(data, config) -> typing.Any:
  """Returns what `to_dict` of an earlier version made, as it is made now.

  Args:
    data: saved; fields that came since get their defaults.
    config: lends its types, where they are defined outside this package.

  Raises:
    ValueError: as `from_dict`.
  """
  return to_dict(from_dict(data, _types(config)))


def _types(config):
  if dataclasses.is_dataclass(config):
    return {type(config)}.union(*(
        _types(getattr(config, f.name)) for f in dataclasses.fields(config)))
  if isinstance(config, tuple | list):
    return set().union(*map(_types, config))
  return set()


def from_dict(data, types=()) -> typing.Any:
  """Undoes `to_dict`, for the config types of this package and `types`.

  Args:
    data: what `to_dict` has returned.
    types: further dataclasses, of mixers defined elsewhere.

  Raises:
    ValueError: an unknown type or field, or one is missing, as of another
      version.
  """
  if isinstance(data, list):
    return tuple(from_dict(item, types) for item in data)
  if not isinstance(data, dict):
    return data
  fields = {k: from_dict(v, types) for k, v in data.items() if k != 'type'}
  known = {**_KNOWN, **{t.__name__: t for t in types}}
  kind: typing.Any = known.get(data.get('type', ''))
  if kind is None:
    raise ValueError(f'config: unknown type {data.get("type")!r}; it was saved '
                     'by another version, or defined outside statejax.config.')
  known = {f.name: f.default is dataclasses.MISSING
           for f in dataclasses.fields(kind)}
  odd = sorted(fields.keys() - known.keys())
  odd += sorted(n for n in known.keys() - fields.keys() if known[n])
  if odd:
    raise ValueError(f'{kind.__name__}: unknown or missing fields {odd}; the '
                     'config was saved by another version.')
  return kind(**fields)
