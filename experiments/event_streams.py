"""Models of memory events on streams far longer than what they learned from.

A model of `event_models` learns from 72 events, then from 512. Over a long
stream the same parameters serve with longer segments and blocks, see `SERVED`,
and a sharper log, see `sharper`. A stream is read once; each question is asked
of a fork of the state at its end.
"""

import dataclasses
import functools
import math
import multiprocessing
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import event_models, report
from experiments.record import digest
from statejax import state as st
from statejax.model import LanguageModel
from statejax.tasks import long_events

TRAINED = dataclasses.replace(event_models.SLOTS, asks=True)
# With its parameters: what learns from more events, and what reads streams.
LONGER = dataclasses.replace(TRAINED, segment=64)
LONG = dict(length=512, rows=16, rate=1e-3)
SERVED = dataclasses.replace(
    TRAINED, segment=256, events=4, fallback=dataclasses.replace(
        TRAINED.fallback, block=512, k=128))
VARIANTS = ('slots and fallback', 'slots only', 'fallback only')
# The most chunks that an event may look at, and the least share of right
# answers.
MOST, SHARE = 132, 0.98
# Bytes of forks of a state at a time, about.
_FORKS = 2 ** 30


def model_of(mixer):
  """A model of this mixer alone."""
  return LanguageModel(event_models.config((mixer,)))


def settings(steps, more):
  """Returns a digest of what `trained` depends on."""
  return digest([event_models.settings((TRAINED,), steps),
                 event_models.settings((LONGER,), more), LONG])


def trained(path, steps, more):
  """Returns parameters, from the file or trained now.

  They are trained in a process of its own, so that what reading needs of memory
  can be told apart.

  Args:
    path: of the file.
    steps: updates on 72 events.
    more: updates on `LONG` items behind them.
  """
  path = pathlib.Path(path)
  if not path.exists():
    with multiprocessing.get_context('spawn').Pool(1) as pool:
      pool.apply(_train, (path, steps, more))
  leaves, tree = jax.tree.flatten(jax.eval_shape(
      model_of(TRAINED).init, jax.random.key(0)))
  with np.load(path) as held:
    return tree.unflatten([jnp.asarray(held[str(i)])
                           for i in range(len(leaves))])


def sharper(params, length):
  """Parameters whose log is as sharp among `length` events as it was among
  those it learned from: scores times log(length) / log(72), as a weight of 1 /
  length takes a score that grows with log(length) (arXiv 2501.19399)."""
  factor = math.log(length) / math.log(event_models.LENGTH)
  layer = params['group_0']['layer_0']
  mixer = layer['mixer']
  mixer = mixer | {
      'log_kappa': mixer['log_kappa'] + math.log(factor),
      'salience': jax.tree.map(lambda x: x * factor, mixer['salience'])}
  return params | {'group_0': {'layer_0': layer | {'mixer': mixer}}}


def _train(path, steps, more):
  params, _ = event_models.train((TRAINED,), 0, steps)
  if more:
    params, _ = event_models.train((LONGER,), 0, more, params, **LONG)
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix('.new.npz')
  np.savez(new, **{str(i): x for i, x in enumerate(jax.tree.leaves(params))})
  new.replace(path)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _absorb(model, params, state, events):
  _, state, _, lent = event_models.read(model, params, state, events, {})
  return state, jnp.max(lent['l0']['active'])


@functools.partial(jax.jit, static_argnums=0)
def _answer(model, params, state, events, look):
  logits, _, _, lent = event_models.read(model, params, state, events,
                                         {'look': look})
  return jnp.argmax(logits, axis=-1), lent['l0']['active'][:, 0]


def read(model, params, events, step):
  """Reads a stream, `step` events at a time.

  Args:
    model: `LanguageModel` of a mixer like `SERVED`.
    params: of the trained one.
    events: [N, 3] int32.
    step: events at a time.

  Returns:
    the state at its end, and {'seconds': of reading, without compilation,
    'active': the most chunks that any event looked at}.
  """
  block = model.config.layers[0].mixer.fallback.block
  room = len(events) + block
  found = list(long_events.pieces(events, step))
  for piece in {len(p): p for p in found}.values():  # compiles
    _absorb(model, params, model.init_state(1, room), piece[None])
  state, most, begin = model.init_state(1, room), [], time.perf_counter()
  for piece in found:
    state, active = _absorb(model, params, state, piece[None])
    most.append(active)
  jax.block_until_ready(state)
  took = time.perf_counter() - begin
  return state, {'seconds': round(took, 2), 'active': int(max(most))}


def ask(model, params, state, questions, look=True):
  """Asks each question of a fork of the state.

  Args:
    model: `LanguageModel`.
    params: its parameters.
    state: of one row.
    questions: [n, 3] int32.
    look: whether the bank is there to be looked at.

  Returns:
    answers [n], and how many chunks each looked at [n].
  """
  size = max(1, _FORKS // sum(st.nbytes(state).values()))
  found = []
  for i in range(0, len(questions), size):
    part = questions[i:i + size, None]
    found.append(_answer(model, params, st.fork(state, 0, len(part)), part,
                         np.full(part.shape[:2], look, np.int32)))
  return tuple(np.concatenate(x) for x in zip(*found))


def without_fallback(model, state):
  """The same bank without what is behind it: a model, and its state."""
  mixer = model.config.layers[0].mixer
  alone = model_of(dataclasses.replace(mixer, fallback=None, asks=False))
  schema, layer = alone.state_schema(1, 0).layers['l0'], state.layers['l0']
  layer = dataclasses.replace(layer, **{
      f.name: None for f in dataclasses.fields(schema)
      if getattr(schema, f.name) is None})
  return alone, dataclasses.replace(
      state, layers={'l0': layer}, capacity=None, strides=())


def study(model, params, stream, step):
  """Reads a stream and asks all of its questions in three ways.

  Args:
    model, params, step: as for `read`.
    stream: an item of `long_events.LongEventsSource`.

  Returns:
    {'right': {variant: {class: right answers}}, 'asked': {class: questions},
    'active': the most chunks, 'bytes': of the state by kind, 'seconds'}.
  """
  state, facts = read(model, params, stream['events'], step)
  ways = {VARIANTS[0]: (model, state, True),
          VARIANTS[1]: (*without_fallback(model, state), True),
          VARIANTS[2]: (model, state, False)}
  names = [long_events.CLASSES[f] for f in stream['family']]

  def count(which):
    return {name: sum(bool(w) for n, w in zip(names, which) if n == name)
            for name in dict.fromkeys(names)}

  right = {}
  for name, (which, held, look) in ways.items():
    said, active = ask(which, params, held, stream['questions'], look)
    right[name] = count(said == stream['answer'])
    facts['active'] = max(facts['active'], int(active.max()))
  return {'right': right, 'asked': count(np.ones(len(names), bool)),
          'bytes': st.nbytes(state), **facts}


def claims(cells):
  """Rows of the report, from what `study` says of each stream."""
  both, slots, fallback = VARIANTS
  asked = {}
  for cell in cells:
    for name, n in cell['asked'].items():
      asked[name] = asked.get(name, 0) + n
  right = {variant: {name: sum(cell['right'][variant][name] for cell in cells)
                     for name in asked} for variant in VARIANTS}

  def row(variant, names, least=None, most=None):
    """A claim about the share of right answers."""
    n, of = (sum(x[name] for name in names) for x in (right[variant], asked))
    bound = f'>= {least:.0%}' if most is None else f'<= {most:.0%}'
    ok = n >= least * of if most is None else n <= most * of
    what = 'all' if len(names) == len(asked) else ', '.join(names)
    return report.Row(f'{variant}: {what}', bound, f'{n} of {of}', ok)

  history = [name for name in asked if name != 'no_write']
  rows = [row(both, list(asked), SHARE)]
  rows += [row(both, [name], SHARE) for name in asked]
  rows += [row(slots, history, SHARE), row(slots, ['no_write'], most=0.1)]
  rows += [row(fallback, ['no_write'], SHARE)]
  rows += [row(fallback, [name], most=0.6) for name in history]
  active = max(cell['active'] for cell in cells)
  return [*rows, report.Row('most chunks that an event looks at', f'<= {MOST}',
                            str(active), active <= MOST)]
