"""How long a device works for a state, for the accounts."""

import contextlib
import time

from jax import monitoring

_COMPILING = '/jax/core/compile/'


class Meter:
  """Sums up the time of steps, without that of compiling them.

    >>> meter = Meter()
    >>> with meter.running():
    ...   pass  # steps, and waiting for their results
    >>> meter.us < 1_000_000
    True

  Attributes:
    us: microseconds so far.
  """

  def __init__(self):
    self.us = 0

  @contextlib.contextmanager
  def running(self):
    """Counts what runs inside; whoever enters waits for the results inside."""
    spans = []
    def note(event: str, duration_secs: float, **_: str | int):
      if event.startswith(_COMPILING):
        now = time.perf_counter()
        spans.append((now - duration_secs, now))
    monitoring.register_event_duration_secs_listener(note)
    begin = time.perf_counter()
    try:
      yield
    finally:
      end = time.perf_counter()
      monitoring.unregister_event_duration_listener(note)
      self.us += round(1e6 * (end - begin - covered(spans, begin)))


  def spent(self, work, before: dict, prefill: int, decode: int) -> dict:
    """Returns the arguments `account` and `spent` of `artifact.mint.mint`.

    Args:
      work: tokens -> millions of operations that absorbing them takes.
      before: group `account` of what it went on from, {} of what began anew.
      prefill, decode: tokens absorbed since, in pieces and one by one.
    """
    begin = before.get('tokens_absorbed', 0)
    more = {'prefill_tokens': prefill, 'decode_tokens': decode,
            'device_us': self.us,
            'mflop': work(begin + prefill + decode) - work(begin)}
    return {'account': {name: before.get(name, 0) + n
                        for name, n in more.items()},
            'spent': {'device_us': self.us}}


def covered(spans, begin: float) -> float:
  """Returns the time since `begin` that lies in any of the spans.

  Programs are compiled inside of others, whose spans hold theirs.

  >>> covered([(3.0, 4.0), (2.0, 5.0), (-1.0, 1.0)], 0.0)
  4.0
  """
  total, last = 0.0, begin
  for low, high in sorted(spans):
    total += max(0.0, high - max(low, last))
    last = max(last, high)
  return total
