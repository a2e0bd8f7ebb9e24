"""Long streams of events: read in pieces, asked on forks, counted."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import event_models, event_streams
from statejax.tasks import long_events

MODEL = event_streams.model_of(dataclasses.replace(
    event_streams.SERVED, segment=16, fallback=dataclasses.replace(
        event_streams.SERVED.fallback, block=8, k=4)))


@pytest.mark.slow
def test_questions_are_asked_of_the_whole_stream():
  """As in one pass over the stream and the question."""
  params = MODEL.init(jax.random.key(0))
  stream = long_events.LongEventsSource(1, 112, 5, seed=0)[0]
  state, facts = event_streams.read(MODEL, params, stream['events'], 48)
  assert state.length.tolist() == [112] and 0 < facts['active'] <= 4
  alone, held = event_streams.without_fallback(MODEL, state)
  for model, begin, look in ((MODEL, state, True), (MODEL, state, False),
                             (alone, held, True)):
    said, active = event_streams.ask(model, params, begin, stream['questions'],
                                     look)
    events = np.stack([np.concatenate([stream['events'], q[None]])
                       for q in stream['questions']])
    hints = np.full(events.shape[:2], 1, np.int32)
    hints[:, -1] = look
    logits, _ = jax.jit(event_models.answers, static_argnums=0)(
        model, params, events, {'look': hints})
    np.testing.assert_array_equal(said, np.argmax(logits, axis=-1))
    assert active.shape == (5,) and active.max() <= 4
  # Forks have left the state as it was.
  assert state.length.tolist() == [112]


def test_claims():
  both = dict.fromkeys(long_events.CLASSES, 5)
  cell = {'asked': both, 'active': 128, 'right': dict(zip(
      event_streams.VARIANTS, (both, both | {'no_write': 0},
                               dict.fromkeys(both, 1) | {'no_write': 5})))}
  rows = event_streams.claims([cell] * 4)
  assert all(r.ok for r in rows)
  assert rows[0].obtained == '100 of 100'
  for change in ({'active': 133},
                 {'right': cell['right'] | {
                     'slots and fallback': both | {'version': 4}}},
                 {'right': cell['right'] | {'slots only': both}},
                 {'right': cell['right'] | {'fallback only': both}}):
    assert not all(r.ok for r in event_streams.claims([cell | change] * 4))


def test_a_longer_stream_is_read_as_sharply():
  """log(72 ** 2) is twice log(72): scores are doubled, all else is kept."""
  params = MODEL.init(jax.random.key(0))
  mixer = lambda p: p['group_0']['layer_0']['mixer']
  old, new = mixer(params), mixer(event_streams.sharper(params, 72 ** 2))
  np.testing.assert_allclose(np.exp(new['log_kappa']),
                             2 * np.exp(old['log_kappa']), rtol=1e-6)
  np.testing.assert_array_equal(new['salience']['kernel'],
                                2 * old['salience']['kernel'])
  same = set(old) - {'log_kappa', 'salience'}
  assert all(old[name] is new[name] for name in same)
