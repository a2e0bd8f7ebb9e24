"""The rate at which each model of memory events learns best, by a split apart.

Cells of a `record.Record`: 'rate/NAME' says which rate was chosen, 'NAME/SEED'
is a training at the rate of slots, 'NAME at RATE/SEED' one at another.
"""

from experiments import event_models, probes
from experiments.record import digest

# The last is that of slots.
RATES = (1e-3, 2e-3, 4e-3)
COUNT = 240


def choose(mixers, steps):
  """Trains at each rate with seed 0 and half as many updates.

  Returns:
    {'rate', 'right': {rate: right of COUNT}}; ties to the first.
  """
  right = {}
  for rate in RATES:
    params, _ = event_models.train(mixers, 0, max(1, steps // 2), rate=rate)
    right[rate] = int(probes.hits(event_models.asked(
        mixers, params, event_models.DEV, COUNT)).sum())
  return {'rate': max(RATES, key=right.get),
          'right': {str(rate): n for rate, n in right.items()}}


def cell(name, rate, seed):
  """The key of a training."""
  return f'{name}/{seed}' if rate == RATES[-1] else f'{name} at {rate}/{seed}'


def settings(mixers, steps, key):
  """Returns a digest of what a cell depends on.

  Args:
    mixers: {name: mixers of a model}.
    steps: updates of a training.
    key: of the cell.
  """
  name, last = key.split('/')
  if name == 'rate':
    return digest([event_models.settings(mixers[last], steps // 2), RATES])
  of = event_models.settings(mixers[name.split(' at ')[0]], steps)
  return digest([of, name]) if ' at ' in name else of
