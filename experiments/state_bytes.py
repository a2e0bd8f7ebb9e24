"""Bytes of one row's serving state against its context, from real schemas.

  python -m experiments.state_bytes

Claim: a stack of delta layers costs the same at every context length; one
attention layer in four costs a quarter of full attention; a window bounds it.
Expected: bytes(KDA, 1M) == bytes(KDA, 1K); nothing is allocated; one second.
"""

import json
import pathlib

from absl import app, flags, logging

from experiments import report
from statejax import config as c
from statejax import state as st
from statejax.model import LanguageModel

OUT = flags.DEFINE_string('out', 'experiments/results', 'where to write')

LAYERS = 32
CONTEXTS = tuple(2 ** p for p in range(10, 24))


def _model(*pattern):
  """32 layers as in a 7B model: 32 heads of 128, 8 key/value heads, bf16."""
  attention = dict(heads=32, kv_heads=8, key=128, value=128)
  layers = (
      c.LayerConfig('full', c.AttentionConfig(**attention)),
      c.LayerConfig('window', c.AttentionConfig(**attention, window=1024)),
      c.LayerConfig('kda', c.KDAConfig(heads=32, key=128, value=128)),
      c.LayerConfig('gdn', c.GatedDeltaNetConfig(16, 32, 128, 128)))
  group = c.GroupConfig(pattern, LAYERS // len(pattern))
  return LanguageModel(c.ModelConfig(
      vocab=32768, width=4096, layers=layers, groups=(group,),
      dtype='bfloat16'))


PATTERNS = {
    'full attention': ('full',),
    '3 window : 1 full': ('window', 'window', 'window', 'full'),
    '3 GDN : 1 full': ('gdn', 'gdn', 'gdn', 'full'),
    '3 KDA : 1 window': ('kda', 'kda', 'kda', 'window'),
    'KDA': ('kda',),
}


def measure() -> dict[str, list[int]]:
  """Returns the bytes of one row for every pattern and context."""
  return {
      name: [sum(st.nbytes(_model(*pattern).state_schema(1, n)).values())
             for n in CONTEXTS]
      for name, pattern in PATTERNS.items()}


def draw(path, curves):
  """Writes the figure."""
  from matplotlib import figure
  picture = figure.Figure(figsize=(6.4, 4.2), layout='constrained')
  axes = picture.subplots()
  for name, values in curves.items():
    axes.plot(CONTEXTS, [v / 2 ** 20 for v in values], marker='.', label=name)
  axes.set(xscale='log', yscale='log', xlabel='context, tokens',
           ylabel='serving state of one row, MiB',
           title='32 layers, 8 key/value heads of 128, bfloat16 stores')
  axes.set_xscale('log', base=2)
  axes.grid(alpha=0.3)
  axes.legend()
  picture.savefig(path, dpi=120)


def run(out) -> tuple[list[report.Row], dict]:
  """Measures, writes figure and numbers into `out`, returns rows and curves."""
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  curves = measure()
  draw(out / 'state_bytes.png', curves)
  (out / 'state_bytes.json').write_text(json.dumps(
      {'contexts': CONTEXTS, 'bytes': curves}, indent=1) + '\n')
  constant = curves['KDA']
  # Full attention by hand: k and v, 32 layers, 8 heads of 128, two bytes.
  growth = (curves['full attention'][-1] - curves['full attention'][0]) // (
      CONTEXTS[-1] - CONTEXTS[0])
  rows = [
      report.Row('KDA state, 8M over 1K tokens', '1.000x',
                 f'{constant[-1] / constant[0]:.3f}x',
                 constant[-1] == constant[0]),
      report.Row('full attention, bytes per token',
                 f'{2 * 32 * 8 * 128 * 2:,}', f'{growth:,}',
                 growth == 2 * 32 * 8 * 128 * 2)]
  return rows, curves


def main(_):
  """Prints bytes per context and the claims."""
  logging.set_verbosity(logging.WARNING)
  rows, curves = run(OUT.value)
  print('MiB per row'.ljust(20), *(f'{n:>9,}' for n in CONTEXTS[::3]))
  for name, values in curves.items():
    print(name.ljust(20), *(f'{v / 2 ** 20:9.1f}' for v in values[::3]))
  print(report.table(rows))
  raise SystemExit(0 if all(r.ok for r in rows) else 1)


if __name__ == '__main__':
  app.run(main)
