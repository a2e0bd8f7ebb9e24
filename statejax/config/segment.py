"""Configurations of the mixers that carry a memory from segment to segment."""

import dataclasses

from statejax.config import checks
from statejax.config.attention import RopeConfig


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


@dataclasses.dataclass(frozen=True)
class DSTConfig:
  """Dynamic State Transduction: vectors carried from segment to segment.

  Attributes:
    width: D of the model, which is that of the vectors.
    heads: query heads H.
    kv_heads: key/value heads G; H must be a multiple.
    key: width K of queries and keys.
    value: width V of values.
    rope: rotary embedding of places in the segment; None is NoPE.
    segment: tokens S of a segment, counted from the document's first.
    vectors: m; 0 makes segments independent.
    update: what a segment makes of the vectors. 'pool': a gated step towards
      what m learned questions find in the segment's outputs; 'rows': what m
      rows behind the segment see of it (RMT).
    through: segments through which a gradient runs; it is cut at every
      multiple, counted from the document's first. None never cuts.
    eps: of the norm of the rows.
  """

  width: int = 256
  heads: int = 4
  kv_heads: int = 4
  key: int = 64
  value: int = 64
  rope: RopeConfig | None = RopeConfig()
  segment: int = 256
  vectors: int = 1
  update: str = 'pool'
  through: int | None = None
  eps: float = 1e-6

  def __post_init__(self):
    checks.positive(self, 'width', 'heads', 'kv_heads', 'key', 'value',
                    'segment')
    checks.no_less(self, 0, 'vectors')
    checks.divides(self, 'heads', 'kv_heads')
    checks.one_of(self, 'update', ('pool', 'rows'))
    if self.through is not None:
      checks.no_less(self, 1, 'through')

  @property
  def reach(self):
    """See `statejax.laws`."""
    return None if self.vectors else self.segment

  @property
  def chooses(self):
    """See `statejax.laws`: alone, a segment's first token sees itself only; and
    behind a cut there is no gradient."""
    return not self.vectors or self.through is not None

  @property
  def straight_through(self):
    """See `statejax.laws`: a gradient that is cut is not that of the output."""
    return self.through is not None and self.vectors > 0


@dataclasses.dataclass(frozen=True)
class InfiniConfig:
  """Infini-attention: the own segment, and a matrix of all before it.

  Attributes:
    heads: query heads H.
    kv_heads: key/value heads G, each with a matrix; H must be a multiple.
    key: width K of queries and keys.
    value: width V of values.
    rope: rotary embedding of places in the segment, of what is attended to in
      it; None is NoPE. The matrix knows no place.
    segment: tokens S of a segment, counted from the document's first.
    write: 'delta' writes what the matrix does not recall yet, 'add' all.
    eps: of the denominator of a read.
  """

  heads: int = 4
  kv_heads: int = 4
  key: int = 64
  value: int = 64
  rope: RopeConfig | None = RopeConfig()
  segment: int = 256
  write: str = 'delta'
  eps: float = 1e-6

  def __post_init__(self):
    checks.positive(self, 'heads', 'kv_heads', 'key', 'value', 'segment')
    checks.divides(self, 'heads', 'kv_heads')
    checks.one_of(self, 'write', ('delta', 'add'))
    if not self.eps > 0:
      raise ValueError(f'InfiniConfig.eps: expected > 0, got {self.eps}; an '
                       'empty matrix is read too.')


@dataclasses.dataclass(frozen=True)
class TitansConfig:
  """A memory of weights that learns in service, by steps of momentum.

  Attributes:
    heads: heads H, each with a memory.
    key: width K of queries and keys.
    value: width V of values.
    hidden: width F of a memory of two layers; None is a matrix.
    segment: tokens whose gradients are taken at the weights that the first of
      them has found, counted from the document's first.
    rate: the most that a step takes of a gradient. A matrix is stable up to
      1 / segment, whatever the keys; a memory of two layers wants 0.01.
    eps: of the output norm.
  """

  heads: int = 4
  key: int = 64
  value: int = 64
  hidden: int | None = None
  segment: int = 16
  rate: float = 0.05
  eps: float = 1e-6

  def __post_init__(self):
    checks.positive(self, 'heads', 'key', 'value', 'segment')
    if self.hidden is not None:
      checks.no_less(self, 1, 'hidden')
    if not self.rate > 0:
      raise ValueError(f'TitansConfig.rate: expected > 0, got {self.rate}.')
