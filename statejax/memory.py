"""Edits of a model's memory from outside: list, read, write, protect, forget.

    memory = Memory(model, journal=Journal('edits'))
    state, receipt = memory.write(params, state, statement, key=k, value=v)
    state, receipt = memory.delete(state, receipt.slot, expect=receipt.version)

Every edit is a function of a state that returns a new one and a `Receipt`; the
old state stays what it was. An edit is an event of `statejax.ops.lifecycle`,
exactly as the model's own are: it replaces one slot of one row or changes no
bit. What has changed something enters the row's witness, so that an edited
state is not taken for one that has only read its tokens. No content enters it:
without a journal, edits that differ in content only leave the same witness.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statejax import model as lm
from statejax import state as st
from statejax.artifact import digest
from statejax.artifact.journal import Journal
from statejax.layers import slots as layer
from statejax.ops import lifecycle, witness
from statejax.ops import slots as sl

STATUS = ('empty', 'live', 'tombstone', 'quarantined')
LOCKS = ('open', 'stream', 'host')
# Integers of a slot, as they stand in the bank.
_FACTS = ('status', 'lock', 'oid', 'version', 'seq', 't_write', 't_first',
          't_read', 'reads', 'owner', 'expires')


@dataclasses.dataclass(frozen=True)
class Slot:
  """What a slot holds; positions and ids are -1 for none.

  Attributes:
    slot: its number.
    status: 'live', 'tombstone', 'quarantined' or 'empty'.
    lock: 'open', 'stream' or 'host'.
    key: tokens of the key.
    values: tokens of the value and of those before it, newest first.
    source: (first token, count) of the statement; (-1, -1) of a host's.
    names: how many other names it has.
    oid, version, seq, t_write, t_first, t_read, reads, owner, expires: see
      `statejax.ops.slots.Bank`.
  """

  slot: int
  status: str
  lock: str
  key: tuple[int, ...]
  values: tuple[tuple[int, ...], ...]
  source: tuple[int, int]
  names: int
  oid: int
  version: int
  seq: int
  t_write: int
  t_first: int
  t_read: int
  reads: int
  owner: int
  expires: int


@dataclasses.dataclass(frozen=True)
class Receipt:
  """What became of an edit of one row; says nothing of content.

  Attributes:
    row: of the state.
    op: of `statejax.ops.slots.OPS`.
    outcome: of `statejax.ops.slots.OUTCOMES`; all but 'committed' and
      'refreshed' have changed no bit. 'refreshed' is a write of the tokens that
      are there: it sets the time and the salience, nothing else.
    slot, oid, version, old_version, seq, evicted: see
      `statejax.ops.slots.Receipts`.
    length: tokens that the row had absorbed.
    before, after: commitments to the slot's row, '' without a journal.
    carriers: where else what was edited may still be.
  """

  row: int
  op: str
  outcome: str
  slot: int
  oid: int
  version: int
  old_version: int
  seq: int
  evicted: int
  length: int
  before: str = ''
  after: str = ''
  carriers: tuple[str, ...] = ()

  @property
  def changed(self) -> bool:
    return self.outcome in ('committed', 'refreshed')


@dataclasses.dataclass(frozen=True)
class Memory:
  """The memory of a model, for whoever serves it.

  Attributes:
    model: with a slot layer.
    layer: its name; '' takes the only one.
    journal: where edits are written down; None for nowhere.
    principal: who acts; None is the model's own stream, so that it may change
      what is written here. What nobody owns, -1, everybody reads. It limits
      edits: whoever holds a state can look at all of it.
    host: whether this holds the host's capability: purge, rekey, host locks.
  """

  model: lm.LanguageModel
  layer: str = ''
  journal: Journal | None = None
  principal: int | None = None
  host: bool = False

  def __post_init__(self):
    have = [x.name for x in self.model.config.layers
            if isinstance(x.mixer, layer.SlotsConfig)
            and x.name in self.model.config.names]
    want = [self.layer] if self.layer else have
    if len(want) != 1 or want[0] not in have:
      raise ValueError(f'memory: expected the name of one slot layer, got '
                       f'{self.layer!r}; this model has {have}.')
    object.__setattr__(self, 'layer', want[0])
    if self.model.config.names.count(want[0]) != 1:
      raise ValueError(f'memory: layer {want[0]!r} stands in the pattern more '
                       'than once; give each memory a name of its own.')

  @property
  def config(self):
    """The `SlotsConfig`."""
    return self.model.config.layer(self.layer).mixer

  # Looking.

  def bank(self, state):
    """Returns the `statejax.ops.slots.Bank` of all rows."""
    held = state.layers[self.layer]
    return sl.Bank(**{f.name: getattr(held, f.name)[0]
                      for f in dataclasses.fields(sl.Bank)})

  def list(self, state, row=0):
    """Returns a `Slot` for each that is neither empty nor expired."""
    bank = jax.device_get(self.bank(st.take(state, row)))
    found = [_slot(bank, m) for m in range(self.config.rules.slots)]
    return [s for s in found
            if s.status != 'empty' and not _expired(s, state, row)]

  def read(self, state, slot, row=0, version=None):
    """Returns the tokens of a slot's value, and the value [V].

    Args:
      state: `ServingState`.
      slot: number of the slot.
      row: of the state.
      version: of the object; None is the present one.

    Raises:
      ValueError: an empty, deleted or expired slot, or a version that is not
        kept.
    """
    bank = jax.device_get(self.bank(st.take(state, row)))
    held = _slot(bank, self._number(slot))
    if _expired(held, state, row):
      raise ValueError(f'slot {slot}, row {row}: expected a live one, got one '
                       f'that has expired at {held.expires} tokens.')
    ago = 0 if version is None else held.version - version
    if not 0 <= ago < len(held.values):
      raise ValueError(
          f'slot {slot}, row {row}: expected a version of {held.version} down '
          f'to {held.version - len(held.values) + 1}, got {version}; it is '
          f'{held.status} and keeps {len(held.values)} of them.')
    return held.values[ago], bank.value[0, slot, ago]

  def diff(self, left, right, row=0):
    """Returns {slot: (before, after)} of slots that differ, `Slot` each."""
    a, b = (jax.device_get(self.bank(st.take(s, row))) for s in (left, right))
    out = {}
    for m in range(self.config.rules.slots):
      one, other = _slot(a, m), _slot(b, m)
      if one != other or (a.value[0, m] != b.value[0, m]).any():
        out[m] = one, other
    return out

  def export(self, state, row=0, redact=False):
    """Returns a row's memory as a dict that JSON can hold; tokens are left out
    where `redact`."""
    drop = ('key', 'values') if redact else ()
    return {'layer': self.layer, 'length': int(state.length[row]), 'slots': [
        {k: v for k, v in dataclasses.asdict(s).items() if k not in drop}
        for s in self.list(state, row)]}

  def untouched(self, state, slot, row=0):
    """Whether a slot's object is what this journal's edits have made of it.

    True proves that no stream has written, renewed, locked or named it, in any
    of its versions; that it was read it may hide. False proves nothing.
    """
    bank = jax.device_get(self.bank(st.take(state, row)))
    oid = int(bank.oid[0, self._number(slot)])
    name = self._object(row, oid)
    if self.journal is None or self.journal.salt(name) is None:
      return False
    edits = [e for e in self.journal.entries if e['row'] == row
             and e.get('layer') == self.layer and e.get('oid') == oid
             and e['outcome'] in ('committed', 'refreshed')]
    held = _plain(bank, slot) | {'reads': 0, 't_first': -1, 't_read': -1}
    said = [e['after'] for e in edits]
    return bool(edits) and not edits[0]['old_version'] and (
        [e['before'] for e in edits[1:]] == said[:-1]
        and self.journal.commitment(name, held) == said[-1])

  # Writing.

  def write(self, params, state, statement, *, key, value, row=0, slot=None,
            expect=None, ttl=None):
    """Writes what the model itself would write for a statement.

    The model reads the statement in a scratch state, and its last token gives
    the key and the value; the row has not read it.

    Args:
      params: of the model.
      state: `ServingState`.
      statement: tokens, fewer than a segment.
      key, value: tokens that are kept of what names the object, and of what it
        is; `read` shows them. Where addresses are spelled (`SlotsConfig.vocab`)
        these are what is spelled, and the statement has to hold them.
      row: of the state.
      slot: the slot to overwrite; None finds it by its key, or takes a new one.
      expect: the version that the slot must have.
      ttl: tokens after which it expires; None never. Where the slot holds these
        tokens already, its expiry stays as it is: see `expire`.

    Returns:
      The state and a `Receipt`.

    Raises:
      ValueError: tokens that are not the model's, or parameters that make no
        finite key and value of them.
    """
    r = self.config.rules
    spans = {'span': self._padded(value, r.span, 'value'),
             'key_span': self._padded(key, r.key_span, 'key')}
    found = self.encode(params, statement, key, value)
    until = -1 if ttl is None else self._until(state, row, ttl)
    return self._edit(state, row, sl.WRITE, slot, expect, expires=until,
                      salience=jnp.linalg.norm(jnp.float32(found['value'])),
                      **found, **spans)

  def encode(self, params, statement, key=(), value=()):
    """Returns {'key': [K], 'value': [V]} of the statement's last token.

    What of it is key and value, which matters where addresses are spelled, is
    found by the model if nobody says so.
    """
    # More than this would be committed, and no longer wait to be seen.
    most = self.config.segment - 1
    tokens = self._tokens(statement, most, 'statement')
    parts = np.full(tokens.shape, -1, np.int32)
    if self.config.vocab and len(key):
      parts[:] = 0
      # The longer one first: the other may stand within it too.
      for name, said in sorted((('key', key), ('value', value)),
                               key=lambda x: -len(x[1])):
        parts[self._within(tokens, parts, said, name)] = layer.PARTS.index(name)
    # One program for statements of any length.
    padded = (np.pad(x, (0, most - len(tokens)))[None] for x in (tokens, parts))
    held = _scratch(self.model, self.layer, params, *(
        jnp.asarray(x, jnp.int32) for x in padded), jnp.array([len(tokens)]))
    found = {'key': held.want_key[0, 0, 0], 'value': held.want_value[0, 0, 0]}
    if not all(np.isfinite(np.float32(x)).all() for x in found.values()):
      raise ValueError('statement: expected a finite key and value, the model '
                       'makes NaN or infinity of it; look at its parameters.')
    return found

  def _within(self, tokens, parts, said, what):
    """Where tokens were said, in a part of the statement that is still free."""
    size = len(said)
    for i in range(len(tokens) - size, -1, -1):
      at = slice(i, i + size)
      if (tokens[at] == said).all() and not parts[at].any():
        return at
    raise ValueError(
        f'statement: expected the {what} {list(map(int, said))} in it, as this '
        f'model spells what it keeps, got {tokens.tolist()}.')

  def lock(self, state, slot, **where):
    """Protects a slot from being changed or evicted; with the host's
    capability so that the model cannot undo it."""
    return self._simple(sl.HOST_LOCK if self.host else sl.LOCK, state, slot,
                        **where)

  def unlock(self, state, slot, **where):
    """Undoes `lock`."""
    return self._simple(sl.HOST_UNLOCK if self.host else sl.UNLOCK, state, slot,
                        **where)

  def delete(self, state, slot, **where):
    """Removes values and tokens; the key stays, so that a later write is known
    to be of the same object."""
    return self._simple(sl.DELETE, state, slot, **where)

  def rollback(self, state, slot, steps=1, **where):
    """Puts an earlier value in front; the version goes on counting, and the
    expiry stays that of the write undone."""
    return self._simple(sl.ROLLBACK, state, slot, steps=steps, **where)

  def alias(self, params, state, slot, statement, name=(), **where):
    """Gives a slot the key of a statement as another name; `name` are the
    tokens of it, see `write`."""
    found = self.encode(params, statement, name)['key']
    return self._simple(sl.ALIAS, state, slot, name=found, **where)

  def expire(self, state, slot, ttl, row=0, **where):
    """Hides a slot when the row has absorbed `ttl` more tokens."""
    return self._simple(sl.EXPIRE, state, slot, row=row,
                        expires=self._until(state, row, ttl), **where)

  def quarantine(self, state, slot, **where):
    """Keeps a slot from being read or written, without losing it."""
    return self._simple(sl.QUARANTINE, state, slot, **where)

  def restore(self, state, slot, **where):
    """Undoes `quarantine`."""
    return self._simple(sl.RESTORE, state, slot, **where)

  def purge(self, state, slot, **where):
    """Empties a slot and destroys its salt; wants the host's capability."""
    return self._simple(sl.PURGE, state, slot, **where)

  # How.

  def _simple(self, op, state, slot, row=0, expect=None, **fields):
    return self._edit(state, row, op, slot, expect, **fields)

  def _until(self, state, row, ttl):
    if ttl < 1:
      raise ValueError(f'ttl: expected 1 token or more, got {ttl}; to hide a '
                       'slot now, quarantine or delete it.')
    return int(state.length[row]) + ttl

  def _tokens(self, tokens, most, what):
    tokens = np.asarray(tokens)
    vocab = self.model.config.vocab
    if (tokens.ndim != 1 or not 0 < tokens.size <= most
        or tokens.dtype.kind not in 'iu' or (tokens < 0).any()
        or (tokens >= vocab).any()):
      raise ValueError(f'{what}: expected 1 to {most} tokens, integers below '
                       f'{vocab}, got {tokens.tolist()}.')
    return tokens

  def _padded(self, tokens, size, what):
    tokens = self._tokens(tokens, size, what)
    return np.pad(tokens.astype(np.int32), (0, size - tokens.size),
                  constant_values=-1)

  def _number(self, slot):
    if not 0 <= slot < self.config.rules.slots:
      raise ValueError(f'slot: expected 0 to {self.config.rules.slots - 1}, '
                       f'got {slot}.')
    return slot

  def _edit(self, state, row, op, slot, expect, **fields):
    if not 0 <= row < st.rows(state):
      raise ValueError(f'row: expected 0 to {st.rows(state) - 1}, got {row}.')
    if slot is not None:
      self._number(slot)
    if expect is not None and expect < 0:
      raise ValueError(f'expect: expected a version, got {expect}.')
    rules, rows = self.config.rules, st.rows(state)
    mine = np.arange(rows)[:, None] == row
    given = {'time': jnp.broadcast_to(state.length[:, None], (rows, 1)),
             'slot': np.full((rows, 1), -1 if slot is None else slot),
             'expect': np.full((rows, 1), -1 if expect is None else expect),
             'host': np.full((rows, 1), self.host),
             'principal': np.full((rows, 1), layer.STREAM if self.principal
                                  is None else self.principal)}
    for name, x in fields.items():
      x = jnp.asarray(x)
      given[name] = jnp.broadcast_to(x[None, None], (rows, 1, *x.shape))
    events = sl.events(rules, np.where(mine, op, sl.NULL), **given)
    new, receipts = commit(self.model, self.layer, state, events)
    return self._noted(state, new, row, op, jax.tree.map(
        lambda x: int(x[row, 0]), receipts))

  def _noted(self, old, new, row, op, found):
    """Writes an edit down, in the journal and in the witness."""
    receipt = Receipt(
        row=row, op=sl.OPS[op], outcome=sl.OUTCOMES[found.outcome],
        length=int(old.length[row]),
        **{n: getattr(found, n) for n in (
            'slot', 'oid', 'version', 'old_version', 'seq', 'evicted')})
    if receipt.changed:
      receipt = dataclasses.replace(receipt, carriers=self._carriers(old))
    before, after = self._commitments(old, new, receipt)
    receipt = dataclasses.replace(receipt, before=before, after=after)
    entry = dataclasses.asdict(receipt) | {
        'layer': self.layer, 'host': int(self.host), 'forgets': '',
        'principal': layer.STREAM if self.principal is None else self.principal}
    if receipt.changed and op == sl.PURGE:
      entry['forgets'] = self._object(row, receipt.oid)
    if self.journal is not None:
      self.journal.append(entry)
    if not receipt.changed:
      return old, receipt
    return marked(new, row, entry), receipt

  def _commitments(self, old, new, receipt):
    if self.journal is None or receipt.slot < 0 or receipt.oid < 0:
      return '', ''
    rows = [jax.device_get(self.bank(st.take(s, receipt.row)))
            for s in (old, new)]
    # A new object has no before, but the one whose slot it took.
    names = [receipt.evicted if not receipt.old_version else receipt.oid,
             receipt.oid]
    before, after = (
        self.journal.commitment(self._object(receipt.row, oid),
                                _plain(bank, receipt.slot)) if oid >= 0 else ''
        for oid, bank in zip(names, rows))
    return before, after

  def _object(self, row, oid):
    return f'{self.layer}/{row}/{oid}'

  def _carriers(self, state):
    """Where what a slot held may be besides it.

    All that the row's stream has left anywhere, whoever wrote the slot, and
    what waits to be committed: what a slot has been through is not known for
    certain, so that nothing is left out.
    """
    bank = {f'layers/{self.layer}/{f.name}' for f in dataclasses.fields(
        sl.Bank)}
    return (*sorted(path for path, _, _, _ in st.leaves(state)
                    if path.startswith('layers/') and path not in bank),
            f'layers/{self.layer}: other slots', 'logits', 'pending',
            'token log', 'forks and artifacts')


def element(entry) -> int:
  """What an edit's entry adds to a witness; no token is that large."""
  mark = hashlib.sha256(b'statejax.ext.v1\0' + digest.canonical(entry))
  return 2 ** 30 + int.from_bytes(mark.digest()[:4], 'little') % 2 ** 30


def marked(state, row, entry):
  """Returns the state whose row's witness has absorbed an edit's entry."""
  count = (np.arange(st.rows(state)) == row).astype(np.int32)
  return dataclasses.replace(state, witness=witness.absorb(
      state.witness, jnp.full((st.rows(state), 1), element(entry), jnp.int32),
      jnp.asarray(count)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def commit(model, name, state, events):
  """Applies events to the slots of a layer; pure, for use inside `jax.jit`.

  What the model has decided and not committed yet, and would undo them, is
  dropped: see `statejax.ops.lifecycle.overruled`.

  Args:
    model: `LanguageModel`.
    name: of the slot layer.
    state: `ServingState` of B rows.
    events: `statejax.ops.slots.Events` [B, E]; those of no time happen now.

  Returns:
    The state, its witness as it was, and `statejax.ops.slots.Receipts` [B, E].
  """
  rules = model.config.layer(name).mixer.rules
  held = state.layers[name]
  events = dataclasses.replace(events, time=jnp.where(
      events.time < 0, state.length[:, None], events.time))
  fields = [f.name for f in dataclasses.fields(sl.Bank)]
  flat = jax.tree.map(lambda x: x[0], held)
  before = sl.Bank(**{n: getattr(flat, n) for n in fields})
  bank, receipts = lifecycle.commit(
      # Expiry is the stream's: an edit of one row empties no slot of another.
      rules, before, events, jnp.full_like(state.length, -1))
  flat = layer.drop(flat, lifecycle.overruled(
      rules, before, bank, events, receipts, layer.waiting(flat)))
  flat = dataclasses.replace(flat, **{n: getattr(bank, n) for n in fields})
  new = jax.tree.map(lambda x: x[None], flat)
  return dataclasses.replace(state, layers=state.layers | {name: new}), receipts


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scratch(model, name, params, tokens, parts, n_valid):
  """The slot layer's state after a statement whose last token has to write."""
  length = tokens.shape[1]
  last = jnp.arange(length, dtype=jnp.int32)[None] == n_valid[:, None] - 1
  state = model.init_state(1, length)
  hints = {'force': jnp.where(last, layer.WANTS.index(sl.WRITE), 0),
           'force_part': parts}
  return lm.forward(model, params, state, tokens, n_valid,
                    hints=hints)[1].layers[name]


def _slot(bank, m):
  """A `Slot` of a bank of one row in numpy."""
  cut = lambda x: tuple(int(t) for t in x if t >= 0)
  facts: dict[str, Any] = {n: int(getattr(bank, n)[0, m]) for n in _FACTS}
  oid, (begin, count) = facts['oid'], bank.source[0, m]
  facts |= {'status': STATUS[facts['status']], 'lock': LOCKS[facts['lock']]}
  values = tuple(cut(x) for x in bank.span[0, m])
  return Slot(slot=m, key=cut(bank.key_span[0, m]),
              values=tuple(v for v in values if v),
              source=(int(begin), int(count)),
              names=int((bank.alias_oid[0] == oid).sum()) * (oid >= 0), **facts)


def _plain(bank, m):
  """A slot's row without floats, every bit of it."""
  held = dataclasses.asdict(_slot(bank, m))
  bits = {n: np.ascontiguousarray(getattr(bank, n)[0, m]).tobytes().hex()
          for n in ('key', 'value', 'salience')}
  return held | {'bits': bits}


def _expired(slot, state, row):
  return 0 <= slot.expires <= int(state.length[row])
