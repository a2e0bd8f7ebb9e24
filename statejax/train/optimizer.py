"""Optax chains of a TrainConfig: clip, AdamW or Muon, warm up, hold, decay."""

import jax
import optax

# Logical axes that make a parameter a matrix: it maps features to features.
_FEATURES = {'embed', 'hidden', 'heads', 'kv_heads', 'key_heads', 'rank',
             'latent', 'block', 'entry'}


def schedule(config):
  """Linear warm-up, constant, linear decay to zero."""
  stable = config.steps - config.warmup - config.decay
  if stable < 0:
    raise ValueError(
        f'schedule: warmup={config.warmup} + decay={config.decay} exceed '
        f'steps={config.steps}; shorten them or train longer.')
  return optax.join_schedules(
      [optax.linear_schedule(0.0, config.peak, config.warmup),
       optax.constant_schedule(config.peak),
       optax.linear_schedule(config.peak, 0.0, config.decay)],
      [config.warmup, config.warmup + stable])


def _is_matrix(axes):
  own = [a for a in axes if a != 'layers']
  if own == ['embed', 'heads']:  # a scalar gate per head
    return False
  return sum(a in _FEATURES for a in own) >= 2 or (
      'embed' in own and len(own) >= 2)


def decays(axes):
  """Which parameters decay: matrices; never norms, biases, gates, sinks.

  Args:
    axes: tree of logical axis names, as `LanguageModel.axes()`.

  Returns:
    The tree of bools.
  """
  return jax.tree.map(_is_matrix, axes, is_leaf=lambda n: isinstance(n, tuple))


def _muon_dimensions(axes):
  """Muon's reduction and output axes, or None for parameters left to Adam."""
  def one(names):
    if not _is_matrix(names) or 'vocab' in names:
      return None
    skip = int(names[0] == 'layers')
    inner = names[skip:]
    # The contracted side: everything but `embed` in an output projection.
    reduce = (range(len(inner) - 1) if inner[-1] == 'embed' else range(1))
    reduce = tuple(skip + i for i in reduce)
    rest = tuple(i for i in range(skip, len(names)) if i not in reduce)
    return optax.contrib.MuonDimensionNumbers(reduce, rest)
  return jax.tree.map(one, axes, is_leaf=lambda n: isinstance(n, tuple))


def make_optimizer(config, axes):
  """Returns the optax transformation of a `TrainConfig`.

  Args:
    config: `TrainConfig`.
    axes: tree of logical axis names of the parameters.

  Raises:
    ValueError: unknown optimizer, or an impossible schedule.
  """
  rate = schedule(config)
  if config.optimizer == 'adamw':
    update = optax.adamw(rate, b1=config.b1, b2=config.b2,
                         weight_decay=config.weight_decay, mask=decays(axes))
  elif config.optimizer == 'muon':
    update = optax.contrib.muon(
        rate, weight_decay=config.weight_decay, consistent_rms=0.2,
        muon_weight_dimension_numbers=_muon_dimensions(axes),
        adam_b1=config.b1, adam_b2=config.b2)
  else:
    raise ValueError(f"optimizer: expected 'adamw' or 'muon', got "
                     f'{config.optimizer!r}.')
  return optax.chain(optax.clip_by_global_norm(config.clip), update)
