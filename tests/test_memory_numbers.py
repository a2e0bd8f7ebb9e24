"""Edits of a memory: numbers, places, who looks, and the journal's files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from test_memory import MODEL, RULES, begun, changed, params

from statejax import edit_events, slot_facts
from statejax import memory as mem
from statejax import state as st
from statejax.artifact import (
  access,
  digest,
  identity,
  load,
  manifest,
  mint,
  objects,
  outcome,
)
from statejax.artifact import journal as jn
from statejax.ops import slots as sl

WRONG = {
    'principal': [2 ** 32, 2 ** 31, -2, 0.5, True, 'me'],
    'slot': [4, -1, 1.5, True, np.True_, 2 ** 32, 2 ** 32 + 1, None, '1'],
    'row': [2, -1, 0.5, False, 2 ** 32], 'expect': [
        -1, 1.0, True, 2 ** 31, 2 ** 32 + 1],
    'steps': [0, 1.0, True, 2 ** 32 + 1], 'ttl': [0, 1.5, True, 2 ** 31 - 1]}


def test_no_number_is_rounded_or_wrapped():
  memory, state = begun()
  state, _ = memory.write(params(), state, [3, 25], key=[11], value=[29],
                          slot=1)
  calls = {
      'principal': lambda x: dataclasses.replace(memory, principal=x),
      'slot': lambda x: memory.delete(state, x),
      'row': lambda x: memory.delete(state, 1, row=x),
      'expect': lambda x: memory.delete(state, 1, expect=x),
      'steps': lambda x: memory.rollback(state, 1, steps=x),
      'ttl': lambda x: memory.expire(state, 1, x)}
  tried = wrongly = 0
  for name, values in WRONG.items():
    for x in values:
      tried += 1
      try:
        calls[name](x)
        wrongly += 1
        print(f'accepted: {name}={x!r}')
      except ValueError as error:
        assert str(error).startswith(f'{name}: expected '), error
  # Under jit their kind is known, if not what they are.
  tried += 1
  rows = np.array([True, False])
  with pytest.raises(ValueError, match='slot: expected integers .*got float'):
    jax.eval_shape(lambda x: memory.events('delete', rows, slot=x), np.ones(2))
  print(f'NUMBERS: tried {tried}, accepted wrongly {wrongly}')
  assert not wrongly
  # What is an integer is one, whatever library it is of.
  assert memory.delete(state, np.int64(1), row=jnp.int32(0),
                       expect=np.uint8(2))[1].changed
  assert dataclasses.replace(memory, principal=2 ** 31 - 1).delete(
      state, 1)[1].outcome == 'missing'
  for look in (memory.list, memory.export):
    with pytest.raises(ValueError, match='row: expected 0 to 1, got 3'):
      look(state, row=3)
  with pytest.raises(ValueError, match='as many rows as the state'):
    mem.commit(MODEL, 'memory', state, memory.events('delete', [True] * 3))


def test_edits_commute_with_forks_and_with_places():
  memory, state = begun()
  fork = lambda state: st.put(state, 1, st.take(state, 0))
  first = fork(memory.delete(state, 1)[0])
  then, _ = memory.delete(fork(state), 1, row=1)
  assert changed(st.take(first, 1), st.take(then, 1)) == set()
  other, _ = memory.delete(fork(state), 0, row=1)
  assert 'witness' in {x[0] for x in changed(then, other)}


def test_a_reason_and_a_lock_are_written_down(tmp_path):
  memory, state = begun(journal=jn.Journal(tmp_path / 'edits'))
  state, receipt = memory.write(
      params(), state, [3, 13], key=[13], value=[5], lock=True, expect=None,
      reason='told so')
  assert (receipt.op, receipt.reason, receipt.principal) == (
      'write', 'told so', 0)
  assert memory.list(state)[3].lock == 'stream'
  write, lock = memory.journal.entries[-2:]
  assert (write['reason'], lock['op'], lock['before']) == (
      'told so', 'lock', write['after'])
  over = lambda slot, expect: memory.overwrite(
      params(), state, slot, expect, [3, 10], key=[10], value=[6])
  assert (over(0, 2)[1].outcome, over(0, 1)[1].version) == ('conflict', 2)
  for slot, expect in ((None, 1), (0, None)):
    with pytest.raises(ValueError, match='expected an integer'):
      over(slot, expect)
  # What is refused locks nothing.
  new, receipt = memory.write(params(), state, [3, 10], key=[10], value=[6],
                              expect=7, lock=True)
  assert receipt.outcome == 'conflict' and new is state
  for reason in ('a\nb', 'x' * 201, 3):
    with pytest.raises(ValueError, match='reason: expected one line'):
      memory.delete(state, 1, reason=reason)


def test_what_is_looked_for():
  memory, state = begun()
  state, _ = memory.delete(state, 2)
  assert [s.slot for s in memory.list(state, status='live')] == [0, 1]
  assert [s.slot for s in memory.list(state, key=[12], version=2)] == [2]
  assert memory.list(state, key=[12], version=1) == []
  for where, why in (
      ({'statuses': 'live'}, 'fields: .*got .*statuses'),
      ({'status': 'alive'}, "status: expected one of empty, .*; got 'alive'"),
      ({'lock': 2}, 'lock: expected one of open, stream, host; got 2'),
      ({'version': '2'}, "version: expected an integer .*, got '2'"),
      ({'key': 12}, 'key: expected integers, got 12'),
      ({'values': [5]}, 'values: expected lists of integers')):
    with pytest.raises(ValueError, match=why):
      memory.list(state, **where)
  assert [s.slot for s in memory.list(state, values=[[21, 7]])] == [1]
  assert memory.read(state, key=[11])[0] == (21, 7)
  for ask, why in (({'key': [13]}, 'one slot of it, got none'),
                   ({'key': [12]}, 'it is tombstone'), ({}, 'one of them'),
                   ({'slot': 1, 'key': [11]}, 'one of them'),
                   ({'slot': 1, 'version': 1.0}, 'version: expected an int')):
    with pytest.raises(ValueError, match=why):
      memory.read(state, **ask)
  twice, _ = dataclasses.replace(memory, principal=3).write(
      params(), state, [3, 11], key=[11], value=[4])
  with pytest.raises(ValueError, match=r'one slot of it, got \[1, 3\]'):
    memory.read(twice, key=[11])
  some = memory.export(state, fields=('slot', 'values', 'owner'))['slots'][0]
  assert some == {'slot': 0, 'values': ((20, 7),), 'owner': 0}
  assert memory.export(state, fields=('slot',), redact=True)[
      'slots'][0] == {'slot': 0}
  for fields, why in ((('salt',), 'salt'), ((), 'none')):
    with pytest.raises(ValueError, match=f'fields: .*got .*{why}'):
      memory.export(state, fields=fields)


def test_another_key_is_the_hosts_to_give():
  memory, state = begun()
  rekey = lambda m: m.rekey(params(), state, 1, [3, 14], [14])
  assert rekey(memory)[1].outcome == 'forbidden'
  new, receipt = rekey(dataclasses.replace(memory, host=True))
  assert receipt.changed and receipt.op == 'rekey'
  assert {x[0] for x in changed(state, new)} == {
      'key', 'key_span', 'seq', 'witness'}
  assert memory.read(new, key=[14])[0] == (21, 7)
  # It is found by it: a write of the key is one of this slot.
  assert memory.write(params(), new, [3, 14], key=[14], value=[9])[
      1].slot == 1


def test_many_rows_are_edited_in_one_program():
  memory, state = begun()
  for token in (10, 11):
    state, _ = memory.write(params(), state, [3, token], key=[token],
                            value=[5], row=1)
  @jax.jit
  def edit(state, slots):
    return mem.commit(MODEL, 'memory', state, memory.events(
        'delete', jnp.ones(2, bool), slot=slots))
  new, gone = edit(state, jnp.array([2, 0]))
  # The journal and the witnesses are not of the program.
  assert {x[1] for x in changed(state, new)} == {0, 1}
  assert 'witness' not in {x[0] for x in changed(state, new)}
  middle, receipts = memory.noted(state, new, 'delete', gone, reason='both')
  assert [(r.row, r.slot, r.outcome, r.reason) for r in receipts] == [
      (0, 2, 'committed', 'both'), (1, 0, 'committed', 'both')]
  one, _ = memory.delete(state, 2, reason='both')
  want, _ = memory.delete(one, 0, row=1, reason='both')
  assert changed(middle, want) == set()
  # A write of one of the rows.
  fields = memory.payload(params(), [3, 15], [15], [6])
  last, wrote = mem.commit(MODEL, 'memory', middle, memory.events(
      'write', np.array([False, True]), **fields))
  end, (receipt,) = memory.noted(middle, last, 'write', wrote)
  want, two = memory.write(params(), want, [3, 15], key=[15], value=[6], row=1)
  assert receipt == two and changed(end, want) == set()
  both = jax.tree.map(lambda x: np.concatenate([x, x], axis=1), wrote)
  with pytest.raises(ValueError, match='receipts of one event of each row'):
    memory.noted(middle, last, 'write', both)
  rows = np.ones(2, bool)
  for make, why in (
      (lambda: memory.events('fly', rows), 'op: expected one of null'),
      (lambda: memory.events('delete', [1, 0]), r'mine: expected \[B\] bool'),
      (lambda: memory.events('delete', rows, host=True), 'got host'),
      (lambda: memory.events('delete', rows, slot=[1, 2, 3]), r'got \(3,\)'),
      (lambda: memory.events('delete', rows, slot=np.int64(2 ** 32)),
       'slot: expected integers of -1'),
      (lambda: memory.events('delete', rows, slot=1.5), 'slot: expected int')):
    with pytest.raises(ValueError, match=why):
      make()
  blank = edit_events.of_rows(RULES, 'null', rows, {}, principal=0, host=False)
  assert sl.OPS[int(blank.op[0, 0])] == 'null'


def test_files_of_a_journal_are_not_lost_in_silence(tmp_path):
  memory, state = begun(journal=jn.Journal(tmp_path / 'edits'))
  host = dataclasses.replace(memory, host=True)
  host.purge(state, 2)
  salts = tmp_path / 'edits/slots.json'
  kept = salts.read_text()
  entries, head = jn.read(tmp_path / 'edits')
  assert (entries, head) == (memory.journal.entries, memory.journal.head)
  assert jn.Journal(tmp_path / 'edits').head == head
  salts.unlink()
  with pytest.raises(ValueError, match='2 of them are lost, e.g. .*memory/0/0'):
    jn.Journal(tmp_path / 'edits')
  for text in ('{', '[]', '{"memory/0/0": 3}', '{"memory/0/0": "00"}'):
    salts.write_text(text)
    with pytest.raises(ValueError, match='slots.json: expected salts of 32'):
      jn.Journal(tmp_path / 'edits')
  salts.write_text(json.dumps({'memory/0/0': json.loads(kept)['memory/0/0']}))
  with pytest.raises(ValueError, match='1 of them are lost'):
    jn.Journal(tmp_path / 'edits')
  for path in ('no/edits', 'edits/slots.json'):
    with pytest.raises(ValueError, match='expected a directory, or the name'):
      jn.Journal(tmp_path / path)
    with pytest.raises(ValueError, match='expected a journal of edits'):
      jn.read(tmp_path / path)
  log = tmp_path / 'edits/journal.jsonl'
  log.write_bytes(log.read_bytes()[:-3])
  with pytest.raises(ValueError, match='expected whole lines'):
    jn.read(tmp_path / 'edits')


def test_what_is_purged_is_in_no_file_of_an_artifact(tmp_path):
  memory, state = begun(journal=jn.Journal(tmp_path / 'edits'))
  bank = jax.device_get(memory.bank(st.take(state, 0)))
  secret = [bank.value[0, 1, 0].tobytes(), bank.key[0, 1].tobytes(),
            np.array([21, 7], np.int32).tobytes(),
            slot_facts.plain(bank, 1)['bits']['value'].encode()]
  shop = objects.Store(tmp_path / 'store', objects.Secrets(tmp_path / 'keys'))
  host = identity.Host(
      MODEL.config, MODEL.state_schema, digest.tree_digest(params()),
      program=identity.Program(capacity=32), tokenizer={'bytes': b'1'})
  marks = []
  def found(state, name):
    edited = mint.Edited(tuple(marks), memory.journal.salts(0))
    kept = mint.mint(shop, state, 0, host, mint.Terms('alice'), ref=name,
                     edited=edited)
    got = load.load(shop, kept.id, access.Principal('alice'), host)
    assert got.edited == edited and 'memory/0' in edited.salts
    assert ('memory/1' in edited.salts) == (name == 'before')
    leaves = [np.asarray(x).tobytes() for _, x, _, _ in st.leaves(
        jax.device_get(st.live(got.state, 0)))]
    # The payload packs what is small: all that is in it, unpacked.
    base = next(shop.place(kept.id).rglob('manifest.ocdbt')).parent
    inside = tensorstore.KvStore.open(
        {'driver': 'ocdbt', 'base': f'file://{base}/'}).result()
    chunks = [inside.read(k).result().value for k in inside.list().result()]
    files = [p.read_bytes() for where in (shop.place(kept.id), tmp_path /
                                          'edits')
             for p in where.rglob('*') if p.is_file()]
    return [any(x in data for group in groups for data in group)
            for groups in ([leaves], [chunks, files]) for x in secret]
  # The test sees what is there.
  assert found(state, 'before') == [True, True, True, False] * 2
  new, receipt = dataclasses.replace(memory, host=True).purge(state, 1)
  assert receipt.changed and receipt.mark
  marks.append((receipt.length, receipt.mark))
  assert found(new, 'after') == [False] * 8
  marks *= 1025
  with pytest.raises(outcome.Refused, match='edits: expected at most 1024'):
    found(new, 'more')


def test_salts_in_an_artifact_are_parsed_first():
  good = b'{"memory/0":"' + b'0' * 32 + b'"}'
  assert manifest.parse_slots(good) == {'memory/0': '0' * 32}
  for bad in (b'{', b'[]', good[:-3] + good[-2:], good.replace(b'0"', b'x"'),
              b' ' + good, good.replace(b'/', b'//')):
    with pytest.raises(outcome.Refused, match='slots.json') as error:
      manifest.parse_slots(bad)
    assert error.value.code == 'E_PLAIN'
