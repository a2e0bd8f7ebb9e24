"""Memory in plain text: a log of notes about named things, and questions.

A line of the log sets a thing's figure, repeats an old one, refuses one, locks
the thing, gives it another name, strikes it out, or is about nothing. What is
asked at the end needs the last valid one. Controlled study of arXiv 2606.28876,
whose authors published neither code nor data: lines, frames and words are ours.
"""

import dataclasses

import numpy as np

from statejax.tasks import lifecycle_words as words
from statejax.tasks.draw import Draw

PAPER = ('base', 'alias', 'stale', 'invalid', 'protected', 'pressure')
HARDER = ('delete', 'rewrite', 'relock', 'before', 'near', 'all_locked')
SCENARIOS = PAPER + HARDER
WANTED = {'update': 1, 'lock': 2, 'unlock': 3, 'delete': 4, 'alias': 5}
# Of a bank of 32 slots: more keys than it holds.
MANY, HELD = 48, 32
_DIGITS = 5
# Of each token; -1 where nothing is to be learned.
HINTS = ('targets', 'want', 'part', 'version', 'object', 'alias')


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of the log; `key` is None in a filler.

  Attributes:
    kind: a key of `lifecycle_words.CUES`, or 'filler'.
    key: (adjective, noun, number).
    value: 0 to 99999, or None.
    tag: (callsign, number) of an alias, or None.
  """

  kind: str
  key: tuple | None = None
  value: int | None = None
  tag: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Question:
  """`name` is a key or a tag of `key`, `kind` of `lifecycle_words.QUESTIONS`;
  `answer` is a value, or None for what was deleted."""

  name: tuple
  key: tuple
  kind: str
  answer: int | None


@dataclasses.dataclass(frozen=True)
class Record:
  """A log and its questions; the first is about the target of the scenario."""

  scenario: str
  lines: tuple
  questions: tuple


def truth(lines):
  """What a memory without bounds holds after a log.

  Returns:
    {key: its values so far, the present one last; empty after a deletion}.
  """
  held, locked = {}, set()
  for x in lines:
    if x.kind == 'lock':
      locked.add(x.key)
    elif x.kind == 'unlock':
      locked.discard(x.key)
    elif x.kind in ('update', 'delete') and x.key not in locked:
      held[x.key] = ([*held.get(x.key, ()), x.value] if x.kind == 'update'
                     else [])
  return held


class LifecycleTextSource:
  """Logs of 40 to 72 lines and questions about what they set.

  | scenario | the target's lines | answer |
  |---|---|---|
  | base | 2 to 4 updates of distinct values | the last |
  | alias | and another name, which the question uses | the last |
  | stale | then 1 to 3 lines that repeat older values | the last update |
  | invalid | then 1 or 2 refused values never set | the last update |
  | protected | then a lock and 1 or 2 updates | the last before |
  | pressure | 48 keys of one update each, no other | its value |
  | delete | then struck out | none |
  | rewrite | then struck out, then updated | the new value |
  | relock | lock, void, unlock, update, lock, void | the last that counts |
  | before | asked for the value before | the last but one |
  | near | as base, among keys that differ in a word or digit | the last |
  | all_locked | 32 keys updated and locked, 4 more updated | its value |

  Half of the questions of 'pressure' are about one of the first 16 keys, of
  which a bank of 32 that drops the oldest keeps none; half of those of
  'all_locked' about one of the four more. Elsewhere 8 to 14 other keys with 1
  to 3 updates and an ending of their own, and 10 to 20 lines about nothing, are
  mixed with the target's, each key's in their own order. A log opens with a
  line about nothing, as too few lines begin a log to learn from how they look.
  Further questions are about other keys of the same log.
  """

  kind = 'text'

  def __init__(self, size, seed, split='train', *, questions=1, length=1024,
               scenarios=SCENARIOS, scale=1.0):
    """Describes a source.

    Args:
      size: items; item i is of scenario i mod the number of them.
      seed: names the stream.
      split: 'train', 'dev' or 'test', which share no frame, key or tag.
      questions: of each item.
      length: tokens of an item; a longer log loses lines about nothing, further
        questions and other keys, and is an error where that is not enough.
      scenarios: those to draw.
      scale: of the numbers of other keys and lines about nothing, for short
        logs to begin with.
    """
    if size < 1 or not 0 <= seed < 2**64 or questions < 1:
      raise ValueError(f'expected size, questions > 0 and 0 <= seed < 2**64, '
                       f'got {size}, {questions}, {seed}.')
    if split not in words.SPLITS:
      raise ValueError(f'split: expected one of {words.SPLITS}, got {split!r}.')
    if not scenarios or not set(scenarios) <= set(SCENARIOS):
      raise ValueError(f'scenarios: expected some of {SCENARIOS}, got '
                       f'{scenarios}.')
    self._size, self._seed, self._split = size, seed, split
    self._questions, self._length = questions, length
    self._scenarios, self._scale = tuple(scenarios), scale

  def __len__(self):
    return self._size

  def __repr__(self):
    return (f'LifecycleTextSource(size={self._size}, seed={self._seed}, split='
            f'{self._split!r}, questions={self._questions}, length='
            f'{self._length}, scenarios={self._scenarios}, scale='
            f'{self._scale})')

  def record(self, index):
    """Returns the `Record` of an item: what rules may see, words excluded."""
    return self._item(index)[0]

  def _item(self, index):
    """The `Record` of an item, and its text."""
    if not 0 <= index < self._size:
      raise IndexError(f'item {index} of {self._size}')
    scenario = self._scenarios[index % len(self._scenarios)]
    record = _Log(Draw(self._seed, index), self._split, self._scale).record(
        scenario, self._questions)
    # Lines about nothing give way where a log would be too long, then all
    # questions but the first, and at last keys that nobody asks for.
    over = sum(map(_most, record.lines)) + 30 - self._length
    lines = []
    for i, line in enumerate(record.lines):
      if line.kind == 'filler' and i and over > 0:
        over -= _most(line)
      else:
        lines.append(line)
    room = max(0, -over) // 30
    record = dataclasses.replace(record, lines=tuple(lines),
                                 questions=record.questions[:1 + room])
    while True:
      text = _Text(Draw(self._seed, 2**63 + index), self._split, record)
      if len(text.tokens) <= self._length:
        return record, text
      shorter = _without_a_key(record)
      if shorter == record:
        raise ValueError(f'{self!r}: item {index} has more tokens; ask for a '
                         'larger length.')
      record = shorter

  def __getitem__(self, index):
    """Returns an item of int32 arrays, [T] where nothing else is said.

    tokens; targets, -1 but where an answer is predicted; n_valid, a scalar;
    hints 'want', 'part', 'version', 'object' and 'alias', -1 where nothing is
    to be learned (see `statejax.layers.slots.Slots`); scenario, an index.
    """
    record, text = self._item(index)
    count = len(text.tokens)
    out = {name: np.full(self._length, -1, np.int32) for name in HINTS}
    # Most tokens want nothing and are part of nothing.
    out['want'][:count] = out['part'][:count] = 0
    for name, found in text.hints.items():
      for at, value in found:
        out[name][at] = value
    tokens = np.zeros(self._length, np.int32)
    tokens[:count] = text.tokens
    return out | {
        'tokens': tokens, 'n_valid': np.int32(count),
        'scenario': np.int32(SCENARIOS.index(record.scenario))}


def _without_a_key(record):
  """A record without the last key that is not asked for, if there is one."""
  asked = {x.key for x in record.questions}
  keys = [x.key for x in record.lines if x.key is not None
          and x.key not in asked]
  return dataclasses.replace(record, lines=tuple(
      x for x in record.lines if not keys or x.key != keys[-1]))


def _most(line):
  """Tokens of a line, at most."""
  if line.kind == 'filler':
    return 20
  return 18 if line.value is not None else 17 if line.tag else 13


class _Log:
  """Draws one record; no name and no value of it means two things."""

  def __init__(self, draw, split, scale):
    self._draw, self._split, self._scale = draw, split, scale
    self._names, self._values = set(), set()

  def record(self, scenario, questions):
    special = {'pressure': self._pressure, 'all_locked': self._all_locked}
    lines, target, kind = special.get(scenario, self._common)(scenario)
    lines = [Line('filler'), *lines]
    held = truth(lines)
    tags = {x.key: x.tag for x in lines if x.kind == 'alias'}
    name = tags[target] if scenario == 'alias' else target
    asked = [self._question(held, target, name, kind)]
    others = [k for k in held if k != target]
    for i in self._draw.order(len(others))[:questions - 1]:
      key, kind = others[i], 'now'
      if len(held[key]) > 1 and self._draw.chance() < 0.3:
        kind = 'before'
      use = key in tags and kind == 'now' and self._draw.chance() < 0.7
      asked.append(self._question(held, key, tags[key] if use else key, kind))
    return Record(scenario, tuple(lines), tuple(asked))

  def _question(self, held, key, name, kind):
    values = held[key]
    ago = 2 if kind == 'before' else 1
    return Question(name, key, kind, values[-ago] if values else None)

  def _common(self, scenario):
    draw, target = self._draw, self._new(words.key)
    streams = [self._target(scenario, target)]
    for _ in range(self._some(8, 14)):
      key = self._new(words.key)
      if scenario == 'near' or draw.chance() < 0.2:
        key = self._new(lambda draw, split: words.near(draw, split, target))
      streams.append(self._other(key))
    streams += [[Line('filler')] for _ in range(self._some(10, 20))]
    kind = 'before' if scenario == 'before' else 'now'
    return draw.mixed(streams), target, kind

  def _pressure(self, scenario):
    del scenario
    count = self._some(MANY, MANY)
    keys = [self._new(words.key) for _ in range(count)]
    first = self._draw.chance() < 0.5
    target = self._draw.one(keys[:self._some(16, 16)] if first else keys)
    lines = [Line('update', key, self._value()) for key in keys]
    fillers = [Line('filler') for _ in range(self._some(2, 6))]
    return self._draw.mixed([lines, fillers]), target, 'now'

  def _all_locked(self, scenario):
    del scenario
    count = self._some(HELD, HELD)
    keys = [self._new(words.key) for _ in range(count + 4)]
    streams = [[Line('update', k, self._value()), Line('lock', k)]
               for k in keys[:count]]
    late = self._draw.chance() < 0.5
    target = self._draw.one(keys[count:] if late else keys[:count])
    more = [Line('update', k, self._value()) for k in keys[count:]]
    return self._draw.mixed(streams) + more, target, 'now'

  def _target(self, scenario, key):
    draw = self._draw
    update = lambda: Line('update', key, self._value())
    lines = [update() for _ in range(draw.between(2, 4))]
    old = [x.value for x in lines[:-1]]
    void = lambda: [update() for _ in range(draw.between(1, 2))]
    lock = Line('lock', key)
    if scenario == 'alias':
      lines.insert(draw.between(1, len(lines)), self._alias(key))
    elif scenario == 'stale':
      lines += [Line('audit', key, draw.one(old))
                for _ in range(draw.between(1, 3))]
    elif scenario == 'invalid':
      lines += [Line('reject', key, self._value())
                for _ in range(draw.between(1, 2))]
    elif scenario == 'protected':
      lines += [lock, *void()]
    elif scenario in ('delete', 'rewrite'):
      lines.append(Line('delete', key))
      lines += [update()] * (scenario == 'rewrite')
    elif scenario == 'relock':
      lines += [lock, *void(), Line('unlock', key), update(), lock, *void()]
    return lines

  def _other(self, key):
    draw = self._draw
    lines = [Line('update', key, self._value())
             for _ in range(draw.between(1, 3))]
    new, chance = Line('update', key, self._value()), draw.chance()
    endings = (
        [Line('lock', key), new], [Line('reject', key, new.value)],
        [Line('audit', key, lines[0].value)] * (len(lines) > 1),
        [self._alias(key)], [Line('delete', key)],
        [Line('delete', key), new], [Line('lock', key), Line('unlock', key),
                                     new])
    # Each with probability 0.1.
    which = int(chance * 10)
    return lines + (endings[which] if which < len(endings) else [])

  def _alias(self, key):
    return Line('alias', key, tag=self._new(words.tag))

  def _some(self, low, high):
    scaled = [max(1, round(n * self._scale)) for n in (low, high)]
    return self._draw.between(*scaled)

  def _new(self, draw_one):
    # A number of names of a split may be all that are near a key.
    for _ in range(1000):
      found = draw_one(self._draw, self._split)
      if found not in self._names:
        self._names.add(found)
        return found
    raise ValueError('expected a name that is still free, found none.')

  def _value(self):
    while True:
      found = self._draw.below(10 ** _DIGITS)
      if found not in self._values:
        self._values.add(found)
        return found


class _Text:
  """The tokens of a record, and what is to be learned of each."""

  def __init__(self, draw, split, record):
    self._draw, self._split = draw, split
    self._used = {x.value for x in record.lines}
    self.tokens, self.hints = [], {name: [] for name in HINTS}
    self._ids = {}
    for line in record.lines:
      self._line(line)
    for question in record.questions:
      self._question(question)

  def _line(self, line):
    middle = self._filler()
    if line.kind != 'filler':
      cue = self._draw.one(words.CUES[line.kind])
      middle = f'{words.name(line.key)} {cue}'
      if line.value is not None:
        middle += ' ' + words.value(line.value)
      if line.tag is not None:
        middle += ' ' + words.name(line.tag)
    text = words.frame(self._draw, self._split, line.kind, middle)
    self._add(text, line.key, line.value, line.tag)
    self._add(words.STOP)
    self._hint('want', WANTED.get(line.kind, 0))
    if line.key is not None:
      self._hint('object', self._id(line.key))
    if line.tag is not None:
      self._hint('alias', self._id(line.tag))

  def _question(self, question):
    middle = self._draw.one(words.QUESTIONS[question.kind]).format(
        words.name(question.name))
    # Long enough that what was written last is committed before the answer.
    text = words.frame(self._draw, self._split, 'ask', middle, words.ASKS)
    self._add(f'{text} {words.ASK} {words.COLON}', question.name)
    for word in (words.NONE if question.answer is None else
                 words.value(question.answer)).split():
      self._hint('targets', words.encode(word)[0])
      self._hint('object', self._id(question.name))
      self._hint('version', int(question.kind == 'before'))
      self._add(word)
    self._add(words.STOP)

  def _filler(self):
    draw = self._draw
    said = [draw.one(words.FILLER) for _ in range(draw.between(5, 8))]
    if draw.chance() < 0.3:
      number = draw.below(10 ** _DIGITS)
      while number in self._used:
        number = draw.below(10 ** _DIGITS)
      said += [words.TICKET, words.value(number)]
    return ' '.join(said)

  def _add(self, text, key=None, value=None, tag=None):
    """Adds words, and says which are of a key, a value or another name."""
    said = words.encode(text)
    for which, name in ((1, key and words.name(key)),
                        (2, value is not None and words.value(value)),
                        (3, tag and words.name(tag))):
      if name:
        name = words.encode(name)
        at = next(i for i in range(len(said)) if said[i:i + len(name)] == name)
        for i in range(len(name)):
          self._hint('part', which, at + i)
    self.tokens += said

  def _hint(self, name, value, ahead=-1):
    """Of the last token, or of one to come."""
    self.hints[name].append((len(self.tokens) + ahead, value))

  def _id(self, name):
    return self._ids.setdefault(name, len(self._ids))
