"""Memory of a decode step over a long store, by the TPU compiler.

  python -m experiments.tpu_decode

No TPU was used: one step of one token for 8 rows, stores of 131,072 tokens in
bfloat16, the state donated, weights in bfloat16, is compiled ahead of time for
one device of each chip. Models have one layer, at the widths of Qwen3-32B
(GQA), DeepSeek-V3 (MLA), V3.2 (DSA; kpool, without rope), V4-Flash (CSA, HCA)
and MiniMax-M3 (M3, MoBA, QSA, NSA); or two, an owner and a reader (HySparse, at
those of M3), a layer of summaries and a full one (KSA-4B). Nothing was run,
nothing was timed.

Claims: every leaf of the state is replaced in place (aliased bytes are at least
those of the state), and what a step needs beside it (temporary bytes) is below
64 MB: no store is copied, no score of every head and token is held. Needs
libtpu; a quarter of an hour.
"""

import pathlib

from absl import app, flags, logging

from experiments import report
from pallas_kernels import aot

OUT = flags.DEFINE_string('out', 'experiments/results', 'where to write')
SMOKE = flags.DEFINE_bool('smoke', False, 'one mixer on one chip alone')


def claims(rows, limit) -> list[report.Row]:
  """The rows of the table of claims, two per mixer."""
  out = []
  for mixer in dict.fromkeys(r['mixer'] for r in rows):
    mine = [r for r in rows if r['mixer'] == mixer]
    kept = sum(r['alias'] >= r['state'] for r in mine)
    most = max(r['temporary'] for r in mine)
    out += [
        report.Row(f'{mixer}: state replaced in place', f'{len(mine)} chips',
                   f'{kept} chips', kept == len(mine)),
        report.Row(f'{mixer}: most temporary MB', f'< {limit / 1e6:.0f}',
                   f'{most / 1e6:.1f}', most < limit)]
  return out


def table(rows) -> str:
  """Returns the measurements as aligned text."""
  head = (f'{"mixer":9}{"chip":7}{"state MB":>10}{"alias MB":>10}'
          f'{"temp MB":>10}')
  return '\n'.join([head + '  ok', *(
      f'{r["mixer"]:9}{r["chip"]:7}{r["state"] / 1e6:10.1f}'
      f'{r["alias"] / 1e6:10.1f}{r["temporary"] / 1e6:10.1f}'
      f'  {"ok" if r["ok"] else "NOT OK"}' for r in rows)])


def main(_):
  """Compiles, prints the table and the claims, writes both."""
  logging.set_verbosity(logging.WARNING)
  if aot.missing():
    raise SystemExit(f'{aot.missing()}: install the extra "aot".')
  from experiments import decode_programs
  mixers, chips = list(decode_programs.MIXERS), list(aot.CHIPS)
  if SMOKE.value:
    mixers, chips = ['MLA'], ['v5e']
  rows = decode_programs.measure(mixers, chips)
  verdict = claims(rows, decode_programs.LIMIT)
  text = f'{table(rows)}\n\n{report.table(verdict)}\n'
  print(text)
  if not SMOKE.value:
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    about = __doc__.split('\n\n', 2)[2]
    (out / 'tpu_decode.txt').write_text(
        f'libtpu {aot.version()}\n\n{about}\n{text}')
    report.write(out / 'tpu_decode.json', verdict,
                 'python -m experiments.tpu_decode', libtpu=aot.version(),
                 batch=decode_programs.ROWS,
                 capacity=decode_programs.CAPACITY, steps=rows)
  raise SystemExit(0 if all(r.ok for r in verdict) else 1)


if __name__ == '__main__':
  app.run(main)
