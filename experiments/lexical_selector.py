"""Where a lexical selector helps, and where it harms: chains and dialogues.

  python -m experiments.lexical_selector

A context is 64 lines; some are the evidence of a question. A selector that
knows words only takes k of them by the sum of the inverse document frequencies
of the words that they share with the question. With `hops` it takes one line at
a time, and the words of a line that is taken become words of the question.

  chains     'a leads to b', 'b leads to c': the question names a; k = 8
  dialogues  two turns of one speaker about two concepts, of which the question
             uses another word than the speaker, in seven cases of ten; the
             words around them are chatter of their topic; k = 4

arXiv 2606.28876 reports +58.0 points on its chains and -7.1 F1 on HotpotQA, and
publishes no data; chains and dialogues here are ours, so only the signs can
agree. A rule for memory that was tuned on chains is no retriever of what people
say.

Expected: hops help on chains and harm in dialogues; a second, on one core.
"""

import pathlib

from absl import app, flags

from experiments import lexical, report
from statejax.tasks.draw import Draw

OUT = flags.DEFINE_string('out', 'experiments/results/lexical_selector.json',
                          'results')
ITEMS = flags.DEFINE_integer('items', 500, 'of each kind and seed')
SMOKE = flags.DEFINE_bool('smoke', False, 'a few items')

SEEDS, CHOSEN = (0, 1, 2), {'chains': 8, 'dialogues': 4}


def measure(kind, seed, items, hops):
  """Mean over items: all of a chain found; or F1 of a dialogue's two turns."""
  make = {'chains': lexical.chain, 'dialogues': lexical.dialogue}[kind]
  total = 0.
  for i in range(items):
    lines, question, needed = make(Draw(seed, i))
    chosen = lexical.select(lines, question, CHOSEN[kind], hops)
    total += needed <= chosen if kind == 'chains' else lexical.f1(
        chosen, needed)
  return 100 * total / items


def main(argv):
  """Measures both selectors on both kinds, prints the table and the claims."""
  del argv
  items = 20 if SMOKE.value else ITEMS.value
  found = {f'{kind}, {"hops" if hops else "one hop"}': [
      measure(kind, seed, items, hops) for seed in SEEDS]
           for kind in CHOSEN for hops in (False, True)}
  show = lambda values: ', '.join(f'{x:.1f}' for x in values)
  gain = {kind: [b - a for a, b in zip(found[f'{kind}, one hop'],
                                       found[f'{kind}, hops'])]
          for kind in CHOSEN}
  rows = [report.Row(name, 'reported', show(values), True)
          for name, values in found.items()]
  rows += [
      report.Row('chains: what hops add, points, each seed', '> 0',
                 show(gain['chains']), min(gain['chains']) > 0),
      report.Row('dialogues: what hops add, F1, each seed', '< 0',
                 show(gain['dialogues']), max(gain['dialogues']) < 0)]
  print(report.table(rows))
  out = pathlib.Path('runs/lexical_selector.json' if SMOKE.value else OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  report.write(out, rows, 'python -m experiments.lexical_selector',
               percent=found)


if __name__ == '__main__':
  app.run(main)
