import numpy as np
import pytest

from statejax.tasks import palindrome, pipeline


def items(size=200, **kwargs):
  defaults = dict(vocab=27, length=24, seed=3)
  return palindrome.PalindromeSource(size, **{**defaults, **kwargs})


@pytest.mark.parametrize('length', [24, 25])
def test_targets_are_the_symbols_backwards(length):
  source = items(length=length)
  for index in range(len(source)):
    item = source[index]
    assert item['tokens'].dtype == item['targets'].dtype == np.int32
    tokens, targets = item['tokens'].tolist(), item['targets'].tolist()
    assert len(tokens) == len(targets) == length
    symbols = tokens[:tokens.index(palindrome.MARK)]
    assert len(symbols) == 12 and tokens.count(palindrome.MARK) == 1
    assert all(0 < x < 27 for x in symbols)
    pile = []
    for t, (token, target) in enumerate(zip(tokens, targets)):
      if t < 12:
        pile.append(token)
      if t < 12 or not pile:
        assert target == -1
        continue
      assert target == pile.pop()
      if t + 1 < length:  # what was asked is shown next
        assert tokens[t + 1] == target


def test_is_a_function_of_seed_and_index():
  np.testing.assert_array_equal(items()[5]['tokens'], items()[5]['tokens'])
  train = {items()[i]['tokens'].tobytes() for i in range(200)}
  held = items(seed=3 + 1_000_003)
  other = {held[i]['tokens'].tobytes() for i in range(200)}
  assert len(train | other) == 400
  assert repr(items()) == repr(items()) != repr(held)


def test_cannot_be_guessed():
  """Symbols are uniform at every place, and independent of their neighbour."""
  source = items(4000, vocab=5, length=40)
  symbols = np.stack([source[i]['tokens'][:20] for i in range(4000)]) - 1
  by_place = np.stack([(symbols == x).mean(0) for x in range(4)])
  assert abs(by_place - 1 / 4).max() < 0.04
  after = np.zeros((4, 4))
  np.add.at(after, (symbols[:, :-1], symbols[:, 1:]), 1)
  assert abs(after / after.sum() - 1 / 16).max() < 0.004


def test_goes_through_the_pipeline():
  stream = pipeline.batches(items(), rows=8, length=24, seed=0)
  batch = next(stream)
  assert (batch['targets'] >= 0).sum() == 8 * 12
  saved, expected = pipeline.state_to_json(stream), next(stream)
  again = pipeline.batches(items(), rows=8, length=24, seed=0)
  pipeline.restore(again, saved)
  np.testing.assert_array_equal(next(again)['tokens'], expected['tokens'])


@pytest.mark.parametrize('wrong, message', [
    (dict(length=1), 'length >= 2'),
    (dict(vocab=2), 'vocab >= 3'),
    (dict(length=8), r'26 \*\* 4 for size=200'),
    (dict(seed=-1), '0 <= seed'),
    (dict(size=0), 'size > 0'),
])
def test_refuses(wrong, message):
  with pytest.raises(ValueError, match=message):
    items(**wrong)
  with pytest.raises(IndexError):
    items()[200]
