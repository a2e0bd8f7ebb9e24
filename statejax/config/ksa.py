"""Configuration of attention over text and summary tokens (KSA)."""

import dataclasses

from statejax.config import checks
from statejax.config.attention import RopeConfig


@dataclasses.dataclass(frozen=True)
class SummaryConfig:
  """Summary tokens that a model appends to every chunk of its text.

  Attributes:
    chunk: text tokens C of a chunk; counted from the document's first.
    count: summary tokens m behind each.
  """

  chunk: int = 8
  count: int = 1

  def __post_init__(self):
    checks.positive(self, 'chunk', 'count')
    if self.count > self.chunk:
      raise ValueError(f'SummaryConfig: expected count <= chunk, got '
                       f'count={self.count}, chunk={self.chunk}.')


@dataclasses.dataclass(frozen=True)
class KSAConfig:
  """Kwai summary attention: near text as it is, far text by its summaries.

  Attributes:
    heads: query heads H.
    kv_heads: key/value heads G; H must be a multiple.
    key: width K of queries and keys.
    value: width V of values.
    summary: the summary tokens, as of `ModelConfig.summary`.
    chunks: chunks before its own of which a token sees the text, and behind
      which it sees the summaries. None is the full layer: the text of all
      chunks, no summaries.
    mix: share of the summaries' own projections, the rest are those of text.
    rope: rotary embedding; None is NoPE.
    qk_norm: RMS norm per head on queries and keys, before rope.
    eps: of the q/k norms.
  """

  heads: int = 4
  kv_heads: int = 2
  key: int = 64
  value: int = 64
  summary: SummaryConfig = SummaryConfig()
  chunks: int | None = 128
  mix: float = 1.0
  rope: RopeConfig | None = RopeConfig()
  qk_norm: bool = False
  eps: float = 1e-6

  def __post_init__(self):
    checks.positive(self, 'heads', 'kv_heads', 'key', 'value')
    checks.divides(self, 'heads', 'kv_heads')
    if self.chunks is not None:
      checks.no_less(self, 0, 'chunks')
    if not 0 <= self.mix <= 1:
      raise ValueError(f'KSAConfig.mix: expected 0 to 1, got {self.mix}.')

  @property
  def chunk(self):
    """Text tokens per chunk, see `statejax.laws`."""
    return self.summary.chunk
