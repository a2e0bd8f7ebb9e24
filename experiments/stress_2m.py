"""Facts in a stream of 2,097,152 events, asked for at its end.

  python -m experiments.stress_2m

A model of one memory layer (slots, and a fallback that answers only those who
ask) learns from 72 events, as in `lifecycle_events`, and a little from 512.
With the same parameters it then reads streams of 2,097,152 events, all but some
hundred of which are noise; see `statejax.tasks.long_events`. Slots commit after
256 events, 4 of them at most; the fallback chooses 128 of 4,096 blocks of 512
events, its scores times log(2,097,152) / log(72). Of each stream 25 questions
are asked, 5 of each class, each on a fork of the state. `slots only` is the
same state without the fallback, `fallback only` hides the bank from the
question.

Expected: at least 98 % of 100 items right, looking at 132 chunks at most; slots
alone lose what nobody asked to keep, the fallback alone what has a history.
"""

import functools
import pathlib
import resource

from absl import app, flags

from experiments import event_models, process, report
from experiments.record import Record, digest

OUT = flags.DEFINE_string('out', 'experiments/results/stress_2m.json',
                          'results')
EVENTS = flags.DEFINE_integer('events', 2 ** 21, 'events of a stream')
STREAMS = flags.DEFINE_integer('streams', 4, 'streams', lower_bound=1)
ITEMS = flags.DEFINE_integer('items', 25, 'questions about a stream')
STEPS = flags.DEFINE_integer('steps', 900, 'updates on 72 events')
MORE = flags.DEFINE_integer('more', 150, 'updates on 512 events')
STEP = flags.DEFINE_integer('step', 8192, 'events read at a time')
SMOKE = flags.DEFINE_bool('smoke', False, 'one short stream, a few updates')

SEED = 2  # of streams by which nothing was chosen


def main(argv):
  """Trains, reads, asks, prints the table."""
  del argv
  from experiments import event_streams
  from statejax import config
  from statejax.tasks import long_events
  length, streams, items = EVENTS.value, STREAMS.value, ITEMS.value
  steps, more, out = STEPS.value, MORE.value, OUT.value
  if SMOKE.value:
    length, streams, items, steps, more = 2 ** 14, 1, 5, 20, 0
    out = pathlib.Path('runs/stress_2m.json')
    out.unlink(missing_ok=True)
  of = event_streams.settings(steps, more)
  params = event_streams.sharper(event_streams.trained(
      f'runs/stress_2m_{of}.npz', steps, more), length)
  model = event_streams.model_of(event_streams.SERVED)
  source = long_events.LongEventsSource(streams, length, items, seed=SEED)
  record = Record(
      out, f'python -m experiments.stress_2m --events={length} '
      f'--streams={streams} --items={items} --steps={steps} --more={more} '
      f'--step={STEP.value}',
      lambda key: digest([of, config.to_dict(event_streams.SERVED), length,
                          items, STEP.value, SEED]))

  def study(i):
    facts = event_streams.study(model, params, source[i], STEP.value)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return facts | {'events_per_second': round(length / facts['seconds']),
                    'peak_bytes': peak}

  cells = [record.get(f'stream/{i}', functools.partial(study, i))
           for i in range(streams)]
  rows = event_streams.claims(cells)
  print(report.table(rows))
  for i, cell in enumerate(cells):
    print(f'stream {i}: {cell["events_per_second"]:,} events per second; '
          f'state {sum(cell["bytes"].values()):,} bytes, {cell["bytes"]}; '
          f'peak of the process {cell["peak_bytes"]:,}')
  record.write(rows, parameters=event_models.size((event_streams.TRAINED,)))


if __name__ == '__main__':
  process.start_with_huge_pages()
  app.run(main)
