"""Few facts in a very long stream of events, and questions at its end.

The events are those of `statejax.tasks.lifecycle_events`. Five classes of facts
ask for one thing each that a memory may get wrong over a long time: the newest
value, the one before it, and the value that stands in spite of what was
mentioned, refused or locked out later; and a value that nobody asked to keep.
The sizes are those that arXiv 2606.28876 reports, the details our own.
"""

import numpy as np

from statejax.tasks import lifecycle_events as le
from statejax.tasks.draw import Draw

CLASSES = ('overwrite', 'version', 'pollution', 'protection', 'no_write')
# The families of events that a class is made of.
_FAMILIES = {'overwrite': ('overwrite',), 'version': ('version',),
             'pollution': ('stale', 'invalid'), 'protection': ('protected',),
             'no_write': ('no_write',)}
# Keys that are left to the filler, at least.
_REST = 8


class LongEventsSource:
  """Streams of events, and what to ask behind each.

  | class | events of its key | answer |
  |---|---|---|
  | overwrite | 2 to 4 SETs of distinct values | the last |
  | version | the same, asked by BEFORE | the last but one |
  | pollution | then 1 or 2 MENTIONs or REJECTs of other values | the last SET |
  | protection | then LOCK and 1 or 2 SETs, which are void | the last before |
  | no_write | one NOISE, and nothing else | its value |

  The events of a key keep their order; all of them stand at places drawn
  uniformly from the whole stream. Every other event is NOISE about a key that
  no fact has. Item j of a stream is of class j mod 5. Stream i is a function of
  (seed, i) alone. Another seed gives other streams.
  """

  kind = 'events'

  def __init__(self, streams, length, items, seed):
    """Describes `streams` streams of `length` events with `items` facts."""
    if not (streams > 0 and 0 <= seed < 2**64):
      raise ValueError(f'expected streams > 0 and 0 <= seed < 2**64, got '
                       f'streams={streams}, seed={seed}.')
    if not 0 < items <= le.KEYS - _REST or length < 8 * items:
      raise ValueError(
          f'expected 0 < items <= {le.KEYS - _REST}, each with a key of its '
          f'own, and length >= 8 items, got items={items}, length={length}.')
    self._streams, self._length = streams, length
    self._items, self._seed = items, seed

  def __len__(self):
    return self._streams

  def __getitem__(self, index):
    """Returns {events, questions, answer, family}.

    events: [length, 3] int32, each (operation, key, value).
    questions: [items, 3] int32, each to be asked behind all events.
    answer: [items] int32; family: index of `CLASSES`, [items] int32.
    """
    if not 0 <= index < self._streams:
      raise IndexError(f'stream {index} of {self._streams}')
    draw = Draw(self._seed, index)
    keys = draw.order(le.KEYS)
    told, questions, answer = [], [], []
    for j, key in enumerate(keys[:self._items]):
      name = CLASSES[j % len(CLASSES)]
      mine, value = le.target(draw.one(_FAMILIES[name]), key, draw)
      told.append(mine)
      answer.append(value)
      questions.append((le.BEFORE if name == 'version' else le.NOW, key,
                        le.NONE))
    rest = np.array(keys[self._items:], np.int32)
    events = np.stack([
        np.full(self._length, le.NOISE, np.int32),
        rest[draw.many(self._length, len(rest))],
        draw.many(self._length, le.VALUES)], axis=1)
    where = self._places(draw, sum(map(len, told)))
    events[where] = draw.mixed(told)
    return {'events': events, 'questions': np.array(questions, np.int32),
            'answer': np.array(answer, np.int32),
            'family': np.arange(self._items, dtype=np.int32) % len(CLASSES)}

  def _places(self, draw, count):
    """Distinct places in order, every set of them equally likely."""
    found = np.zeros(0, np.int32)
    while len(found) < count:
      more = draw.many(count, self._length)
      both = np.concatenate([found, more])
      _, first = np.unique(both, return_index=True)
      found = both[np.sort(first)][:count]
    return np.sort(found)

  def __repr__(self):
    return (f'LongEventsSource(streams={self._streams}, length={self._length}, '
            f'items={self._items}, seed={self._seed})')


def pieces(events, size):
  """Yields the events of a stream, `size` at a time; the last may be fewer."""
  for begin in range(0, len(events), size):
    yield events[begin:begin + size]
