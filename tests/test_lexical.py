"""Contexts of `experiments.lexical`, and the selectors by hand."""

from experiments import lexical
from statejax.tasks.draw import Draw


def test_the_needed_lines_of_a_chain_lead_from_the_question():
  sizes = set()
  for i in range(50):
    lines, question, needed = lexical.chain(Draw(0, i))
    leads = {lines[at][0]: lines[at][3] for at in needed}
    at, steps = question[2], 0
    while at in leads:
      at, steps = leads[at], steps + 1
    assert steps == len(needed) and all(
        at not in line[:1] for line in lines)
    sizes.add(steps)
    # Everybody else starts elsewhere.
    assert sum(question[2] in line for line in lines) == 1
  assert sizes == {2, 3, 4, 5, 6}


def test_two_turns_of_a_dialogue_hold_what_is_asked():
  same = 0
  for i in range(50):
    lines, question, needed = lexical.dialogue(Draw(1, i))
    assert len(lines) == lexical.LINES and len(needed) == 2
    of = lambda words: {w[:-1] for w in words if w.startswith('concept')}
    for at, line in enumerate(lines):
      holds = question[1] in line and of(line) & of(question[2:])
      assert bool(holds) == (at in needed)
    same += sum(w in lines[at] for at in needed for w in question[2:])
  assert 10 < same < 50  # of 100


def test_words_of_a_line_that_is_taken_are_asked_for():
  lines = [['a', 'x'], ['x', 'y'], ['y', 'z'], ['q', 'r'], ['a', 'q']]
  assert lexical.select(lines, ['a'], 2, hops=False) == {0, 4}
  # 'a', then what shares its x; 'a' in line 4 weighs as much, and is later.
  assert lexical.select(lines, ['a'], 3, hops=True) == {0, 1, 2}
  assert lexical.f1({0, 1}, {1, 2}) == 0.5
