"""Evidence of a question, and scores of lines by hand."""

import numpy as np

from experiments import evidence
from statejax.tasks import lifecycle_text as task


def test_evidence_says_the_answer():
  source = task.LifecycleTextSource(24, 5, 'dev', length=1216)
  for i in range(24):
    record = source.record(i)
    asked = record.questions[0]
    mine = [x for x, e in zip(record.lines, evidence.evidence(record)) if e]
    alias = record.scenario == 'alias'
    assert sorted(x.kind for x in mine) == sorted(
        ['delete' if asked.answer is None else 'update', *['alias'] * alias])
    assert all(x.key == asked.key for x in mine)
    assert all(x.value == asked.answer for x in mine if x.kind == 'update')


def test_a_line_names_what_is_asked():
  words, same, right, of = evidence.logs(12, 5, 'dev')
  assert words.shape == same.shape and len(of) == len(right) == len(words)
  named = same.any(axis=1)
  assert (words[named] == same[named]).all() and words.any(axis=1).all()
  # Evidence names it, and so do lines about other figures of the same thing;
  # but where it is asked for by another name, the figure's line does not.
  assert right.sum() == 13 and (right & named).sum() == 12
  assert named.sum() > 13


def test_area_and_what_is_held():
  right = np.array([1, 0, 1, 0, 0], bool)
  assert evidence.area(np.array([3., 2, 1, 0, -1]), right) == 5 / 6
  assert evidence.area(np.zeros(5), right) == 0.5
  assert evidence.area(np.array([1., 0, 1, 1, 0]), right) == 5 / 6
  of, score = np.array([0, 0, 0, 1, 1]), np.array([1., 2, 1, 0, 0])
  held = lambda right, kept: evidence.held(
      score, np.array(right, bool), of, kept)
  assert held([1, 1, 0, 1, 0], 1) == 2 / 3  # the first of a tie
  assert held([1, 1, 0, 1, 0], 2) == 1
  assert held([0, 0, 1, 0, 1], 1) == 0


def test_a_regression_tells_what_it_can():
  x = np.random.default_rng(0).integers(0, 2, (400, 3)).astype(np.float32)
  right = x[:, 1] > 0
  weight, offset = evidence.fitted(x, right)
  assert ((x @ weight + offset > 0) == right).all()
