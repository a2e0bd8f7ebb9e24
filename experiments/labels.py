"""Training batches where a share of all items has labels."""

import numpy as np


def batches(fresh, pool, rows, seed):
  """Yields batches, one half of items that are new, one of items with labels.

  Labels are few, so that each of them is seen several times: the second half is
  drawn from a pool with replacement. Who has no use for labels only sees the
  same items again by that: without a pool all are new.

  Args:
    fresh: source of items, dicts of arrays; read once, in order.
    pool: source of the items with labels, or None.
    rows: of a batch, even.
    seed: of the draws.

  Yields:
    {name: [rows, ...]}, with 'known', [rows] bool, of the items with labels.
  """
  random, held = np.random.default_rng(seed), {}
  half = rows if pool is None else rows // 2
  known = np.arange(rows) >= half
  for i in range(0, len(fresh) - half + 1, half):
    again = [] if pool is None else random.integers(
        len(pool), size=half).tolist()
    for j in again:
      if j not in held:
        held[j] = pool[j]
    items = [fresh[i + j] for j in range(half)] + [held[j] for j in again]
    yield {name: np.stack([x[name] for x in items]) for name in items[0]} | {
        'known': known}


def sources(make, steps, rows, share):
  """Returns the fresh items and the pool of a run, for `batches`.

  Args:
    make: (0 for fresh items and 1 for the pool, how many) -> a source.
    steps: batches.
    rows: of a batch.
    share: of all different items that have labels; 0 is no pool.
  """
  if not share:
    return make(0, steps * rows), None
  fresh = steps * (rows // 2)
  return make(0, fresh), make(1, max(1, round(fresh * share / (1 - share))))
