"""From where a slot's object has to be forgotten: before it was first said."""

import numpy as np
import pytest
from test_memory import MODEL, after_all, blank, heard, params

from statejax import forget
from statejax import memory as mem
from statejax import state as st
from statejax.artifact import journal as jn


def said(times, gap=2):
  """A fact that the stream has said so often, and the states on the way."""
  states = [blank()]
  for _ in range(times):
    _, state = heard(states[-1], [20, 21, 10], [], want='write')
    states.append(after_all(state))
    for _ in range(gap):
      states.append(after_all(states[-1]))
  return states


def test_what_is_said_again_was_said_before():
  memory, states = mem.Memory(MODEL), said(2)
  slot, = memory.list(states[-1])
  # The same words: still the first version, at another time.
  assert (slot.version, slot.source, slot.t_write) == (1, (0, 3), 23)
  plan = forget.plan(memory, states[-1], 0)
  assert (plan.mode, plan.before) == ('replay', 0)
  assert not memory.list(forget.last_before(states, plan.before))


def test_what_waits_is_not_all_that_was_said():
  memory, states = mem.Memory(MODEL), said(1)
  _, later = heard(states[-1], [23, 10], [], want='lock')
  assert np.asarray(later.layers['memory'].want).any()
  assert forget.plan(memory, later, 0) == forget.plan(memory, states[-1], 0)
  assert forget.plan(memory, later, 0).before == 0


def test_what_an_edit_has_overruled_was_said(tmp_path):
  memory = mem.Memory(MODEL, journal=jn.Journal(tmp_path / 'a'), host=True)
  waits = heard(blank(), [9, 10], [], want='write')[1]
  state, receipt = memory.write(params(), waits, [3, 10], key=[10], value=[9])
  assert receipt.overruled == memory.journal.entries[-1]['overruled'] == 1
  # At once, and also after more: the stream said it before the edit.
  for later in (state, after_all(state)):
    assert forget.plan(memory, later, 0) == forget.Plan(
        'replay', 0, 'the stream has spoken of it from 0 on, not yet in the '
        'slot')
  assert forget.purge(memory, state, 0)[1].scope == 'bank'


def lock(memory, state):
  return memory.lock(state, 0)[0]


def other(memory, state):
  return memory.write(params(), state, [3, 12], key=[12], value=[8])[0]


@pytest.mark.parametrize('edit', [lambda _, state: state, lock, other])
def test_what_may_have_been_met_wants_a_replay(edit, tmp_path):
  """A lock refuses, an owner keeps others out, a slot is taken."""
  memory = mem.Memory(MODEL, journal=jn.Journal(tmp_path / 'a'), host=True)
  state, _ = memory.write(params(), blank(), [3, 10], key=[10], value=[9])
  state = edit(memory, state)
  assert forget.plan(memory, state, 0).mode == 'purge'
  quiet = heard(state, [1, 1], [])[1]
  assert memory.list(quiet)[0].reads == 0
  assert forget.plan(memory, quiet, 0) == forget.Plan(
      'replay', 0, 'written from outside at 0')
  assert forget.purge(memory, quiet, 0)[1].scope == 'bank'


def test_a_fact_of_which_no_token_knows_is_gone_bit_for_bit(tmp_path):
  memory = mem.Memory(MODEL, journal=jn.Journal(tmp_path / 'a'), host=True)
  before = heard(blank(), [5, 6, 7], [])[1]
  state, _ = memory.write(params(), before, [3, 10], key=[10], value=[9])
  gone, receipt = forget.purge(memory, state, 0)
  assert receipt.scope == 'model'
  assert set(receipt.left) == {'layers/memory/seq', 'layers/memory/next_oid',
                               'forks, prefix caches and artifacts'}
  for (path, a, _, _), (_, b, _, _) in zip(st.leaves(gone), st.leaves(before)):
    if path != 'witness' and path not in receipt.left:
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
