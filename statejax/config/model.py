"""Configurations of layers, their order, and the model."""

import dataclasses
import typing

from statejax.config import checks
from statejax.config.ksa import SummaryConfig

# Of models; the ops take float64 too.
DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class NormConfig:
  """RMS normalisation.

  Attributes:
    eps: added to the mean square.
    offset: the weight enters as `offset + w`; 1.0 is the (1+w) form.
  """

  eps: float = 1e-6
  offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class SwiGLUConfig:
  """`down(silu(gate x) * up x)` of the given hidden width F."""

  hidden: int = 256


@dataclasses.dataclass(frozen=True)
class LayerConfig:
  """One kind of layer: a mixer and a feed-forward block around residuals.

  Attributes:
    name: label used in patterns and as the key of its state.
    mixer: configuration of a registered mixer; its type chooses the module.
    mlp: feed-forward block.
    norm: 'pre' normalises each block's input, 'post' its output.
  """

  name: str
  mixer: typing.Any
  mlp: SwiGLUConfig = SwiGLUConfig()
  norm: str = 'pre'


@dataclasses.dataclass(frozen=True)
class GroupConfig:
  """`pattern` of layer names, run `repeats` times as one scan."""

  pattern: tuple[str, ...]
  repeats: int = 1

  def __post_init__(self):
    checks.positive(self, 'repeats')
    if not isinstance(self.pattern, tuple) or not self.pattern:
      raise ValueError(f'pattern: expected a tuple of layer names, got '
                       f"{self.pattern!r}; one layer is ('name',).")


@dataclasses.dataclass(frozen=True)
class HyperConfig:
  """Several residual streams (mHC), see `statejax.layers.hyper`.

  Attributes:
    count: streams S.
    eps: of the mappings.
    iterations: of the normalisation of rows and columns.
  """

  count: int = 4
  eps: float = 1e-6
  iterations: int = 20

  def __post_init__(self):
    checks.no_less(self, 2, 'count')
    checks.positive(self, 'iterations')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder: embedding, groups of layers, norm, head.

  Attributes:
    vocab: P, number of token ids.
    width: D.
    layers: the kinds of layers that patterns may name.
    groups: run in order.
    norm: of the residual stream.
    tied: the head reuses the embedding.
    dtype: of activations and matmuls; parameters are float32.
    store_dtype: of growing stores, rings and convolution tails; recurrent
      matrices are float32 whatever this says. None means `dtype`.
    remat: recompute each layer in the backward pass.
    streams: several residual streams; None is the plain residual.
    summary: summary tokens behind every chunk of text, for mixers that bear the
      same `summary`; None has none.
  """

  vocab: int
  width: int
  layers: tuple[LayerConfig, ...]
  groups: tuple[GroupConfig, ...]
  norm: NormConfig = NormConfig()
  tied: bool = True
  dtype: str = 'float32'
  store_dtype: str | None = None
  remat: bool = False
  streams: HyperConfig | None = None
  summary: SummaryConfig | None = None

  def __post_init__(self):
    checks.positive(self, 'vocab', 'width')
    for name in ('layers', 'groups'):
      if not isinstance(getattr(self, name), tuple):
        raise ValueError(f'{name}: expected a tuple, got '
                         f'{type(getattr(self, name)).__name__}.')
    names = [layer.name for layer in self.layers]
    if len(set(names)) != len(names):
      raise ValueError(f'layers: expected distinct names, got {names}.')
    for layer in self.layers:
      if getattr(layer.mixer, 'vocab', 0) not in (0, self.vocab):
        raise ValueError(f'layer {layer.name!r}: expected a mixer with vocab=0 '
                         f'or {self.vocab}, as the model, got '
                         f'{layer.mixer.vocab}.')
    for name in ('dtype', 'store_dtype'):
      if getattr(self, name) not in (*DTYPES, *[None] * (name != 'dtype')):
        raise ValueError(f'{name}: expected one of {DTYPES}, got '
                         f'{getattr(self, name)!r}.')

  def layer(self, name: str) -> LayerConfig:
    """Returns the layer kind `name`."""
    for layer in self.layers:
      if layer.name == name:
        return layer
    raise ValueError(
        f'groups: layer {name!r} is not among layers='
        f'{[layer.name for layer in self.layers]}; add it or mend the pattern.')

  @property
  def names(self) -> tuple[str, ...]:
    """The layer name of every layer, in order."""
    return tuple(
        name for g in self.groups for _ in range(g.repeats)
        for name in g.pattern)
