"""Loss and update: the model's own step from a fresh state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from statejax import model as lm
from statejax.config import TrainConfig
from statejax.layers import common
from statejax.train import optimizer as opt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that training carries.

  Attributes:
    params: float32 masters.
    optimizer: optax state.
    step: updates done, int32 scalar.
    key: root key data of the run, [2] uint32, saved with it; no layer draws
      from it yet.
  """

  params: Any
  optimizer: Any
  step: Any
  key: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """Sums over predicted tokens; divide by `count`.

  Attributes:
    loss: cross-entropy in nats, float32 scalar.
    correct: tokens whose most likely prediction was right.
    squares: squared log-normalisers, for the z-loss.
    count: predicted tokens.
    layers: losses of the layers' own, such as an indexer's, over real tokens.
    tokens: real tokens.
    labels: {name: losses of the layers over tokens that have this label}.
    labelled: {name: such tokens}.
  """

  loss: jax.Array
  correct: jax.Array
  squares: jax.Array
  count: jax.Array
  layers: jax.Array
  tokens: jax.Array
  labels: dict[str, jax.Array]
  labelled: dict[str, jax.Array]


def score(model, params, batch) -> Sums:
  """Runs a batch from a fresh state.

  Args:
    model: `LanguageModel`.
    params: its parameters.
    batch: {'tokens', 'targets', 'segments'}, each [B, T] int32; a target of
      -1 is not predicted. And labels, if there are any, by the names of
      `statejax.layers.common.HINTS`.

  Raises:
    ValueError: something else in the batch, which would be left out.
  """
  targets = batch['targets']
  hints = _labels(batch)
  state = model.init_state(targets.shape[0], 0)
  logits, _, losses = lm.forward(model, params, state, batch['tokens'],
                                 segment_ids=batch['segments'], hints=hints)
  asked = targets >= 0
  norm = jax.nn.logsumexp(logits, axis=-1)
  hit = jnp.take_along_axis(
      logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  total = lambda x: jnp.sum(jnp.where(asked, x, 0.0))
  own, labels = jnp.float32(0), {name: jnp.float32(0) for name in hints}
  for name, x in (pair for layer in losses.values() for pair in layer.items()):
    label = name.removesuffix('_loss')
    if label in labels:
      labels[label] += x
    else:
      own += x
  return Sums(loss=total(norm - hit),
              correct=total((jnp.argmax(logits, -1) == targets) * 1.0),
              squares=total(norm * norm), count=total(1.0),
              layers=own, labels=labels, **_real(batch))


def _labels(batch):
  """What of a batch is labels; raises as `score` does."""
  return common.checked_hints(
      {name: x for name, x in batch.items()
       if name not in ('tokens', 'targets', 'segments')}, batch['tokens'].shape)


def _real(batch):
  """Counts of `Sums`: real tokens, and those of them that have a label."""
  real = batch['segments'] >= 0
  many = lambda mask: jnp.sum(mask).astype(jnp.float32)
  return {'tokens': many(real), 'labelled': {
      name: many((x >= 0) & real) for name, x in _labels(batch).items()}}


def _own(sums, tokens, labelled):
  """The layers' own losses: per real token, and per token with the label."""
  many = lambda count: jnp.maximum(count, 1.0)
  return sums.layers / many(tokens) + sum(
      x / many(labelled[name]) for name, x in sums.labels.items())


def initial(model, config: TrainConfig) -> TrainState:
  """Returns the state before the first update."""
  key = jax.random.key(config.seed)
  params = model.init(key)
  optimizer = opt.make_optimizer(config, model.axes())
  return TrainState(params, optimizer.init(params), jnp.int32(0),
                    jax.random.key_data(key))


def _gradient(model, config, params, batch):
  """Mean gradient over the batch, summed over `accumulate` micro-batches."""
  count = jnp.maximum(jnp.sum(batch['targets'] >= 0), 1).astype(jnp.float32)
  real = _real(batch)

  def loss(params, piece):
    sums = score(model, params, piece)
    predicted = (sums.loss + config.z_loss * sums.squares) / count
    return predicted + _own(sums, **real), sums

  grad = jax.grad(loss, has_aux=True)
  if config.accumulate == 1:
    return grad(params, batch)
  pieces = jax.tree.map(
      lambda x: x.reshape(config.accumulate, -1, *x.shape[1:]), batch)
  def add(carry, piece):
    return jax.tree.map(jnp.add, carry, grad(params, piece)), None
  zero = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype),
      jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], pieces)))
  return jax.lax.scan(add, zero, pieces)[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def update(model, config: TrainConfig, state: TrainState, batch):
  """One optimizer update.

  Args:
    model: static.
    config: static.
    state: consumed.
    batch: as in `score`; its rows must be divisible by `config.accumulate`.

  Returns:
    The next `TrainState` and a dict of float32 scalars: loss (nats per
    predicted token), accuracy, layers (their own losses per real token, those
    of labels per token that has one), grad_norm, rate.
  """
  grads, sums = _gradient(model, config, state.params, batch)
  chain = opt.make_optimizer(config, model.axes())
  updates, optimizer = chain.update(grads, state.optimizer, state.params)
  count = jnp.maximum(sums.count, 1.0)
  metrics = {'loss': sums.loss / count, 'accuracy': sums.correct / count,
             'layers': _own(sums, sums.tokens, sums.labelled),
             'grad_norm': optax.tree.norm(grads),
             'rate': jnp.float32(opt.schedule(config)(state.step))}
  return TrainState(optax.apply_updates(state.params, updates), optimizer,
                    state.step + 1, state.key), metrics


evaluate = jax.jit(score, static_argnums=0)
