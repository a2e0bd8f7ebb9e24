"""Edits of a live memory: they do what they say, to one slot, or nothing."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import forget, slot_facts
from statejax import memory as mem
from statejax import model as lm
from statejax import state as st
from statejax.artifact import journal as jn
from statejax.artifact import names, serving
from statejax.layers import slots as layer
from statejax.ops import slots as sl

RULES = c.SlotRules(slots=4, key=8, value=6, span=3, key_span=2, aliases=2)
SLOTS = c.SlotsConfig(RULES, segment=8, events=2, statement=4, confidence=0.9)
MODEL = lm.LanguageModel(c.ModelConfig(
    vocab=32, width=16,
    layers=(c.LayerConfig('memory', SLOTS, c.SwiGLUConfig(16)),
            c.LayerConfig('kda', c.KDAConfig(heads=2, key=4, value=4, chunk=4),
                          c.SwiGLUConfig(16))),
    groups=(c.GroupConfig(('memory', 'kda')),)))


WANT = {name: layer.WANTS.index(getattr(sl, name.upper()))
        for name in ('write', 'lock', 'unlock', 'delete', 'alias')}


@functools.cache
def params():
  """The memory comes first and asks as it writes, so that a token reads what a
  statement that ends with it has written; on its own it writes nothing."""
  found = jax.jit(MODEL.init)(jax.random.key(0))
  mixer = found['group_0']['layer_0']['mixer']
  mixer['query'] = mixer['key']
  mixer['want'] = jax.tree.map(jnp.zeros_like, mixer['want'])
  # Of all versions the present one.
  mixer['version'] = jax.tree.map(jnp.zeros_like, mixer['version'])
  return found


@functools.cache
def _program():
  return jax.jit(functools.partial(lm.forward, MODEL, keep='last'))


def heard(state, *rows, want=None):
  """The logits after the last token of each row, and the state; with `want` the
  last of the first row wants this of the memory.

  One program for up to ten tokens, as a step takes longer to compile than all
  of these tests to run.
  """
  tokens, force = np.zeros((2, 2, 10), np.int32)
  n_valid = np.array([len(row) for row in rows], np.int32)
  for row, said in enumerate(rows):
    tokens[row, :len(said)] = said
  force[0, n_valid[0] - 1] = 0 if want is None else WANT[want]
  logits, state, _ = _program()(params(), state, tokens, n_valid,
                                hints={'force': force})
  return np.asarray(logits[:, 0]), state


@functools.cache
def blank():
  """Two rows that have read nothing."""
  return MODEL.init_state(2, 32, logits=True)


@functools.cache
def started():
  return heard(blank(), [1, 1], [1, 1])[1]


def begun(memory=None, journal=None):
  """Two rows; the first knows of the tokens 10, 11 and 12, by edits."""
  memory = mem.Memory(MODEL, journal=journal) if memory is None else memory
  state = started()
  for token in (10, 11, 12):
    state, receipt = memory.write(
        params(), state, [3, token], key=[token], value=[token + 10, 7])
    assert receipt.outcome == 'committed' and receipt.slot == token - 10
  return memory, state


def answers(state):
  """Logits of the first row after each of three questions, asked apart."""
  return [heard(state, [token], [])[0][0] for token in (10, 11, 12)]


def changed(old, new):
  """{(path, row, slot or -1)} of what differs in any bit."""
  out = set()
  for (path, a, axes, _), (_, b, _, _) in zip(st.leaves(old), st.leaves(new)):
    a, b = np.asarray(a), np.asarray(b)
    bits = f'u{a.itemsize}'
    at = [axes.index(n) for n in ('batch', 'slots') if n in axes]
    for index in zip(*np.nonzero(a.view(bits) != b.view(bits))):
      out.add((path.split('/')[-1], *([int(index[i]) for i in at] + [-1])[:2]))
  return out


def test_one_answer_flips_and_comes_back_bit_for_bit(tmp_path):
  memory, state = begun(journal=jn.Journal(tmp_path / 'edits'))
  before = answers(state)
  new, receipt = memory.write(params(), state, [3, 25], key=[11], value=[29],
                              slot=1, expect=1)
  assert receipt.outcome == 'committed' and receipt.version == 2
  after = answers(new)
  assert [np.array_equal(a, b) for a, b in zip(before, after)] == [
      True, False, True]
  assert memory.read(new, 1)[0] == (29,)
  assert memory.read(new, 1, version=1)[0] == (21, 7)
  back, receipt = memory.rollback(new, 1)
  assert receipt.version == 3
  assert all(map(np.array_equal, before, answers(back)))
  # The old states are what they were.
  assert all(map(np.array_equal, before, answers(state)))
  ops = [e['op'] for e in memory.journal.entries]
  assert ops == ['write'] * 4 + ['rollback']
  last, edit = memory.journal.entries[-1], memory.journal.entries[-2]
  assert last['before'] == edit['after'] != last['after']


EDITS = {
    'overwrite': lambda m, s: m.write(params(), s, [20], key=[11], value=[5],
                                      slot=1),
    'new': lambda m, s: m.write(params(), s, [20], key=[20], value=[5], ttl=9),
    'lock': lambda m, s: m.lock(s, 1), 'delete': lambda m, s: m.delete(s, 1),
    'alias': lambda m, s: m.alias(params(), s, 1, [20]),
    'expire': lambda m, s: m.expire(s, 1, ttl=3),
    'quarantine': lambda m, s: m.quarantine(s, 1),
    'rollback': lambda m, s: m.rollback(s, 1),
    'unlock': lambda m, s: m.unlock(s, 1),
    'restore': lambda m, s: m.restore(s, 1),
    'rekey': lambda m, s: dataclasses.replace(m, host=True).rekey(
        params(), s, 1, [3, 14], [14]),
    'purge': lambda m, s: dataclasses.replace(m, host=True).purge(s, 1)}


# What undoes something, and what that is.
UNDONE = {'rollback': 'overwrite', 'unlock': 'lock', 'restore': 'quarantine'}


@pytest.mark.parametrize('name', EDITS)
def test_an_edit_changes_its_slot_and_the_witness(name):
  memory, state = begun()
  if name in UNDONE:
    state, _ = EDITS[UNDONE[name]](memory, state)
  new, receipt = EDITS[name](memory, state)
  assert receipt.changed
  found = changed(state, new)
  rest = {x for x in found if x[0] != 'witness'}
  assert {x[1] for x in found} == {0} and len(found) > len(rest)
  if name == 'alias':
    assert {x[0] for x in rest} == {'alias_key', 'alias_oid'}
  else:
    assert {x[2] for x in rest if x[0] != 'next_oid'} == {
        3 if name == 'new' else 1}
    assert ('next_oid' in {x[0] for x in rest}) == (name == 'new')


def test_what_is_refused_changes_nothing():
  memory, state = begun()
  locked, _ = memory.lock(state, 1)
  gone, _ = memory.delete(state, 2)
  host = dataclasses.replace(memory, host=True)
  kept, _ = host.lock(state, 0)
  other = dataclasses.replace(memory, principal=5)
  write = functools.partial(memory.write, params(), statement=[20], key=[1],
                            value=[2])
  for edit, why in (
      (lambda: write(state, slot=1, expect=2), 'conflict'),
      (lambda: write(locked, slot=1), 'locked'),
      (lambda: memory.delete(locked, 1), 'locked'),
      (lambda: memory.delete(gone, 2), 'invalid'),
      (lambda: memory.unlock(kept, 0), 'locked'),
      (lambda: memory.rollback(state, 1), 'invalid'),
      (lambda: memory.delete(state, 3), 'missing'),
      (lambda: other.delete(state, 1), 'missing'),
      (lambda: memory.purge(state, 1), 'forbidden')):
    new, receipt = edit()
    assert receipt.outcome == why and not receipt.changed
    assert any(new is s for s in (state, locked, gone, kept))


def test_saved_restored_and_edited_is_edited_saved_and_restored(tmp_path):
  memory, state = begun()
  there = serving.save_state(tmp_path / 'a', MODEL, params(), state)
  restored = serving.load_state(tmp_path / 'a', MODEL, params())
  assert there == serving.state_digest(restored)
  for name in ('overwrite', 'delete', 'lock'):
    one, _ = EDITS[name](memory, restored)
    two, _ = EDITS[name](memory, state)
    assert serving.state_digest(one) == serving.state_digest(two)
  serving.save_state(tmp_path / 'b', MODEL, params(), two)
  assert not changed(serving.load_state(tmp_path / 'b', MODEL, params()), two)


def test_the_model_goes_on_from_an_edit_as_from_its_own():
  """A segment later the bank still has it, and expiry is kept."""
  memory, state = begun()
  state, _ = memory.expire(state, 0, ttl=5)
  _, state = heard(state, [12] * 10, [12] * 10)
  assert [s.slot for s in memory.list(state)] == [1, 2]
  slot = memory.list(state)[1]
  assert slot.reads == 10 and slot.t_first == 2 and slot.t_read == 11
  assert memory.list(state, row=1) == []


def test_the_journal_knows_its_order_and_no_content(tmp_path):
  book = jn.Journal(tmp_path / 'edits')
  memory, state = begun(journal=book)
  bank = jax.device_get(memory.bank(st.take(state, 0)))
  name, row = 'memory/0/1', slot_facts.plain(bank, 1)
  salt, shown = book.salt(name), book.entries[1]['after']
  assert jn.commitment(salt, row) == shown
  host = dataclasses.replace(memory, host=True)
  new, receipt = host.purge(state, 1)
  assert book.salt(name) is None and book.salt('memory/0/2') is not None
  assert receipt.changed and memory.list(new)[1].slot == 2
  text = (tmp_path / 'edits/journal.jsonl').read_text()
  both = text + (tmp_path / 'edits/slots.json').read_text()
  assert salt not in both and '[21, 7]' not in both
  for x in (bank.value[0, 1, 0], bank.key[0, 1]):
    assert x.tobytes().hex() not in both
    assert all(not (a == x).all(axis=-1).any()
               for path, a, _, _ in st.leaves(jax.device_get(new))
               if a.ndim and a.shape[-1] == x.size)
  again = jn.Journal(tmp_path / 'edits')
  assert again.entries == book.entries and again.head == book.head
  lines = text.splitlines()
  for bad in (lines[:1] + lines[2:], [lines[1], lines[0], *lines[2:]],
              [lines[0].replace('write', 'delete'), *lines[1:]]):
    (tmp_path / 'edits/journal.jsonl').write_text('\n'.join(bad) + '\n')
    with pytest.raises(ValueError, match='changed, lost or inserted'):
      jn.Journal(tmp_path / 'edits')


def test_a_journal_survives_a_crash_and_another_writer(tmp_path):
  book = jn.Journal(tmp_path / 'a')
  name = 'memory/0/3'
  assert book.commitment(name, {'x': 1}) != book.commitment(name, {'x': 2})
  book.append({'op': 'write'})
  log = tmp_path / 'a/journal.jsonl'
  kept = log.read_bytes()
  # Torn at any byte, the newline too, a line was never acknowledged.
  book.append({'op': 'purge', 'forgets': name})
  whole = log.read_bytes()
  for size in range(len(kept), len(whole)):
    log.write_bytes(whole[:size])
    again = jn.Journal(tmp_path / 'a')
    assert [e['op'] for e in again.entries] == ['write']
    assert log.read_bytes() == kept
  again.append({'op': 'lock'})
  assert [e['op'] for e in jn.Journal(tmp_path / 'a').entries] == [
      'write', 'lock']
  with pytest.raises(ValueError, match='but another one has appended'):
    book.append({'op': 'late'})
  # Between an entry and what it says: the salt goes when it is opened.
  log.write_bytes(whole)
  (tmp_path / 'a/slots.json').write_text(json.dumps({name: '00' * 16}))
  assert jn.Journal(tmp_path / 'a').salt(name) is None
  assert name not in (tmp_path / 'a/slots.json').read_text()


def test_who_is_pushed_out_keeps_a_salt_of_its_own(tmp_path):
  memory, state = begun(journal=jn.Journal(tmp_path / 'edits'))
  for token in (13, 14):
    state, receipt = memory.write(params(), state, [3, token], key=[token],
                                  value=[1])
  assert receipt.evicted == 0 and receipt.oid == 4
  last = memory.journal.entries[-1]
  assert memory.journal.entries[-2]['before'] == ''
  salts = [memory.journal.salt(f'memory/0/{i}') for i in (0, 4)]
  assert len(set(salts)) == 2 and last['before'] != last['after']


def test_what_was_pushed_out_can_be_forgotten(tmp_path):
  """What an entry says of it is then nobody's to guess."""
  book = jn.Journal(tmp_path / 'edits')
  memory, state = begun(journal=book)
  for token in (13, 14):
    state, receipt = memory.write(
        params(), state, [3, token], key=[token], value=[token + 10, 7])
  assert receipt.evicted == 0
  name = 'memory/0/0'
  with pytest.raises(ValueError, match='expected LAYER/ROW/OID of an object'):
    book.forget('memory/0/9')
  book.forget(name, reason='asked to')
  assert book.salt(name) is None and name.encode() not in (
      tmp_path / 'edits/slots.json').read_bytes()
  again = jn.Journal(tmp_path / 'edits')
  assert again.gone == {name} and again.entries[-1]['op'] == 'forget'
  # What is left goes on.
  other = dataclasses.replace(memory, journal=again)
  state, receipt = other.delete(state, 1)
  assert receipt.changed and jn.Journal(tmp_path / 'edits').gone == {name}


def test_a_purge_that_the_disk_refused_is_made_again(tmp_path, monkeypatch):
  book = jn.Journal(tmp_path / 'edits')
  memory, state = begun(journal=book)
  memory = dataclasses.replace(memory, host=True)
  replace = jn.os.replace

  def full(*_):
    raise OSError(28, 'no space')

  monkeypatch.setattr(jn.os, 'replace', full)
  with pytest.raises(OSError):
    memory.purge(state, 0)
  monkeypatch.setattr(jn.os, 'replace', replace)
  assert jn.Journal(tmp_path / 'edits').gone == {'memory/0/0'}
  # The state has it still, and nothing else may be done to it here.
  with pytest.raises(ValueError, match='has forgotten memory/0/0; purge that'):
    memory.delete(state, 0)
  new, receipt = memory.purge(state, 0)
  assert receipt.changed and receipt.before == receipt.after == ''
  assert memory.list(new)[0].oid != 0
  assert b'memory/0/0' not in (tmp_path / 'edits/slots.json').read_bytes()
  assert jn.Journal(tmp_path / 'edits').entries == book.entries


def test_what_was_forgotten_can_still_be_pushed_out(tmp_path):
  book = jn.Journal(tmp_path / 'edits')
  memory, state = begun(journal=book)
  book.forget('memory/0/0')
  for token in (13, 14):
    state, receipt = memory.write(
        params(), state, [3, token], key=[token], value=[token + 10])
  assert receipt.evicted == 0 and receipt.before == '' != receipt.after


def test_what_can_be_seen():
  memory, state = begun()
  new, _ = memory.delete(state, 1)
  (before, after), = memory.diff(state, new).values()
  assert before.status == 'live' and after.status == 'tombstone'
  assert after.values == () and after.key == (11,) and after.version == 2
  _, receipt = memory.delete(state, 1)
  assert {'layers/kda/matrix', 'layers/memory/near', 'layers/memory/want_value',
          'forks and artifacts'} <= set(receipt.carriers)
  assert 'layers/memory/value' not in receipt.carriers
  # Hidden at once, before anything empties it.
  late, _ = memory.expire(state, 1, ttl=1)
  _, late = heard(late, [1], [1])
  assert [s.slot for s in memory.list(late)] == [0, 2]
  with pytest.raises(ValueError, match='has expired at 3 tokens'):
    memory.read(late, 1)
  # Which is not what an edit of another slot does.
  assert list(memory.diff(late, memory.delete(late, 2)[0])) == [2]
  whole = memory.export(state)
  assert json.loads(json.dumps(whole))['slots'][0]['values'] == [[20, 7]]
  assert 'values' not in memory.export(state, redact=True)['slots'][0]


def expired():
  """Four slots of which the second has expired, and nothing has emptied it."""
  memory, state = begun()
  state, _ = memory.alias(params(), state, 1, [16])
  state, _ = memory.write(params(), state, [3, 13], key=[13], value=[23])
  state, _ = memory.expire(state, 1, ttl=1)
  return memory, heard(state, [1], [1])[1]


@pytest.mark.parametrize('op', [
    'delete', 'lock', 'quarantine', 'rollback', 'expire', 'alias', 'overwrite'])
def test_what_has_expired_is_nothing_to_edit(op):
  memory, state = expired()
  calls = {'rollback': lambda s: memory.rollback(s, 1),
           'expire': lambda s: memory.expire(s, 1, ttl=9),
           'alias': lambda s: memory.alias(params(), s, 1, [17]),
           'overwrite': lambda s: memory.overwrite(
               params(), s, 1, 1, [3, 11], key=[11], value=[9])}
  new, receipt = calls.get(op, lambda s: getattr(memory, op)(s, 1))(state)
  assert receipt.outcome == 'missing' and not changed(state, new)


def test_what_is_renewed_after_it_has_expired_stays():
  """A new object, in the slot of the old one: nobody else has to go."""
  memory, state = expired()
  new, receipt = memory.write(params(), state, [3, 11], key=[11], value=[21, 7])
  assert (receipt.outcome, receipt.slot) == ('committed', 1)
  assert receipt.evicted == -1
  assert (receipt.version, receipt.old_version, receipt.oid) == (1, 0, 4)
  assert {at[2] for at in changed(state, new) if at[0] == 'value'} <= {1}
  late = after_all(heard(new, [1] * 9, [])[1])
  assert [s.slot for s in memory.list(late)] == [0, 1, 2, 3]
  assert memory.read(late, key=[11])[0] == (21, 7)
  assert memory.list(late)[1].expires == -1
  # The name went with the old one, and is free for another.
  assert memory.alias(params(), late, 0, [16])[1].outcome == 'committed'
  # Any other new object takes the place as well.
  new, receipt = memory.write(params(), state, [3, 19], key=[19], value=[9])
  assert (receipt.slot, receipt.evicted) == (1, -1)
  assert [s.key for s in memory.list(new)] == [(10,), (19,), (12,), (13,)]


def test_what_has_expired_can_be_purged():
  memory, state = expired()
  host = dataclasses.replace(memory, host=True)
  new, receipt = host.purge(state, 1)
  assert receipt.outcome == 'committed' and receipt.oid == 1
  assert not np.asarray(new.layers['memory'].value[0, 0, 1]).any()


def wider():
  """Another model, with more slots."""
  more = dataclasses.replace(SLOTS, rules=dataclasses.replace(RULES, slots=5))
  return lm.LanguageModel(dataclasses.replace(
      MODEL.config, layers=tuple(
          dataclasses.replace(x, mixer=more) if x.name == 'memory' else x
          for x in MODEL.config.layers)))


def test_mistakes_are_named():
  memory, state = begun()
  with pytest.raises(ValueError, match='expected a version of 1 down to 1'):
    memory.read(state, 1, version=0)
  with pytest.raises(ValueError, match='slot: expected 0 to 3, got 4'):
    memory.delete(state, 4)
  with pytest.raises(ValueError, match='row: expected 0 to 1, got 2'):
    memory.delete(state, 1, row=2)
  with pytest.raises(ValueError, match='expected 1 to 7 tokens'):
    memory.write(params(), state, [1] * 8, key=[1], value=[1])
  for value in ([1] * 4, [32], [-1], [1.5], []):
    with pytest.raises(ValueError, match='value: expected 1 to 3 tokens'):
      memory.write(params(), state, [1], key=[1], value=value)
  with pytest.raises(ValueError, match='statement: .* integers below 32, got'):
    memory.write(params(), state, [99], key=[1], value=[1])
  with pytest.raises(ValueError, match='ttl: expected 1 to .*, got -3'):
    memory.expire(state, 1, ttl=-3)
  with pytest.raises(ValueError, match='expect: expected 0 to .*, got -7'):
    memory.delete(state, 1, expect=-7)
  other = wider().init_state(2, 32)
  gone, none = memory.events('delete', np.array([True, False])), [None]
  edited = mem.commit(MODEL, 'memory', state, gone)
  mistakes = {
      'key: expected integers, got': lambda: memory.read(state, key='sky'),
      'key: expected integers, got .None': lambda: memory.list(state, key=none),
      'row: expected an integer .* got 1.5': lambda: memory.export(state, 1.5),
      'list of some of .* got .key': lambda: memory.export(state, fields='key'),
      'redacted': lambda: memory.export(state, fields=['key'], redact=True),
      'value: expected 1 to 3': lambda: memory.write(
          params(), state, [1], key=[1], value=[[1], [1, 2]]),
      'memory: .* expected .*another model': lambda: memory.diff(
          state, other),
      'journal: expected': lambda: mem.Memory(MODEL, journal='edits'),
      'name: expected a slot layer': lambda: mem.commit(
          MODEL, 'kda', state, gone),
      'op: expected one of .* .foo': lambda: memory.noted(
          state, state, 'foo', None),
      'noted: expected the state right before': lambda: memory.noted(
          blank(), edited[0], 'delete', edited[1]),
      'slot 3, row 0: .* it is empty': lambda: memory.read(state, 3),
      'to be a directory; make it first': lambda: serving.save_state(
          '/no/such/folder', MODEL, params(), state),
      'slot: expected an integer': lambda: forget.plan(memory, state, 'x'),
      'slot: expected 0 to 3': lambda: forget.purge(memory, state, 7)}
  for text, call in mistakes.items():
    with pytest.raises(ValueError, match=text):
      call()
  broken = jax.tree.map(lambda x: x * jnp.nan, params())
  with pytest.raises(ValueError, match='expected a finite key and value'):
    memory.write(broken, state, [1], key=[1], value=[1])
  plain = lm.LanguageModel(dataclasses.replace(
      MODEL.config, groups=(c.GroupConfig(('kda',)),)))
  with pytest.raises(ValueError, match='expected a model with a slot layer'):
    mem.Memory(plain)


def after_all(state):
  """The state after so many tokens that nothing waits."""
  return heard(state, [1] * 6, [])[1]


# What waits, the edit, and what the slot is in the end.
WAITING = {
    'write, write': ('write', lambda m, p, s: m.write(
        p, s, [3, 10], key=[10], value=[9]), 'values', ((9,), (7,))),
    'delete, write': ('delete', lambda m, p, s: m.write(
        p, s, [3, 10], key=[10], value=[9]), 'values', ((9,), (7,))),
    'lock, write': ('lock', lambda m, p, s: m.write(
        p, s, [3, 10], key=[10], value=[9]), 'lock', 'stream'),
    'write, delete': ('write', lambda m, p, s: m.delete(s, 0),
                      'status', 'tombstone'),
    'lock, unlock': ('lock', lambda m, p, s: m.unlock(m.lock(s, 0)[0], 0),
                     'lock', 'open'),
    'unlock, lock': ('unlock', lambda m, p, s: m.lock(s, 0), 'lock', 'stream'),
    'write, expire': ('write', lambda m, p, s: m.expire(s, 0, ttl=20),
                      'expires', 22),
    'other write': ('write', lambda m, p, s: m.expire(s, 1, ttl=20),
                    'values', ((21, 10), (7,)))}


@pytest.mark.parametrize('case', WAITING)
def test_an_edit_is_not_undone_by_what_was_said_before_it(case):
  want, edit, field, expected = WAITING[case]
  memory, state = mem.Memory(MODEL), blank()
  for token in (10, 12):
    state, _ = memory.write(params(), state, [3, token], key=[token], value=[7])
  # It waits for the end of its segment of eight tokens.
  _, state = heard(state, [21, 10], [], want=want)
  state, receipt = edit(memory, params(), state)
  assert receipt.changed
  assert getattr(memory.list(after_all(state))[0], field) == (
      expected)


def test_what_is_said_after_an_edit_counts():
  memory, state = mem.Memory(MODEL), blank()
  state, receipt = memory.write(params(), state, [3, 10], key=[10], value=[9])
  state = after_all(heard(state, [21, 10], [], want='write')[1])
  assert memory.list(state)[0].values == ((21, 10), (9,))
  # The witness is that of the tokens and of the edit's mark between them.
  assert names.lanes(np.asarray(state.witness[0])) == names.witness(
      [21, 10, *[1] * 6], [(0, receipt.mark)])


@pytest.mark.parametrize('value', [(9,), (21, 10)])
def test_a_purge_takes_what_waits_with_it(value, tmp_path):
  """And does not claim that the model has never heard of it."""
  memory = mem.Memory(MODEL, journal=jn.Journal(tmp_path / 'edits'), host=True)
  state = blank()
  state, _ = memory.write(params(), state, [3, 10], key=[10],
                          value=list(value))
  assert forget.plan(memory, state, 0).mode == 'purge'
  _, said = heard(state, [21, 10], [], want='write')
  assert forget.plan(memory, said, 0) == forget.Plan(
      'replay', 0, 'the stream has spoken of it from 0 on, not yet in the slot')
  new, receipt = forget.purge(memory, said, 0)
  assert receipt.scope == 'bank' and 'layers/memory/want_value' in receipt.left
  assert 'token log' in receipt.left
  held = new.layers['memory']
  assert not np.asarray(held.want).any()
  assert not np.asarray(held.want_value).any()
  assert (np.asarray(held.want_span) == -1).all()
  assert not memory.list(after_all(new))
  # What has gone may not go on in this journal.
  with pytest.raises(ValueError, match='has forgotten memory/0/0'):
    memory.expire(state, 0, ttl=1)
  # What has expired is hidden, and there until the next commit.
  memory = mem.Memory(MODEL)
  state, _ = memory.expire(state, 0, ttl=1)
  _, state = heard(state, [1, 1], [])
  assert not memory.list(state)
  assert forget.plan(memory, state, 0).mode == 'replay'
  for slot, text in ((1, 'empty slot'), (9, 'expected 0 to 3, got 9')):
    with pytest.raises(ValueError, match=text):
      forget.plan(memory, state, slot)


def test_what_is_spelled_is_what_the_host_says():
  spells = c.LayerConfig('memory', dataclasses.replace(SLOTS, vocab=32),
                         c.SwiGLUConfig(16))
  model = lm.LanguageModel(dataclasses.replace(
      MODEL.config, layers=(spells,), groups=(c.GroupConfig(('memory',)),)))
  found = jax.jit(model.init)(jax.random.key(0))
  memory = mem.Memory(model)
  # As many rows as elsewhere, so that a commit is the same program.
  state = model.init_state(2, 0)
  write = lambda state, statement, key, value: memory.write(
      found, state, statement, key=key, value=value)
  state, receipt = write(state, [3, 10, 5, 21, 7], [10, 5], [21, 7])
  assert receipt.outcome == 'committed'
  # Around the key anything may stand; another key is another object.
  state, receipt = write(state, [9, 22, 10, 5, 4], [10, 5], [22])
  assert (receipt.slot, receipt.version) == (0, 2)
  state, receipt = write(state, [3, 5, 10, 21, 7], [5, 10], [21, 7])
  assert (receipt.slot, receipt.version) == (1, 1)
  state, receipt = memory.alias(found, state, 1, [8, 30], name=[30])
  assert receipt.changed
  state, receipt = write(state, [30, 2, 23], [30], [23])
  assert (receipt.slot, receipt.version) == (1, 2)
  # The key stands in the value as well.
  state, receipt = write(state, [30, 2, 30, 7], [30], [30, 7])
  assert (receipt.slot, receipt.version) == (1, 3)
  for statement, key, value, why in (
      ([3, 10, 4], [10], [9], r'value \[9\] in its .*\[3, 10, 4\]'),
      # Farther back than a writer looks nothing is spelled.
      ([22, 4, 4, 10, 5, 9], [10, 5], [22], r'value \[22\] in its last 4 '),
      ([10, 5, 4, 21, 7], [10, 5], [21, 7], r'key \[10, 5\] in its last 4 ')):
    with pytest.raises(ValueError, match=why):
      write(state, statement, key, value)
  with pytest.raises(ValueError, match='name: expected 1 to 2 tokens'):
    memory.alias(found, state, 1, [5, 6, 7, 8], name=[5, 6, 7])
