"""Configuration of multi-head latent attention."""

import dataclasses

from statejax.config import checks
from statejax.config.attention import RopeConfig


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Attention whose keys and values come from one latent vector per token.

  Attributes:
    heads: heads H.
    nope: width of the part of queries and keys that never rotates; keys have it
      per head, from the latent.
    rope_width: width of the other part; its key is one for all heads. 0 leaves
      the part out.
    value: width V of values.
    rank: width R of the latent.
    q_rank: width of the queries' latent; None projects them outright.
    rope: rotary embedding of the second part; None leaves it as it is.
    eps: of the norms of both latents.
    lora_scale: queries times `sqrt(D / q_rank)`, latents `sqrt(D / rank)`, as
      in LongCat.
    output_gate: sigmoid gate, from the layer's input, on the output.
  """

  heads: int = 4
  nope: int = 32
  rope_width: int = 16
  value: int = 32
  rank: int = 64
  q_rank: int | None = None
  rope: RopeConfig | None = RopeConfig(layout='interleaved')
  eps: float = 1e-6
  lora_scale: bool = False
  output_gate: bool = False

  def __post_init__(self):
    checks.positive(self, 'heads', 'nope', 'value', 'rank')
    checks.no_less(self, 0, 'rope_width')
    if self.q_rank is not None:
      checks.positive(self, 'q_rank')
    elif self.lora_scale:
      raise ValueError('MLAConfig.lora_scale: it scales by q_rank, which is '
                       'None; give q_rank.')
