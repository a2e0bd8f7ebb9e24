import os
import shutil
import tempfile

# Before jax is imported: no accelerator look-up, and eight devices so that
# multi-device tests run in this process.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Workers and child processes compile a program once for all.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  PROGRAMS = tempfile.mkdtemp(prefix='programs')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = PROGRAMS
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
else:
  PROGRAMS = None

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_unconfigure():
  """Removes the programs, in the process that made the place for them."""
  if PROGRAMS is not None:
    shutil.rmtree(PROGRAMS, ignore_errors=True)


def compile_as(node):
  """Leaves out most optimizations, which take longer than most tests run.

  Tests of what they could break, equality to the bit say, are `optimized`. On
  an accelerator it is what it compiles that is tested.
  """
  quick = (node.get_closest_marker('optimized') is None
           and jax.default_backend() == 'cpu')
  jax.config.update('jax_disable_most_optimizations', quick)


@pytest.fixture(autouse=True, scope='module')
def forget_programs(request):
  """Lets go of a module's programs: a process may map only so many."""
  compile_as(request.node)  # what the module's own fixtures run
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def compile_quickly(request):
  """See `compile_as`."""
  compile_as(request.node)
  yield
  compile_as(request.node.parent)


@pytest.fixture
def float64():
  """Runs the test with 64-bit types enabled."""
  with jax.enable_x64(True) if hasattr(jax, 'enable_x64') else (
      jax.experimental.enable_x64()):
    yield
