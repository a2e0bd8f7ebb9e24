"""The mistakes that others made with such tasks are tests of this one."""

import collections

import numpy as np
import pytest

from statejax.tasks import lifecycle_text as task
from statejax.tasks import lifecycle_words as words
from statejax.tasks.lifecycle_text import Line

SIZE = 1200
SOURCE = task.LifecycleTextSource(SIZE, 5)
RECORDS = [SOURCE.record(i) for i in range(SIZE)]
OF = {name: [r for r in RECORDS if r.scenario == name]
      for name in task.SCENARIOS}


def said(record, kinds=('update', 'audit', 'reject')):
  """All values that lines give the target, in order."""
  key = record.questions[0].key
  return [x.value for x in record.lines if x.key == key and x.kind in kinds]


def test_truth():
  a, b = (0, 0, 1), (0, 0, 2)
  lines = [Line('update', a, 1), Line('update', b, 2), Line('update', a, 3),
           Line('audit', a, 1), Line('reject', a, 9), Line('lock', a),
           Line('update', a, 4), Line('delete', a), Line('delete', b)]
  assert task.truth(lines) == {a: [1, 3], b: []}
  lines += [Line('unlock', a), Line('update', a, 5), Line('update', b, 6)]
  assert task.truth(lines) == {a: [1, 3, 5], b: [6]}


@pytest.mark.parametrize('name', task.SCENARIOS)
def test_answer(name):
  """The last mention is what the scenario wants it to be."""
  for record in OF[name]:
    answer, last = record.questions[0].answer, said(record)[-1]
    if name in ('base', 'alias', 'pressure', 'near', 'all_locked', 'rewrite'):
      assert answer == last
    elif name == 'delete':
      assert answer is None
    elif name == 'before':
      assert answer == said(record)[-2]
    else:
      assert answer != last
      assert answer in said(record, ('update',))
      fresh = last not in said(record)[:-1]
      assert fresh == (name != 'stale')
    assert (record.questions[0].name == record.questions[0].key) == (
        name != 'alias')


@pytest.mark.parametrize('name', task.SCENARIOS)
def test_no_other_rule(name):
  """The first mention answers nothing that has a second."""
  right = [said(r)[0] == r.questions[0].answer for r in OF[name]]
  if name in ('pressure', 'all_locked'):
    assert all(right)  # each key is said once: there it is eviction that counts
  else:
    assert sum(right) <= 0.35 * len(right)  # a lock after the first update


def test_position():
  """A line of the target may stand anywhere: chi-square, 10 bins."""
  at = []
  for i, r in enumerate(OF['base'] + OF['near'] + OF['before']):
    mine = [j for j, x in enumerate(r.lines) if x.key == r.questions[0].key]
    at.append((mine[i % len(mine)] + 0.5) / len(r.lines))
  count = np.histogram(at, 10, (0, 1))[0]
  expected = len(at) / 10
  assert np.sum((count - expected) ** 2 / expected) < 21.7  # 1 %, 9 degrees


def test_position_of_pressure():
  at = []
  for r in OF['pressure']:
    keys = [x.key for x in r.lines if x.kind == 'update']
    assert len(set(keys)) == len(keys) == task.MANY
    at.append(keys.index(r.questions[0].key))
  at = np.array(at)
  assert np.mean(at < 16) >= 0.5
  for low, high in ((0, 16), (16, 48)):
    some = at[(at >= low) & (at < high)]
    count = np.histogram(some, 4, (low, high))[0]
    expected = len(some) / 4
    assert np.sum((count - expected) ** 2 / expected) < 11.3  # 1 %, 3 degrees


def test_all_locked():
  late = []
  for r in OF['all_locked']:
    kinds = collections.Counter(x.kind for x in r.lines)
    assert kinds == {'update': task.HELD + 4, 'lock': task.HELD, 'filler': 1}
    locked = {x.key for x in r.lines if x.kind == 'lock'}
    late.append(r.questions[0].key not in locked)
  assert 0.3 < np.mean(late) < 0.7


def test_names_and_values_mean_one_thing():
  for r in RECORDS:
    written = [x.value for x in r.lines if x.kind == 'update']
    assert len(set(written)) == len(written)
    tags = [x.tag for x in r.lines if x.kind == 'alias']
    assert len(set(tags)) == len(tags)


def test_near():
  for r in OF['near']:
    key = r.questions[0].key
    for other in {x.key for x in r.lines if x.key} - {key}:
      a, b = (words.name(k).split() for k in (key, other))
      assert sum(x != y for x, y in zip(a, b)) == 1


def test_splits_share_no_name_and_no_frame():
  names, frames = {}, {}
  for split in words.SPLITS:
    source = task.LifecycleTextSource(120, 7, split)
    lines = [x for i in range(120) for x in source.record(i).lines]
    names[split] = {x.key for x in lines if x.key} | {
        x.tag for x in lines if x.tag}
    frames[split] = set()
    for i in range(120):
      item = source[i]
      text = words.decode(item['tokens'][:item['n_valid']])
      for line, _ in zip(text.split(' . '), source.record(i).lines):
        first = [o for o in words.OPENINGS if line.startswith(o + ' ')]
        last = [o for o in words.CLOSES if line.endswith(' ' + o)]
        frames[split].add((*first, *last))
  for a in words.SPLITS:
    assert len(frames[a]) >= 24
    for b in words.SPLITS:
      if a != b:
        assert not names[a] & names[b]
        assert not frames[a] & frames[b]


def test_void_lines_are_worded_like_others():
  """What a lock makes void can be told by the lock alone."""
  source = task.LifecycleTextSource(240, 9, scenarios=('protected', 'relock'))
  cues = {True: collections.Counter(), False: collections.Counter()}
  for i in range(240):
    record, item = source.record(i), source[i]
    text = words.decode(item['tokens'][:item['n_valid']]).split(' . ')
    locked = set()
    for line, said_ in zip(record.lines, text):
      if line.kind == 'lock':
        locked.add(line.key)
      elif line.kind == 'unlock':
        locked.discard(line.key)
      elif line.kind == 'update':
        cue = [c for c in words.CUES['update'] if f' {c} ' in said_]
        assert len(cue) == 1
        cues[line.key in locked][cue[0]] += 1
  assert set(cues[True]) == set(cues[False]) == set(words.CUES['update'])


def test_lines_about_nothing_say_nothing_of_the_others():
  for i in range(60):
    record, item = SOURCE.record(i), SOURCE[i]
    text = words.decode(item['tokens'][:item['n_valid']]).split(' . ')
    facts = {words.value(x.value) for x in record.lines if x.value is not None}
    names = {words.name(x.key) for x in record.lines if x.key}
    for line, said_ in zip(record.lines, text):
      if line.kind == 'filler':
        assert not any(f in said_ for f in facts | names)


def test_the_log_does_not_know_the_question():
  """More questions, same log: what is kept of it cannot depend on them."""
  one, more = (task.LifecycleTextSource(SIZE, 5, questions=n, length=2000)
               for n in (1, 3))
  for i in range(24):
    assert more.record(i).lines == one.record(i).lines
    a, b = one[i], more[i]
    until = int(np.flatnonzero(a['targets'] >= 0)[0]) - 12
    np.testing.assert_array_equal(a['tokens'][:until], b['tokens'][:until])


def test_hints():
  """Each hint stands where its line ends or its answer is given."""
  stop, colon = (words.encode(w)[0] for w in (words.STOP, words.COLON))
  for i in range(24):
    record, item = RECORDS[i], SOURCE[i]
    ends = np.flatnonzero(item['tokens'] == stop)[:len(record.lines)]
    assert [task.WANTED.get(x.kind, 0) for x in record.lines] == (
        item['want'][ends].tolist())
    assert np.sum(item['want'] > 0) == sum(
        x.kind in task.WANTED for x in record.lines)
    asked = np.flatnonzero(item['targets'] >= 0)
    answer = record.questions[0].answer
    said_ = [words.WORDS[t] for t in item['targets'][asked]]
    assert ' '.join(said_) == (
        words.NONE if answer is None else words.value(answer))
    assert item['tokens'][asked[0]] == colon
    assert len(set(item['object'][asked])) == 1
    # Long enough after the log that a segment of 16 tokens is over.
    assert asked[0] - ends[-1] >= 17
    values = [t for t, p in zip(item['tokens'], item['part']) if p == 2]
    told = [words.value(x.value) for x in record.lines if x.value is not None]
    assert words.decode(values) == ' '.join(told)


def test_events_are_few_enough_for_a_segment():
  """No 16 tokens hold the ends of three lines."""
  stop = words.encode(words.STOP)[0]
  for i in range(48):
    ends = np.flatnonzero(SOURCE[i]['tokens'] == stop)
    assert np.min(ends[2:] - ends[:-2]) >= 16


def test_item_is_a_function_of_seed_and_index():
  again = task.LifecycleTextSource(SIZE, 5)
  for name, x in SOURCE[7].items():
    np.testing.assert_array_equal(x, again[7][name])
  other = task.LifecycleTextSource(SIZE, 6)[7]
  assert not np.array_equal(SOURCE[7]['tokens'], other['tokens'])


@pytest.mark.parametrize('bad, message', [
    (dict(size=0), 'size'), (dict(split='all'), 'split'),
    (dict(scenarios=('bass',)), 'scenarios'), (dict(questions=0), 'questions')])
def test_refuses(bad, message):
  with pytest.raises(ValueError, match=message):
    task.LifecycleTextSource(**{'size': 4, 'seed': 0} | bad)


def test_a_log_that_is_too_long_loses_other_keys():
  """And neither the question nor what it needs."""
  tight = task.LifecycleTextSource(36, 0, length=300)
  wide = task.LifecycleTextSource(36, 0, length=1400)
  for i in range(36):
    record, whole = tight.record(i), wide.record(i)
    (question,) = record.questions
    assert question == whole.questions[0]
    mine, all_of = ([x for x in r.lines if x.key == question.key]
                    for r in (record, whole))
    assert mine == all_of
    # Of each other key all or nothing, and as many as there is room for.
    kept = {x.key for x in record.lines} - {None}
    assert [x for x in record.lines if x.key] == [
        x for x in whole.lines if x.key in kept]
    assert 230 < tight[i]['n_valid'] <= 300


def test_refuses_what_is_too_long():
  with pytest.raises(ValueError, match='larger length'):
    task.LifecycleTextSource(1, 0, length=64)[0]
  with pytest.raises(IndexError):
    SOURCE.record(SIZE)
