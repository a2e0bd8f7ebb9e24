"""The lifecycle in plain Python: one row, one event at a time."""

import numpy as np

from statejax.ops import lifecycle
from statejax.ops import slots as sl

MOST = 2 ** 31 - 1


class Slot:
  """Content is a list of (value, span), newest first."""

  def __init__(self, seq=0):
    self.status, self.lock, self.oid, self.version, self.seq = 0, 0, -1, 0, seq
    self.key, self.key_span, self.source = None, None, (-1, -1)
    self.content = []
    self.t_write = self.t_first = self.t_read = self.owner = self.expires = -1
    self.reads, self.salience = 0, 0.0


class Row:
  """A bank of one row.

  Args:
    rules: `SlotRules`.
  """

  def __init__(self, rules):
    self.rules, self.next_oid = rules, 0
    self.slots = [Slot() for _ in range(rules.slots)]
    self.aliases = [None] * rules.aliases

  def commit(self, events, now):
    """Applies dicts of one event each; returns outcomes by name."""
    for i, s in enumerate(self.slots):
      if s.status != sl.EMPTY and 0 <= s.expires <= now:
        self._empty(i)
    return [sl.OUTCOMES[self._one(e)] for e in events]

  def _empty(self, i):
    oid = self.slots[i].oid
    self.slots[i] = Slot(self.slots[i].seq + 1)
    self.aliases = [None if a and a[1] == oid else a for a in self.aliases]

  def _mine(self, e):
    return [i for i, s in enumerate(self.slots)
            if s.status != sl.EMPTY and s.owner == e['principal']]

  def _set(self, e):
    r = self.rules
    if r.mode == 'router':
      return [e['slot']] if 0 <= e['slot'] < r.slots else []
    if r.mode == 'hashed':
      which = int(lifecycle.hash_tokens(e['key_span'])) % (r.slots // r.ways)
      return list(range(which * r.ways, which * r.ways + r.ways))
    return list(range(r.slots))

  def _cosines(self, e, key):
    """(cosine, slot) of all that has a key, by key."""
    return [(float(self.slots[i].key @ key), i) for i in self._mine(e)]

  def _aliases(self, e, key):
    oids = {self.slots[i].oid: i for i in self._mine(e)}
    return [(float(a[0] @ key), oids[a[1]]) for a in self.aliases
            if a and a[1] in oids]

  def _best(self, found):
    found = [f for f in found if f[0] > self.rules.threshold]
    return max(found, key=lambda f: f[0], default=(-np.inf, -1))

  def _find(self, e):
    if e['slot'] >= 0 or self.rules.mode == 'router':
      return e['slot'] if e['slot'] in self._mine(e) else -1
    return self._called(e)

  def _called(self, e):
    if self.rules.mode == 'hashed':
      same = [i for i in self._mine(e) if i in self._set(e)
              and (self.slots[i].key_span == e['key_span']).all()]
      key = (2., same[0]) if same else (-np.inf, -1)
    else:
      key = self._best(self._cosines(e, e['key']))
    alias = self._best(self._aliases(e, e['key']))
    return alias[1] if alias[0] > key[0] else key[1]

  def _room(self, e):
    def rank(i):
      s = self.slots[i]
      if s.status == sl.EMPTY:
        return 0
      if s.owner != e['principal'] or s.lock:
        return None
      if s.status == sl.TOMBSTONE:
        return 1
      live = s.status == sl.LIVE and self.rules.policy != 'reject'
      return 2 if live else None
    def score(i):
      s = self.slots[i]
      return {'lru': max(s.t_write, s.t_read), 'oldest': s.t_write,
              'reject': s.t_write, 'low_salience': s.salience}[
                  self.rules.policy]
    able = [(rank(i), score(i), self.slots[i].oid, i)
            for i in self._set(e) if rank(i) is not None]
    return min(able, default=(-1,))[-1]

  def _one(self, e):
    op, r = e['op'], self.rules
    if op == sl.NULL:
      return sl.UNUSED
    if not 0 < op <= sl.HOST_UNLOCK:
      return sl.INVALID
    if op >= sl.PURGE and not e['host']:
      return sl.FORBIDDEN
    if op == sl.WRITE and e['span'][0] < 0:
      return sl.INVALID
    if r.mode == 'hashed' and op in (sl.WRITE, sl.REKEY) and (
        e['key_span'][0] < 0):
      return sl.INVALID
    at = self._find(e)
    if op == sl.WRITE and at < 0 and (e['slot'] < 0 or r.mode == 'router'):
      return self._create(e)
    if op == sl.REKEY and not e['key'].any():
      return sl.INVALID
    if op == sl.ALIAS and not e['name'].any():
      return sl.INVALID
    if at < 0:
      return sl.MISSING
    s = self.slots[at]
    if e['expect'] >= 0 and e['expect'] != s.version:
      return sl.CONFLICT
    return getattr(self, sl.OPS[op])(e, s, at)

  def _create(self, e):
    if not e['key'].any():
      return sl.INVALID
    if e['expect'] > 0:
      return sl.MISSING
    at = self._room(e)
    if at < 0:
      return sl.FULL
    s = self.slots[at] = Slot(self.slots[at].seq + 1)
    s.status, s.oid, s.version = sl.LIVE, self.next_oid, 1
    s.owner, s.key, s.key_span = e['principal'], e['key'], e['key_span']
    self.next_oid += 1
    self._fill(s, e, [])
    return sl.COMMITTED

  def _fill(self, s, e, ring):
    s.content = [(e['value'], e['span']), *ring][:self.rules.ring + 1]
    s.t_write, s.source = e['time'], tuple(e['source'])
    s.salience, s.expires = e['salience'], e['expires']

  def write(self, e, s, at):
    if s.lock:
      return sl.LOCKED
    if self._otherwise(e, s, at):
      return sl.CONFLICT
    if s.status == sl.QUARANTINED:
      return sl.INVALID
    if s.status == sl.LIVE and (s.content[0][1] == e['span']).all():
      s.t_write, s.salience = e['time'], e['salience']
      return sl.REFRESHED
    self._fill(s, e, s.content if s.status == sl.LIVE else [])
    if self.rules.mode == 'router':
      s.key, s.key_span = e['key'], e['key_span']
    s.status, s.version, s.seq = sl.LIVE, s.version + 1, s.seq + 1
    return sl.COMMITTED

  def _otherwise(self, e, s, at):
    """Whether a host calls a slot by other tokens than its own."""
    if self.rules.mode == 'router' or e['source'][0] >= 0:
      return False
    if e['key_span'][0] < 0 or s.key_span[0] < 0:
      return False
    if (e['key_span'] == s.key_span).all():
      return False
    return self._best(self._aliases(e, e['key']))[1] != at

  def lock(self, e, s, at):
    if s.lock:
      return sl.LOCKED
    if s.status != sl.LIVE:
      return sl.INVALID
    s.lock, s.seq = sl.STREAM, s.seq + 1
    return sl.COMMITTED

  def unlock(self, e, s, at):
    if s.lock != sl.STREAM:
      return sl.LOCKED if s.lock == sl.HOST else sl.INVALID
    s.lock, s.seq = sl.OPEN, s.seq + 1
    return sl.COMMITTED

  def delete(self, e, s, at):
    if s.lock:
      return sl.LOCKED
    if s.status != sl.LIVE:
      return sl.INVALID
    s.content, s.source, s.salience, s.expires = [], (-1, -1), 0., -1
    s.status, s.t_write = sl.TOMBSTONE, e['time']
    s.version, s.seq = s.version + 1, s.seq + 1
    return sl.COMMITTED

  def rollback(self, e, s, at):
    if s.lock:
      return sl.LOCKED
    if s.status != sl.LIVE or not 1 <= e['steps'] < len(s.content):
      return sl.INVALID
    s.content = [s.content[e['steps']], *s.content][:self.rules.ring + 1]
    s.t_write, s.source = e['time'], tuple(e['source'])
    s.version, s.seq = s.version + 1, s.seq + 1
    return sl.COMMITTED

  def alias(self, e, s, at):
    if s.status != sl.LIVE or self._best(self._aliases(e, e['name']))[1] >= 0:
      return sl.INVALID
    if self.rules.mode == 'content' and (
        self._best(self._cosines(e, e['name']))[1] >= 0):
      return sl.INVALID
    alive = {x.oid for x in self.slots if x.status != sl.EMPTY}
    free = [i for i, a in enumerate(self.aliases) if not a or a[1] not in alive]
    if not free:
      return sl.FULL
    self.aliases[free[0]] = (e['name'], s.oid)
    return sl.COMMITTED

  def expire(self, e, s, at):
    if s.lock and not e['host']:
      return sl.LOCKED
    if s.status != sl.LIVE:
      return sl.INVALID
    s.expires, s.seq = e['expires'], s.seq + 1
    return sl.COMMITTED

  def quarantine(self, e, s, at):
    if s.lock and not e['host']:
      return sl.LOCKED
    if s.status != sl.LIVE:
      return sl.INVALID
    s.status, s.seq = sl.QUARANTINED, s.seq + 1
    return sl.COMMITTED

  def restore(self, e, s, at):
    if s.lock and not e['host']:
      return sl.LOCKED
    if s.status != sl.QUARANTINED:
      return sl.INVALID
    s.status, s.seq = sl.LIVE, s.seq + 1
    return sl.COMMITTED

  def purge(self, e, s, at):
    self._empty(at)
    return sl.COMMITTED

  def rekey(self, e, s, at):
    if self.rules.mode == 'hashed' and at not in self._set(e):
      return sl.INVALID
    if self.rules.mode != 'router' and self._called(e) not in (-1, at):
      return sl.INVALID
    s.key, s.key_span, s.seq = e['key'], e['key_span'], s.seq + 1
    return sl.COMMITTED

  def host_lock(self, e, s, at):
    if s.lock == sl.HOST:
      return sl.INVALID
    s.lock, s.seq = sl.HOST, s.seq + 1
    return sl.COMMITTED

  def host_unlock(self, e, s, at):
    if s.lock == sl.OPEN:
      return sl.INVALID
    s.lock, s.seq = sl.OPEN, s.seq + 1
    return sl.COMMITTED

  def arrays(self):
    """The bank's leaves of this row, as numpy, values [M, R + 1, V]."""
    r = self.rules
    out = {
        'key': np.zeros((r.slots, r.key), np.float32),
        'value': np.zeros((r.slots, r.ring + 1, r.value), np.float32),
        'span': np.full((r.slots, r.ring + 1, r.span), -1),
        'key_span': np.full((r.slots, r.key_span), -1)}
    for name in ('status', 'lock', 'oid', 'version', 'seq', 't_write',
                 't_first', 't_read', 'reads', 'owner', 'expires'):
      out[name] = np.array([getattr(s, name) for s in self.slots])
    out['source'] = np.array([s.source for s in self.slots])
    out['salience'] = np.array([s.salience for s in self.slots], np.float32)
    for i, s in enumerate(self.slots):
      if s.key is not None:
        out['key'][i], out['key_span'][i] = s.key, s.key_span
      for v, (value, span) in enumerate(s.content):
        out['value'][i, v], out['span'][i, v] = value, span
    out['alias_key'] = np.stack([
        a[0] if a else np.zeros(r.key, np.float32) for a in self.aliases])
    out['alias_oid'] = np.array([a[1] if a else -1 for a in self.aliases])
    out['next_oid'] = np.array(self.next_oid)
    return out
