import pathlib
import shutil
import tempfile

import pytest

MEMORY = pathlib.Path('/dev/shm')


@pytest.fixture
def memory(tmp_path):
  """A directory in memory where there is one, for tests that sync a lot.

  What a process has written outlives its kill there as on a disk; what a sync
  must do is for `crash` to say, and a mint's errors for `faults`.
  """
  if not MEMORY.is_dir():
    yield tmp_path
    return
  path = pathlib.Path(tempfile.mkdtemp(dir=MEMORY))
  yield path
  shutil.rmtree(path)
