"""Configurations of attention to chosen blocks."""

import dataclasses

from statejax.config import checks
from statejax.config.attention import AttentionConfig, RopeConfig
from statejax.config.dsa import STAGES
from statejax.config.mla import MLAConfig


def _check(config, *positive):
  checks.positive(config, *positive)
  checks.no_less(config, 0, 'index_loss')
  if config.stage not in STAGES:
    raise ValueError(f'{type(config).__name__}.stage: expected one of {STAGES},'
                     f' got {config.stage!r}.')


def _no_window(config):
  if config.attention.window is not None:
    raise ValueError(f'{type(config).__name__}.attention: expected window=None '
                     f'(all of the past can be chosen), got '
                     f'{config.attention.window}.')


@dataclasses.dataclass(frozen=True)
class MoBAConfig:
  """Mixture of block attention (arXiv 2502.13189).

  Attributes:
    attention: heads, widths, rope; without a window.
    block: tokens per block.
    k: blocks that a query head sees, its own among them.
  """

  attention: AttentionConfig = AttentionConfig()
  block: int = 512
  k: int = 3

  # What is seen depends on values, see `statejax.laws`.
  chooses = True

  def __post_init__(self):
    checks.positive(self, 'block', 'k')
    _no_window(self)


@dataclasses.dataclass(frozen=True)
class BlockMaxConfig:
  """MiniMax-M3's sparse attention: the best key of a block speaks for it.

  Attributes:
    attention: heads, widths, rope; without a window.
    block: tokens per block.
    k: blocks that a group of heads sees, the local ones among them.
    local: newest blocks that are always seen, the query's own among them.
    index_width: width dI of the index queries, one per key/value head, and of
      the one index key.
    index_rope: rotation of both.
    index_loss: factor on the indexer's loss; 0 leaves it out.
    eps: of the norms of index queries and keys.
    stage: 'sparse'; or 'warmup', where attention sees everything and the
      indexer learns from all of it.
  """

  attention: AttentionConfig = AttentionConfig(qk_norm=True)
  block: int = 128
  k: int = 16
  local: int = 1
  index_width: int = 32
  index_rope: RopeConfig | None = RopeConfig(fraction=0.5)
  index_loss: float = 1.0
  eps: float = 1e-6
  stage: str = 'sparse'

  chooses = True

  def __post_init__(self):
    _check(self, 'block', 'k', 'index_width')
    checks.no_less(self, 0, 'local')
    if self.local > self.k:
      raise ValueError(f'BlockMaxConfig.local: the local blocks are among the '
                       f'k={self.k}; expected local <= k, got {self.local}.')
    _no_window(self)


@dataclasses.dataclass(frozen=True)
class QSAConfig:
  """Qwen's sparse attention: pooled index keys, and the tail.

  Attributes:
    attention: heads, widths, rope; without a window.
    block: tokens per pooled index key.
    k: complete blocks that a query sees; the open block's tokens are seen
      beside them.
    index_heads: heads HI of the indexer.
    index_width: width dI of its queries and of its one key.
    index_rope: rotation of both, of a pooled key at its block's first token.
    index_loss: factor on the indexer's loss; 0 leaves it out.
    eps: of the norms of index queries and keys.
    stage: as for `BlockMaxConfig`.
  """

  attention: AttentionConfig = AttentionConfig(qk_norm=True, output_gate=True)
  block: int = 16
  k: int = 128
  index_heads: int = 4
  index_width: int = 32
  index_rope: RopeConfig | None = RopeConfig(fraction=0.5)
  index_loss: float = 1.0
  eps: float = 1e-6
  stage: str = 'sparse'

  chooses = True

  def __post_init__(self):
    _check(self, 'block', 'k', 'index_heads', 'index_width')
    _no_window(self)


@dataclasses.dataclass(frozen=True)
class PooledDSAConfig:
  """GLM-5.3-Flash's sparse latent attention over pools (kpool).

  A layer that reads the choice is a `DSAConfig` with this one as its owner.

  Attributes:
    mla: the attention.
    block: tokens per pool.
    k: complete pools that a query sees; the open one's tokens are seen beside
      them.
    index_heads: heads HI of the indexer.
    index_width: width dI of its queries and of its one key.
    index_loss: factor on the indexer's loss; 0 leaves it out.
    index_eps: of the layer norm of its keys.
    stage: as for `DSAConfig`.
  """

  mla: MLAConfig = MLAConfig(q_rank=64)
  block: int = 4
  k: int = 512
  index_heads: int = 4
  index_width: int = 32
  index_loss: float = 1.0
  index_eps: float = 1e-6
  stage: str = 'sparse'

  chooses = True

  def __post_init__(self):
    _check(self, 'block', 'k', 'index_heads', 'index_width')


@dataclasses.dataclass(frozen=True)
class HySparseConfig:
  """Sparse layers that see what a full layer before them looked at.

  Attributes:
    attention: heads, widths, rope. Without an owner it sees everything; a
      reader has its own queries and shares the owner's keys and values, so
      their sizes have to agree.
    owner: name of the earlier full layer; None is such a layer.
    block: tokens per block; a reader's has to be its owner's.
    k: blocks that a group of heads of a reader sees; the owner's counts.
    window: visible tokens, the query included, of a reader's second branch,
      which has keys and values of its own; None in the owner.
  """

  attention: AttentionConfig = AttentionConfig(sink=True)
  owner: str | None = None
  block: int = 64
  k: int = 16
  window: int | None = None

  def __post_init__(self):
    checks.positive(self, 'block', 'k')
    _no_window(self)
    if (self.owner is None) != (self.window is None):
      raise ValueError(
          'HySparseConfig: expected owner and window together (a reader), or '
          f'neither (an owner), got owner={self.owner!r}, '
          f'window={self.window}.')
    if self.window is not None:
      checks.positive(self, 'window')

  @property
  def reach(self):
    """All of the past, also behind a window."""
    return None

  @property
  def chooses(self):
    """Readers see a part that depends on values, see `statejax.laws`."""
    return self.owner is not None
