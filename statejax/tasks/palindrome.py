"""Palindrome: the task that asks a state for everything, last token first.

Reference: arXiv 2510.26692 (Kimi Linear, section on synthetic tasks).
"""

import numpy as np

MARK = 0


class PalindromeSource:
  """Symbols, a marker, and the same symbols backwards.

      x1 x2 x3 |  x3 x2
               x3 x2 x1   targets

  Item i is a function of (seed, i) alone. Symbols are uniform over the
  vocabulary without MARK and may repeat. Another seed gives other items: use
  one for training and one for evaluation.

  Attributes:
    kind: 'examples', see `pipeline.batches`.
    length: tokens of an item.
  """

  kind = 'examples'

  def __init__(self, size, vocab, length, seed):
    """Describes a source.

    Args:
      size: number of items.
      vocab: number of token ids, MARK among them.
      length: tokens of an item, of which length // 2 are symbols to reverse.
      seed: names the stream, 0 <= seed < 2**64.
    """
    if size < 1 or not 0 <= seed < 2**64:
      raise ValueError(f'expected size > 0 and 0 <= seed < 2**64, got size='
                       f'{size}, seed={seed}.')
    if length < 2 or vocab < 3:
      raise ValueError(f'expected length >= 2 and vocab >= 3, got length='
                       f'{length}, vocab={vocab}.')
    # Else items of two streams would often be equal, and held-out ones known.
    if (vocab - 1) ** (length // 2) < 2**20 * size:
      raise ValueError(
          f'expected 2**20 * size possible items, got {vocab - 1} ** '
          f'{length // 2} for size={size}; enlarge length or vocab.')
    self.length = length
    self._size, self._vocab, self._seed = size, vocab, seed

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    """Returns {tokens, targets}, int32 [length]; -1 where nothing is asked."""
    if not 0 <= index < self._size:
      raise IndexError(f'item {index} of {self._size}')
    count = self.length // 2
    uniform = np.random.Generator(np.random.Philox(
        key=[self._seed, index])).random(count)
    symbols = (1 + np.floor(uniform * (self._vocab - 1))).astype(np.int32)
    tokens = np.full(self.length, MARK, np.int32)
    targets = np.full(self.length, -1, np.int32)
    tokens[:count] = symbols
    # Of an even length the last symbol is a target only.
    tokens[count + 1:] = symbols[::-1][:self.length - count - 1]
    targets[count:2 * count] = symbols[::-1]
    return {'tokens': tokens, 'targets': targets}

  def __repr__(self):
    return (f'PalindromeSource(size={self._size}, vocab={self._vocab}, '
            f'length={self.length}, seed={self._seed})')
