import numpy as np
import pytest

from statejax.tasks import pipeline, stack


def items(size=200, **kwargs):
  defaults = dict(vocab=100, stacks=64, length=96, seed=3)
  return stack.StackSource(size, **{**defaults, **kwargs})


def operations(item):
  """Returns [(kind, stack, value, target)] of an item and its filler."""
  tokens, targets = item['tokens'].tolist(), item['targets'].tolist()
  end = len(tokens) - len(tokens) % 3
  found = []
  for at in range(0, end, 3):
    assert targets[at] == targets[at + 2] == -1
    found.append((*tokens[at:at + 3], targets[at + 1]))
  assert set(targets[end:]) <= {-1}
  return found, tokens[end:]


def simulate(found, stacks):
  """Runs operations on one list per stack; returns the depths of the pops."""
  piles = [[] for _ in range(stacks)]
  depths = []
  for kind, where, value, target in found:
    assert stack.FIRST <= where < stack.FIRST + stacks <= value
    pile = piles[where - stack.FIRST]
    if kind == stack.PUSH:
      assert target == -1
      pile.append(value)
    else:
      assert kind == stack.POP
      depths.append(len(pile))
      assert target == value == pile.pop()  # also raises if it was empty
  return depths


@pytest.mark.parametrize('stacks, vocab, length', [
    (64, 100, 96), (3, 20, 98), (1, 20, 61)])
def test_targets_by_lists(stacks, vocab, length):
  source = items(stacks=stacks, vocab=vocab, length=length)
  depths = []
  for index in range(len(source)):
    item = source[index]
    assert item['tokens'].dtype == item['targets'].dtype == np.int32
    assert item['tokens'].shape == item['targets'].shape == (length,)
    assert 0 <= item['tokens'].min() and item['tokens'].max() < vocab
    found, rest = operations(item)
    assert len(found) == length // 3 and set(rest) <= {stack.FILLER}
    depths += simulate(found, stacks)
  # A generator without order (queues, or one cell per stack) fails above only
  # if stacks hold more than one value.
  assert np.mean(np.array(depths) > 1) > {64: 0.02, 3: 0.3, 1: 0.6}[stacks]


def test_is_a_function_of_seed_and_index():
  np.testing.assert_array_equal(items()[5]['tokens'], items()[5]['tokens'])
  train = {items()[i]['tokens'].tobytes() for i in range(200)}
  held = items(seed=3 + 1_000_003)
  other = {held[i]['tokens'].tobytes() for i in range(200)}
  assert len(train | other) == 400
  assert repr(items()) == repr(items()) != repr(held)


def test_cannot_be_guessed():
  """Neither the stack, nor the value before, nor the place tells a pop."""
  source = items(3000, stacks=4, vocab=15, length=60)
  by_stack, by_last = np.zeros((4, 8)), np.zeros((8, 8))
  by_place, pushed = np.zeros((20, 8)), np.zeros((4, 8))
  for index in range(len(source)):
    last = None
    for place, (kind, where, value, target) in enumerate(
        operations(source[index])[0]):
      x = value - 7
      if kind == stack.PUSH:
        pushed[where - 3, x] += 1
      else:
        assert target == value
        by_stack[where - 3, x] += 1
        by_place[place, x] += 1
        if last is not None and last[0] == stack.POP:
          by_last[last[1], x] += 1
      last = kind, x
  share = lambda table: table / table.sum(1, keepdims=True)
  assert by_place[0].sum() == 0  # nothing to pop yet
  assert abs(pushed / pushed.sum() - 1 / 32).max() < 0.004
  for table, width in ((by_stack, 0.015), (by_place[1:], 0.06),
                       (by_last, 0.045)):
    assert abs(share(table) - 1 / 8).max() < width


def test_pops_are_half_and_of_any_stack():
  source = items(2000, stacks=8, vocab=20, length=90)
  pops, order = [], []
  for index in range(len(source)):
    found, _ = operations(source[index])
    held = {}
    for kind, where, _, _ in found:
      if held:
        pops.append(kind == stack.POP)
      if kind == stack.PUSH:
        held[where] = held.get(where, 0) + 1
        continue
      if len(held) == 3:
        order.append(list(held).index(where))
      held[where] -= 1
      if not held[where]:
        del held[where]
  assert abs(np.mean(pops) - 1 / 2) < 0.01
  share = np.bincount(order, minlength=3) / len(order)
  assert abs(share - 1 / 3).max() < 0.02


def test_goes_through_the_pipeline():
  batch = next(pipeline.batches(items(), rows=200, length=96, seed=0))
  asked = batch['targets'] >= 0
  assert (batch['tokens'][:, :-1][asked[:, :-1]] < 67).all()  # at the stack
  got = {row.tobytes() for row in batch['tokens']}
  assert got == {items()[i]['tokens'].tobytes() for i in range(200)}


@pytest.mark.parametrize('wrong, message', [
    (dict(stacks=0), 'stacks: expected 1 to 95'),
    (dict(stacks=96), 'for vocab=100'),
    (dict(length=5), 'length: expected at least 6'),
    (dict(length=12), r'about 2112 \*\* 2 for size=200'),
    (dict(seed=2**64), '0 <= seed'),
])
def test_refuses(wrong, message):
  with pytest.raises(ValueError, match=message):
    items(**wrong)
  with pytest.raises(IndexError):
    items()[200]
