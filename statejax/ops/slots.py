"""Slot bank: what a row of memory holds, and the events that may change it.

A slot is the delta rule with a one-hot key: it is replaced as a whole or not at
all. Beside its value it keeps integers that say what it is (status, lock,
versions, times) and the tokens its value stands for. `lifecycle.commit` is the
only thing that changes a bank, `recall.read` the only thing that reads values.
"""

import dataclasses

import jax
import jax.numpy as jnp

from statejax import state as st

# Of `Bank.status`.
EMPTY, LIVE, TOMBSTONE, QUARANTINED = range(4)
# Of `Bank.lock`: a stream can undo a stream's lock, not a host's.
OPEN, STREAM, HOST = range(3)
# Of `Events.op`; those from PURGE on need the host's capability.
(NULL, WRITE, LOCK, UNLOCK, DELETE, ROLLBACK, ALIAS, EXPIRE, QUARANTINE,
 RESTORE, PURGE, REKEY, HOST_LOCK, HOST_UNLOCK) = range(14)
OPS = ('null', 'write', 'lock', 'unlock', 'delete', 'rollback', 'alias',
       'expire', 'quarantine', 'restore', 'purge', 'rekey', 'host_lock',
       'host_unlock')
# Of `Receipts.outcome`: the two first of COMMITTED changed the bank.
(UNUSED, COMMITTED, REFRESHED, MISSING, LOCKED, FULL, CONFLICT, FORBIDDEN,
 INVALID) = range(9)
OUTCOMES = ('unused', 'committed', 'refreshed', 'missing', 'locked', 'full',
            'conflict', 'forbidden', 'invalid')

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
  """All slots of B rows, M each; -1 stands for none in every integer.

  Attributes:
    key: unit vector by which the slot is found, float32.
    value: what the slot holds and the R values before it, newest first.
    span: the tokens that each value stands for, padded with -1. A version
      without tokens is no version: it fills no place in the ring.
    key_span: the tokens of the key.
    source: (first token, number of tokens) of the value in the stream, or of
      what is taken for it.
    status: EMPTY, LIVE, TOMBSTONE or QUARANTINED.
    lock: OPEN, STREAM or HOST.
    oid: object id, given once.
    version: of the object, from 1.
    seq: commits of this slot, whatever objects it held.
    t_write, t_first, t_read: positions of the last write, and of the first and
      the last read.
    reads: tokens that have read the slot.
    owner: the principal who wrote it.
    expires: the position from which it is hidden.
    salience: of the last write.
    alias_key: unit vectors that are other names of objects.
    alias_oid: the objects; one that is gone leaves a name without effect.
    next_oid: the id of the next new object.
  """

  key: st.Array = st.leaf('batch slots key')
  value: st.Array = st.leaf('batch slots versions value')
  span: st.Array = st.leaf('batch slots versions tokens', fill=-1)
  key_span: st.Array = st.leaf('batch slots tokens', fill=-1)
  source: st.Array = st.leaf('batch slots words', fill=-1)
  status: st.Array = st.leaf('batch slots')
  lock: st.Array = st.leaf('batch slots')
  oid: st.Array = st.leaf('batch slots', fill=-1)
  version: st.Array = st.leaf('batch slots')
  seq: st.Array = st.leaf('batch slots')
  t_write: st.Array = st.leaf('batch slots', fill=-1)
  t_first: st.Array = st.leaf('batch slots', fill=-1)
  t_read: st.Array = st.leaf('batch slots', fill=-1)
  reads: st.Array = st.leaf('batch slots')
  owner: st.Array = st.leaf('batch slots', fill=-1)
  expires: st.Array = st.leaf('batch slots', fill=-1)
  salience: st.Array = st.leaf('batch slots')
  alias_key: st.Array = st.leaf('batch aliases key')
  alias_oid: st.Array = st.leaf('batch aliases', fill=-1)
  next_oid: st.Array = st.leaf('batch')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Events:
  """What is to happen to the banks of B rows: E events each, in order.

  Attributes:
    op: [B, E] int32, NULL for an unused place.
    key: of the object, unit vectors, [B, E, K] float32; of a REKEY the new one,
      and the slot has to be named by number.
    name: of an ALIAS the other name, [B, E, K].
    value: of a WRITE, [B, E, V].
    span, key_span: tokens, [B, E, Ls] and [B, E, Lk] int32, padded with -1.
    source: [B, E, 2] int32, -1 where a host writes.
    time: position of the event, -1 for none, [B, E] int32.
    salience: [B, E] float32.
    principal: who acts, [B, E] int32; sees and changes only what it owns.
    expires: of a WRITE or EXPIRE the position from which it is hidden, -1
      never, [B, E].
    slot: the slot meant, [B, E] int32; -1 asks the key.
    expect: version that the slot must have, or nothing happens; 0 is of a WRITE
      that makes an object, -1 any, [B, E].
    steps: of a ROLLBACK, versions back, [B, E] int32.
    host: whether the host's capability is shown, [B, E] bool.
  """

  op: jax.Array
  key: jax.Array
  name: jax.Array
  value: jax.Array
  span: jax.Array
  key_span: jax.Array
  source: jax.Array
  time: jax.Array
  salience: jax.Array
  principal: jax.Array
  expires: jax.Array
  slot: jax.Array
  expect: jax.Array
  steps: jax.Array
  host: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Receipts:
  """What became of each event, [B, E] int32.

  Attributes:
    outcome: index into `OUTCOMES`. COMMITTED has replaced one slot or added one
      alias; REFRESHED has set the time of a value written again; all others
      have changed no bit.
    slot, oid: what was meant, after the event; -1 for none.
    version, old_version: after and before.
    seq: of the slot, after.
    evicted: object whose slot a new one took, -1 for none.
  """

  outcome: jax.Array
  slot: jax.Array
  oid: jax.Array
  version: jax.Array
  old_version: jax.Array
  seq: jax.Array
  evicted: jax.Array


def specs(rules, rows, dtype):
  """Returns the `Bank` of `Spec` for so many rows.

  Args:
    rules: `statejax.config.SlotRules`, here and below.
    rows: B.
    dtype: of values.
  """
  r, m, versions = rules, rules.slots, rules.ring + 1
  ints = {name: st.Spec((rows, m), 'int32') for name in (
      'oid', 'version', 'seq', 't_write', 't_first', 't_read', 'reads', 'owner',
      'expires')}
  return Bank(
      key=st.Spec((rows, m, r.key), 'float32'),
      value=st.Spec((rows, m, versions, r.value), dtype),
      span=st.Spec((rows, m, versions, r.span), 'int32'),
      key_span=st.Spec((rows, m, r.key_span), 'int32'),
      source=st.Spec((rows, m, 2), 'int32'),
      status=st.Spec((rows, m), 'int8'), lock=st.Spec((rows, m), 'int8'),
      salience=st.Spec((rows, m), 'float32'),
      alias_key=st.Spec((rows, r.aliases, r.key), 'float32'),
      alias_oid=st.Spec((rows, r.aliases), 'int32'),
      next_oid=st.Spec((rows,), 'int32'), **ints)


def empty(rules, rows, dtype='float32'):
  """Returns an empty bank.

  >>> from statejax.config import SlotRules
  >>> empty(SlotRules(slots=4), rows=2).status.shape
  (2, 4)
  """
  return st.allocate(st.describe(specs(rules, rows, dtype)))


def events(rules, op, **fields):
  """Returns `Events`, with what is not given as it is for an unused place.

  Args:
    rules: of the bank.
    op: [B, E] integers.
    **fields: of `Events`, in its shapes; keys need not have unit length.

  Raises:
    ValueError: an unknown field, or a shape that is not that of `Events`.
  """
  op = jnp.asarray(op, jnp.int32)
  if op.ndim != 2:
    raise ValueError(f'events: expected op of shape [B, E], got {op.shape}.')
  shapes = {
      'key': (*op.shape, rules.key), 'name': (*op.shape, rules.key),
      'value': (*op.shape, rules.value),
      'span': (*op.shape, rules.span), 'key_span': (*op.shape, rules.key_span),
      'source': (*op.shape, 2)}
  floats, zero = ('key', 'name', 'value', 'salience'), ('steps',)
  out = {'op': op}
  for field in dataclasses.fields(Events)[1:]:
    name, shape = field.name, shapes.get(field.name, op.shape)
    dtype = (jnp.float32 if name in floats else
             bool if name == 'host' else jnp.int32)
    fill = 0 if name in (*floats, *zero, 'host') else -1
    given = fields.pop(name, None)
    if given is None:
      out[name] = jnp.full(shape, fill, dtype)
      continue
    # A value is narrowed by the bank that takes it, not here.
    given = jnp.asarray(given, None if name == 'value' else dtype)
    if given.shape != shape:
      raise ValueError(f'events: {name}: expected {shape}, got {given.shape}.')
    out[name] = given
  if fields:
    raise ValueError(f'events: unknown fields {sorted(fields)}.')
  return Events(**out | {n: unit(out[n]) for n in ('key', 'name')})


def unit(x):
  """Vectors of length 1, or 0, whose gradient at 0 is finite."""
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  zero = square == 0
  return jnp.where(zero, 0., x * jax.lax.rsqrt(jnp.where(zero, 1., square)))


def same_span(a, b):
  """Whether two spans are the same tokens, over the last axis."""
  return jnp.all(a == b, axis=-1)
