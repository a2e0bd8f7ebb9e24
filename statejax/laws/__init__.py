"""The laws of carried state, as a suite that anything can be held against.

  >>> from statejax import config, laws
  >>> report = laws.check(config.AttentionConfig(2, 1, 4, 4), laws='schema')
  >>> report.worst
  {'schema': 0.0}

Chunks and windows longer than a dozen tokens are cut to 8 and 5: no parameter
depends on them, and a border that is never reached is never checked.

Comparisons that the laws call exact are of bits. The others allow a relative
error |a - b| / max(1, max |b|) of `tolerance`: 2e-6 for a layer in float32,
1e-5 for a small model. In bfloat16 pass one; what holds for the layers and
models of the tests is in `tests/test_laws.py`.
"""

import dataclasses
import difflib

import jax

from statejax.laws import gradient, program, rows, sequence
from statejax.laws.bench import Bench, LawError
from statejax.laws.subject import MixerSubject, ModelSubject, resolve

__all__ = ['LAWS', 'LawError', 'MixerSubject', 'ModelSubject', 'Report',
           'check']

# Cheap and basic ones first: what they find would break the others too. The
# docstring of each is its statement.
LAWS = {law.__name__: law for law in (
    program.schema, program.fixed_point, program.dtype,
    sequence.split, sequence.decode, sequence.true_start, sequence.padding,
    sequence.packed, sequence.causality,
    rows.ragged, rows.fork, rows.rewind, rows.save, rows.witness,
    rows.neighbours,
    gradient.initial_gradient, gradient.extreme,
    program.donation, program.no_recompile)}


@dataclasses.dataclass(frozen=True)
class Report:
  """What `check` saw where it found nothing wrong.

  Attributes:
    subject: what was checked.
    tolerance: largest relative error it accepted.
    worst: law -> largest relative error seen, 0.0 where the law is exact, None
      where it says nothing of this subject.
  """

  subject: object
  tolerance: float
  worst: dict[str, float | None]

  def __str__(self):
    width = max(map(len, self.worst))
    lines = [f'{self.subject}, tolerance {self.tolerance:.0e}']
    for name, error in self.worst.items():
      shown = ('-' if error is None else 'exact' if error == 0 else
               f'{error:.1e}')
      lines.append(f'  {name:{width}}  {shown:>8}  {statement(name)}')
    return '\n'.join(lines)


def statement(name: str) -> str:
  """Returns the first line of a law's docstring."""
  return (LAWS[name].__doc__ or '').partition('\n')[0]


def check(subject, *, laws=None, tolerance=None, key=None) -> Report:
  """Holds `subject` against the laws of carried state.

  Args:
    subject: a LanguageModel, a ModelConfig, a LayerConfig, the config of a
      registered mixer, or an object as `statejax.laws.subject` describes it.
    laws: names from `LAWS`, or one name; None for all.
    tolerance: largest relative error where a law is not exact; None for the
      subject's own.
    key: typed key of parameters and inputs; None means `jax.random.key(0)`.

  Returns:
    A `Report`; print it.

  Raises:
    LawError: a law does not hold; names law, leaf, row and time step.
    ValueError: the subject or a name is none.
  """
  names = _names(laws)
  subject = resolve(subject)
  if tolerance is None:
    tolerance = getattr(subject, 'tolerance', 2e-6)
  bench = Bench(subject, jax.random.key(0) if key is None else key, tolerance)
  worst = {}
  for name in names:
    bench.law, bench.worst = name, 0.0
    applies = LAWS[name](bench) is not False
    worst[name] = bench.worst if applies else None
  return Report(subject, tolerance, worst)


def _names(laws):
  if laws is None:
    return tuple(LAWS)
  names = (laws,) if isinstance(laws, str) else tuple(laws)
  for name in names:
    if name not in LAWS:
      near = difflib.get_close_matches(name, LAWS, n=1)
      raise ValueError(
          f'laws: there is no law {name!r}; the laws are {", ".join(LAWS)}.'
          + (f' Did you mean {near[0]!r}?' if near else ''))
  return names
