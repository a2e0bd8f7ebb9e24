"""Edits of many rows at once, as events that a jitted program can commit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from statejax.ops import slots as sl
from statejax.slot_facts import MOST

# What of an event a caller says; who acts is not.
_GIVEN = tuple(f.name for f in dataclasses.fields(sl.Events)
               if f.name not in ('op', 'host', 'principal'))


def of_rows(rules, op, mine, fields, *, principal, host):
  """Returns one edit of each of some rows, `statejax.ops.slots.Events` [B, 1].

  Runs inside `jax.jit` too; numbers that are traced are not looked at.

  Args:
    rules: `statejax.config.SlotRules`.
    op: of `statejax.ops.slots.OPS`.
    mine: the rows that it is for, [B] bool.
    fields: dict of those of `Events`, [B, ...] or what all rows have in common.
    principal, host: of all of them.

  Raises:
    ValueError: an unknown op or field, one of another shape, or a number that a
      bank cannot hold.
  """
  if op not in sl.OPS:
    raise ValueError(f'op: expected one of {", ".join(sl.OPS)}; got {op!r}.')
  mine = jnp.asarray(mine)
  if mine.ndim != 1 or mine.dtype != bool:
    raise ValueError(f'mine: expected [B] bool, got {mine.shape} {mine.dtype}.')
  wrong = sorted(set(fields) - set(_GIVEN))
  if wrong:
    raise ValueError(f'fields: expected some of {", ".join(_GIVEN)}; got '
                     f'{", ".join(wrong)}.')
  given, kinds = fields | {'principal': principal, 'host': host}, _kinds(rules)
  for name, x in given.items():
    dtype, rest = kinds[name]
    if dtype == jnp.int32 and not isinstance(x, jax.core.Tracer):
      _check(name, x)
    x, shape = jnp.asarray(x), (mine.size, *rest)
    if x.shape not in ((), rest, shape):
      raise ValueError(f'{name}: expected {shape} or {rest}, got {x.shape}.')
    given[name] = jnp.broadcast_to(x, shape)[:, None]
  number = jnp.where(mine, sl.OPS.index(op), sl.NULL)
  return sl.events(rules, number[:, None], **given)


@functools.cache
def _kinds(rules):
  """{field: (dtype, shape behind [B, E])}."""
  blank = jax.eval_shape(lambda: sl.events(rules, jnp.zeros((1, 1))))
  return {f.name: (getattr(blank, f.name).dtype, getattr(blank, f.name).shape[
      2:]) for f in dataclasses.fields(sl.Events)}


def _check(name, x):
  """Raises unless a bank holds integers as they are."""
  x = np.asarray(x)
  if x.dtype.kind not in 'iu' or (
      x.size and (x.min() < -1 or x.max() > MOST)):
    raise ValueError(f'{name}: expected integers of -1 to {MOST}, got '
                     f'{x.tolist()}.')
