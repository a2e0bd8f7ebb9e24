"""Configurations: frozen dataclasses of scalars and tuples, typed overrides.

A model is a list of groups; a group is a pattern of layer names, repeated; a
name points to one `LayerConfig`. Layers of equal name share one stacked state,
so the pattern `('kda', 'kda', 'kda', 'full')` repeated six times has exactly
two state entries, `kda` with 18 layers and `full` with 6.
"""

import ast
import dataclasses
import difflib
import types
import typing

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def _positive(config, *names):
  for name in names:
    if getattr(config, name) < 1:
      raise ValueError(f'{type(config).__name__}.{name}: expected >= 1, got '
                       f'{getattr(config, name)}.')


def _divides(config, many, few):
  if getattr(config, many) % getattr(config, few):
    raise ValueError(
        f'{type(config).__name__}: {many}={getattr(config, many)} must be a '
        f'multiple of {few}={getattr(config, few)}.')


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
class NormConfig:
  """RMS normalisation.

  Attributes:
    eps: added to the mean square.
    offset: the weight enters as `offset + w`; 1.0 is the (1+w) form.
  """

  eps: float = 1e-6
  offset: float = 0.0


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
    _positive(self, 'heads', 'value_heads', 'key', 'value', 'conv')
    _divides(self, 'value_heads', 'heads')


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
    _positive(self, 'heads', 'key', 'value', 'rank', 'conv')
    if self.lower_bound is not None and self.lower_bound >= 0:
      raise ValueError(f'lower_bound: expected < 0 or None, got '
                       f'{self.lower_bound}.')


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
    _positive(self, 'heads', 'kv_heads', 'key', 'value')
    _divides(self, 'heads', 'kv_heads')
    if self.window is not None and self.window < 1:
      raise ValueError(f'window: expected >= 1 (it counts the query) or None, '
                       f'got {self.window}.')


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
    _positive(self, 'repeats')
    if not isinstance(self.pattern, tuple) or not self.pattern:
      raise ValueError(f'pattern: expected a tuple of layer names, got '
                       f"{self.pattern!r}; one layer is ('name',).")


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

  def __post_init__(self):
    _positive(self, 'vocab', 'width')
    for name in ('layers', 'groups'):
      if not isinstance(getattr(self, name), tuple):
        raise ValueError(f'{name}: expected a tuple, got '
                         f'{type(getattr(self, name)).__name__}.')
    names = [layer.name for layer in self.layers]
    if len(set(names)) != len(names):
      raise ValueError(f'layers: expected distinct names, got {names}.')
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


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimisation, data and checkpoints of one run.

  Attributes:
    steps: optimizer updates.
    rows: rows of a global batch.
    length: tokens per row T.
    accumulate: micro-batches per update; divides `rows`.
    peak: highest learning rate.
    warmup: updates of linear rise from 0.
    decay: updates of linear fall to 0 at the end.
    b1: first-moment decay of AdamW.
    b2: second-moment decay of AdamW.
    weight_decay: on matrices only, never on norms, biases or gates.
    clip: largest global gradient norm.
    optimizer: 'adamw', or 'muon' (matrices) beside adamw (the rest).
    z_loss: weight of the squared log-normaliser.
    seed: of initialisation and data order.
    save_every: updates between checkpoints.
    keep: newest checkpoints kept.
    eval_every: updates between evaluations; 0 evaluates at the end only.
    eval_batches: held-out batches of an evaluation.
    log_every: updates between metric lines.
    data: size of the data mesh axis; None means every device that is left, a
      number only the first `data * fsdp * tensor`.
    fsdp: size of the parameter-sharding mesh axis.
    tensor: size of the head-sharding mesh axis.
  """

  steps: int = 100
  rows: int = 16
  length: int = 256
  accumulate: int = 1
  peak: float = 3e-3
  warmup: int = 20
  decay: int = 40
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.1
  clip: float = 1.0
  optimizer: str = 'adamw'
  z_loss: float = 0.0
  seed: int = 0
  save_every: int = 50
  keep: int = 2
  eval_every: int = 0
  eval_batches: int = 8
  log_every: int = 1
  data: int | None = None
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """What is learned: `text` (Python standard library) or `mqar`.

  Attributes:
    name: 'text' or 'mqar'.
    pairs: key-value pairs of an mqar item.
    items: number of distinct mqar items.
    vocab: mqar vocabulary; half keys, half values.
  """

  name: str = 'text'
  pairs: int = 8
  items: int = 100_000
  vocab: int = 64


@dataclasses.dataclass(frozen=True)
class Config:
  """What a file in `configs/` returns from `get_config()`."""

  model: ModelConfig
  train: TrainConfig = TrainConfig()
  task: TaskConfig = TaskConfig()


def override(config, assignment: str) -> typing.Any:
  """Returns `config` with one typed field replaced.

  The path may pass through fields of dataclasses, and through tuples of
  dataclasses by their `name` or by index: `model.layers.kda.mixer.heads`.

  Args:
    config: a frozen dataclass.
    assignment: 'a.b=value'; the value is a Python literal or a bare word.

  Raises:
    ValueError: unknown field (with the nearest match), wrong type.

  >>> override(Config(ModelConfig(8, 4, (), ())), 'model.width=16').model.width
  16
  """
  path, sep, text = assignment.partition('=')
  if not sep:
    raise ValueError(
        f'override {assignment!r}: expected path=value, e.g. model.width=64.')
  return _replace(config, path.strip().split('.'), text.strip(), path.strip())


def _replace(node, keys, text, path):
  key, *rest = keys
  if isinstance(node, tuple):
    index = _position(node, key, path)
    value = (_replace(node[index], rest, text, path) if rest
             else _parse(text, None, node[index], path))
    return node[:index] + (value,) + node[index + 1:]
  if not dataclasses.is_dataclass(node):
    raise ValueError(f'{path}: {node!r} has no field {key!r}.')
  hints = typing.get_type_hints(type(node))
  if key not in hints:
    raise ValueError(_unknown(key, hints, path))
  old = getattr(node, key)
  value = (_replace(old, rest, text, path) if rest
           else _parse(text, hints[key], old, path))
  return dataclasses.replace(node, **{key: value})


def _position(items, key, path):
  if key.isdigit() and int(key) < len(items):
    return int(key)
  names = [getattr(item, 'name', None) for item in items]
  if key in names:
    return names.index(key)
  known = [n for n in names if n] or [str(i) for i in range(len(items))]
  raise ValueError(_unknown(key, known, path))


def _unknown(key, known, path):
  near = difflib.get_close_matches(key, list(known), n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  return (f'{path}: unknown key {key!r}; the keys here are '
          f'{", ".join(known)}.{hint}')


def _parse(text, hint, old, path):
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  hint = type(old) if hint is None or hint is typing.Any else hint
  if not _fits(value, hint):
    raise ValueError(
        f'{path}: expected {getattr(hint, "__name__", hint)}, got {value!r} '
        f'({type(value).__name__}).')
  return float(value) if _is_float(hint) and type(value) is int else value


def _is_float(hint):
  return float in (typing.get_args(hint) or (hint,)) and (
      int not in (typing.get_args(hint) or (hint,)))


def _fits(value, hint):
  """Whether `value` is of the annotated type; a bool is no int."""
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, h) for h in typing.get_args(hint))
  if origin is tuple:
    item = typing.get_args(hint)[0]
    return isinstance(value, tuple) and all(_fits(v, item) for v in value)
  if hint is float:
    return type(value) in (int, float)
  if hint is int:
    return type(value) is int
  return isinstance(value, hint)


def to_dict(config) -> typing.Any:
  """Returns `config` as nested dicts and lists that JSON can hold.

  Every dataclass carries its type under `type`, so that two mixers with equal
  fields differ.
  """
  if dataclasses.is_dataclass(config):
    fields = {f.name: to_dict(getattr(config, f.name))
              for f in dataclasses.fields(config)}
    return {'type': type(config).__name__, **fields}
  if isinstance(config, tuple | list):
    return [to_dict(item) for item in config]
  return config


def from_dict(data, types=()) -> typing.Any:
  """Undoes `to_dict`, for the config types of this module.

  Raises:
    ValueError: an unknown type or field, or one is missing, as of another
      version.
  """
  if isinstance(data, list):
    return tuple(from_dict(item, types) for item in data)
  if not isinstance(data, dict):
    return data
  fields = {k: from_dict(v, types) for k, v in data.items() if k != 'type'}
  known = {t.__name__: t for t in types}
  name = data.get('type', '')
  kind: typing.Any = known.get(name, globals().get(name))
  if not dataclasses.is_dataclass(kind):
    raise ValueError(f'config: unknown type {data.get("type")!r}; it was saved '
                     'by another version, or defined outside statejax.config.')
  known = {f.name: f.default is dataclasses.MISSING
           for f in dataclasses.fields(kind)}
  odd = sorted(fields.keys() - known.keys())
  odd += sorted(n for n in known.keys() - fields.keys() if known[n])
  if odd:
    raise ValueError(f'{kind.__name__}: unknown or missing fields {odd}; the '
                     'config was saved by another version.')
  return kind(**fields)
