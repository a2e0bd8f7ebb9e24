"""Mixers of one size have it, and what cannot have it is refused."""

import pytest

from experiments import equal_state
from statejax import config as c


def test_sized():
  found = equal_state.sized(8192, 73)
  assert set(found) == set(equal_state.MAKERS)
  for mixer, size in found.values():
    assert size == equal_state.nbytes(mixer, 73)
    assert abs(size - 8192) <= 0.03 * 8192
  # By hand: 24 + 8 rows of 64 numbers; keys and values of 16 tokens and heads.
  assert found['Transformer-XL'][0].memory == 24
  assert found['window'][0].window == 16


def test_refused():
  make = lambda n: c.AttentionConfig(heads=4, kv_heads=4, window=n)
  with pytest.raises(ValueError, match='within 3% of 3,000 bytes after 5 tok'):
    equal_state.fit(make, 3000, 5)
