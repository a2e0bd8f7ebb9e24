"""Each rival at the rate at which it learns best, by a split apart.

Cells of a `record.Record`: 'NAME at RATE/SEED' is a training where there is a
choice, 'NAME/SEED' where there is none. Those of seed 0 decide for all seeds.
"""

import functools


def cell(name, rates, rate, seed):
  """The key of a training."""
  return f'{name} at {rate}/{seed}' if len(rates) > 1 else f'{name}/{seed}'


def named(key):
  """The name that is in a key."""
  return key.split('/')[0].split(' at ')[0]


def best(record, name, rates, seeds, study):
  """Facts of the trainings of a system at its best rate, one of each seed.

  Args:
    record: `record.Record`.
    name: of the system.
    rates: to choose from; ties to the first.
    seeds: how many.
    study: (seed, rate) -> facts, with 'dev', right answers of items that are in
      no test, where there are several rates.
  """
  make = lambda seed, rate: record.get(
      cell(name, rates, rate, seed), functools.partial(study, seed, rate))
  rate = max(rates, key=lambda rate: (
      make(0, rate)['dev'] if len(rates) > 1 else 0))
  return [make(seed, rate) for seed in range(seeds)]
