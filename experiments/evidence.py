"""Lines that are evidence of a question, and who tells them from the rest.

A line of a log of `statejax.tasks.lifecycle_text` is evidence of its question
if it says the answer (or strikes the thing out, where that is the answer), or
gives the name that is asked for. A logistic regression scores lines by their
words, names and figures masked; one that sees the question also by each of
these words where a line names what is asked.
"""

import numpy as np

KEPT, LENGTH = 32, 1216
WAYS = ('without the question', 'with it')


def evidence(record):
  """Whether each line of a record is evidence of its first question."""
  asked = record.questions[0]
  kind = 'delete' if asked.answer is None else 'update'
  said = [i for i, x in enumerate(record.lines)
          if (x.kind, x.key, x.value) == (kind, asked.key, asked.answer)]
  out = np.zeros(len(record.lines), bool)
  out[said] = True
  if asked.name != asked.key:
    out |= np.array([x.tag == asked.name for x in record.lines])
  return out


def logs(items, seed, split):
  """Features of lines, whether they are evidence, and their number in the log.

  Returns:
    words [N, W] float32, the same where a line names what is asked and 0
    elsewhere [N, W], evidence [N] bool, and logs [N] int.
  """
  from statejax.tasks import lifecycle_lines as lines
  from statejax.tasks import lifecycle_text as task
  from statejax.tasks import lifecycle_words as words
  told = lines.LifecycleLinesSource(items, seed, split, 'chunks')
  records = task.LifecycleTextSource(items, seed, split, length=LENGTH)
  masked = [words.encode(w)[0] for w in (
      *words.ADJECTIVES, *words.NOUNS, *words.CALLSIGNS, *words.DIGITS)]
  seen, right, of = [], [], []
  for i in range(items):
    record, item = records.record(i), told[i]
    count = len(record.lines)
    bag = np.zeros((count, len(words.WORDS)), np.float32)
    for row, tokens in zip(bag, item['lines'][:count]):
      row[tokens[tokens >= 0]] = 1
    bag[:, masked] = 0
    same = np.any(np.all(item['names'][:count] == item['names'][-1:, :1],
                         axis=2), axis=1)
    seen.append(np.stack([bag, bag * same[:, None]]))
    right.append(evidence(record))
    of.append(np.full(count, i))
  return (*np.concatenate(seen, axis=1), np.concatenate(right),
          np.concatenate(of))


def fitted(x, right, updates=300, rate=2., decay=1e-4):
  """Weights and offset of a logistic regression, by gradient descent."""
  weight, offset = np.zeros(x.shape[1], np.float32), np.float32(0)
  for _ in range(updates):
    miss = (1 / (1 + np.exp(-(x @ weight + offset))) - right).astype('f4')
    weight -= rate * (x.T @ miss / len(x) + decay * weight)
    offset -= rate * miss.mean()
  return weight, offset


def area(score, right):
  """Area under the curve: the chance that evidence scores above another line,
  ties half."""
  _, rank, count = np.unique(score, return_inverse=True, return_counts=True)
  middle = np.cumsum(count) - (count - 1) / 2
  many = right.sum()
  total = middle[rank.reshape(-1)][right].sum() - many * (many + 1) / 2
  return float(total / (many * (~right).sum()))


def held(score, right, of, kept=KEPT):
  """Share of evidence among the best lines of each log."""
  # Of one score the earlier line is first.
  order = np.lexsort((np.arange(len(of)), -score, of))
  first = np.searchsorted(of, of[order])
  return float(right[order][np.arange(len(of)) - first < kept].sum()
               / right.sum())


def study(seed, items):
  """{way: (area, share of the evidence held)}."""
  train, test = logs(items, seed, 'train'), logs(items, 1000 + seed, 'test')
  out = {}
  for way, seen in zip(WAYS, (lambda x: x[0],
                              lambda x: np.concatenate(x[:2], axis=1))):
    weight, offset = fitted(seen(train), train[2])
    score = seen(test) @ weight + offset
    out[way] = area(score, test[2]), held(score, *test[2:])
  return out
