"""Configuration of attention over a window and compressed entries."""

import dataclasses
import typing

from statejax.config import checks
from statejax.config.attention import RopeConfig
from statejax.config.dsa import STAGES


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """Lightning indexer over compressed entries.

  Attributes:
    k: entries that a query may see.
    heads: heads HI.
    width: width dI of its queries and entries.
  """

  k: int = 512
  heads: int = 4
  width: int = 32

  def __post_init__(self):
    checks.positive(self, 'k', 'heads', 'width')


@dataclasses.dataclass(frozen=True)
class CompressedConfig:
  """DeepSeek-V4's attention: one array is key and value of all heads.

  Attributes:
    heads: query heads H.
    width: width K of queries and of the shared key and value.
    q_rank: width of the queries' latent.
    window: visible tokens including the query; below `ratio` - 1 some tokens
      of the open block are not seen yet, and no longer.
    ratio: tokens per compressed entry; None keeps the window alone.
    overlap: an entry also sees the block before its own (CSA).
    index: chooses among the entries; None sees all of them (HCA).
    index_loss: factor on the indexer's own loss; 0 leaves it out. How
      DeepSeek-V4 trains its indexer is not published; this is V3.2's loss, over
      entries.
    stage: 'sparse'; or 'warmup', where attention sees all entries and the
      indexer learns from all of them.
    rope: of queries, keys and entries; outputs are turned back; fraction=0.0
      turns nothing. DeepSeek-V4 turns the trailing channels, interleaved, with
      a factor of 1 on cos and sin whatever the scaling.
    out_groups: groups of heads, each with its own first output projection,
    out_rank: to so many channels.
    eps: of all norms.
  """

  heads: int = 4
  width: int = 64
  q_rank: int = 64
  window: int = 128
  ratio: int | None = 4
  overlap: bool = True
  index: IndexConfig | None = IndexConfig()
  index_loss: float = 1.0
  stage: str = 'sparse'
  rope: RopeConfig = RopeConfig(
      fraction=0.5, layout='interleaved', side='trailing')
  out_groups: int = 2
  out_rank: int = 32
  eps: float = 1e-6

  def __post_init__(self):
    checks.positive(self, 'heads', 'width', 'q_rank', 'window', 'out_groups',
                    'out_rank')
    checks.divides(self, 'heads', 'out_groups')
    checks.no_less(self, 0, 'index_loss')
    if self.stage not in STAGES or (
        self.index is None and self.stage != 'sparse'):
      raise ValueError(f'CompressedConfig.stage: expected one of {STAGES}, '
                       f"without an index 'sparse', got {self.stage!r}.")
    factor = getattr(self.rope.scaling, 'attention_factor', 1.0)
    if factor != 1.0:
      raise ValueError(
          'CompressedConfig.rope.scaling: expected attention_factor=1.0, got '
          f'{factor}: outputs are turned back, and a factor '
          'would not cancel.')
    if self.ratio is None:
      if self.overlap or self.index is not None:
        raise ValueError('CompressedConfig: without a ratio there are no '
                         'entries; set overlap=False and index=None.')
      return
    checks.positive(self, 'ratio')
    turning = int(self.rope.fraction * self.width)
    if self.index is not None and self.index.width < turning:
      raise ValueError(
          f'CompressedConfig.index.width: expected >= {turning}, the channels '
          f'that turn (rope.fraction x width), as the indexer turns as many; '
          f'got {self.index.width}.')

  @property
  def reach(self):
    """Visible tokens, the query included; None is all of them."""
    return self.window if self.ratio is None else None

  @property
  def chooses(self):
    """Whether what is seen depends on values, see `statejax.laws`."""
    return self.index is not None

  @classmethod
  def sliding(cls, **fields):
    """The window alone."""
    preset: dict[str, typing.Any] = {
        'ratio': None, 'overlap': False, 'index': None}
    return cls(**(preset | fields))

  @classmethod
  def heavily(cls, **fields):
    """Heavily compressed attention (HCA): every entry is seen."""
    preset: dict[str, typing.Any] = {
        'ratio': 128, 'overlap': False, 'index': None}
    return cls(**(preset | fields))
