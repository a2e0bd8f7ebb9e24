"""Memory events: what was set, repeated, refused, locked, deleted, and is now?

Every event is one vector (operation, key, value); the last one is a question
about one key. Eight families of items ask for one thing each that a memory may
get wrong. The families and sizes are those of a study that published neither
code nor data (arXiv 2606.28876), so the details here are our own.
"""

import numpy as np

from statejax.tasks.draw import Draw

NOISE, SET, MENTION, REJECT, LOCK, DELETE, NOW, BEFORE = range(8)
OPERATIONS = 8
FAMILIES = ('overwrite', 'stale', 'invalid', 'protected', 'delete', 'version',
            'pressure', 'no_write')
EVENTS, KEYS, VALUES, PRESSURE = 72, 96, 64, 48
NONE = VALUES  # the answer about what was deleted, and the value of no value


class LifecycleEventsSource:
  """Events about many keys, and a question about one.

  A stream of events of the target key holds what the family asks:

  | family | events of the target | answer |
  |---|---|---|
  | overwrite | 2 to 4 SETs of distinct values | the last |
  | stale | then 1 or 2 MENTIONs of older values | the last SET |
  | invalid | then 1 or 2 REJECTs of values never set | the last SET |
  | protected | then LOCK and 1 or 2 SETs, which are void | the last before |
  | delete | then DELETE | NONE |
  | version | asked by BEFORE | the last but one |
  | pressure | one SET, before SETs of 48 other keys | it |
  | no_write | one NOISE, no SET at all | its value |

  Streams of 6 to 11 other keys (1 or 2 SETs each, then one of these endings
  with probability .15, .15, .15 and .1: lock and a void SET, reject, mention,
  delete) are mixed with it at random, each in its own order; in 'pressure' the
  48 keys take their place. The rest are NOISE about keys that no stream uses.
  Item i is of family i mod 8, and a function of (seed, i) alone. Another seed
  gives other items.
  """

  kind = 'events'

  def __init__(self, size, seed, events=EVENTS):
    """Describes a source of `size` items; `seed` names the stream. More
    `events` are more noise."""
    if size < 1 or not 0 <= seed < 2**64 or events < EVENTS:
      raise ValueError(
          f'expected size > 0, 0 <= seed < 2**64 and events >= {EVENTS}, got '
          f'size={size}, seed={seed}, events={events}.')
    self._size, self._seed, self._events = size, seed, events

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    """Returns {events, answer, family}: events [events + 1, 3] int32, each
    (operation, key, value), the question last; answer 0 to 64; family, an
    index."""
    if not 0 <= index < self._size:
      raise IndexError(f'item {index} of {self._size}')
    draw = Draw(self._seed, index)
    family = FAMILIES[index % len(FAMILIES)]
    key, *others = draw.order(KEYS)
    mine, answer = target(family, key, draw)
    if family == 'pressure':
      streams = [[(SET, k, draw.below(VALUES))] for k in others[:PRESSURE]]
      used = PRESSURE
    else:
      used = 6 + draw.below(6)
      streams = [mine, *(_other(k, draw) for k in others[:used])]
    noise = self._events - sum(map(len, streams)) - (family == 'pressure')
    streams += [[(NOISE, others[used + draw.below(len(others) - used)],
                  draw.below(VALUES))] for _ in range(noise)]
    events = draw.mixed(streams)
    if family == 'pressure':
      # Anywhere before the first of the keys that are to push it out.
      first = next(i for i, e in enumerate(events) if e[0] == SET)
      events[draw.below(first + 1):0] = mine
    question = (BEFORE if family == 'version' else NOW, key, NONE)
    return {'events': np.array([*events, question], np.int32),
            'answer': np.int32(answer),
            'family': np.int32(FAMILIES.index(family))}

  def __repr__(self):
    return (f'LifecycleEventsSource(size={self._size}, seed={self._seed}, '
            f'events={self._events})')


def target(family, key, draw):
  """The events of a key of which a family asks, in order, and the answer."""
  values = draw.order(VALUES)
  count = 1 if family in ('pressure', 'no_write') else 2 + draw.below(3)
  sets, fresh = values[:count], values[count:]
  events = [(SET, key, v) for v in sets]
  if family == 'no_write':
    return [(NOISE, key, sets[0])], sets[0]
  more = 1 + draw.below(2)
  if family == 'stale':
    events += [(MENTION, key, sets[draw.below(count - 1)]) for _ in range(more)]
  elif family == 'invalid':
    events += [(REJECT, key, v) for v in fresh[:more]]
  elif family == 'protected':
    events += [(LOCK, key, NONE), *((SET, key, v) for v in fresh[:more])]
  elif family == 'delete':
    return [*events, (DELETE, key, NONE)], NONE
  return events, sets[-2] if family == 'version' else sets[-1]


def _other(key, draw):
  """The events of another key."""
  first, second, fresh = draw.order(VALUES)[:3]
  sets = [first, second][:1 + draw.below(2)]
  events, ending = [(SET, key, v) for v in sets], draw.chance()
  if ending < 0.15:
    events += [(LOCK, key, NONE), (SET, key, fresh)]
  elif ending < 0.3:
    events += [(REJECT, key, fresh)]
  elif ending < 0.45:
    events += [(MENTION, key, sets[0])]
  elif ending < 0.55:
    events += [(DELETE, key, NONE)]
  return events
