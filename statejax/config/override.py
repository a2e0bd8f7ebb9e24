"""Typed replacement of one field of a configuration."""

import ast
import dataclasses
import difflib
import types
import typing


def override(config, assignment: str) -> typing.Any:
  """Returns `config` with one typed field replaced.

  The path may pass through fields of dataclasses, and through tuples of
  dataclasses by their `name` or by index: `model.layers.kda.mixer.heads`.

  Args:
    config: a frozen dataclass.
    assignment: 'a.b=value'; the value is a Python literal or a bare word.

  Raises:
    ValueError: unknown field (with the nearest match), wrong type.

  >>> from statejax.config import Config, ModelConfig
  >>> override(Config(ModelConfig(8, 4, (), ())), 'model.width=16').model.width
  16
  """
  path, sep, text = assignment.partition('=')
  if not sep:
    raise ValueError(
        f'override {assignment!r}: expected path=value, e.g. model.width=64.')
  return _replace(config, path.strip().split('.'), text.strip(), path.strip())


def _replace(node, keys, text, path):
  key, *rest = keys
  if isinstance(node, tuple):
    index = _position(node, key, path)
    value = (_replace(node[index], rest, text, path) if rest
             else _parse(text, None, node[index], path))
    return node[:index] + (value,) + node[index + 1:]
  if not dataclasses.is_dataclass(node):
    raise ValueError(f'{path}: {node!r} has no field {key!r}.')
  hints = typing.get_type_hints(type(node))
  if key not in hints:
    raise ValueError(_unknown(key, hints, path))
  old = getattr(node, key)
  value = (_replace(old, rest, text, path) if rest
           else _parse(text, hints[key], old, path))
  return dataclasses.replace(node, **{key: value})


def _position(items, key, path):
  if key.isdigit() and int(key) < len(items):
    return int(key)
  names = [getattr(item, 'name', None) for item in items]
  if key in names:
    return names.index(key)
  known = [n for n in names if n] or [str(i) for i in range(len(items))]
  raise ValueError(_unknown(key, known, path))


def _unknown(key, known, path):
  near = difflib.get_close_matches(key, list(known), n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  return (f'{path}: unknown key {key!r}; the keys here are '
          f'{", ".join(known)}.{hint}')


def _parse(text, hint, old, path):
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  hint = type(old) if hint is None or hint is typing.Any else hint
  if not _fits(value, hint):
    raise ValueError(
        f'{path}: expected {getattr(hint, "__name__", hint)}, got {value!r} '
        f'({type(value).__name__}).')
  return float(value) if _is_float(hint) and type(value) is int else value


def _is_float(hint):
  return float in (typing.get_args(hint) or (hint,)) and (
      int not in (typing.get_args(hint) or (hint,)))


def _fits(value, hint):
  """Whether `value` is of the annotated type; a bool is no int."""
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, h) for h in typing.get_args(hint))
  if origin is tuple:
    item = typing.get_args(hint)[0]
    return isinstance(value, tuple) and all(_fits(v, item) for v in value)
  if hint is float:
    return type(value) in (int, float)
  if hint is int:
    return type(value) is int
  return isinstance(value, hint)
