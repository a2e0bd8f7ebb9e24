"""Sentences of `experiments.frozen_sentences`, and the states made of them."""

import jax
import numpy as np
import pytest

from experiments import frozen_sentences as frozen
from statejax import model as lm
from statejax.tasks import lifecycle_events as le


def text(tokens):
  return ' '.join(frozen.WORDS[t] for t in tokens if t >= 0)


def test_sentences_tell_events():
  sentences, names = frozen.table()
  assert text(sentences[le.SET, 47, 9]) == 'entity a2 n7 is set to v9 .'
  assert text(sentences[le.BEFORE, 399, le.NONE]) == (
      'what did entity a19 n19 hold before ?')
  assert text(names[120]) == 'entity a6 n0'
  both = [set(frozen.entities(split).tolist()) for split in ('train', 'test')]
  assert not both[0] & both[1] and len(both[0] | both[1]) == frozen.ENTITIES


@pytest.mark.slow
def test_a_state_is_the_mean_of_a_sentence(monkeypatch):
  """Of its own tokens alone."""
  sentences, names = (x[..., :5, :] if x.ndim == 4 else x
                      for x in frozen.table())
  monkeypatch.setattr(frozen, 'table', lambda: (sentences[:2], names))
  params = lm.LanguageModel(frozen.config('KDA')).init(jax.random.key(0))
  found, called = frozen.states('KDA', params)
  assert found.shape == (2, 400, 5, 256) and called.shape == (400, 128)
  # Behind the first layer first, which knows nothing of the second.
  other = dict(params['group_0'], layer_1=jax.tree.map(
      lambda x: 2 * x, params['group_0']['layer_1']))
  changed, _ = frozen.states('KDA', params | {'group_0': other})
  np.testing.assert_array_equal(changed[..., :128], found[..., :128])
  assert np.abs(changed[..., 128:] - found[..., 128:]).max() > 0.01
  # Padding more changes nothing.
  wider = np.pad(sentences[:2], ((0, 0),) * 3 + ((0, 3),), constant_values=-1)
  monkeypatch.setattr(frozen, 'LENGTH', frozen.LENGTH + 3)
  monkeypatch.setattr(frozen, 'table', lambda: (
      wider, np.pad(names, ((0, 0), (0, 3)), constant_values=-1)))
  np.testing.assert_allclose(frozen.states('KDA', params)[0], found, atol=2e-4)
