"""One row for each question of a test, and what a system gains over a rule.

A row is text: number of the item, truth, answer, route and bytes, with blanks
between. Route: 'slot', 'log' (the fallback of slots), 'none' (neither), or
'state' of a model without slots. Bytes: of the model's state of that item.
"""

import numpy as np

RESAMPLED, INTERVAL = 10_000, (2.5, 97.5)


def rows(first, truth, answer, route, nbytes):
  """Rows of the items `first` and on; the others are lists, one value each."""
  return [f'{first + i} {" ".join(map(str, x))}' for i, x in enumerate(
      zip(truth, answer, route, nbytes, strict=True))]


def hits(found):
  """Whether each of the rows is right, bool, by the number of the item."""
  parts = [x.split(' ') for x in found]
  order = sorted(range(len(parts)), key=lambda i: int(parts[i][0]))
  return np.array([parts[i][1] == parts[i][2] for i in order])


def counted(hit, names):
  """Right answers {name: number}; item i is of name i mod their number."""
  return {name: int(hit[i::len(names)].sum()) for i, name in enumerate(names)}


def placed(right, rule):
  """What `hits` may have been of a test of which only counts are left.

  Each name's misses are put where the rule is right: no other place makes the
  interval of `gain` wider.

  Args:
    right: {name: right answers}; item i is of name i mod their number.
    rule: hits of the rule, [N] bool.
  """
  out = np.zeros(len(rule), bool)
  for i, count in enumerate(right.values()):
    mine = rule[i::len(right)]
    first = np.argsort(mine, kind='stable')[:count]  # where the rule misses
    hit = np.zeros(len(mine), bool)
    hit[first] = True
    out[i::len(right)] = hit
  return out


def gain(ours, rule, seed=0):
  """Points that `ours` is better than `rule` by, on the same items.

  Args:
    ours, rule: hits, [N] bool.
    seed: of the resamples.

  Returns:
    mean, and the ends of the interval of 95 % of a paired bootstrap.
  """
  lead = 100. * (ours.astype(float) - rule.astype(float))
  # How often each of the leads -100, 0, 100 is drawn says all of a resample.
  values, counts = np.unique(lead, return_counts=True)
  draws = np.random.default_rng(seed).multinomial(
      len(lead), counts / len(lead), RESAMPLED)
  low, high = np.percentile(draws @ values / len(lead), INTERVAL)
  return float(lead.mean()), float(low), float(high)


def strongest(rules):
  """The name of the rule with most hits, of {name: hits}; ties to the first."""
  return max(rules, key=lambda name: int(rules[name].sum()))
