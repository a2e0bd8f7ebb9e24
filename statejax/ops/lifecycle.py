"""The lifecycle of slots: which event changes which slot, and how.

The events of a row are a scan that carries integers and copies of keys; a value
is then gathered from the event that wrote it last. So the bank after many
segments of events is the same bits whether they are committed one by one or
together, and the gradient of a value goes straight to the event it came from.
No associative scan does that, even where addresses are known, as what n events
do together has no summary of bounded size. n times LOCK, of n keys that share
an address, ask whether what is there is one of them; and where a slot is given
by its number, n times WRITE and ROLLBACK ask of each of n values whether it is
what the slot held, since what is written again is no new version.

| event | when | effect |
|---|---|---|
| WRITE | open and LIVE | ring shifts, value replaced, version + 1 |
| WRITE | the same tokens again | its time and salience only |
| WRITE | open TOMBSTONE | LIVE, version + 1, ring empty |
| WRITE | no such object, and a free or evictable slot | object with version 1 |
| WRITE | a host's, whose key tokens are not the object's | none: conflict |
| LOCK, UNLOCK | open and LIVE; locked by a stream | |
| DELETE | open and LIVE | values and tokens gone, key stays, version + 1 |
| ROLLBACK n | open and LIVE, n values in the ring | like writing that value |
| ALIAS | LIVE, name unused | another name |
| EXPIRE | open or host, LIVE | hidden from a position on |
| QUARANTINE, RESTORE | open or host | out of reads and writes, and back |
| PURGE, HOST_LOCK, HOST_UNLOCK | host | slot empty; lock |
| REKEY | host, and the key is no other object's | new key |

An event may wait for the end of its segment while a host edits the object that
it is about: `overruled` says which then wait in vain.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from statejax.ops import slots as sl

_MOST = jnp.iinfo(jnp.int32).max
_TURNS, _LOCKS = (sl.WRITE, sl.DELETE), (sl.LOCK, sl.UNLOCK)
# What would undo an edit, if it came after it.
_UNDONE_BY = {
    sl.WRITE: _TURNS, sl.DELETE: _TURNS, sl.ROLLBACK: _TURNS, sl.EXPIRE: _TURNS,
    sl.LOCK: _LOCKS, sl.UNLOCK: _LOCKS, sl.HOST_LOCK: _LOCKS,
    sl.HOST_UNLOCK: _LOCKS, sl.PURGE: range(1, len(sl.OPS)),
    sl.REKEY: range(1, len(sl.OPS))}
# A slot in the scan: the fields of a bank that a slot has, without values.
SLOT = tuple(f.name for f in dataclasses.fields(sl.Bank)
             if f.metadata['axes'][:2] == ('batch', 'slots')
             and f.name != 'value')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Row:
  """One row's bank in the scan, and where its floats come from.

  Attributes:
    slot: field -> [M, ...]. Beside those of a bank `value_at`, which content
      each version is: of the bank before, in order, then of the events, -1 for
      none; and `key_at`, the same of keys.
    alias: `key`, `oid` and `at`, [A, ...].
    next_oid: int32.
  """

  slot: dict
  alias: dict
  next_oid: jax.Array


def commit(rules, bank, events, now):
  """Applies the events of each row in order, each wholly or not at all.

  Slots that have expired become empty first.

  Args:
    rules: `statejax.config.SlotRules`, static.
    bank: `slots.Bank` of B rows.
    events: `slots.Events` [B, E].
    now: tokens absorbed by each row, [B] int32.

  Returns:
    The bank after, and `slots.Receipts` [B, E].
  """
  one = jax.tree.map(lambda x: x[:, None], events)
  last, _, receipts, _ = segments(rules, bank, one, now[:, None])
  return last, jax.tree.map(lambda x: x[:, 0], receipts)


def segments(rules, bank, events, now, turn=None, inputs=(), fresh=None):
  """`commit` of S segments, one after the other.

  Args:
    rules: `statejax.config.SlotRules`, static.
    bank: `slots.Bank` of B rows.
    events: `slots.Events` with a segment axis, [B, S, E].
    now: tokens absorbed at the end of each segment, [B, S] int32.
    turn: what comes before the events of a segment, or None: a function of one
      row's slots {field: [M, ...]}, its aliases and its part of `inputs`, that
      returns fields to replace and anything else.
    inputs: pytree of [B, S, ...].
    fresh: whether a document begins between the turn and the events of a
      segment, which then find an empty bank, [B, S] bool; None is never.

  Returns:
    The bank after all; the bank before each segment, with an axis S behind that
    of the rows; `slots.Receipts` [B, S, E]; what `turn` returned, [B, S, ...].
  """
  steer = (*parts(bank), bank.next_oid, dataclasses.replace(events, value=None))
  run = functools.partial(_segments, rules, turn or (lambda *_: ({}, ())))
  fresh = jnp.zeros(now.shape, bool) if fresh is None else fresh
  last, before, receipts, found = jax.vmap(run)(
      *jax.lax.stop_gradient(steer), now, jax.lax.stop_gradient(inputs), fresh)
  return (_fill(bank, events, last), _fill(bank, events, before), receipts,
          found)


def meant(rules, bank, events):
  """The slots that events [B, N] are about, [B, N] int32; -1 for none."""
  slot, alias = jax.lax.stop_gradient(parts(bank))
  def one(slot, alias, next_oid, event):
    return jnp.where(event.op == sl.NULL, -1,
                     _find(rules, _Row(slot, alias, next_oid), event))
  of_row = jax.vmap(one, in_axes=(None, None, None, 0))
  return jax.vmap(of_row)(slot, alias, bank.next_oid,
                          dataclasses.replace(events, value=None))


def overruled(rules, before, after, edits, receipts, waiting):
  """Which events are not to come after edits of their objects.

  Args:
    rules: `statejax.config.SlotRules`, static.
    before, after: `slots.Bank` of B rows around the edits.
    edits: `slots.Events` [B, E], and
    receipts: what became of them.
    waiting: `slots.Events` [B, N], decided before.

  Returns:
    [B, N] bool: those that would undo what was changed of the object that they
    mean. Any other waits on; a lock said before a value was written locks it.
  """
  table = jnp.array([[op in _UNDONE_BY.get(edit, ()) for op in range(
      len(sl.OPS))] for edit in range(len(sl.OPS))])
  changed = (receipts.outcome == sl.COMMITTED) | (
      receipts.outcome == sl.REFRESHED)
  edited = jnp.where(changed, receipts.oid, -1)[..., None]
  hits = jnp.zeros(edited.shape[:2] + waiting.op.shape[1:], bool)
  for bank in (before, after):
    at = meant(rules, bank, waiting)
    oid = jnp.take_along_axis(bank.oid, jnp.maximum(at, 0), axis=1)
    oid = jnp.where(at < 0, -2, oid)[:, None]
    hits |= oid == edited
  hits &= table[edits.op[..., None], waiting.op[:, None]]
  return jnp.any(hits, axis=1)


def parts(bank):
  """What a bank has of each slot, but for its values, and of each alias."""
  slot = {name: getattr(bank, name) for name in SLOT}
  return slot, {'key': bank.alias_key, 'oid': bank.alias_oid}


def _segments(rules, turn, slot, alias, next_oid, events, now, inputs, fresh):
  """One row: events [S, E]."""
  row = _Row(
      slot | {'value_at': _count(slot['span'].shape[:2]),
              'key_at': _count(slot['oid'].shape)},
      alias | {'at': _count(alias['oid'].shape)}, next_oid)

  def segment(row, xs):
    events, number, now, inputs, fresh = xs
    read, found = turn(row.slot, row.alias, inputs)
    after = dataclasses.replace(row, slot=row.slot | read)
    after = _expire(_begin(after, fresh), now)
    after, receipts = jax.lax.scan(
        functools.partial(_event, rules), after, (events, number))
    return after, (row, receipts, found)

  last, (before, receipts, found) = jax.lax.scan(
      segment, row, (events, _count(events.op.shape), now, inputs, fresh))
  return last, before, receipts, found


def _count(shape):
  """0, 1, 2, ... in a shape."""
  return jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)


def _fill(bank, events, row):
  """The bank of a `_Row` with leaves [B, ...] or [B, S, ...]."""
  flat = lambda x: x.reshape(x.shape[0], -1, x.shape[-1])
  value = _pick(flat(bank.value), flat(events.value).astype(bank.value.dtype),
                row.slot['value_at'])
  key = _pick(bank.key, flat(events.key), row.slot['key_at'])
  alias = _pick(bank.alias_key, flat(events.name), row.alias['at'])
  integers = {n: x for n, x in row.slot.items()
              if n not in ('key', 'value_at', 'key_at')}
  return sl.Bank(value=value, key=key, alias_key=alias,
                 alias_oid=row.alias['oid'], next_oid=row.next_oid, **integers)


def _pick(old, new, at):
  """Rows `at` [B, ...] of old and new together, [B, N, D]; zeros at -1."""
  flat = at.reshape(at.shape[0], -1, 1)
  found = jnp.take_along_axis(
      jnp.concatenate([old, new], axis=1), jnp.maximum(flat, 0), axis=1)
  found = jnp.where(flat < 0, jnp.zeros((), found.dtype), found)
  return found.reshape(*at.shape, found.shape[-1])


# One row from here on.

_FILL = {f.name: f.metadata['fill'] for f in dataclasses.fields(sl.Bank)} | {
    'value_at': -1, 'key_at': -1}


def _where(mask, new, old):
  """New where a mask [M] holds; `new` may be of one slot."""
  def one(new, old):
    new = jnp.asarray(new, old.dtype)
    if 0 < new.ndim < old.ndim:
      new = new[None]
    return jnp.where(mask.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
  return {name: one(new[name], old[name]) for name in old}


_NO_NAME = {'key': 0, 'oid': -1, 'at': -1}


def _begin(row, fresh):
  """An empty row where a document begins."""
  return _Row(_where(fresh[None], _FILL, row.slot),
              _where(fresh[None], _NO_NAME, row.alias),
              jnp.where(fresh, 0, row.next_oid))


def _expire(row, now):
  """Empties slots whose time has come."""
  s = row.slot
  return _clear(row, (s['status'] != sl.EMPTY) & (s['expires'] >= 0)
                & (now >= s['expires']))


def _clear(row, gone):
  """Empties slots, [M] bool, but for the number of their commits."""
  lost = row.slot['oid'][None] == row.alias['oid'][:, None]
  lost = jnp.any(lost & gone[None], axis=1)
  slot = _where(gone, _FILL | {'seq': row.slot['seq'] + 1}, row.slot)
  alias = _where(lost & (row.alias['oid'] >= 0), _NO_NAME, row.alias)
  return _Row(slot, alias, row.next_oid)


def cosines(keys, key):
  """Cosines of unit vectors, summed in one order whatever the batch."""
  return jnp.sum(keys * key[None], axis=-1)


def targets(slot, alias):
  """The slot of each alias, [A]; -1 for a name whose object is gone."""
  same = slot['oid'][None] == alias['oid'][:, None]
  same &= (slot['status'] != sl.EMPTY)[None] & (alias['oid'] >= 0)[:, None]
  at = jnp.argmax(same, axis=1).astype(jnp.int32)
  return jnp.where(jnp.any(same, axis=1), at, -1)


def hash_tokens(tokens):
  """A number for the tokens of a key, [..., L] int32 -> [...] int32."""
  h = jnp.zeros(tokens.shape[:-1], jnp.uint32)
  for i in range(tokens.shape[-1]):
    h = (h ^ (tokens[..., i].astype(jnp.uint32) + 1)) * jnp.uint32(0x9E3779B1)
    h = h ^ (h >> 15)
  return (h >> 1).astype(jnp.int32)


def _best(score, candidates, threshold):
  """The first of the highest scores above a threshold, -1 for none, and it."""
  score = jnp.where(candidates, score, -jnp.inf)
  at = jnp.argmax(score).astype(jnp.int32)
  hit = score[at] > threshold
  return jnp.where(hit, at, -1), jnp.where(hit, score[at], -jnp.inf)


def _reach(rules, event):
  """The slots that the address of an event allows, [M] bool."""
  m = jnp.arange(rules.slots, dtype=jnp.int32)
  if rules.mode == 'router':
    return m == event.slot
  if rules.mode == 'hashed':
    sets = rules.slots // rules.ways
    return m // rules.ways == hash_tokens(event.key_span) % sets
  return m >= 0


def _by_key(rules, row, event, key):
  """The slot of a key, -1 for none, and how near it is."""
  mine = _owned(row, event)
  if rules.mode == 'hashed':
    same = sl.same_span(row.slot['key_span'], event.key_span[None])
    return _best(same * 2., mine & _reach(rules, event), 1.)
  return _best(cosines(row.slot['key'], key), mine, rules.threshold)


def _by_alias(rules, row, event, key):
  """The same of the slot that has the key for another name."""
  target = targets(row.slot, row.alias)
  at, score = _best(cosines(row.alias['key'], key),
                    (target >= 0) & _owned(row, event)[target], rules.threshold)
  return jnp.where(at >= 0, target[at], -1), score


def _owned(row, event):
  return (row.slot['status'] != sl.EMPTY) & (
      row.slot['owner'] == event.principal)


def _find(rules, row, event):
  """The slot that an event means, by its number or its key; -1 for none."""
  number = jnp.clip(event.slot, 0, rules.slots - 1)
  direct = (event.slot == number) & _owned(row, event)[number]
  direct = jnp.where(direct, number, -1)
  if rules.mode == 'router':
    return direct
  return jnp.where(event.slot >= 0, direct, _called(rules, row, event))


def _called(rules, row, event):
  """The slot that the key of an event finds, -1 for none."""
  at, score = _by_key(rules, row, event, event.key)
  other, better = _by_alias(rules, row, event, event.key)
  return jnp.where(better > score, other, at)


def _otherwise(rules, row, event, old, at):
  """Whether the key of an event is not that of the slot `at`: of a host's WRITE
  its tokens, of a REKEY the new one, which is another slot's."""
  if rules.mode == 'router':
    return jnp.bool_(False), jnp.bool_(False)
  said = (event.source[0] < 0) & (event.key_span[0] >= 0)
  said &= (old['key_span'][0] >= 0) & ~sl.same_span(
      old['key_span'], event.key_span)
  said &= _by_alias(rules, row, event, event.key)[0] != at
  found = _called(rules, row, event)
  taken = (found >= 0) & (found != at)
  if rules.mode == 'hashed':
    taken |= ~_reach(rules, event)[jnp.maximum(at, 0)]
  return said, taken


def _free_name(rules, row, event):
  """Whether the name of an ALIAS means nothing yet."""
  free = _by_alias(rules, row, event, event.name)[0] < 0
  if rules.mode == 'content':
    free &= _by_key(rules, row, event, event.name)[0] < 0
  return free


def _room(rules, row, event):
  """The slot that a new object takes, or -1."""
  slot = row.slot
  status, mine = slot['status'], slot['owner'] == event.principal
  mine &= slot['lock'] == sl.OPEN
  rank = jnp.where(mine & (status == sl.TOMBSTONE), 1, 3)
  if rules.policy != 'reject':
    rank = jnp.where(mine & (status == sl.LIVE), 2, rank)
  rank = jnp.where(status == sl.EMPTY, 0, rank)
  rank = jnp.where(_reach(rules, event), rank, 3)
  least = jnp.min(rank)
  if rules.policy == 'low_salience':
    score, most = slot['salience'], jnp.float32(jnp.inf)
  else:
    score, most = slot['t_write'], jnp.int32(_MOST)
  if rules.policy == 'lru':
    score = jnp.maximum(score, slot['t_read'])
  among = rank == least
  among &= score == jnp.min(jnp.where(among, score, most))
  # Who writes many at one position has written the first of them first.
  at = jnp.argmin(jnp.where(among, slot['oid'], _MOST)).astype(jnp.int32)
  return jnp.where(least < 3, at, -1)


def _event(rules, row, inputs):
  """Applies one event to one row."""
  event, number = inputs
  op = event.op
  found = _find(rules, row, event)
  new = (op == sl.WRITE) & (found < 0)
  # A number names a slot that is there; only a router names one to take.
  if rules.mode != 'router':
    new &= event.slot < 0
  at = jnp.where(new, _room(rules, row, event), found)
  place = jnp.maximum(at, 0)
  old = {name: x[place] for name, x in row.slot.items()}
  target = targets(row.slot, row.alias)
  said, taken = _otherwise(rules, row, event, old, at)
  name_free = jnp.where(op == sl.REKEY, ~taken, _free_name(rules, row, event))
  why = _outcome(row, event, old, at, new, said, name_free, jnp.any(target < 0),
                 rules.mode == 'hashed')
  go = (why == sl.COMMITTED) | (why == sl.REFRESHED)
  mask = go & (jnp.arange(rules.slots, dtype=jnp.int32) == place)
  after = _changed(rules, row, event, number, old, new, why == sl.REFRESHED)
  alias = op == sl.ALIAS
  slot = _where(mask & ~alias & (op != sl.PURGE), after, row.slot)
  named = go & alias & (
      jnp.arange(target.size, dtype=jnp.int32) == jnp.argmax(target < 0))
  names = _where(named, {'key': event.name, 'oid': old['oid'],
                         'at': target.size + number}, row.alias)
  out = _clear(_Row(slot, names, row.next_oid + (go & new)),
               mask & (op == sl.PURGE))
  there, was = at >= 0, found >= 0
  show = lambda name, there: jnp.where(there, out.slot[name][place], 0)
  return out, sl.Receipts(
      outcome=why, slot=at,
      oid=jnp.where(was, old['oid'], jnp.where(go, row.next_oid, -1)),
      version=show('version', there & (was | go)),
      old_version=jnp.where(was, old['version'], 0), seq=show('seq', there),
      evicted=jnp.where(go & new & (old['status'] != sl.EMPTY), old['oid'], -1))


def _outcome(row, event, old, at, new, said, name_free, alias_room, hashed):
  """Why an event changes nothing, or that it does."""
  op, status, lock = event.op, old['status'], old['lock']
  op_is = lambda *ops: functools.reduce(jnp.logical_or, [op == o for o in ops])
  live, is_open = status == sl.LIVE, lock == sl.OPEN
  fill = jnp.sum(old['span'][1:, 0] >= 0)
  bad_key = ~jnp.any(event.key != 0) | ~jnp.all(jnp.isfinite(event.key))
  # All that has no name would be one object.
  nameless = (event.key_span[0] < 0) if hashed else False
  bad_name = ~jnp.any(event.name != 0) | ~jnp.all(jnp.isfinite(event.name))
  worn = (new & (row.next_oid == _MOST)) | (old['seq'] == _MOST) | (
      old['version'] == _MOST)
  empty = (event.span[0] < 0) | ~jnp.isfinite(event.salience)
  written = op_is(sl.WRITE)
  same = written & live & ~new & sl.same_span(old['span'][0], event.span)
  needs_live = op_is(sl.LOCK, sl.DELETE, sl.ROLLBACK, sl.ALIAS, sl.EXPIRE,
                     sl.QUARANTINE)
  needs_open = op_is(sl.WRITE, sl.DELETE, sl.ROLLBACK, sl.LOCK) & ~new
  needs_open |= op_is(sl.EXPIRE, sl.QUARANTINE, sl.RESTORE) & ~event.host
  missing = jnp.where(new, sl.FULL, sl.MISSING)
  checks = (
      (op == sl.NULL, sl.UNUSED),
      ((op < 0) | (op > sl.HOST_UNLOCK), sl.INVALID),
      ((op >= sl.PURGE) & ~event.host, sl.FORBIDDEN),
      (written & (empty | nameless) | new & bad_key
       | op_is(sl.REKEY) & (bad_key | nameless)
       | op_is(sl.ALIAS) & bad_name, sl.INVALID),
      (new & (event.expect > 0), sl.MISSING),
      (at < 0, missing),
      (~new & (event.expect >= 0) & (event.expect != old['version']),
       sl.CONFLICT),
      (needs_open & ~is_open, sl.LOCKED),
      (written & ~new & said, sl.CONFLICT),
      (op_is(sl.UNLOCK) & (lock == sl.HOST), sl.LOCKED),
      (needs_live & ~live, sl.INVALID),
      (written & ~new & ~live & (status != sl.TOMBSTONE), sl.INVALID),
      (op_is(sl.UNLOCK, sl.HOST_UNLOCK) & is_open, sl.INVALID),
      (op_is(sl.ROLLBACK) & ((event.steps < 1) | (event.steps > fill)),
       sl.INVALID),
      (op_is(sl.ALIAS, sl.REKEY) & ~name_free, sl.INVALID),
      (op_is(sl.ALIAS) & ~alias_room, sl.FULL),
      (op_is(sl.RESTORE) & (status != sl.QUARANTINED), sl.INVALID),
      (op_is(sl.HOST_LOCK) & (lock == sl.HOST), sl.INVALID),
      (worn, sl.FULL),
      (same, sl.REFRESHED))
  return jnp.select([c for c, _ in checks], [
      jnp.int32(why) for _, why in checks], jnp.int32(sl.COMMITTED))


def _changed(rules, row, event, number, old, new, refresh):
  """The slot that an event leaves behind, {field: [...]}."""
  op = event.op
  write = (op == sl.WRITE) & ~refresh
  delete, back = op == sl.DELETE, op == sl.ROLLBACK
  turned = write | delete | back
  keep = back | (write & ~new & (old['status'] == sl.LIVE))
  steps = jnp.clip(event.steps, 0, rules.ring)

  def versions(held, first):
    """The ring: the new one in front, or nothing at all."""
    first = jnp.where(back, held[steps], first)
    ring = jnp.where(keep, held[:-1], -1)
    shifted = jnp.concatenate([first[None], ring])
    return jnp.where(turned, jnp.where(delete, -1, shifted), held)

  content = rules.slots * (rules.ring + 1) + number
  rekeyed = new | (op == sl.REKEY)
  if rules.mode == 'router':
    # The slot is the object there, and its key part of what is written.
    rekeyed |= write
  touched = turned | refresh
  status = jnp.select(
      [write | (op == sl.RESTORE), delete, op == sl.QUARANTINE],
      [sl.LIVE, sl.TOMBSTONE, sl.QUARANTINED], old['status'])
  lock = jnp.select(
      [op == sl.LOCK, op == sl.HOST_LOCK,
       new | (op == sl.UNLOCK) | (op == sl.HOST_UNLOCK)],
      [sl.STREAM, sl.HOST, sl.OPEN], old['lock'])
  return {
      'value_at': versions(old['value_at'], content),
      'span': versions(old['span'], event.span),
      'key': jnp.where(rekeyed, event.key, old['key']),
      'key_at': jnp.where(rekeyed, rules.slots + number, old['key_at']),
      'key_span': jnp.where(rekeyed, event.key_span, old['key_span']),
      'source': jnp.where(turned, jnp.where(delete, -1, event.source),
                          old['source']),
      'status': status, 'lock': lock,
      'oid': jnp.where(new, row.next_oid, old['oid']),
      'version': jnp.where(new, 1, old['version'] + turned),
      'seq': old['seq'] + ~refresh,
      't_write': jnp.where(touched, event.time, old['t_write']),
      't_first': jnp.where(new, -1, old['t_first']),
      't_read': jnp.where(new, -1, old['t_read']),
      'reads': jnp.where(new, 0, old['reads']),
      'owner': jnp.where(new, event.principal, old['owner']),
      'expires': jnp.where(write | (op == sl.EXPIRE), event.expires,
                           jnp.where(delete, -1, old['expires'])),
      'salience': jnp.where(write | refresh, event.salience,
                            jnp.where(delete, 0., old['salience']))}
