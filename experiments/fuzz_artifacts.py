"""Hostile bytes against every parser of what comes from outside.

  python -m experiments.fuzz_artifacts --minutes=10 --seed=1

Each parser of a manifest, a signature, a portable file, a grant, a list of
revocations, a trust document, a model card and of keys gets changed documents:
values, fields and bytes of `experiments/fuzz_corpus`, and of every input that
was refused for a new reason. It must return what gives the same bytes again, or
refuse with a code of its own, soon and without much memory; see `fuzz_targets`.
What does otherwise is kept as `fuzz_corpus/*/found_*`, which the tests replay.

Runs of other seeds add up in the results; those against other parsers, told by
a digest of their source, are left out. A run is the same again for a seed and
--executions. Needs the extra [sign].

Found and fixed so far: two texts whose refusal took time with the square of
their length; an epoch in a list of revocations, a key in a grant, a transcript,
and keys of unknown algorithms, whose errors were not the library's own.

Expected: ten million executions or an hour of a processor, and no finding.
"""

import hashlib
import pathlib
import random
import resource
import time

from absl import app, flags

from experiments import fuzz_mutate, fuzz_seeds, record, report
from experiments import fuzz_targets as targets

OUT = flags.DEFINE_string('out', 'experiments/results/fuzz_artifacts.json',
                          'results')
MINUTES = flags.DEFINE_float('minutes', 10., 'of processor time, at most')
EXECUTIONS = flags.DEFINE_integer('executions', 1 << 60, 'in all, at most')
SEED = flags.DEFINE_integer('seed', 0, 'of the changes; a run has its own')
ONLY = flags.DEFINE_list('only', [], 'parsers; none are all, and only all of '
                         'them go into the results')
SMOKE = flags.DEFINE_bool('smoke', False, 'twenty thousand executions')

COMMAND = 'python -m experiments.fuzz_artifacts --minutes=10 --seed=N'
ENOUGH, HOUR = 10_000_000, 3600
MEMORY = 512 << 20
# Inputs that a parser's changes may begin at.
POOL, LONG = 400, 1 << 14


class Fuzzed:
  """One parser, the inputs known to be worth changing, and what it did.

  Attributes:
    executions: how many.
    seconds: of processor time.
    accepted: how many inputs.
    reasons: outcomes seen, each once.
    faults: {fault: the first input}.
  """

  def __init__(self, name: str, seed: int):
    self.target = targets.TARGETS[name]
    self.mutator = fuzz_mutate.Mutator(random.Random(f'{seed} {name}'),
                                       self.target.large)
    self.seeds = list(targets.corpus(name, 'seed').values())
    self.pool = list(self.seeds)
    self.executions, self.accepted, self.seconds = 0, 0, 0.
    self.reasons: set[str] = set()
    self.faults: dict[str, bytes] = {}

  def run(self, count: int):
    """Executes changed inputs."""
    mutator, began = self.mutator, time.process_time()
    change = getattr(mutator, self.target.change)
    for _ in range(count):
      data = change(mutator.of(self.pool), mutator.of(self.pool))
      outcome, fault = targets.execute(self.target, data, self.seeds)
      self.accepted += outcome == 'accepted'
      if fault and fault not in self.faults:
        self.faults[fault] = data
      if outcome not in self.reasons and len(self.reasons) < 10_000:
        self.reasons.add(outcome)
        if not fault and len(self.pool) < POOL and len(data) < LONG:
          self.pool.append(data)
    self.executions += count
    self.seconds += time.process_time() - began

  def facts(self) -> dict:
    """Returns the numbers."""
    return {'executions': self.executions, 'seconds': round(self.seconds, 1),
            'accepted': self.accepted, 'reasons': len(self.reasons),
            'findings': len(self.faults)}


def fuzz(names, seed: int, executions: int, seconds: float) -> dict:
  """Returns {parser: `Fuzzed`} after so much, whatever is reached first."""
  found = {name: Fuzzed(name, seed) for name in names}
  with targets.watched(), _little_memory():
    while (left := executions - sum(f.executions for f in found.values())) > 0:
      # Whoever has had the least time is next, in steps that cost alike.
      one = min(found.values(), key=lambda f: (f.executions / f.target.batch))
      one.run(min(left, one.target.batch))
      if sum(f.seconds for f in found.values()) > seconds:
        break
  return found


class _little_memory:
  """Lets this process have `MEMORY` bytes more than it has."""

  def __enter__(self):
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    self.old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (
        pages * resource.getpagesize() + MEMORY, self.old[1]))

  def __exit__(self, *_):
    resource.setrlimit(resource.RLIMIT_AS, self.old)


def keep(name: str, fault: str, data: bytes) -> pathlib.Path:
  """Keeps what was found as an input that the tests replay."""
  mark = hashlib.sha256(data).hexdigest()[:12]
  path = fuzz_seeds.CORPUS / name / f'found_{mark}'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  print(f'FOUND {name}: {fault}\n  {data[:120]!r} ({len(data)} bytes)\n  '
        f'{path}', flush=True)
  return path


def sources() -> str:
  """Digest of the source of all parsers."""
  root = pathlib.Path(targets.canonical.__file__).parent
  return record.digest({path.name: path.read_text() for path in sorted(
      root.glob('*.py')) if path.stem in (
          'canonical', 'card', 'envelope', 'grammar', 'grant', 'head', 'keys',
          'manifest', 'names', 'portable', 'revoke', 'sealing', 'tree', 'trust',
          'verify')})


def claims(cells) -> list[report.Row]:
  """The rows of the table, of all runs together."""
  total = {name: {key: sum(cell[name][key] for cell in cells.values())
                  for key in ('executions', 'seconds', 'accepted', 'findings')}
           for name in targets.TARGETS}
  rows = [report.Row(
      f'{name}: executions, a second, accepted', 'reported',
      f'{facts["executions"]:,}; '
      f'{facts["executions"] / max(facts["seconds"], 1e-9):,.0f}; '
      f'{facts["accepted"]:,}', True) for name, facts in total.items()]
  count, seconds, found = (sum(f[key] for f in total.values())
                           for key in ('executions', 'seconds', 'findings'))
  return rows + [
      report.Row('executions, or hours', f'>= {ENOUGH:,} or 1',
                 f'{count:,}; {seconds / HOUR:.2f}',
                 count >= ENOUGH or seconds >= HOUR),
      report.Row('findings', '0', str(found), found == 0)]


def main(argv):
  """Fuzzes, keeps what it finds, prints the table."""
  del argv
  names = ONLY.value or list(targets.TARGETS)
  executions = 20_000 if SMOKE.value else EXECUTIONS.value
  def run():
    found = fuzz(names, SEED.value, executions, 60 * MINUTES.value)
    for name, one in found.items():
      for fault, data in one.faults.items():
        keep(name, fault, data)
    return {name: one.facts() for name, one in found.items()}
  if SMOKE.value or ONLY.value:
    cells = run()
    for name, facts in cells.items():
      print(name.ljust(12), facts)
    raise SystemExit(any(facts['findings'] for facts in cells.values()))
  held = record.Record(OUT.value, COMMAND, lambda key: sources())
  held.get(f'seed {SEED.value}, {MINUTES.value:g} min', run)
  rows = claims(held.cells)
  held.write(rows)
  print(report.table(rows))
  raise SystemExit(not rows[-1].ok)


if __name__ == '__main__':
  app.run(main)
