"""The gated short convolution against plain numpy; its laws are elsewhere."""

import numpy as np
import pytest
import single

from statejax import config as c


def test_equals_plain_numpy():
  config = c.GatedConvConfig(width=7, taps=4)
  params, x = single.draw(config, 12)
  y, state = single.run(config, params, x, (1, 9, 10))
  wide = np.asarray(x, np.float64)
  project = lambda name: wide @ np.asarray(params[name]['kernel'], np.float64)
  inner, weight = project('before') * project('input'), params['weight']
  padded = np.pad(inner, ((0, 0), (3, 0), (0, 0)))
  total = sum(np.asarray(weight[w], np.float64) * padded[:, w:w + 30]
              for w in range(4))
  want = (project('after') * total) @ np.asarray(params['out']['kernel'],
                                                 np.float64)
  np.testing.assert_allclose(y, want, atol=2e-6)
  np.testing.assert_allclose(state.tail, inner[:, -3:], atol=2e-6)


@pytest.mark.parametrize('change', [dict(width=0), dict(taps=0)])
def test_configs_say_what_is_wrong(change):
  with pytest.raises(ValueError, match='expected >= 1, got 0'):
    c.GatedConvConfig(**change)
