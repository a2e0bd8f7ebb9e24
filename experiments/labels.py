"""Training batches where a share of all items has labels."""

import numpy as np


def batches(fresh, pool, rows, seed):
  """Yields batches, one half of items that are new, one of items with labels.

  Labels are few, so that each of them is seen several times: the second half is
  drawn from a pool with replacement.

  Args:
    fresh: source of items, dicts of arrays; read once, in order.
    pool: source of the items with labels.
    rows: of a batch, even.
    seed: of the draws.

  Yields:
    {name: [rows, ...]}, with 'known', [rows] bool, of the items with labels.
  """
  random, half, held = np.random.default_rng(seed), rows // 2, {}
  known = np.arange(rows) >= half
  for i in range(0, len(fresh) - half + 1, half):
    again = random.integers(len(pool), size=half).tolist()
    for j in again:
      if j not in held:
        held[j] = pool[j]
    items = [fresh[i + j] for j in range(half)] + [held[j] for j in again]
    yield {name: np.stack([x[name] for x in items]) for name in items[0]} | {
        'known': known}


def sizes(steps, rows, share):
  """Returns how many items are fresh, and how many the pool has, so that a
  `share` of all items that a run sees has labels."""
  fresh = steps * (rows // 2)
  return fresh, max(1, round(fresh * share / (1 - share)))
