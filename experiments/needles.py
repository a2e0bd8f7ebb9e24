"""Needles in a haystack of frequent words, as tokens.

A haystack is words of a Zipf law. Needles stand anywhere in it, and a question
at the end; what is to be predicted follows it, one token after the other:

| kind | in the haystack | asked | answer |
|---|---|---|---|
| single | one `: key value` | the key | its value |
| multi_key | eight of other keys | one of them | its value |
| multi_value | a key four times, with other values | it | all, in their order |
| chain | two chains of 6 hops, `: key key` | a key, 1 to 6 hops before the \
end of one | the keys that follow |
| frequent | a mark 24 times, three others 8 times | no more | the mark |

RULER (arXiv 2404.06654) has tasks of these kinds in text; ours are our own.
"""

import numpy as np

from statejax.tasks.draw import Draw

KINDS = ('single', 'multi_key', 'multi_value', 'chain', 'frequent')
WORDS, KEYS, VALUES, MARKS = 64, 64, 64, 16
HOPS, OTHERS, TIMES = 6, 8, 4
_KEY, _VALUE = WORDS, WORDS + KEYS
_MARK = _VALUE + VALUES
SAYS = _MARK + MARKS  # opens a needle
ASKS = SAYS + 1  # one token for each kind of question
VOCAB = ASKS + len(KINDS)
LEAST = 128  # tokens of an item, at least


class NeedlesSource:
  """Items {tokens [T], targets [T], kind}; item i is of kind i mod 5, a
  function of (seed, i) alone. Targets are -1 but where an answer is predicted;
  the answer's tokens follow the question, and end the item."""

  kind = 'needles'

  def __init__(self, size, seed, length):
    """Describes a source of `size` items of `length` tokens."""
    if size < 1 or not 0 <= seed < 2**64 or length < LEAST:
      raise ValueError(
          f'expected size > 0, 0 <= seed < 2**64 and length >= {LEAST}, got '
          f'size={size}, seed={seed}, length={length}.')
    self._size, self._seed, self._length = size, seed, length

  def __len__(self):
    return self._size

  def __repr__(self):
    return f'NeedlesSource({self._size}, {self._seed}, {self._length})'

  def __getitem__(self, index):
    if not 0 <= index < self._size:
      raise IndexError(f'item {index} of {self._size}')
    draw, which = Draw(self._seed, index), index % len(KINDS)
    needles, asked, answer = _drawn(KINDS[which], draw)
    end = [ASKS + which, *asked, *answer]
    hay = self._length - len(end) - sum(map(len, needles))
    # Word w with a chance like 1 / (w + 1).
    words = np.searchsorted(
        np.cumsum(1 / np.arange(1, WORDS + 1)) / np.sum(
            1 / np.arange(1, WORDS + 1)),
        draw.many(hay, 2**20) / 2**20)
    at, tokens, begin = np.sort(draw.many(len(needles), hay + 1)), [], 0
    for place, needle in zip(at, needles):
      tokens += [*words[begin:place].tolist(), *needle]
      begin = place
    tokens = np.array([*tokens, *words[begin:].tolist(), *end], np.int32)
    targets = np.full(self._length, -1, np.int32)
    targets[-1 - len(answer):-1] = answer
    return {'tokens': tokens, 'targets': targets, 'kind': np.int32(which)}


def _drawn(kind, draw):
  """Needles in the order of the haystack, the question's tokens, the answer."""
  keys = [_KEY + i for i in draw.order(KEYS)]
  values = [_VALUE + i for i in draw.order(VALUES)]
  if kind == 'frequent':
    first, *others = (_MARK + i for i in draw.order(MARKS)[:4])
    said = [first] * 24 + [x for x in others for _ in range(8)]
    return [[said[i]] for i in draw.order(len(said))], [], [first]
  if kind == 'chain':
    paths = keys[:HOPS + 1], keys[HOPS + 1:2 * HOPS + 2]
    links = [[SAYS, a, b] for path in paths for a, b in zip(path, path[1:])]
    start = draw.below(HOPS)
    return ([links[i] for i in draw.order(len(links))], paths[0][start:][:1],
            paths[0][start + 1:])
  if kind == 'multi_value':
    return ([[SAYS, keys[0], value] for value in values[:TIMES]], keys[:1],
            values[:TIMES])
  count = 1 if kind == 'single' else OTHERS
  needles = [[SAYS, *pair] for pair in zip(keys[:count], values)]
  asked = draw.below(count)
  return needles, keys[asked:asked + 1], values[asked:asked + 1]
