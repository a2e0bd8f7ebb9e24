r"""The command `memory`: the slots of a state, and edits of them.

  python -m statejax.main memory list chat --workdir=runs/a --where=status=live
  python -m statejax.main memory read chat --workdir=runs/a --key=sky
  python -m statejax.main memory overwrite chat --workdir=runs/a --slot=3 \
      --expect=1 --statement='the sky is grey' --key=sky --value=grey \
      --journal=edits
  python -m statejax.main memory delete runs/s1 --workdir=runs/a --slot=3 \
      --save=runs/s2 --journal=edits
  python -m statejax.main memory diff runs/s1 runs/s2 --workdir=runs/a
  python -m statejax.main memory merge chat other --workdir=runs/a
  python -m statejax.main memory journal edits --journal_head=5f1c...
  python -m statejax.main memory journal edits --forget=memory/0/7

Statement, key and value are text; of a model that does not read text they are
numbers of tokens, 12,43,5.

A target is the directory of a saved state, or an artifact of the store: a name,
an id or 12 characters of it or more, or its directory. What has a name there is
what is meant, `./chat` is the directory beside it. An artifact is loaded as
`state resume` does; an edit of one makes a child of it, and moves its name. A
merge takes slots of the second that are newer, or new, over into the first: the
child has both as parents. A journal is that of one state: what comes of it by
edits may go on in it, another state needs another one.

Loads jax only where a model runs.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from statejax import asking

SLOT = flags.DEFINE_integer('slot', None, 'memory: number of a slot')
LAYER = flags.DEFINE_string(
    'slot_layer', '', 'memory: name of the slot layer, where there are several')
ROW = flags.DEFINE_integer('row', 0, 'memory: row of the state',
                           upper_bound=2**31 - 1)
EXPECT = flags.DEFINE_integer(
    'expect', None, 'memory: version that the slot must have')
STATEMENT = flags.DEFINE_string(
    'statement', None, 'memory write, alias, rekey: text of which the model '
    'writes the last token down')
KEY = flags.DEFINE_string(
    'key', None, 'memory write, alias, rekey: the key in the statement; read: '
    'the key of the slot')
VALUE = flags.DEFINE_string(
    'value', None, 'memory write: the value in the statement')
TTL = flags.DEFINE_integer(
    'ttl', None, 'memory write, expire: tokens after which it is hidden')
LOCK = flags.DEFINE_bool('lock', False, 'memory write: and lock it')
STEPS = flags.DEFINE_integer('steps', 1, 'memory rollback: versions back')
VERSION = flags.DEFINE_integer(
    'version', None, 'memory read: of the value; default the present one')
WHERE = flags.DEFINE_multi_string(
    'where', [], 'memory list: what slots must have, e.g. status=live')
FIELDS = flags.DEFINE_list(
    'fields', None, 'memory export: of each slot; default all of them')
REDACT = flags.DEFINE_bool(
    'redact', False, 'memory export: without the tokens of keys and values')
JOURNAL = flags.DEFINE_string(
    'journal', None, 'memory: directory where edits are written down')
HEAD = flags.DEFINE_string(
    'journal_head', None, 'memory journal: its head as kept elsewhere, which '
    'the last line must say; with --forget, of before')
FORGET = flags.DEFINE_string(
    'forget', None, 'memory journal: LAYER/ROW/OID of an object that has no '
    'slot any more, whose salt is destroyed')
REASON = flags.DEFINE_string(
    'reason', '', 'memory: a line for receipt and journal, without content')
TENANT = flags.DEFINE_integer(
    'tenant', None, 'memory: whose slots are edited, a number; default those '
    "of the model's own stream, which it reads beside those of nobody, -1")
HOST = flags.DEFINE_bool(
    'host', False, 'memory: act with the capability of the host')

# Verb -> the flags that it needs, and those that it may have.
LOOKS = {'list': ((), {'where'}), 'read': ((), {'slot', 'key', 'version'}),
         'export': ((), {'fields', 'redact'}), 'diff': ((), set())}
EDITS = {
    'write': (('statement', 'key', 'value'), {'slot', 'ttl', 'lock'}),
    'overwrite': (('slot', 'expect', 'statement', 'key', 'value'),
                  {'ttl', 'lock'}),
    'alias': (('slot', 'statement'), {'key'}),
    'rekey': (('slot', 'statement', 'key'), set()),
    'expire': (('slot', 'ttl'), set()), 'rollback': (('slot',), {'steps'}),
    **{verb: (('slot',), set()) for verb in (
        'lock', 'unlock', 'delete', 'quarantine', 'restore', 'purge')}}
PAIRS = {'merge': ((), set())}
BOOKS = {'journal': ((), {'journal_head', 'forget', 'reason'})}
# What every look reads, what every edit besides, and what artifacts want.
_LOOK = {'workdir', 'resume', 'row', 'slot_layer'}
_PAIR = {'save', 'journal', 'reason', 'tenant', 'host', 'ref'}
_EDIT = _PAIR | {'expect'}
_STORE = {'store', 'secrets', 'principal', 'org', 'root', 'grant', 'holder_key',
          *asking.TEXTS, *asking.PARAMS}
_VERBS = LOOKS | EDITS | PAIRS | BOOKS
ALL = (_LOOK | _EDIT | _STORE).union(*(
    {*needs, *may} for needs, may in _VERBS.values()))


@dataclasses.dataclass(frozen=True)
class _Target:
  """A state to look at or to edit.

  Attributes:
    state: `ServingState`.
    model, params: that it runs with.
    keep: function that keeps an edited state, given it, its `Edited` and of
      which artifact slots were merged into it, None for none.
    edited: `mint.Edited`; a saved state keeps the edits of it.
    may: function that raises where it would not be kept, given of which
      artifact slots are to be merged into it, None for none.
    origin: `mint.Parent`, None of a saved state.
  """

  state: Any
  model: Any
  params: Any
  keep: Callable
  edited: Any
  may: Callable = lambda slots: None
  origin: Any = None


def usage() -> str:
  """One line that says how the command is called."""
  return (f'memory takes one of {", ".join(_VERBS)} and a saved state or an '
          'artifact, diff and merge two of them, journal a directory of edits')


def explain(verb: str = '') -> str:
  """What the command takes, or one verb with its flags, for a person."""
  if verb not in _VERBS:
    return f'{__doc__}\n{usage()}; memory VERB --help says what a verb takes.'
  needs, may = _VERBS[verb]
  return '\n'.join([f'memory {verb}', ' needs', *asking.flag_lines(needs),
                    ' takes', *asking.flag_lines(may | _uses(verb))])


def _uses(verb):
  return (set() if verb in BOOKS else _LOOK | _STORE) | (
      _EDIT if verb in EDITS else _PAIR if verb in PAIRS else set())


def run(verb: str, *targets: str):
  """Runs one verb; raises ValueError with one line for a user's mistake."""
  if verb not in _VERBS:
    raise ValueError(f'memory {verb}: expected one of {", ".join(_VERBS)}.')
  needs, may = _VERBS[verb]
  uses = {*needs, *may} | _uses(verb)
  for name in sorted(ALL - uses):
    if flags.FLAGS[name].present:
      raise ValueError(f'--{name}: memory {verb} does not use it.')
  resume = asking.flag('resume') if verb not in BOOKS else None
  targets = (*targets, *([resume] if resume else []))
  count = 2 if verb == 'diff' or verb in PAIRS else 1
  if len(targets) != count:
    raise ValueError(f'memory {verb}: expected {count} to look at or to edit, '
                     f'got {len(targets)}; {usage()}.')
  for name in needs:
    if asking.flag(name) is None:
      raise ValueError(f'--{name}: memory {verb} needs it.')
  given = [name for name in sorted(_STORE) if flags.FLAGS[name].present]
  if given and verb not in BOOKS and all(map(_is_saved, targets)):
    raise ValueError(f'--{given[0]}: memory {verb} does not use it here, '
                     f'{targets[0]} is a saved state, of no store.')
  try:
    if verb in BOOKS:
      _journal(*targets)
    elif verb in LOOKS:
      _look(verb, *(_open(target, verb) for target in targets))
    elif verb in PAIRS:
      _merge(*targets)
    else:
      _edit(verb, _open(targets[0], verb))
  finally:
    if not all(map(_is_saved, targets)):
      asking.close()


def _journal(path):
  """Prints a journal whose chain is whole."""
  from statejax.artifact import journal
  if FORGET.value is not None and (pathlib.Path(path) / journal.LOG).is_file():
    book = journal.Journal(path)
    _require_head(path, book.head)  # of before: this moves it
    book.forget(FORGET.value, REASON.value)
  entries, head = journal.read(path)
  for entry in entries:
    print(json.dumps(entry))
  print(json.dumps({'edits': len(entries), 'head': head}))
  if FORGET.value is None:
    _require_head(path, head)


def _require_head(path, head):
  """Raises where another head than this was kept elsewhere."""
  if HEAD.value not in (None, head):
    raise ValueError(f'{path}: expected the head {HEAD.value}, got {head}; '
                     'edits were cut off, or others were added.')


def _look(verb, one, other=None):
  """Prints what there is, or what differs."""
  from statejax.memory import Memory
  from statejax.tasks import text
  memory, row = Memory(one.model, LAYER.value), ROW.value
  if verb == 'list':
    for slot in memory.list(one.state, row, **_wanted(one.model)):
      print(json.dumps(dataclasses.asdict(slot)))
  elif verb == 'export':
    print(json.dumps(memory.export(one.state, row, FIELDS.value, REDACT.value)))
  elif verb == 'diff':
    assert other is not None
    for slot, pair in memory.diff(one.state, other.state, row).items():
      before, after = map(dataclasses.asdict, pair)
      print(json.dumps({'slot': slot, 'before': before, 'after': after}))
  else:
    key = None if KEY.value is None else _tokens(KEY, one.model)
    tokens, _ = memory.read(one.state, SLOT.value, row, VERSION.value, key=key)
    print(json.dumps({
        'slot': SLOT.value if key is None else memory.list(
            one.state, row, key=key)[0].slot,
        'value': tokens} | ({'text': text.decode(tokens)} if (
            _reads_text(one.model)) else {})))


def _reads_text(model):
  from statejax.tasks import text
  return model.config.vocab == text.VOCAB


def _tokens(flag, model, said=None):
  """The tokens of what a flag says, [] for nothing."""
  from statejax.tasks import text
  said = flag.value if said is None else said
  if said is None:
    return []
  if _reads_text(model):
    return text.encode(said).tolist()
  try:
    return [int(x) for x in said.split(',')]
  except ValueError:
    raise ValueError(
        f'--{flag.name}={said}: expected numbers of tokens, e.g. 12,43, as '
        f'this model of {model.config.vocab} tokens reads no text.') from None


def _wanted(model):
  """{field: value} of --where."""
  out: dict[str, Any] = {}
  for entry in WHERE.value:
    name, found, value = entry.partition('=')
    if not found:
      raise ValueError(f'--where={entry}: expected a field of a slot and what '
                       'it must be, e.g. status=live.')
    if name in ('values', 'source'):
      raise ValueError(f'--where={entry}: expected another field, as what it '
                       'must be is not said in a word; list them all instead.')
    out[name] = (_tokens(WHERE, model, value) if name == 'key' else
                 int(value) if value.removeprefix('-').isdecimal() else value)
  return out


def _edit(verb, target):
  """Edits one slot, and keeps the state if that has changed it."""
  from statejax.artifact.journal import Journal
  from statejax.memory import Memory
  # What can refuse the child does so before the journal says that it is there.
  _require_room(target, 2 if LOCK.value else 1)
  target.may(None)
  # So does a row that is not there, or the journal would have its salts.
  Memory(target.model, LAYER.value).list(target.state, ROW.value)
  book = Journal(JOURNAL.value) if JOURNAL.value else None
  if book is not None:
    book.adopt(ROW.value, target.edited.salts)
  memory = Memory(target.model, LAYER.value, host=HOST.value,
                  principal=TENANT.value, journal=book)
  state, slot, params = target.state, SLOT.value, target.params
  where = dict(row=ROW.value, expect=EXPECT.value, reason=REASON.value)
  statement, key, value = (
      _tokens(flag, target.model) for flag in (STATEMENT, KEY, VALUE))
  if verb in ('write', 'overwrite'):
    state, receipt = memory.write(
        params, state, statement, key=key, value=value, slot=slot,
        ttl=TTL.value, **where)
  elif verb in ('alias', 'rekey'):
    state, receipt = getattr(memory, verb)(
        params, state, slot, statement, key, **where)
  else:
    more = {'expire': (TTL.value,), 'rollback': (STEPS.value,)}.get(verb, ())
    state, receipt = getattr(memory, verb)(state, slot, *more, **where)
  print(json.dumps(dataclasses.asdict(receipt)))
  if not receipt.changed:
    raise ValueError(f'memory {verb}: {_refused(receipt)}; nothing was '
                     'changed, and nothing saved.')
  receipts = [receipt]
  if LOCK.value:
    state, receipt = memory.lock(state, receipt.slot, row=ROW.value)
    print(json.dumps(dataclasses.asdict(receipt)))
    receipts.append(receipt)
  target.keep(state, _edited(memory, target.edited, receipts))


def _require_room(target, more):
  """Raises where an artifact would have too many edits for its manifest."""
  from statejax.artifact import manifest
  have = len(target.edited.edits)
  if target.origin is not None and have + more > manifest.MAX_EDITS:
    raise ValueError(f'memory: expected at most {manifest.MAX_EDITS} edits of '
                     f'an artifact, this one has {have}; nothing was changed. '
                     'Absorb the tokens again, and edit what comes of that.')


def _refused(receipt):
  """The outcome, and what to do about it."""
  return f'{receipt.outcome}' + {
      'forbidden': ', it wants --host',
      'missing': ', there is none that this principal owns; see memory list, '
                 'and --tenant for those of another',
      'conflict': f', the slot has version {receipt.version}, and the key is '
                  'its own or must be; see memory list',
      'locked': ', it is protected; unlock it first, with --host if a host did',
      'full': ', no slot may be taken, or no name',
      'invalid': ', it cannot be done to what the slot holds, see memory list',
  }.get(receipt.outcome, '')


def _merge(first, second):
  """Takes slots of the second target over into the first."""
  from statejax.artifact.journal import Journal
  from statejax.memory import Memory
  if _is_saved(first) != _is_saved(second):
    raise ValueError('memory merge: expected two saved states or two artifacts,'
                     ' got one of each; a child names both as its parents.')
  one, other = _open(first, 'merge'), _open(second, 'merge')
  merge = lambda memory: memory.merge(
      one.state, other.state, ROW.value, ROW.value, REASON.value)
  memory = Memory(one.model, LAYER.value, host=HOST.value,
                  principal=TENANT.value)
  _require_room(one, sum(r.changed for r in merge(memory)[1].values()))
  one.may(other.origin)
  book = Journal(JOURNAL.value) if JOURNAL.value else None
  if book is not None:
    book.adopt(ROW.value, one.edited.salts)
  memory = dataclasses.replace(memory, journal=book)
  state, found = merge(memory)
  for slot, receipt in found.items():
    print(json.dumps({'theirs': slot, **dataclasses.asdict(receipt)}))
  changed = [receipt for receipt in found.values() if receipt.changed]
  if not changed:
    raise ValueError(f'memory merge: none of {len(found)} slots that are not '
                     f'the same in {second} could be taken over; nothing was '
                     'changed, and nothing saved.')
  one.keep(state, _edited(memory, one.edited, changed), other.origin)


def _edited(memory, before, receipts):
  """The `mint.Edited` after these edits of it."""
  salts = before.salts
  gone = {f'{memory.layer}/{r.oid}' for r in receipts if r.op == 'purge'}
  if memory.journal is not None:
    salts = salts | memory.journal.salts(ROW.value)
    gone |= memory.journal.forgotten(ROW.value)
  return dataclasses.replace(
      before, salts={n: x for n, x in salts.items() if n not in gone},
      edits=(*before.edits, *((r.length, r.mark) for r in receipts)))


def _open(target, verb):
  """The `_Target` of a directory, a name or an id."""
  from statejax.artifact import manifest
  path = pathlib.Path(target)
  if _is_saved(target):
    return _saved(target, verb)
  if asking.elsewhere(target) and not (path / manifest.NAME).is_file():
    raise ValueError(f'{target}: expected a saved state or an artifact, got '
                     'something else; make one with generate --save or state '
                     'mint.')
  if not asking.is_store():
    raise ValueError(f'{target}: expected a saved state, or an artifact of a '
                     f'store; there is no store at {asking.STORE.value}, name '
                     'one with --store.')
  if asking.flag('save') is not None:
    raise ValueError(f'--save: {target} is no saved state, and an edit of an '
                     'artifact makes an artifact of the store, nothing beside '
                     'it.')
  return _artifact(target, verb in EDITS or verb in PAIRS)


def _is_saved(target):
  from statejax.artifact import serving
  return (pathlib.Path(target) / serving.ABOUT).is_file() and (
      asking.elsewhere(target))


def _saved(path, verb):
  from statejax.artifact import mint, serving
  from statejax.train import restore
  save, workdir = asking.flag('save'), asking.flag('workdir')
  if verb in EDITS or verb in PAIRS:
    if save is None:
      raise ValueError(f'--save: memory {verb} needs it for a saved state.')
    asking.free(pathlib.Path(save))
  if asking.flag('ref') is not None:
    raise ValueError('--ref: a saved state has no name; it is where --save says'
                     '.')
  if workdir is None:
    raise ValueError('--workdir: name the directory of the run.')
  model, params = restore.from_workdir(workdir)
  state, edits = serving.load_state(path, model, params), serving.edits(path)
  row = ROW.value
  def keep(state, edited, *_):
    serving.save_state(save, model, params, state, edits=[
        edited.edits if i == row else old for i, old in enumerate(edits)])
  return _Target(state, model, params, keep, mint.Edited(
      edits[row] if 0 <= row < len(edits) else ()))


def _artifact(key, charged):
  """Loads an artifact as `state resume` does, with all its checks.

  Args:
    key: of the artifact.
    charged: see `load.load`.
  """
  from statejax.artifact import load, verify
  from statejax.artifact import mint as minting
  shop = asking.shop()
  if asking.elsewhere(key):
    folder, key = key, verify.head(key)[3]
    if not shop.place(key).exists() or not shop.place(key).samefile(folder):
      raise ValueError(f'{folder}: expected an artifact of the store at '
                       f'{asking.STORE.value}; take it in there, or name its '
                       'store with --store.')
  name, who = asking.flag('ref'), asking.who(shop, key)
  if name is not None:
    asking.vacant(shop, name, who)
  model, params, digest = asking.model()
  ref = shop.catalog.ref(key)
  room = asking.room(asking.size(shop, key, who)[0])
  found = load.load(shop, who.granted_for or key, who,
                    asking.host(model, digest, room), charged=charged)
  asking.told(found.decision)
  if charged:
    asking.nameless(ref, key)
  origin = minting.Parent(found.id, found.about)
  def terms_with(slots):
    terms = minting.Terms.of(found.about)
    return dataclasses.replace(terms, sealed=terms.sealed or (
        slots is not None and slots.about['sealed'] != 'none'))
  def may(slots):
    minting.may_go_on(shop, origin, terms_with(slots), who, slots)
  def keep(state, edited, slots=None):
    # Without the transcript: what absorbs it again would undo the edit.
    asking.say(minting.mint(
        shop, state, 0, found.host, terms_with(slots), principal=who,
        edited=edited, parent=origin, slots=slots,
        # An edit absorbs no token: what it took to come here is the same.
        account=found.about['account'], ref=name or (key if ref else ''),
        # A name that is not theirs stays, as where they resume it.
        expect=ref[1] if ref and not name else 0))
  return _Target(found.state, model, params, keep, found.edited, may, origin)
