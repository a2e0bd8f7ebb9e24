"""Configuration of sparse attention by a lightning indexer."""

import dataclasses

from statejax.config import checks
from statejax.config.attention import RopeConfig
from statejax.config.mla import MLAConfig

STAGES = ('sparse', 'warmup')


@dataclasses.dataclass(frozen=True)
class DSAConfig:
  """Latent attention restricted to the tokens that an indexer chooses.

  Attributes:
    mla: the attention.
    owner: name of an earlier layer whose choice is read (IndexShare), whatever
      that is: such a layer has no indexer, k or stage of its own, and keeps no
      index keys.
    k: tokens that a query may see.
    index_heads: heads HI of the indexer.
    index_width: width dI of its queries and of its one key.
    index_rope: rotation of both; `fraction` of the width turns.
    index_relu: whether scores below 0 count as 0.
    index_loss: factor on the indexer's own loss; 0 leaves it out.
    index_eps: of the layer norm of its keys.
    stage: 'sparse'; or 'warmup', where attention sees everything and the
      indexer learns from all of it.
  """

  mla: MLAConfig = MLAConfig(q_rank=64)
  owner: str | None = None
  k: int = 2048
  index_heads: int = 4
  index_width: int = 32
  index_rope: RopeConfig | None = RopeConfig(fraction=0.5)
  index_relu: bool = True
  index_loss: float = 1.0
  index_eps: float = 1e-6
  stage: str = 'sparse'

  # What is seen depends on values, see `statejax.laws`.
  chooses = True

  def __post_init__(self):
    checks.positive(self, 'k', 'index_heads', 'index_width')
    checks.no_less(self, 0, 'index_loss')
    if self.stage not in STAGES or (
        self.owner is not None and self.stage != 'sparse'):
      raise ValueError(f"DSAConfig.stage: expected one of {STAGES}, 'sparse' "
                       f'for a layer with an owner, got {self.stage!r}.')
