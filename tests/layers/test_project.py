"""Linear maps: the form for TPUs is the other one."""

from unittest import mock

import jax
import numpy as np
import pytest

from statejax.layers import common


@pytest.mark.parametrize('contract', [1, 2])
def test_axes_may_stay(contract, float64):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 3, 4, 5))
  kernel = rng.standard_normal((*x.shape[4 - contract:], 6, 7))
  flat = common.project(x, kernel, contract)
  with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
    kept = common.project(x, kernel, contract)
  assert kept.shape == flat.shape == (*x.shape[:4 - contract], 6, 7)
  np.testing.assert_allclose(kept, flat, 1e-12, 1e-12)
