"""Many processes at one store: names move by compare and set, collections run,
and whoever reads sees a whole artifact.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys

import bare
import pytest

from statejax.artifact import collect

REFS = ('a', 'b', 'c')
START = '''
import json, os, pathlib, random, sys, time
sys.path.insert(0, {here!r})
import bare
from statejax.artifact import collect
from statejax.artifact.outcome import Refused
rng, path = random.Random({seed}), pathlib.Path({path!r})
shop, refs, now = bare.store(path), {refs!r}, time.monotonic_ns
def say(*event):
  print(json.dumps(event), flush=True)
def ref(name):
  return shop.catalog.ref(name) or ('', 0)
'''
WRITER = START + '''
for i in range({ops}):
  name = rng.choice(refs)
  start, (_, version) = now(), ref(name)
  other, _ = ref(rng.choice(refs))
  if other and rng.random() < 0.3:
    try:
      with shop.catalog.lease(other, f'mover-{seed}'):
        start = now()
        won, id = shop.catalog.move(name, other, version), other
    except Refused as error:
      assert error.code == 'E_ACL'  # collected in the meantime
      continue
  else:
    kept = bare.mint(shop, {seed} * 100_000 + i, ref=name, expect=version)
    won, id = not kept.conflict, kept.id
    if not won:
      try:
        assert bare.read(shop, id) == {seed} * 100_000 + i
      except (Refused, AssertionError) as error:
        say('half', name, version, id, str(error))
      shop.catalog.drop(kept.ref)
  say('write' if won else 'lost', name, version + 1, id, start, now())
'''
READER = START + '''
while not (path / 'stop').exists():
  name = rng.choice(refs)
  start, (id, version) = now(), ref(name)
  end = now()
  if id:
    try:
      bare.read(shop, id)
      say('read', name, version, id, start, end)
    except (Refused, AssertionError) as error:
      # It may be gone, if the name no longer needs it.
      gone = getattr(error, 'code', '') == 'E_ACL' and ref(name)[1] > version
      say(*(('late', name, version, id, start, end) if gone else
            ('half', name, version, id, str(error))))
'''
COLLECTOR = START + '''
while not (path / 'stop').exists():
  say('gc', len(collect.collect(shop, grace=0, generations=0).objects))
'''


# Forks them all, as starting Python costs more than what most of them do.
CROWD = """
import os, pathlib, sys
sys.path.insert(0, {here!r})
import bare
from statejax.artifact import collect
from statejax.artifact.outcome import Refused
path, running = pathlib.Path({path!r}), []
for number, code in enumerate({codes!r}):
  child = os.fork()
  if not child:
    os.dup2(os.open(path / f'{{number}}.out', os.O_WRONLY | os.O_CREAT), 1)
    try:
      exec(code, {{}})
      sys.stdout.flush()
      os._exit(0)
    except BaseException:
      sys.excepthook(*sys.exc_info())
    finally:
      os._exit(1)
  running.append(child)
ends = [os.waitpid(child, 0)[1] for child in running[:{writers}]]
(path / 'stop').touch()
ends += [os.waitpid(child, 0)[1] for child in running[{writers}:]]
print(sum(map(bool, ends)))
"""


def crowd(path, writers, ops):
  """Lets them all loose; returns {kind: events}, processes that have failed.
  """
  known = dict(here=os.path.dirname(__file__), path=str(path), refs=REFS)
  # Nobody has made the store: they all do at once.
  codes = [WRITER.format(seed=n + 1, ops=-(-ops // writers), **known)
           for n in range(writers)]
  codes += [code.format(seed=90 + n, **known) for n, code in enumerate(
      (READER, READER, COLLECTOR, COLLECTOR))]
  done = subprocess.run(
      [sys.executable, '-c', CROWD.format(
          codes=codes, writers=writers, **known)], check=True,
      stdout=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parent.parent.parent)
  events = collections.defaultdict(list)
  for number in range(len(codes)):
    for line in (path / f'{number}.out').read_text().splitlines():
      kind, *event = json.loads(line)
      events[kind].append(event)
  return events, int(done.stdout)


def linear(writes, reads):
  """Whether all that was seen of a name can have happened in one order.

  Every write has a version, so that there is only one order to test: nothing
  of a later version may have ended before something of an earlier one began.

  Args:
    writes, reads: (version, id, start, end).
  """
  ids = {version: id for version, id, _, _ in writes}
  if sorted(ids) != list(range(1, len(writes) + 1)):
    return False  # a version was given twice, or left out
  # A read comes after the write it sees.
  steps = sorted([(2 * v, start, end) for v, _, start, end in writes]
                 + [(2 * v + 1, start, end) for v, _, start, end in reads])
  latest, before, at = 0, 0, 0
  for step, start, end in steps:
    if step != at:
      before, at = latest, step
    if end < before:
      return False
    latest = max(latest, start)
  return all(ids.get(version) == id for version, id, _, _ in reads)


def check(path, writers, ops):
  events, aborts = crowd(path, writers, ops)
  given = collections.Counter(tuple(e[:2]) for e in events['write'])
  twice = sum(n - 1 for n in given.values())
  shop, moves = bare.store(path), 0
  for name in REFS:
    writes = [e[1:] for e in events['write'] if e[0] == name]
    reads = [e[1:] for e in events['read'] + events['late'] if e[0] == name]
    assert linear(writes, reads), name
    last = max(writes)
    assert shop.catalog.ref(name) == (last[1], last[0])
    moves += len(writes)
  collect.collect(shop, grace=0, generations=0)
  assert collect.check(shop) == []
  assert set(shop.catalog.objects()) == {
      id for id, _ in shop.catalog.refs().values()}
  assert set(shop.catalog.refs()) == set(REFS)
  gone = sum(n for n, in events['gc'])
  print(f'concurrent: {writers} writers, {ops} ops, {moves} moves won, '
        f'{len(events["lost"])} lost to another, {len(events["read"])} reads, '
        f'{len(events["late"])} late, {gone} collected beside them; half '
        f'artifacts {len(events["half"])}, versions given twice {twice}, '
        f'processes that failed {aborts}')
  assert not events['half'] and not twice and not aborts, events['half'][:3]
  return moves, gone


def test_a_thousand(memory):
  assert check(memory, 8, 1000)[0] > 100


@pytest.mark.slow
@pytest.mark.parametrize('ops', [1000, 20_000])
def test_many(tmp_path, ops):
  moves, gone = check(tmp_path, 8, ops)
  assert moves > ops // 10 and gone


def test_what_is_not_linear():
  one, two = (1, 'x', 0, 10), (2, 'y', 5, 20)
  assert linear([one, two], [(1, 'x', 1, 4), (2, 'y', 8, 30)])
  assert not linear([one, two], [(1, 'x', 25, 30)])  # an old version
  assert not linear([one, two], [(2, 'y', 1, 4)])  # before it was written
  assert not linear([one, two], [(2, 'x', 8, 30)])  # another's
  assert not linear([one, one], [])
  assert not linear([one, (3, 'y', 5, 20)], [])
  assert not linear([(1, 'x', 15, 20), (2, 'y', 5, 10)], [])
