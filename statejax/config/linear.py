"""Configurations of the mixers that decay and write but never erase."""

import dataclasses

from statejax.config import checks
from statejax.config.attention import RopeConfig


@dataclasses.dataclass(frozen=True)
class GLAConfig:
  """Gated linear attention: one decay per key channel (arXiv 2312.06635).

  Attributes:
    heads: heads, of keys and of values.
    key: key width K.
    value: value width V.
    rank: inner width of the low-rank decay gate.
    divisor: the log decay is `log sigmoid(.) / divisor`.
    eps: of the gated output norm.
    chunk: chunk length of the parallel form; None means the op's default.
  """

  heads: int = 4
  key: int = 32
  value: int = 64
  rank: int = 16
  divisor: float = 16.0
  eps: float = 1e-5
  chunk: int | None = None

  def __post_init__(self):
    checks.positive(self, 'heads', 'key', 'value', 'rank')
    checks.no_less(self, 1, 'divisor')
    checks.chunk(self)


@dataclasses.dataclass(frozen=True)
class GatedConvConfig:
  """A short convolution between two gates (LFM2, arXiv 2511.23404).

  Attributes:
    width: channels; LFM2 has as many as the model.
    taps: tokens that a token sees, its own included.
  """

  width: int = 256
  taps: int = 3

  def __post_init__(self):
    checks.positive(self, 'width', 'taps')

  @property
  def reach(self):
    """See `statejax.laws`."""
    return self.taps


@dataclasses.dataclass(frozen=True)
class RetNetConfig:
  """Multi-scale retention: head h decays by `1 - 2^(-5-h)` (arXiv 2307.08621).

  Attributes:
    heads: heads, of keys and of values.
    key: key width K.
    value: value width V.
    rope: rotary embedding of queries and keys; None leaves it out.
    eps: of the gated output norm.
    chunk: chunk length of the parallel form; None means the op's default.
  """

  heads: int = 4
  key: int = 64
  value: int = 128
  rope: RopeConfig | None = RopeConfig()
  eps: float = 1e-5
  chunk: int | None = None

  def __post_init__(self):
    checks.positive(self, 'heads', 'key', 'value')
    checks.chunk(self)


@dataclasses.dataclass(frozen=True)
class LightningConfig:
  """Lightning attention: head h decays by `exp(-slope 2^(-8 (h+1) / H))`.

  Attributes:
    heads: heads H, of keys and of values.
    key: key width K.
    value: value width V.
    slope: factor on every head's rate. Where layers differ in it they are
      layers of different names; see `of_layer`.
    eps: of the output norm, over all heads at once.
    chunk: chunk length of the parallel form; None means the op's default.
  """

  heads: int = 4
  key: int = 64
  value: int = 64
  slope: float = 1.0
  eps: float = 1e-6
  chunk: int | None = None

  def __post_init__(self):
    checks.positive(self, 'heads', 'key', 'value')
    checks.chunk(self)
    if self.slope < 0:
      raise ValueError(f'slope: expected >= 0, got {self.slope}; a negative '
                       'one would let the state grow.')

  @classmethod
  def of_layer(cls, layer: int, layers: int, **fields):
    """Layer `layer` of `layers`, from 0, as in MiniMax-Text-01 (2501.08313)."""
    return cls(slope=1 - layer / (layers - 1 + 1e-5) + 1e-5, **fields)


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
  """Mamba-2: state space duality with a decay per head (arXiv 2405.21060).

  Attributes:
    heads: heads H of x, which is the value.
    groups: groups of B and C, the key and the query; divides `heads`.
    key: state size N of the literature.
    value: width P of a head of x.
    conv: taps of the short convolutions, which have a bias.
    dt_min: time steps are clamped to this from below,
    dt_max: and to this from above; None leaves them free.
    eps: of the output norm, over the heads of a group at once.
    chunk: chunk length of the parallel form; None means the op's default.
  """

  heads: int = 8
  groups: int = 1
  key: int = 128
  value: int = 64
  conv: int = 4
  dt_min: float = 0.0
  dt_max: float | None = None
  eps: float = 1e-5
  chunk: int | None = None

  def __post_init__(self):
    checks.positive(self, 'heads', 'groups', 'key', 'value', 'conv')
    checks.chunk(self)
    checks.divides(self, 'heads', 'groups')
    if self.dt_min < 0 or (self.dt_max is not None
                           and self.dt_max < self.dt_min):
      raise ValueError(f'dt_min, dt_max: expected 0 <= dt_min <= dt_max, got '
                       f'{self.dt_min} and {self.dt_max}.')
