"""A million tokens: stopped, saved, loaded by another process, gone on.

  python -m experiments.resume_million

For a tiny model of every registered mixer and a hybrid: batches of 64 rows
with prompts, sampler keys and lengths of their own generate 100 tokens in one
go, and again in two pieces; between them the state is saved, and a process that
compiles its programs anew loads it and goes on. So at eight places, from 1 to
99 tokens; at one place more each of 16 rows becomes an artifact of its own,
which the other process loads with every check and puts into another slot.
Tokens of the second piece and the digest of every leaf of every row are
compared, to the bit; nothing is counted twice. Random weights, temperature 0.8.
One numerics id: same versions, device, batch and capacity. What was measured is
kept: a run that was stopped goes on there.

Expected: at least 1,000,000 tokens after a stop, 0 rows whose tokens or digest
differ.
"""

import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging

from experiments import report
from experiments import resume_worker as rw
from experiments.record import Record, digest
from statejax import config as c

OUT = flags.DEFINE_string(
    'out', 'experiments/results/resume_million.json', 'results')
SMOKE = flags.DEFINE_bool('smoke', False, 'two families, few tokens')

CUTS, MINT_CUT, MINTS = (1, 3, 5, 9, 21, 38, 63, 99), 50, 16
EXPECTED = 1_000_000


def begin(family, rows, seed):
  """Prompts of 1 to 8 random tokens, absorbed; the first token is pending."""
  import jax
  import numpy as np

  from statejax import generate as gen
  model, params = rw.loaded(family)
  rng = np.random.default_rng(seed)
  state = model.init_state(rows, rw.CAPACITY, key=jax.random.key(seed))
  return gen.prefill(
      model, params, state, rng.integers(0, rw.VOCAB, (rows, rw.PROMPT)),
      rng.integers(1, rw.PROMPT + 1, rows), chunk=rw.PROMPT,
      sampling=gen.Sampling(temperature=0.8))


def parted(family, folder, rows, cut, seed, mints=0):
  """One batch in one go, and its first piece, saved.

  Returns:
    the job of the other process, and what it must answer.
  """
  import numpy as np

  from statejax.artifact import mint, serving
  start = begin(family, rows, seed)
  whole, end = rw.go_on(family, start, rw.STEPS)
  first, middle = rw.go_on(family, start, cut)
  some = np.arange(mints or rows)
  want = {'tokens': whole[some, cut:].tolist(),
          'digests': rw.digests(end, some),
          'first': int((first != whole[:, :cut]).any(axis=1).sum())}
  job = {'rows': rows, 'steps': rw.STEPS - cut}
  if not mints:
    model, params = rw.loaded(family)
    job['path'] = str(folder / f'state_{seed}')
    serving.save_state(job['path'], model, params, middle)
    return job, want
  shop, host = rw.shop(folder), rw.host(family, rows)
  job['ids'] = [mint.mint(shop, middle, row, host, mint.Terms('bench')).id
                for row in some.tolist()]
  return job, want


@contextlib.contextmanager
def other_process():
  """Yields a function (family, directory) that another process carries out."""
  with subprocess.Popen([sys.executable, '-m', 'experiments.resume_worker'],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        text=True, bufsize=1) as process:
    def ask(family, folder):
      print(family, folder, file=process.stdin)
      if process.stdout.readline() != 'done\n':
        raise RuntimeError(f'{family}: the other process has failed; see what '
                           'it says.')
    yield ask
    process.stdin.close()


def measured(ask, family, rows, cuts, mints):
  """Returns what came of all batches of a family."""
  os.makedirs('runs', exist_ok=True)
  clock = time.perf_counter()
  with tempfile.TemporaryDirectory(dir='runs') as folder:
    folder = pathlib.Path(folder).absolute()
    pairs = [parted(family, folder, rows, cut, seed)
             for seed, cut in enumerate(cuts)]
    pairs.append(parted(family, folder, rows, MINT_CUT, len(cuts), mints))
    (folder / 'jobs.json').write_text(json.dumps([job for job, _ in pairs]))
    ask(family, folder)
    answers = json.loads((folder / 'answers.json').read_text())
  rw.forget()
  wants = [want for _, want in pairs]
  # Of the last batch only what became artifacts was generated on.
  runs = rows * len(cuts) + mints
  return {
      'tokens': runs * rw.STEPS, 'runs': runs, 'resumed_tokens': sum(
          len(row) for want in wants for row in want['tokens']),
      'states': len(cuts), 'artifacts': mints,
      'mismatches': sum(want['first'] for want in wants) + sum(
          a != b or x != y for want, got in zip(wants, answers, strict=True)
          for a, b, x, y in zip(want['tokens'], got['tokens'], want['digests'],
                                got['digests'], strict=True)),
      'seconds': round(time.perf_counter() - clock, 1)}


def table(found):
  """Returns the lines of the results, one for each family."""
  lines = [f'{"family":<18}{"tokens":>10}{"resumed":>10}{"runs":>7}'
           f'{"artifacts":>11}{"mismatches":>12}']
  lines += [f'{name:<18}{x["tokens"]:>10,}{x["resumed_tokens"]:>10,}'
            f'{x["runs"]:>7}{x["artifacts"]:>11}{x["mismatches"]:>12}'
            for name, x in found.items()]
  return lines


def main(_):
  """Measures, prints, writes JSON."""
  logging.set_verbosity(logging.WARNING)
  smoke = SMOKE.value
  rows, cuts, mints = (4, (13,), 2) if smoke else (rw.ROWS, CUTS, MINTS)
  families = ('gated_conv', 'attention') if smoke else rw.FAMILIES
  out = pathlib.Path('runs/resume_million.json' if smoke else OUT.value)
  if smoke:
    out.unlink(missing_ok=True)
  record = Record(out, 'python -m experiments.resume_million', lambda key: (
      digest([c.to_dict(rw.config(key)), rows, cuts, mints, rw.PROMPT,
              rw.STEPS])))
  with other_process() as ask:
    found = {name: record.get(name, functools.partial(
        measured, ask, name, rows, cuts, mints)) for name in families}
  total = {name: sum(x[name] for x in found.values())
           for name in ('tokens', 'resumed_tokens', 'runs', 'states',
                        'artifacts', 'mismatches')}
  claims = [
      report.Row('tokens generated after a stop, of all that were',
                 f'>= {EXPECTED:,}', f'{total["resumed_tokens"]:,} of '
                 f'{total["tokens"]:,} in {total["runs"]:,} runs',
                 total['resumed_tokens'] >= EXPECTED),
      report.Row('runs whose tokens or final leaves differ', '0',
                 f'{total["mismatches"]:,}', total['mismatches'] == 0)]
  lines = table(found)
  print('\n'.join(lines), report.table(claims), sep='\n\n')
  record.write(claims, table=lines, total=total)
  raise SystemExit(0 if all(r.ok for r in claims[smoke:]) else 1)


if __name__ == '__main__':
  app.run(main)
