"""Configurations of the delta-rule mixers."""

import dataclasses
import typing

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
    rate_min: exp(A) is drawn from [rate_min, 16).
    dt_bias: initial value; None draws its softplus from [0.001, 0.1].
    decode: 'step' writes the matrix for every token; 'deferred' at the end of
      every `chunk` tokens, None meaning 8; 'bitwise' likewise, and training,
      prefill and decode agree to the bit in the op. Parameters are the same.
  """

  heads: int = 4
  value_heads: int = 4
  key: int = 64
  value: int = 64
  conv: int = 4
  max_erase: float = 1.0
  eps: float = 1e-6
  chunk: int | None = None
  rate_min: float = 1.0
  dt_bias: float | None = None
  decode: str = 'step'

  def __post_init__(self):
    checks.positive(self, 'heads', 'value_heads', 'key', 'value', 'conv')
    checks.divides(self, 'value_heads', 'heads')
    checks.chunk(self)
    checks.decodes(self)

  @classmethod
  def qwen(cls, **fields):
    """As in Qwen3-Next and Qwen3.5."""
    preset: dict[str, typing.Any] = {'rate_min': 0.01, 'dt_bias': 1.0}
    return cls(**(preset | fields))

  @classmethod
  def olmo(cls, **fields):
    """As in OLMo Hybrid, with negative eigenvalues."""
    preset: dict[str, typing.Any] = {
        'rate_min': 0.0, 'max_erase': 2.0, 'eps': 1e-5}
    return cls(**(preset | fields))


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
    gate_bias: the output gate has a bias.
    decode: 'step' writes the matrix for every token; 'deferred' at the end of
      every `chunk` tokens, None meaning 8; 'bitwise' likewise, and training,
      prefill and decode agree to the bit in the op. Parameters are the same.
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
  gate_bias: bool = False
  decode: str = 'step'

  def __post_init__(self):
    checks.positive(self, 'heads', 'key', 'value', 'rank', 'conv')
    checks.negative(self, 'lower_bound')
    checks.chunk(self)
    checks.decodes(self)


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet2Config:
  """Gated DeltaNet-2: erases per key, writes per value channel (2605.22791).

  Attributes:
    heads: key heads HK.
    value_heads: value heads HV, a multiple of `heads`.
    key: key width K.
    value: value width V.
    rank: inner width of the low-rank decay and output gates.
    conv: taps of the three short convolutions.
    lower_bound: of the log decay, as in `KDAConfig`.
    max_erase: erase is `max_erase * sigmoid(.)`; write never exceeds 1.
    eps: of the gated output norm.
    chunk: chunk length of the parallel form; None means the op's default.
    decode: 'step' writes the matrix for every token; 'deferred' at the end of
      every `chunk` tokens, None meaning 8; 'bitwise' likewise, and training,
      prefill and decode agree to the bit in the op. Parameters are the same.
  """

  heads: int = 4
  value_heads: int = 4
  key: int = 64
  value: int = 64
  rank: int = 32
  conv: int = 4
  lower_bound: float | None = None
  max_erase: float = 1.0
  eps: float = 1e-5
  chunk: int | None = None
  decode: str = 'step'

  def __post_init__(self):
    checks.positive(self, 'heads', 'value_heads', 'key', 'value', 'rank',
                    'conv')
    checks.divides(self, 'value_heads', 'heads')
    checks.negative(self, 'lower_bound')
    checks.chunk(self)
    checks.decodes(self)


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
  """DeltaNet: the delta rule without decay (arXiv 2406.06484).

  Attributes:
    heads: heads, of keys and of values.
    key: key width K.
    value: value width V.
    conv: taps of the three short convolutions.
    max_erase: beta is `max_erase * sigmoid(.)`.
    output_gate: the output norm is gated by a SiLU of the input.
    eps: of the output norm.
    chunk: chunk length of the parallel form; None means the op's default.
    decode: 'step' writes the matrix for every token; 'deferred' at the end of
      every `chunk` tokens, None meaning 8; 'bitwise' likewise, and training,
      prefill and decode agree to the bit in the op. Parameters are the same.
  """

  heads: int = 4
  key: int = 64
  value: int = 64
  conv: int = 4
  max_erase: float = 1.0
  output_gate: bool = False
  eps: float = 1e-5
  chunk: int | None = None
  decode: str = 'step'

  def __post_init__(self):
    checks.positive(self, 'heads', 'key', 'value', 'conv')
    checks.chunk(self)
    checks.decodes(self)


@dataclasses.dataclass(frozen=True)
class DeltaProductConfig:
  """Gated DeltaProduct: several writes per token (arXiv 2502.10297).

  Attributes:
    heads: key heads HK.
    value_heads: value heads HV, a multiple of `heads`.
    key: key width K.
    value: value width V.
    writes: keys, values and gates per token, applied one after the other.
    decay: the state decays once per token; False is DeltaProduct ungated.
    conv: taps of the three short convolutions.
    max_erase: beta is `max_erase * sigmoid(.)`.
    eps: of the gated output norm.
    chunk: writes per chunk of the parallel form; None means the op's default.
  """

  heads: int = 4
  value_heads: int = 4
  key: int = 64
  value: int = 64
  writes: int = 2
  decay: bool = True
  conv: int = 4
  max_erase: float = 2.0
  eps: float = 1e-5
  chunk: int | None = None

  def __post_init__(self):
    checks.positive(self, 'heads', 'value_heads', 'key', 'value', 'writes',
                    'conv')
    checks.divides(self, 'value_heads', 'heads')
    checks.chunk(self)
