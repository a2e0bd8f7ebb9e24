"""Whatever `check` is asked about, brought to one interface.

A subject has

  init(key) -> params
  init_state(rows, capacity) -> ServingState
  step(params, state, inputs, n_valid, segment_ids) -> (outputs, state)
  inputs(key, rows, steps) -> [B, T, ...]

with `step` pure and traceable, and inputs either floats or token ids. It may
say more about itself:

  reach: tokens that an output can see, itself included; None for all.
  chooses: whether outputs see a part of their reach that depends on values.
  straight_through: whether gradients are not those of what is computed.
  phases: chunk lengths worth trying, such as a window and its neighbours.
  grid: chunk length such that splits at its multiples are exact; None for none.
  tolerance: largest relative error where a law is not exact.
  state_schema(rows, capacity): the `statejax.state.Leaf` of every leaf.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from statejax import config as cfg
from statejax import model as lm
from statejax.layers import block, common, groups

# Chunks and windows that do not end within a few tokens are cut to these: no
# parameter depends on them, and what is never reached is never checked.
_SHORT = {'chunk': 8, 'window': 5, 'segment': 4}
_LONGEST = 12
# Fields and properties of a mixer's config that say where something begins.
_LENGTHS = ('window', 'conv', 'chunk', 'ratio', 'block', 'stride',
            'compress_block', 'select_block', 'segment')

# Per layer and for a whole tiny model, float32; see `statejax.laws`.
LAYER, MODEL = 2e-6, 1e-5


@dataclasses.dataclass(frozen=True)
class ModelSubject:
  """A language model: token ids [B, T] in, logits [B, T, P] out.

  Attributes:
    model: the model.
    unstacked: whether it runs on `model.unstack(params)`.
  """

  model: lm.LanguageModel
  unstacked: bool = False

  def __str__(self):
    c = self.model.config
    return (f'model of {len(c.names)} layers ({", ".join(sorted(set(c.names)))}'
            f'), width {c.width}, {c.dtype}')

  @property
  def tolerance(self):
    return MODEL

  @property
  def reach(self):
    reaches = [_reach(self.model.config.layer(name).mixer)
               for name in self.model.config.names]
    known = [r for r in reaches if r is not None]
    return (1 + sum(r - 1 for r in known) if len(known) == len(reaches)
            else None)

  @property
  def chooses(self):
    return any(_chooses(layer.mixer) for layer in self.model.config.layers)

  @property
  def straight_through(self):
    return any(getattr(layer.mixer, 'straight_through', False)
               for layer in self.model.config.layers)

  @property
  def phases(self):
    return _phases(layer.mixer for layer in self.model.config.layers)

  def init(self, key):
    params = self.model.init(key)
    return self.model.unstack(params) if self.unstacked else params

  def init_state(self, rows, capacity):
    return self.model.init_state(rows, capacity, logits=True)

  def state_schema(self, rows, capacity):
    return self.model.state_schema(rows, capacity, logits=True)

  def step(self, params, state, tokens, n_valid, segment_ids):
    return self.model.step(params, state, tokens, n_valid, segment_ids)

  def inputs(self, key, rows, steps):
    return jax.random.randint(
        key, (rows, steps), 0, self.model.config.vocab, jnp.int32)


@dataclasses.dataclass(frozen=True)
class MixerSubject:
  """One layer with its residuals: floats [B, T, D] in and out.

  It runs through the same functions as a model of that one layer, so its state
  is a `ServingState` whose witness, lacking tokens, stays zero.

  Attributes:
    layer: configuration of the layer.
    width: D.
    norm: of the residual stream.
    dtype: of activations.
    store_dtype: of stores, rings and convolution tails; None means `dtype`.
  """

  layer: cfg.LayerConfig
  width: int = 24
  norm: cfg.NormConfig = cfg.NormConfig()
  dtype: str = 'float32'
  store_dtype: str | None = None

  def __str__(self):
    return (f'{type(self.layer.mixer).__name__} in a layer of width '
            f'{self.width}, {self.dtype}')

  @property
  def model(self):
    return lm.LanguageModel(cfg.ModelConfig(
        vocab=1, width=self.width, layers=(self.layer,),
        groups=(cfg.GroupConfig((self.layer.name,)),), norm=self.norm,
        dtype=self.dtype, store_dtype=self.store_dtype))

  @property
  def tolerance(self):
    return LAYER

  @property
  def reach(self):
    return _reach(self.layer.mixer)

  @property
  def chooses(self):
    return _chooses(self.layer.mixer)

  @property
  def straight_through(self):
    return getattr(self.layer.mixer, 'straight_through', False)

  @property
  def phases(self):
    return _phases([self.layer.mixer])

  @property
  def grid(self):
    # Deferred, a matrix written by steps is close to one of a longer call.
    if getattr(self.layer.mixer, 'decode', 'step') == 'deferred':
      return None
    return getattr(self.layer.mixer, 'chunk', None)

  def init(self, key):
    return {'group_0': self.model.init(key)['group_0']}

  def init_state(self, rows, capacity):
    return self.model.init_state(rows, capacity)

  def state_schema(self, rows, capacity):
    return self.model.state_schema(rows, capacity)

  def step(self, params, state, x, n_valid, segment_ids):
    rows, steps = x.shape[:2]
    if n_valid is None:
      n_valid = jnp.full((rows,), steps, jnp.int32)
    document = back = None
    if segment_ids is not None:
      index = jnp.arange(steps, dtype=jnp.int32)
      index = jnp.broadcast_to(index[None], (rows, steps))
      order, n_valid, document, back = lm.pack(index, n_valid, segment_ids)
      x = jnp.take_along_axis(x, order[..., None], axis=1)
    context = common.context(state.length, n_valid, document, steps)
    y, layers, _ = groups.run(
        self.model.config, params, x, state.layers, context)
    y = jnp.where(context.valid[..., None], y, jnp.zeros((), y.dtype))
    if back is not None:
      y = jnp.take_along_axis(y, back[..., None], axis=1)
    return y, dataclasses.replace(
        state, layers=layers, length=context.new_length)

  def inputs(self, key, rows, steps):
    return jax.random.normal(key, (rows, steps, self.width), self.dtype)


def resolve(subject):
  """Returns the subject that an argument of `check` stands for.

  Raises:
    ValueError: it is none of the accepted things; says what is missing.
  """
  if isinstance(subject, cfg.ModelConfig):
    subject = lm.LanguageModel(subject)
  if isinstance(subject, lm.LanguageModel):
    subject = ModelSubject(subject)
  if isinstance(subject, ModelSubject):
    short = lm.LanguageModel(_short(subject.model.config))
    return dataclasses.replace(subject, model=short)
  if type(subject) in block.MIXERS:
    subject = cfg.LayerConfig('mixer', subject, cfg.SwiGLUConfig(32))
  if isinstance(subject, cfg.LayerConfig):
    subject = MixerSubject(subject)
  if isinstance(subject, MixerSubject):
    return dataclasses.replace(subject, layer=_short(subject.layer))
  needed = ('init', 'init_state', 'step', 'inputs')
  missing = [name for name in needed if not hasattr(subject, name)]
  if missing:
    raise ValueError(
        f'subject: {type(subject).__name__} lacks {", ".join(missing)}; '
        'expected a LanguageModel, a ModelConfig, a LayerConfig, the config of '
        'a registered mixer, or an object with init, init_state, step, inputs.')
  return subject


def _short(config) -> Any:
  """A layer or a model with `_SHORT` chunks and windows."""
  if isinstance(config, cfg.ModelConfig):
    return dataclasses.replace(config, layers=tuple(map(_short, config.layers)))
  if isinstance(config, cfg.LayerConfig):
    return dataclasses.replace(config, mixer=_short(config.mixer))
  found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
           if f.name in _SHORT}
  # No window is no window, but no chunk is the op's choice.
  return dataclasses.replace(config, **{
      name: _SHORT[name] for name, size in found.items()
      if (name == 'chunk' if size is None else size > _LONGEST)})


def _reach(mixer):
  # Without a window everything before is visible, through the store or
  # through the recurrent matrix; a config may say otherwise by `reach`.
  return getattr(mixer, 'reach', getattr(mixer, 'window', None))


def _chooses(mixer):
  return getattr(mixer, 'chooses', False)


def _phases(mixers):
  """Lengths at which something in one of the mixers begins anew."""
  found = {getattr(mixer, name, None) or 0
           for mixer in mixers for name in _LENGTHS}
  return tuple(sorted(found - {0}))
