import os

# Before jax is imported: no accelerator look-up, and eight devices so that
# multi-device tests run in this process.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def float64():
  """Runs the test with 64-bit types enabled."""
  with jax.enable_x64(True) if hasattr(jax, 'enable_x64') else (
      jax.experimental.enable_x64()):
    yield


@pytest.fixture(scope='module')
def quick_compile():
  """Compiles three times as fast, to slower programs; for tiny models."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
