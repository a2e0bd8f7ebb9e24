"""Configurations of the delta-rule mixers."""

import dataclasses

from statejax.config import checks


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
  """Gated DeltaNet: one decay per value head (arXiv 2412.06464).

  Attributes:
    heads: key heads HK.
    value_heads: value heads HV, a multiple of `heads`.
    key: key width K.
    value: value width V.
    conv: taps of the short convolution.
    max_erase: beta is `max_erase * sigmoid(.)`; 2.0 allows negative
      eigenvalues (arXiv 2411.12537).
    eps: of the gated output norm.
    chunk: chunk length of the parallel form; None means the op's default.
  """

  heads: int = 4
  value_heads: int = 4
  key: int = 64
  value: int = 64
  conv: int = 4
  max_erase: float = 1.0
  eps: float = 1e-6
  chunk: int | None = None

  def __post_init__(self):
    checks.positive(self, 'heads', 'value_heads', 'key', 'value', 'conv')
    checks.divides(self, 'value_heads', 'heads')


@dataclasses.dataclass(frozen=True)
class KDAConfig:
  """Kimi Delta Attention: one decay per key channel (arXiv 2510.26692).

  Attributes:
    heads: heads, of keys and of values.
    key: key width K.
    value: value width V.
    rank: inner width of the two low-rank gate projections.
    conv: taps of the three short convolutions.
    lower_bound: None for the gate `-exp(A) softplus(x)`; a negative number
      bounds it: `lower_bound * sigmoid(exp(A) x)`.
    max_erase: beta is `max_erase * sigmoid(.)`.
    eps: of the gated output norm.
    chunk: chunk length of the parallel form; None means the op's default.
  """

  heads: int = 4
  key: int = 64
  value: int = 64
  rank: int = 32
  conv: int = 4
  lower_bound: float | None = None
  max_erase: float = 1.0
  eps: float = 1e-6
  chunk: int | None = None

  def __post_init__(self):
    checks.positive(self, 'heads', 'key', 'value', 'rank', 'conv')
    if self.lower_bound is not None and self.lower_bound >= 0:
      raise ValueError(f'lower_bound: expected < 0 or None, got '
                       f'{self.lower_bound}.')
