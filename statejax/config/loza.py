"""Configuration of streaming latent attention."""

import dataclasses

from statejax.config import checks
from statejax.config.mla import MLAConfig


@dataclasses.dataclass(frozen=True)
class LoZAConfig:
  """Latent attention over the first and the latest blocks of a document.

  Attributes:
    mla: the attention.
    block: tokens per block; what is seen begins and ends with blocks.
    sink_blocks: first blocks, always seen.
    recent_blocks: latest blocks, the query's own one included.
  """

  mla: MLAConfig = MLAConfig()
  block: int = 128
  sink_blocks: int = 1
  recent_blocks: int = 7

  # The first blocks are as far away as a document is long.
  reach = None

  def __post_init__(self):
    checks.positive(self, 'block', 'sink_blocks', 'recent_blocks')

  @property
  def sink(self):
    """Tokens of the first blocks."""
    return self.sink_blocks * self.block

  @property
  def window(self):
    """The most tokens that are seen of the latest blocks."""
    return self.recent_blocks * self.block
