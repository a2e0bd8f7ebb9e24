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

import jax
import jax.numpy as jnp
import numpy as np

from statejax import edit_events, edit_marks, slot_facts, slot_merge
from statejax import model as lm
from statejax import state as st
from statejax.artifact.journal import Journal, checked_reason, object_name
from statejax.edit_events import commit
from statejax.layers import slots as layer
from statejax.ops import slots as sl
from statejax.slot_facts import integer


@dataclasses.dataclass(frozen=True)
class Receipt:
  """What became of an edit of one row; says nothing of content.

  Attributes:
    row: of the state.
    op: of `statejax.ops.slots.OPS`, or 'merge'.
    outcome: of `statejax.ops.slots.OUTCOMES`; all but 'committed' and
      'refreshed' have changed no bit. 'refreshed' is a write of the tokens that
      are there: it sets the time and the salience, nothing else.
    slot, oid, version, old_version, seq, evicted: see
      `statejax.ops.slots.Receipts`.
    length: tokens that the row had absorbed.
    principal: who acted, as a number.
    reason: what the edit was said to be for.
    before, after: commitments to the slot's row, '' without a journal.
    carriers: where else what was edited may still be.
    overruled: position of the first token whose event waited to be committed
      and does not any more, as the edit was later; -1 for none. A rollback
      does not bring that back.
    mark: what the witness has absorbed of it, 64 hex digits, as an artifact
      lists its edits; '' where nothing was changed.
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
  principal: int
  reason: str = ''
  before: str = ''
  after: str = ''
  carriers: tuple[str, ...] = ()
  overruled: int = -1
  mark: str = ''

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
      edits: whoever holds a state can look at all of it. The layer itself acts
      as its own stream in every row: what another owns is kept beside, and the
      model neither reads nor changes it.
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
    if not have:
      raise ValueError('memory: expected a model with a slot layer, this one '
                       f'has {", ".join(self.model.config.names)}.')
    if len(want) != 1 or want[0] not in have:
      raise ValueError(f'memory: expected the name of one slot layer, got '
                       f'{self.layer!r}; this model has {have}.')
    object.__setattr__(self, 'layer', want[0])
    if not isinstance(self.journal, Journal | None):
      raise ValueError('journal: expected a statejax.artifact.journal.Journal '
                       f'or None, got {self.journal!r}.')
    if self.principal is not None:
      object.__setattr__(self, 'principal', integer(
          'principal', self.principal, -1))
    if self.model.config.names.count(want[0]) != 1:
      raise ValueError(f'memory: layer {want[0]!r} stands in the pattern more '
                       'than once; give each memory a name of its own.')

  @property
  def config(self):
    """The `SlotsConfig`."""
    return self.model.config.layer(self.layer).mixer

  # Looking.

  def bank(self, state):
    """Returns the `statejax.ops.slots.Bank` of all rows.

    Raises:
      ValueError: a state of another model.
    """
    held = self._held(state)
    return sl.Bank(**{f.name: getattr(held, f.name)[0]
                      for f in dataclasses.fields(sl.Bank)})

  def list(self, state, row=0, **where):
    """Returns a `Slot` for each that is neither empty nor expired.

    Args:
      state: `ServingState`.
      row: of the state.
      **where: fields of `Slot` that it must have, e.g. `status='live'`.
    """
    bank = self._row_bank(state, row)
    found = (slot_facts.of(bank, m) for m in range(self.config.rules.slots))
    return slot_facts.matching(
        [s for s in found if s.status != 'empty'
         and not slot_facts.expired(s, int(state.length[row]))], where)

  def read(self, state, slot=None, row=0, version=None, *, key=None):
    """Returns the tokens of a slot's value, and the value [V].

    Args:
      state: `ServingState`.
      slot: number of the slot; None finds it by its key.
      row: of the state.
      version: of the object; None is the present one.
      key: all tokens of the key, where no slot is given.

    Raises:
      ValueError: an empty, deleted or expired slot, a version that is not
        kept, or a key that not exactly one slot has.
    """
    if (slot is None) == (key is None):
      raise ValueError('slot, key: expected one of them.')
    bank = self._row_bank(state, row)
    slot = self._keyed(state, row, key) if slot is None else self._number(slot)
    held = slot_facts.of(bank, slot)
    if slot_facts.expired(held, int(state.length[row])):
      raise ValueError(f'slot {slot}, row {row}: expected a live one, got one '
                       f'that has expired at {held.expires} tokens.')
    if not held.values:
      raise ValueError(f'slot {slot}, row {row}: expected one that holds '
                       f'a value, it is {held.status}; see list.')
    ago = 0 if version is None else held.version - integer(
        'version', version, 0)
    if not 0 <= ago < len(held.values):
      raise ValueError(
          f'slot {slot}, row {row}: expected a version of {held.version} down '
          f'to {held.version - len(held.values) + 1}, got {version}; it keeps '
          f'{len(held.values)} of them.')
    return held.values[ago], bank.value[0, slot, ago]

  def _keyed(self, state, row, key):
    """The number of the one slot whose key is spelled so."""
    found = [s.slot for s in self.list(state, row, key=key)]
    if len(found) != 1:
      raise ValueError(f'key {list(key)}, row {row}: expected one '
                       f'slot of it, got {found or "none"}; name a slot.')
    return found[0]

  def diff(self, left, right, row=0):
    """Returns {slot: (before, after)} of slots that differ, `Slot` each."""
    a, b = (self._row_bank(state, row) for state in (left, right))
    slot_merge.require_like(a, b)
    out = {}
    for m in range(self.config.rules.slots):
      one, other = slot_facts.of(a, m), slot_facts.of(b, m)
      if one != other or (a.value[0, m] != b.value[0, m]).any():
        out[m] = one, other
    return out

  def export(self, state, row=0, fields=None, redact=False):
    """Returns a row's memory as a dict that JSON can hold.

    Args:
      state: `ServingState`.
      row: of the state.
      fields: of `Slot`; None is all of them.
      redact: whether the tokens of keys and values are left out.

    Raises:
      ValueError: what no slot has, or is both asked for and left out.
    """
    row, drop = self._row(state, row), ('key', 'values') if redact else ()
    if fields is None:
      fields = [n for n in slot_facts.FIELDS if n not in drop]
    slot_facts.known(fields or ('none',))
    if set(fields) & set(drop):
      raise ValueError('fields: expected neither key nor values where they are '
                       f'redacted, got {list(fields)}.')
    return {'layer': self.layer, 'length': int(state.length[row]), 'slots': [
        {n: getattr(s, n) for n in fields} for s in self.list(state, row)]}

  # Writing.

  def write(self, params, state, statement, *, key, value, row=0, slot=None,
            ttl=None, lock=False, **where):
    """Writes what the model itself would write for a statement.

    The model reads the statement in a scratch state, and its last token gives
    the key and the value; the row has not read it.

    Args:
      params: of the model.
      state: `ServingState`.
      statement: tokens, fewer than a segment.
      key, value: tokens that are kept of what names the object, and of what it
        is; `read` shows them. Where addresses are spelled (`SlotsConfig.vocab`)
        these are what is spelled, and the statement has to hold them in its
        last `SlotsConfig.statement` tokens.
      row: of the state.
      slot: the slot to overwrite; None finds it by its key, or takes a new one.
      ttl: tokens after which it expires; None never. Where the slot holds these
        tokens already, its expiry stays as it is: see `expire`.
      lock: whether to protect it at once, which is an edit of its own: the
        receipt returned is that of the write.
      **where: `expect`, the version that the slot must have, 0 for a write
        that makes an object or does nothing, and `reason`, a line for the
        receipt and the journal, which must not hold content.

    Returns:
      The state and a `Receipt`.

    Raises:
      ValueError: tokens that are not the model's, or parameters that make no
        finite key and value of them.
    """
    until = -1 if ttl is None else self._until(state, row, ttl)
    new, receipt = self._edit(
        state, sl.WRITE, slot, row=row, **where,
        fields=self.payload(params, statement, key, value) | {'expires': until})
    if lock and receipt.changed:
      new, _ = self.lock(new, receipt.slot, row=row)
    return new, receipt

  def overwrite(self, params, state, slot, expect, statement, **where):
    """Writes to a slot that has the version expected, or changes no bit.

    Args:
      slot, expect: its number, and that version.
      **where: of `write`, which says the rest.
    """
    return self.write(params, state, statement, slot=self._number(slot),
                      expect=integer('expect', expect, 0), **where)

  def payload(self, params, statement, key, value):
    """Returns the fields of a WRITE that `write` makes of its arguments, for
    `events`."""
    r = self.config.rules
    spans = {'span': self._padded(value, r.span, 'value'),
             'key_span': self._padded(key, r.key_span, 'key')}
    found = self.encode(params, statement, key, value)
    return found | spans | {
        'salience': np.linalg.norm(np.float32(found['value']))}

  def encode(self, params, statement, key=(), value=()):
    """Returns {'key': [K], 'value': [V]} of the statement's last token.

    What of it is key and value, which matters where addresses are spelled, is
    found by the model if nobody says so.
    """
    # More than this would be committed, and no longer wait to be seen.
    most = self.config.segment - 1
    if most < 1:
      raise ValueError('memory: expected a model whose segments have 2 tokens '
                       'or more, to see what it would write; this one has 1.')
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
    found = jax.device_get(_scratch(
        self.model, self.layer, params, *(x.astype(np.int32) for x in padded),
        np.array([len(tokens)], np.int32)))
    if not all(np.isfinite(np.float32(x)).all() for x in found.values()):
      raise ValueError('statement: expected a finite key and value, the model '
                       'makes NaN or infinity of it; look at its parameters.')
    return found

  def _within(self, tokens, parts, said, what):
    """Where tokens were said, in a part of the statement that is still free."""
    size, sees = len(said), self.config.statement
    for i in range(len(tokens) - size, max(0, len(tokens) - sees) - 1, -1):
      at = slice(i, i + size)
      if (tokens[at] == said).all() and not parts[at].any():
        return at
    raise ValueError(
        f'statement: expected the {what} {list(map(int, said))} in its last '
        f'{sees} tokens, of which this model spells what it keeps, got '
        f'{tokens.tolist()}.')

  def lock(self, state, slot, **where):
    """Protects a slot from being changed or evicted; with the host's
    capability so that the model cannot undo it."""
    return self._simple(sl.HOST_LOCK if self.host else sl.LOCK, state, slot,
                        where)

  def unlock(self, state, slot, **where):
    """Undoes `lock`."""
    return self._simple(sl.HOST_UNLOCK if self.host else sl.UNLOCK, state, slot,
                        where)

  def delete(self, state, slot, **where):
    """Removes values and tokens; the key stays, so that a later write is known
    to be of the same object."""
    return self._simple(sl.DELETE, state, slot, where)

  def rollback(self, state, slot, steps=1, **where):
    """Puts an earlier value in front; the version goes on counting, and the
    expiry stays that of the write undone. What that write had overruled before
    it was committed does not come back, see `Receipt`."""
    return self._simple(sl.ROLLBACK, state, slot, where,
                        steps=integer('steps', steps, 1))

  def alias(self, params, state, slot, statement, name=(), **where):
    """Gives a slot the key of a statement as another name; `name` are the
    tokens of it, see `write`."""
    if len(name):
      self._tokens(name, self.config.rules.key_span, 'name')
    found = self.encode(params, statement, name)['key']
    return self._simple(sl.ALIAS, state, slot, where, name=found)

  def rekey(self, params, state, slot, statement, key, **where):
    """Gives a slot the key of a statement in place of its own; `key` are the
    tokens of it, see `write`. Wants the host's capability."""
    span = self._padded(key, self.config.rules.key_span, 'key')
    found = self.encode(params, statement, key)['key']
    return self._simple(sl.REKEY, state, slot, where, key=found, key_span=span)

  def expire(self, state, slot, ttl, row=0, **where):
    """Hides a slot when the row has absorbed `ttl` more tokens."""
    return self._simple(sl.EXPIRE, state, slot, where | {'row': row},
                        expires=self._until(state, row, ttl))

  def quarantine(self, state, slot, **where):
    """Keeps a slot from being read or written, without losing it."""
    return self._simple(sl.QUARANTINE, state, slot, where)

  def restore(self, state, slot, **where):
    """Undoes `quarantine`."""
    return self._simple(sl.RESTORE, state, slot, where)

  def purge(self, state, slot, **where):
    """Empties a slot and destroys its salt; wants the host's capability."""
    return self._simple(sl.PURGE, state, slot, where)

  def merge(self, state, other, row=0, other_row=0, reason=''):
    """Takes over what another memory has that is new, or not here.

    Of slots with the same key tokens the higher version wins, a deleted one
    too; what is not here takes a slot as a new write does, under the policy of
    overflow. Aliases stay where they are, and so does all that a stream has
    left elsewhere. Slots that the principal does not own, or expired, are none.

    Args:
      state: `ServingState`.
      other: `ServingState` of the same model and parameters.
      row, other_row: of them.
      reason: see `write`.

    Returns:
      The state, and {slot of `other`: `Receipt`} of each that was not here as
      new as there. Where ours stays, it is for 'conflict': equal versions that
      say different things, or an address of another object here; 'locked': ours
      is protected; 'full': nothing can be evicted but what came with this
      merge, and for a deleted one nothing; 'forbidden': a host's lock, without
      the capability; 'invalid': quarantined here or there, or no key tokens.

    Raises:
      ValueError: a memory of other shapes.
    """
    row, other_row = self._row(state, row), self._row(other, other_row)
    if self.journal is not None:  # what it cannot take is told before the first
      alone = dataclasses.replace(self, journal=None)
      for receipt in alone.merge(state, other, row, other_row)[1].values():
        self._require_known(receipt)
    plan = slot_merge.steps(
        self.config.rules, self._row_bank(state, row),
        self._row_bank(other, other_row), principal=self._actor, host=self.host,
        lengths=(int(state.length[row]), int(other.length[other_row])))
    receipts: dict[int, Receipt] = {}
    brought: set[int] = set()
    for step in plan:
      new, found = slot_merge.taken(self, state, row, step, brought)
      state, receipt = self._noted(state, new, row, 'merge', found,
                                   checked_reason(reason))
      if receipt.changed and step.new:
        brought.add(receipt.slot)
      receipts[step.theirs] = receipt
    return state, receipts

  # Edits of many rows at once, inside a program.

  def events(self, op, mine, **fields):
    """Returns `edit_events.of_rows` of this memory and who holds it."""
    return edit_events.of_rows(self.config.rules, op, mine, fields,
                               principal=self._actor, host=self.host)

  def noted(self, old, new, op, receipts, reason=''):
    """Writes edits that `commit` has made down, in journal and witnesses.

    Args:
      old, new: the states before and after, outside of `jax.jit`.
      op, receipts: of `events`, and what `commit` has returned: of one event of
        each row, as a journal has them one by one.
      reason: see `write`.

    Returns:
      The state and a `Receipt` of each row that the edit was for.
    """
    if op not in sl.OPS:
      raise ValueError(f'op: expected one of {", ".join(sl.OPS)}; got {op!r}.')
    found, out = jax.device_get(receipts), []
    if found.outcome.shape[1] != 1:
      raise ValueError('noted: expected the receipts of one event of each row, '
                       f'got {found.outcome.shape[1]}; commit them one after '
                       'another, and note each.')
    if (np.asarray(old.length) != np.asarray(new.length)).any():
      raise ValueError('noted: expected the state right before the edits, this '
                       'one has absorbed another number of tokens; return it '
                       'from the program too.')
    for row in np.flatnonzero(found.outcome[:, 0] != sl.UNUSED).tolist():
      one = {f.name: int(getattr(found, f.name)[row, 0])
             for f in dataclasses.fields(found)}
      new, receipt = self._noted(old, new, row, op, one, checked_reason(reason))
      out.append(receipt)
    return new, out

  # How.

  @property
  def _actor(self):
    return layer.STREAM if self.principal is None else self.principal

  def _simple(self, op, state, slot, where, **fields):
    return self._edit(state, op, self._number(slot), fields, **where)

  def _row(self, state, row):
    return integer('row', row, 0, st.rows(state) - 1)

  def _row_bank(self, state, row):
    """The bank of one row, in numpy."""
    return jax.device_get(edit_events.row_of(
        self._held(state), self._row(state, row)))

  def _held(self, state):
    """The layer's part of a state, if it is one of this model."""
    return edit_events.state_of(self.model, self.layer, state)

  def _until(self, state, row, ttl):
    length = int(state.length[self._row(state, row)])
    return length + integer('ttl', ttl, 1, slot_facts.MOST - length)

  def _tokens(self, tokens, most, what):
    try:
      tokens = np.asarray(tokens)
    except ValueError:  # ragged
      tokens = np.asarray(tokens, object)
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
    return integer('slot', slot, 0, self.config.rules.slots - 1)

  def _edit(self, state, op, slot, fields, row=0, expect=None, reason=''):
    row, op = self._row(state, row), sl.OPS[op]
    given = fields | {
        'slot': -1 if slot is None else self._number(slot),
        'expect': -1 if expect is None else integer('expect', expect, 0)}
    checked_reason(reason)
    events = self.events(op, np.arange(st.rows(state)) == row, **given)
    new, receipts = commit(self.model, self.layer, state, events)
    new, (receipt,) = self.noted(state, new, op, receipts, reason)
    return new if receipt.changed else state, receipt

  def _noted(self, old, new, row, op, found, reason):
    """Writes an edit of one row down."""
    receipt = Receipt(
        row=row, op=op, length=int(old.length[row]), principal=self._actor,
        reason=reason, **found | {'outcome': sl.OUTCOMES[found['outcome']]})
    receipt = dataclasses.replace(
        receipt, carriers=self._carriers(old) if receipt.changed else (),
        overruled=edit_events.undone_at(self._held(old), self._held(new), row))
    before, after = self._commitments(old, new, receipt)
    receipt = dataclasses.replace(receipt, before=before, after=after)
    entry = dataclasses.asdict(receipt) | {
        'layer': self.layer, 'host': int(self.host), 'forgets': ''}
    if receipt.changed and op == sl.OPS[sl.PURGE]:
      entry['forgets'] = self._object(row, receipt.oid)
    del entry['mark']
    if self.journal is not None:
      self.journal.append(entry)
    if not receipt.changed:
      return new, receipt
    return edit_marks.marked(new, row, entry), dataclasses.replace(
        receipt, mark=edit_marks.mark(entry))

  def _commitments(self, old, new, receipt):
    if self.journal is None or receipt.slot < 0 or receipt.oid < 0:
      return '', ''
    # A new object has no before, but the one whose slot it took.
    oids = [receipt.evicted if not receipt.old_version else receipt.oid,
            receipt.oid]
    names = [self._object(receipt.row, oid) for oid in oids]
    self._require_known(receipt)
    before, after = (
        self.journal.commitment(name, slot_facts.plain(
            self._row_bank(state, receipt.row), receipt.slot))
        if oid >= 0 and name not in self.journal.gone else ''
        for oid, name, state in zip(oids, names, (old, new)))
    return before, after

  def _require_known(self, receipt):
    name = self._object(receipt.row, receipt.oid)
    # A purge that the disk refused is tried again.
    if self.journal and name in self.journal.gone and receipt.op != 'purge':
      raise ValueError(
          f'journal: expected one of this state, this one has forgotten {name};'
          ' purge that, if it has a slot yet, or begin another journal.')

  def _object(self, row, oid):
    return object_name({'layer': self.layer, 'row': row, 'oid': oid})

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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scratch(model, name, params, tokens, parts, n_valid):
  """{'key': [K], 'value': [V]} that the last token of a statement, which has
  to write, wants to."""
  length = tokens.shape[1]
  last = jnp.arange(length, dtype=jnp.int32)[None] == n_valid[:, None] - 1
  state = model.init_state(1, length)
  hints = {'force': jnp.where(last, layer.WANTS.index(sl.WRITE), 0),
           'force_part': parts}
  held = lm.forward(model, params, state, tokens, n_valid,
                    hints=hints)[1].layers[name]
  return {'key': held.want_key[0, 0, 0], 'value': held.want_value[0, 0, 0]}
