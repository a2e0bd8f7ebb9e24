"""Mixers of one size have it, and what cannot have it is refused."""

import pytest

from experiments import equal_state
from statejax import config as c


def test_sized():
  found = equal_state.sized(32768, 73)
  assert set(found) == set(equal_state.MAKERS)
  for mixer, size in found.values():
    assert size == equal_state.nbytes(mixer, 73)
    assert abs(size - 32768) <= 0.03 * 32768
  # By hand: 24 + 104 rows of 64 numbers; keys and values of 64 tokens.
  assert found['Transformer-XL'][0].memory == 104
  assert found['window'][0].window == 64


def test_refused():
  make = lambda n: c.AttentionConfig(heads=4, kv_heads=4, window=n)
  with pytest.raises(ValueError, match='within 3% of 3,000 bytes after 5 tok'):
    equal_state.fit(make, 3000, 5)
