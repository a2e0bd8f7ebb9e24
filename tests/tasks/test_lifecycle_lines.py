"""Lines of `lifecycle_text` as events and as chunks of tokens."""

import numpy as np
import pytest

from statejax.tasks import lifecycle_lines as lines
from statejax.tasks import lifecycle_text as text
from statejax.tasks import lifecycle_words as words

COUNT = 24  # two of each scenario


@pytest.fixture(scope='module')
def both():
  return [lines.LifecycleLinesSource(COUNT, 3, 'dev', way)
          for way in ('events', 'chunks')]


def test_both_ways_tell_of_the_same_items(both):
  records = text.LifecycleTextSource(COUNT, 3, 'dev', length=1216)
  for i in range(COUNT):
    event, chunk = (source[i] for source in both)
    for name in set(event) - {'lines', 'names'}:
      np.testing.assert_array_equal(event[name], chunk[name])
    record, asked = records.record(i), records.record(i).questions[0]
    assert event['lines'].shape == (73, 13) and (event['lines'] >= 0).all()
    assert (event['lines'] < lines.SIZES).all()
    said = [words.decode(row[row >= 0]) for row in chunk['lines']]
    for line, row in zip(record.lines, said):
      assert line.key is None or words.name(line.key) in row
      assert line.value is None or words.value(line.value) in row
    assert said[len(record.lines):-1] == [''] * (72 - len(record.lines))
    assert words.name(asked.name) in said[-1] and said[-1].endswith('? :')
    held = ''.join(map(str, event['answer']))
    assert held == ('10' * 5 if asked.answer is None else
                    f'{asked.answer:05d}')


def test_names_are_told_alone(both):
  """Of a line its name and the other that it gives; of a question what it
  asks for, in the place of the first."""
  records = text.LifecycleTextSource(COUNT, 3, 'dev', length=1216)
  for i in range(COUNT):
    record = records.record(i)
    event, chunk = (source[i]['names'] for source in both)
    assert event.shape == (73, 2, 7) and chunk.shape == (73, 2, 4)
    called = [(x.key, x.tag) for x in record.lines]
    called += [(None, None)] * (72 - len(called))
    called.append((record.questions[0].name, None))
    for names, *pairs in zip(called, event, chunk, strict=True):
      for name, fields, tokens in zip(names, *pairs, strict=True):
        spelled = words.decode(tokens[tokens >= 0])
        assert spelled == ('' if name is None else words.name(name))
        where = 'key' if name is None or len(name) == 3 else 'tag'
        assert fields.tolist() == lines.event('now', **{where: name})[1:8]


def test_fields_of_an_event():
  assert lines.event('update', key=(3, 7, 42), value=60) == [
      0, 4, 8, 5, 3, 0, 0, 0, 1, 1, 1, 7, 1]
  assert lines.event('now', tag=(25, 9)) == [8, 0, 0, 0, 0, 26, 1, 10] + [0] * 5


def test_hints_name_objects(both):
  for i in range(COUNT):
    item = both[0][i]
    target = item['object'][-1]
    alias = item['scenario'] == text.SCENARIOS.index('alias')
    assert (target in item['object'][:-1]) != alias
    assert (target in item['alias']) == alias
    same = item['lines'][:-1][item['object'][:-1] == target]
    assert (same[:, 1:5] == item['lines'][-1, 1:5]).all()
    assert (item['want'] > 0).sum() == np.isin(
        item['lines'][:, 0], [lines.KINDS.index(k) for k in text.WANTED]).sum()


def test_an_unknown_way_is_refused():
  with pytest.raises(ValueError, match="expected 'events' or 'chunks'"):
    lines.LifecycleLinesSource(1, 0, 'dev', 'words')
