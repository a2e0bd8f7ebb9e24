"""Configuration of native sparse attention."""

import dataclasses

from statejax.config import checks
from statejax.config.attention import RopeConfig


@dataclasses.dataclass(frozen=True)
class NSAConfig:
  """Attention to compressed, to selected and to recent tokens, gated.

  Attributes:
    heads: query heads H.
    kv_heads: key/value heads G; H must be a multiple. Query heads of a group
      select the same.
    key: width K of queries and keys.
    value: width V of values.
    compress_block: tokens l per compressed entry.
    stride: one entry for every so many tokens; divides both kinds of blocks.
    compress_hidden: hidden width of the networks that compress.
    select_block: tokens l' of a block that is selected or not.
    select_count: blocks that a query selects, the forced ones included.
    initial: first blocks, always selected.
    local: latest blocks, the query's own one included, always selected.
    window: visible tokens of the window, the query included.
    rope: of the selected and the recent; compressed keys and their queries
      are not rotated. None is NoPE.
  """

  heads: int = 4
  kv_heads: int = 2
  key: int = 64
  value: int = 64
  compress_block: int = 32
  stride: int = 16
  compress_hidden: int = 128
  select_block: int = 64
  select_count: int = 16
  initial: int = 1
  local: int = 2
  window: int = 512
  rope: RopeConfig | None = RopeConfig()

  # All tokens are in a compressed entry or may be selected; what is selected
  # depends on values, see `statejax.laws`.
  reach = None
  chooses = True

  def __post_init__(self):
    checks.positive(self, 'heads', 'kv_heads', 'key', 'value', 'stride',
                    'compress_hidden', 'select_block', 'local', 'window')
    checks.no_less(self, 2, 'compress_block')
    checks.no_less(self, 0, 'initial')
    checks.divides(self, 'heads', 'kv_heads')
    checks.divides(self, 'compress_block', 'stride')
    checks.divides(self, 'select_block', 'stride')
    if self.select_count < self.initial + self.local:
      raise ValueError(
          f'NSAConfig.select_count: expected at least initial + local = '
          f'{self.initial + self.local}, which are always selected, got '
          f'{self.select_count}.')

  @property
  def overlap(self):
    """Entries that hold a token."""
    return self.compress_block // self.stride
