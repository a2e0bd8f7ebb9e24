"""Multi-query associative recall: the task that asks a state to remember.

Reference: arXiv 2312.04927 (Zoology). There a query's value is only the target;
here it also follows the query, as in text, so that nothing is left unanswered.
"""

import numpy as np

FILLER = 0


class MQARSource:
  """Key-value pairs, then every key again, in another order, with gaps.

      k1 v1 k2 v2 k3 v3 . . k2 v2 . . . . k1 v1 k3 v3 . .
                            v2            v1    v3        targets

  Item i is a function of (seed, i) alone. Keys are from the lower half of the
  vocabulary without FILLER, values from the upper half, both without
  repetition within an item. Another seed gives other items: use one for
  training and one for evaluation.

  Attributes:
    kind: 'examples', see `pipeline.batches`.
    length: tokens of an item.
  """

  kind = 'examples'

  def __init__(self, size, vocab, pairs, length, seed, power=0.01):
    """Describes a source.

    Args:
      size: number of items.
      vocab: number of token ids.
      pairs: pairs of an item; each is queried once.
      length: tokens of an item, at least 4 * pairs.
      seed: names the stream, 0 <= seed < 2**64.
      power: a gap g has probability proportional to g**(power - 1): near 0 most
        queries come early, 1 is uniform.
    """
    if size < 1 or not 0 <= seed < 2**64:
      raise ValueError(f'expected size > 0 and 0 <= seed < 2**64, got size='
                       f'{size}, seed={seed}.')
    if not 0 < pairs < vocab // 2:
      raise ValueError(f'pairs: expected 1 to {vocab // 2 - 1} for vocab='
                       f'{vocab}, half of which are keys, got {pairs}; enlarge '
                       'vocab.')
    if length < 4 * pairs:
      raise ValueError(f'length: expected at least 4 * pairs = {4 * pairs}, '
                       f'got {length}; enlarge length, or ask for fewer pairs.')
    self.length = length
    self._arguments = (size, vocab, pairs, length, seed, power)
    self._size, self._vocab, self._pairs, self._seed = size, vocab, pairs, seed
    # Queries stand at even distances from the end of the pairs.
    gaps = np.arange(1, (length - 2 * pairs) // 2 + 1)
    self._weight = gaps ** (power - 1.0)

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    """Returns {tokens, targets}, int32 [length]; -1 where nothing is asked."""
    if not 0 <= index < self._size:
      raise IndexError(f'item {index} of {self._size}')
    half, pairs = self._vocab // 2, self._pairs
    # Order statistics of plain uniform numbers: quick, and the same in every
    # version of numpy, which `permutation` and `choice` do not promise.
    sizes = [half - 1, self._vocab - half, len(self._weight), pairs]
    uniform = np.random.Generator(np.random.Philox(
        key=[self._seed, index])).random(sum(sizes))
    keys, values, arrival, order = np.split(uniform, np.cumsum(sizes[:-1]))
    keys = 1 + np.argsort(keys)[:pairs]
    values = half + np.argsort(values)[:pairs]
    # The earliest of exponential arrivals: a draw by weight, no repetition.
    gaps = np.argsort(-np.log1p(-arrival) / self._weight)[:pairs]
    at = 2 * (pairs + gaps[np.argsort(order)])
    tokens = np.full(self.length, FILLER, np.int32)
    targets = np.full(self.length, -1, np.int32)
    tokens[:2 * pairs:2], tokens[1:2 * pairs:2] = keys, values
    tokens[at], tokens[at + 1] = keys, values
    targets[at] = values
    return {'tokens': tokens, 'targets': targets}

  def __repr__(self):
    size, vocab, pairs, length, seed, power = self._arguments
    return (f'MQARSource(size={size}, vocab={vocab}, pairs={pairs}, '
            f'length={length}, seed={seed}, power={power})')
