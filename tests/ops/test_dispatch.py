"""Which implementation runs, and what is said of those that do not."""

import warnings

import jax
import pytest

from statejax.ops import dispatch

CANDIDATES = {'pallas_tpu': 'these widths are odd', 'xla': max}


def test_a_kernel_that_declines_is_reported_once(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter('default')  # as Python has it
    for _ in range(3):
      assert dispatch.choose('some op', None, CANDIDATES) is max
  (warning,) = found
  assert str(warning.message) == ("some op: pallas_tpu declines: these widths "
                                  "are odd; 'xla' runs.")


def test_kernels_of_other_backends_are_no_news():
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert dispatch.choose('another op', None, CANDIDATES) is max


@pytest.mark.parametrize('name,text', [
    ('pallas_tpu', 'cannot run: these widths are odd; available: xla'),
    ('triton', 'there is none of that name'),
])
def test_what_is_asked_for_by_name_runs_or_raises(name, text):
  with pytest.raises(ValueError, match=text):
    dispatch.choose('some op', name, CANDIDATES)


def test_nothing_accepts():
  with pytest.raises(ExceptionGroup, match='no implementation accepts'):
    dispatch.choose('some op', None, {'xla': 'it is too small'})


def test_kernel_names_the_device_that_it_needs():
  assert dispatch.kernel('delta_rule', 'pallas_tpu') == (
      'it needs a TPU, the backend is cpu')
