"""Configurations of the attention mixers."""

import dataclasses

from statejax.config import checks


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN: slow channels are slowed by `factor` (arXiv 2309.00071).

  Attributes:
    factor: of the context's extension.
    original: positions of the pre-training.
    beta_fast: channels that turn more often over `original` positions keep
      their frequency.
    beta_slow: those that turn less often have it divided by `factor`.
    mscale: numerator of the factor on cos and sin, with `mscale_all_dim`.
    mscale_all_dim: its denominator; latent attention also multiplies the
      softmax scale by `(0.1 mscale_all_dim ln(factor) + 1)^2`.
    attention_factor: the factor on cos and sin outright; None derives it.
    truncate: whether the two limits are rounded to whole channels.
  """

  factor: float = 40.0
  original: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self):
    checks.no_less(self, 1, 'factor')
    checks.positive(self, 'original')
    if not 0 < self.beta_slow < self.beta_fast:
      raise ValueError(f'YarnConfig: expected 0 < beta_slow < beta_fast, got '
                       f'{self.beta_slow} and {self.beta_fast}.')


@dataclasses.dataclass(frozen=True)
class LongRopeConfig:
  """LongRoPE: a factor for each channel's wavelength (arXiv 2402.13753).

  The published code turns by `short` until a sequence outgrows `original`, and
  by `long` from then on. Here `maximum` decides once for all sequences: keys in
  a store cannot change their rotation in mid-stream.

  Attributes:
    short: a factor per pair of rotating channels, where maximum <= original.
    long: the same, where maximum > original.
    original: positions of the pre-training.
    maximum: positions that are to be served.
    factor: of the extension; None means `maximum / original`.
    attention_factor: on cos and sin; None means
      `sqrt(1 + ln(factor) / ln(original))`.
  """

  short: tuple[float, ...]
  long: tuple[float, ...]
  original: int = 4096
  maximum: int = 131_072
  factor: float | None = None
  attention_factor: float | None = None

  def __post_init__(self):
    checks.no_less(self, 2, 'original')
    checks.positive(self, 'maximum')
    for name in ('short', 'long'):
      factors = getattr(self, name)
      if not isinstance(factors, tuple) or not all(f > 0 for f in factors):
        raise ValueError(f'LongRopeConfig.{name}: expected a tuple of factors '
                         f'above 0, got {factors!r}.')


@dataclasses.dataclass(frozen=True)
class Llama3RopeConfig:
  """Llama 3.1: channels of few turns are slowed by `factor`.

  Attributes:
    factor: of the slow channels.
    original: positions of the pre-training.
    low: channels that turn less often over `original` positions are slow.
    high: those that turn more often keep their frequency.
  """

  factor: float = 8.0
  original: int = 8192
  low: float = 1.0
  high: float = 4.0

  def __post_init__(self):
    checks.no_less(self, 1, 'factor')
    checks.positive(self, 'original')
    if not 0 < self.low < self.high:
      raise ValueError(f'Llama3RopeConfig: expected 0 < low < high, got '
                       f'{self.low} and {self.high}.')


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding on a `fraction` of the channels.

  Attributes:
    theta: base of the geometric frequencies.
    fraction: share of the head's channels that rotate (partial rope).
    scaling: of the frequencies, for contexts longer than those of the
      pre-training; None leaves them.
    layout: 'half' pairs channel i with one half the rotating channels ahead,
      'interleaved' with its neighbour.
    side: the 'leading' or the 'trailing' channels rotate.
  """

  theta: float = 10_000.0
  fraction: float = 1.0
  scaling: YarnConfig | LongRopeConfig | Llama3RopeConfig | None = None
  layout: str = 'half'
  side: str = 'leading'

  def __post_init__(self):
    checks.types(self)
    if not (self.theta > 0 and 0 <= self.fraction <= 1):
      raise ValueError('RopeConfig: expected theta > 0 and 0 <= fraction <= 1, '
                       f'got {self.theta} and {self.fraction}.')
    checks.one_of(self, 'layout', ('half', 'interleaved'))
    checks.one_of(self, 'side', ('leading', 'trailing'))


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
