"""Configurations of the mixers that carry a memory from segment to segment."""

import dataclasses

from statejax.config import checks
from statejax.config.attention import AttentionConfig


@dataclasses.dataclass(frozen=True)
class TransformerXLConfig:
  """Attention to the own segment and to the layer's inputs before it.

  Attributes:
    width: D of the model, whose layer inputs are remembered.
    heads: query heads H.
    kv_heads: key/value heads G; H must be a multiple.
    key: width K of queries and keys.
    value: width V of values.
    segment: tokens S of a segment, counted from the document's first.
    memory: tokens M before its segment that a query sees; 0 sees none.
    relative: width of the sinusoids that encode a distance, even.
    detach: no gradient runs into the tokens of earlier segments.
  """

  width: int = 256
  heads: int = 4
  kv_heads: int = 4
  key: int = 64
  value: int = 64
  segment: int = 256
  memory: int = 256
  relative: int = 64
  detach: bool = True

  def __post_init__(self):
    checks.positive(self, 'width', 'heads', 'kv_heads', 'key', 'value',
                    'segment', 'relative')
    checks.no_less(self, 0, 'memory')
    checks.divides(self, 'heads', 'kv_heads')
    if self.relative % 2:
      raise ValueError(f'{type(self).__name__}.relative: expected an even '
                       f'number, a sine and a cosine each, got '
                       f'{self.relative}.')

  @property
  def slots(self):
    """Layer inputs that are kept: the memory and the open segment."""
    return self.memory + self.segment

  @property
  def reach(self):
    """See `statejax.laws`; what the last token of a segment sees."""
    return self.memory + self.segment

  @property
  def chooses(self):
    """See `statejax.laws`: other tokens of a segment see fewer."""
    return True

  @property
  def straight_through(self):
    """See `statejax.laws`: a gradient that is cut is not that of the output."""
    return self.detach and self.memory > 0


@dataclasses.dataclass(frozen=True)
class CompressiveConfig(TransformerXLConfig):
  """`TransformerXLConfig` whose oldest rows are compressed, not lost.

  Attributes beside those of `TransformerXLConfig`:
    compressed: entries Mc that are kept; 0 is Transformer-XL.
    rate: rows to an entry; `segment` and `memory` are multiples.
  """

  compressed: int = 256
  rate: int = 4

  def __post_init__(self):
    super().__post_init__()
    checks.positive(self, 'rate')
    checks.no_less(self, 0, 'compressed')
    for name in ('segment', 'memory'):
      checks.divides(self, name, 'rate')

  @property
  def reach(self):
    """See `statejax.laws`."""
    return self.slots + self.rate * self.compressed

  @property
  def straight_through(self):
    """See `statejax.laws`."""
    return self.detach and self.memory + self.compressed > 0
