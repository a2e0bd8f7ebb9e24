"""Random numbers of one item: the same in every version of numpy."""

import numpy as np


class Draw:
  """A function of (seed, index) alone."""

  def __init__(self, seed, index):
    self._generator = np.random.Generator(np.random.Philox(key=[seed, index]))
    self._ahead = []

  def chance(self):
    """A number in [0, 1)."""
    if not self._ahead:  # one by one numpy takes ten times as long
      self._ahead = self._generator.random(256).tolist()
    return self._ahead.pop()

  def below(self, n):
    """A number in 0..n-1."""
    return int(self.chance() * n)

  def between(self, low, high):
    """A number in low..high."""
    return low + self.below(high - low + 1)

  def many(self, count, n):
    """`count` numbers in 0..n-1, an array of int32."""
    return (self._generator.random(count) * n).astype(np.int32)

  def order(self, n):
    """0..n-1 in random order."""
    return np.argsort(self._generator.random(n)).tolist()

  def one(self, items):
    """One of several."""
    return items[self.below(len(items))]

  def mixed(self, streams):
    """All items of some lists; those of one list keep their order."""
    owner = [i for i, stream in enumerate(streams) for _ in stream]
    rest = [iter(stream) for stream in streams]
    return [next(rest[owner[i]]) for i in self.order(len(owner))]
