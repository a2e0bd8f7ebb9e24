"""What haystacks hold, by an answerer that reads all of them."""

import collections

import numpy as np
import pytest

from experiments import needles

KEY = range(needles.WORDS, needles.WORDS + needles.KEYS)


def answered(tokens, kind):
  """What follows the question, by rule; tokens end with it."""
  says = [i for i, t in enumerate(tokens) if t == needles.SAYS]
  pairs = [tuple(tokens[i + 1:i + 3]) for i in says]
  if kind == 'frequent':
    marks = [t for t in tokens if needles.SAYS - needles.MARKS <= t
             < needles.SAYS]
    return [collections.Counter(marks).most_common(1)[0][0]]
  found, at = [v for k, v in pairs if k == tokens[-1]], tokens[-1]
  if kind != 'chain':
    return found
  found = []
  while at in dict(pairs):
    at = dict(pairs)[at]
    found.append(at)
  return found


def test_answers_are_in_the_haystack():
  hops, source = set(), needles.NeedlesSource(200, 3, 192)
  places = collections.Counter()
  for i in range(200):
    item = source[i]
    tokens, kind = item['tokens'].tolist(), needles.KINDS[item['kind']]
    assert len(tokens) == 192 and max(tokens) < needles.VOCAB
    end = int(np.argmax(np.isin(tokens, range(needles.ASKS, needles.VOCAB))))
    begin = end + (1 if kind == 'frequent' else 2)
    answer = tokens[begin:]
    assert tokens[end] == needles.ASKS + item['kind']
    assert answered(tokens[:begin], kind) == answer
    # Each token of the answer is predicted by the one before it.
    at = np.flatnonzero(item['targets'] >= 0)
    assert at.tolist() == list(range(begin - 1, 191))
    assert item['targets'][at].tolist() == answer
    if kind == 'chain':
      hops.add(len(answer))
    if kind == 'single':
      places[tokens.index(needles.SAYS) // 64] += 1
  assert hops == set(range(1, needles.HOPS + 1)) and len(places) == 3
  again = needles.NeedlesSource(1, 3, 192)[0]['tokens']
  assert (again == source[0]['tokens']).all()
  assert (needles.NeedlesSource(1, 4, 192)[0]['tokens'] != again).any()


def test_too_short_a_haystack_is_refused():
  with pytest.raises(ValueError, match='length >= 128, got size=1, seed=0'):
    needles.NeedlesSource(1, 0, 127)
