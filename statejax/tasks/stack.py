"""Numbered stacks: the task that asks a state to keep order and to forget.

Reference: arXiv 2510.26692 (Kimi Linear, section on synthetic tasks).
"""

import numpy as np

FILLER, PUSH, POP = 0, 1, 2
FIRST = 3  # token of stack 0; values follow the stacks


class StackSource:
  """Pushes values onto stacks, pops them, and asks what each pop returns.

      + 3 x  + 1 y  + 3 z  - 3 z  - 3 x  - 1 y
                             z      x      y     targets

  Item i is a function of (seed, i) alone. Three tokens are one operation: a
  pop with probability 1/2 if any stack holds a value, else a push. A push
  takes a uniform stack and a uniform value, a pop a uniform stack among those
  that hold one. Another seed gives other items: use one for training and one
  for evaluation.

  Attributes:
    kind: 'examples', see `pipeline.batches`.
    length: tokens of an item.
  """

  kind = 'examples'

  def __init__(self, size, vocab, stacks, length, seed):
    """Describes a source.

    Args:
      size: number of items.
      vocab: number of token ids: FILLER, PUSH, POP, the stacks, the values.
      stacks: number of stacks.
      length: tokens of an item; length // 3 operations, then FILLER.
      seed: names the stream, 0 <= seed < 2**64.
    """
    if size < 1 or not 0 <= seed < 2**64:
      raise ValueError(f'expected size > 0 and 0 <= seed < 2**64, got size='
                       f'{size}, seed={seed}.')
    if not 0 < stacks <= vocab - FIRST - 2:
      raise ValueError(
          f'stacks: expected 1 to {vocab - FIRST - 2} for vocab={vocab}, which '
          f'leaves two values, got {stacks}; enlarge vocab, or ask for fewer.')
    if length < 6:
      raise ValueError(f'length: expected at least 6, a push and a pop, got '
                       f'{length}.')
    # Else items of two streams would often be equal, and held-out ones known.
    pushes, ways = -(-(length // 3) // 2), stacks * (vocab - FIRST - stacks)
    if ways ** pushes < 2**20 * size:
      raise ValueError(
          f'expected 2**20 * size possible items, got about {ways} ** {pushes} '
          f'for size={size}; enlarge length or vocab.')
    self.length = length
    self._size, self._vocab = size, vocab
    self._stacks, self._seed = stacks, seed

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    """Returns {tokens, targets}, int32 [length]; -1 where nothing is asked."""
    if not 0 <= index < self._size:
      raise IndexError(f'item {index} of {self._size}')
    first = FIRST + self._stacks
    tokens, targets, held = [], [], {}
    draws = np.random.Generator(np.random.Philox(
        key=[self._seed, index])).random((self.length // 3, 3))
    for kind, where, what in draws.tolist():
      if held and kind < 0.5:
        # In the order of a dict, which is that of filling: no hash decides.
        stack = list(held)[int(where * len(held))]
        value = held[stack].pop()
        if not held[stack]:
          del held[stack]
        tokens += [POP, FIRST + stack, value]
        targets += [-1, value, -1]
      else:
        stack = int(where * self._stacks)
        value = first + int(what * (self._vocab - first))
        held.setdefault(stack, []).append(value)
        tokens += [PUSH, FIRST + stack, value]
        targets += [-1, -1, -1]
    rest = self.length - len(tokens)
    return {'tokens': np.array(tokens + rest * [FILLER], np.int32),
            'targets': np.array(targets + rest * [-1], np.int32)}

  def __repr__(self):
    return (f'StackSource(size={self._size}, vocab={self._vocab}, stacks='
            f'{self._stacks}, length={self.length}, seed={self._seed})')
