"""Configurations of the attention mixers."""

import dataclasses

from statejax.config import checks


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding on the first `fraction` of the channels.

  Attributes:
    theta: base of the geometric frequencies.
    fraction: share of the head's channels that rotate (partial rope).
  """

  theta: float = 10_000.0
  fraction: float = 1.0


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Softmax attention with grouped key/value heads.

  Attributes:
    heads: query heads H.
    kv_heads: key/value heads G; H must be a multiple.
    key: width K of queries and keys.
    value: width V of values.
    window: visible tokens including the query itself; None sees all.
    rope: rotary embedding; None is NoPE.
    qk_norm: RMS norm per head on queries and keys, before rope.
    sink: a learned logit per head joins the softmax denominator.
    output_gate: sigmoid gate, from the layer's input, on the output.
    eps: of the q/k norms.
  """

  heads: int = 4
  kv_heads: int = 2
  key: int = 64
  value: int = 64
  window: int | None = None
  rope: RopeConfig | None = RopeConfig()
  qk_norm: bool = False
  sink: bool = False
  output_gate: bool = False
  eps: float = 1e-6

  def __post_init__(self):
    checks.positive(self, 'heads', 'kv_heads', 'key', 'value')
    checks.divides(self, 'heads', 'kv_heads')
    if self.window is not None and self.window < 1:
      raise ValueError(f'window: expected >= 1 (it counts the query) or None, '
                       f'got {self.window}.')
