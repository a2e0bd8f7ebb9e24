"""The logs of `lifecycle_text` line by line: as events, or as their tokens."""

import numpy as np

from statejax.tasks import lifecycle_text
from statejax.tasks import lifecycle_words as words

LINES, TOKENS, DIGITS, SPELLED = 72, 32, 5, 4
KINDS = (*words.CUES, 'filler', 'now', 'before')
# Fields of an event; the first value of all but the kind is 'none'.
SIZES = (len(KINDS), 49, 49, 11, 11, 27, 11, 11, *(11,) * DIGITS)


def event(kind, key=None, tag=None, value=None):
  """The fields of a line or a question, a list of integers."""
  number = lambda n: [1 + n // 10, 1 + n % 10]
  out = [KINDS.index(kind)]
  out += [0] * 4 if key is None else [1 + key[0], 1 + key[1], *number(key[2])]
  out += [0] * 3 if tag is None else [1 + tag[0], *number(tag[1])]
  return out + ([0] * DIGITS if value is None else
                [1 + int(d) for d in f'{value:05d}'])


def _fields(name):
  """The fields of an event that tell a name, or None, alone."""
  which = 'tag' if name is not None and len(name) == 2 else 'key'
  return event('filler', **{which: name})[1:8]


def _tokens(name):
  """The tokens of a name, or of None."""
  found = [] if name is None else list(words.encode(words.name(name)))
  return found + [-1] * (SPELLED - len(found))


class LifecycleLinesSource:
  """Items of `LifecycleTextSource`, line by line; see `__getitem__`."""

  def __init__(self, size, seed, split, way):
    """Describes a source; `way` is 'events' or 'chunks'."""
    if way not in ('events', 'chunks'):
      raise ValueError(f"way: expected 'events' or 'chunks', got {way!r}.")
    self._text = lifecycle_text.LifecycleTextSource(size, seed, split,
                                                    length=1216)
    self._way = way

  kind = 'lines'

  def __len__(self):
    return len(self._text)

  def __repr__(self):
    return f'LifecycleLinesSource({self._way!r}, {self._text!r})'

  def __getitem__(self, index):
    """Returns {lines, names, answer, scenario} and hints.

    lines: of the log, then of nothing, and last the question; events
      [73, 13], or tokens [73, 32], -1 behind the last. names: the name that a
      line or a question is about and the other one that it gives, alone:
      fields [73, 2, 7], or tokens [73, 2, 4]. answer: [5], 10 for none. The
      hints are [73]: want, object, alias, version; and figure [73, 5], what
      each line says.
    """
    record = self._text.record(index)
    asked = record.questions[0]
    names = {}
    number = lambda name: names.setdefault(name, len(names))
    hints: dict[str, np.ndarray] = {
        n: np.full(LINES + 1, -1, np.int32)
        for n in ('object', 'alias', 'version')}
    hints['want'] = np.zeros(LINES + 1, np.int32)
    hints['figure'] = np.full((LINES + 1, DIGITS), -1, np.int32)
    for i, x in enumerate(record.lines):
      hints['want'][i] = lifecycle_text.WANTED.get(x.kind, 0)
      hints['object'][i] = -1 if x.key is None else number(x.key)
      hints['alias'][i] = -1 if x.tag is None else number(x.tag)
      if x.value is not None:
        hints['figure'][i] = [int(d) for d in f'{x.value:05d}']
    hints['object'][-1] = number(asked.name)
    hints['version'][-1] = asked.kind == 'before'
    answer = ([10] * DIGITS if asked.answer is None else
              [int(d) for d in f'{asked.answer:05d}'])
    make = self._events if self._way == 'events' else self._chunks
    called = [(x.key, x.tag) for x in record.lines]
    called += [(None, None)] * (LINES - len(called)) + [(asked.name, None)]
    spell = _fields if self._way == 'events' else _tokens
    return hints | {
        'lines': make(index, record),
        'names': np.array([[spell(x) for x in pair] for pair in called],
                          np.int32),
        'answer': np.array(answer, np.int32),
        'scenario': np.int32(lifecycle_text.SCENARIOS.index(record.scenario))}

  def _events(self, index, record):
    del index
    asked = record.questions[0]
    which = 'key' if len(asked.name) == 3 else 'tag'
    lines = [event(x.kind, x.key, x.tag, x.value) for x in record.lines]
    lines += [event('filler')] * (LINES - len(lines))
    return np.array([*lines, event(asked.kind, **{which: asked.name})],
                    np.int32)

  def _chunks(self, index, record):
    tokens = np.asarray(self._text[index]['tokens'])
    ends = np.flatnonzero(tokens == words.encode(words.STOP)[0]) + 1
    colon = np.flatnonzero(tokens == words.encode(words.COLON)[0])[0] + 1
    count = len(record.lines)
    cuts = [0, *ends[:count]]
    parts = [tokens[a:b] for a, b in zip(cuts, cuts[1:])]
    parts += [tokens[:0]] * (LINES - count) + [tokens[cuts[-1]:colon]]
    out = np.full((LINES + 1, TOKENS), -1, np.int32)
    for row, part in zip(out, parts, strict=True):
      row[:len(part)] = part
    return out
