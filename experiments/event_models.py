"""Models of memory events, and how they learn: see `lifecycle_events`.

One token of a model is one event of `statejax.tasks.lifecycle_events`, the sum
of three embeddings; the last is a question.
"""

import dataclasses
import functools
import time

from absl import logging

from experiments import labels, probes, rates
from experiments.record import digest
from statejax import config as c

WIDTH, ROWS, LABELLED, HIDDEN, LENGTH = 64, 64, 0.1, 4, 72
# Seeds of the items of the test, and of those by which is chosen, begin here.
TEST, DEV = 9000, 8000
RATE = 4e-3  # of slots
HEADS = c.AttentionConfig(heads=4, kv_heads=4, key=16, value=16, rope=None)
RULES = c.SlotRules(slots=32, key=32, value=64, ring=1, span=1, key_span=1,
                    aliases=1, threshold=0.8)
SLOTS = c.SlotsConfig(
    RULES, segment=8, events=8, statement=2, kappa=10., confidence=0.6,
    fallback=c.LogConfig(block=8, k=16))


def config(mixers, width=WIDTH):
  """Of a model with these mixers in turn."""
  layers = tuple(c.LayerConfig(f'l{i}', m, c.SwiGLUConfig(128))
                 for i, m in enumerate(mixers))
  return c.ModelConfig(vocab=8 + 96 + 65, width=width, layers=layers, groups=(
      c.GroupConfig(tuple(x.name for x in layers)),))


def wants(events):
  """What each event wants of the memory, as an index of `slots.WANTS`."""
  import numpy as np

  from statejax.tasks import lifecycle_events as task
  out = np.zeros(events.shape[:2], np.int32)
  for op, want in ((task.SET, 1), (task.LOCK, 2), (task.DELETE, 4)):
    out[events[..., 0] == op] = want
  return out


def hinted(events, known):
  """What is known of the events of the items that have labels; -1 elsewhere."""
  import numpy as np

  from statejax.tasks import lifecycle_events as task
  asks = np.isin(events[..., 0], (task.NOW, task.BEFORE))
  back = np.where(asks, events[..., 0] == task.BEFORE, -1)
  about = np.where((wants(events) > 0) | asks, events[..., 1], -1)
  known = known[:, None]
  # What is in the slots is hidden from some, so that the fallback learns too.
  look = np.arange(len(events)) % HIDDEN != 0
  # Each event is one token, which is its value.
  out = {'want': wants(events), 'object': about, 'version': back,
         'ask': asks, 'part': np.full(asks.shape, 2)}
  out = {name: np.where(known, hint, -1) for name, hint in out.items()}
  out['look'] = np.broadcast_to(look[:, None], asks.shape)
  return {name: hint.astype(np.int32) for name, hint in out.items()}


def read(model, params, state, events, hints):
  """Absorbs events.

  Args:
    model: `LanguageModel` of a `config`.
    params: its parameters.
    state: `ServingState` of B rows, with room.
    events: [B, T, 3] int32.
    hints: {name: [B, T] int32}, see `hinted`.

  Returns:
    logits [B, 65] of the answer to the last event, the new state, the layers'
    own losses, and what the layers lend.
  """
  import jax.numpy as jnp

  from statejax.layers import common, groups
  from statejax.ops import norm
  rows, steps = events.shape[:2]
  offset = jnp.array([0, 8, 8 + 96], jnp.int32)
  x = jnp.sum(params['embed'][events + offset[None, None]], axis=2)
  context = dataclasses.replace(
      common.context(state.length, jnp.full((rows,), steps, jnp.int32), None,
                     steps), tokens=events[..., 2], hints=hints)
  x, layers, losses, lent = groups.run_and_lend(
      model.config, params, x, state.layers, context)
  x = norm.rms_norm(x[:, -1], params['norm'], eps=1e-6)
  state = dataclasses.replace(state, layers=layers, length=context.new_length)
  return jnp.dot(x, params['embed'][8 + 96:].T), state, losses, lent


def answers(model, params, events, hints):
  """Logits [B, 65] of the answer, and the layers' own losses."""
  state = model.init_state(events.shape[0], 0)
  logits, _, losses, _ = read(model, params, state, events, hints)
  return logits, losses


def batches(size, seed, rows):
  """Yields (events, answer, family) of fresh items."""
  import numpy as np

  from statejax.tasks import lifecycle_events as task
  source = task.LifecycleEventsSource(size, seed)
  for i in range(0, size, rows):
    items = [source[j] for j in range(i, min(size, i + rows))]
    yield tuple(np.stack([x[k] for x in items])
                for k in ('events', 'answer', 'family'))


def train(mixers, seed, steps, params=None, *, length=LENGTH, rows=ROWS,
          rate=RATE, shuffled=False, share=None):
  """Trains a model.

  Args:
    mixers: of a `config`.
    seed: of parameters and items.
    steps: updates.
    params: where to begin, and then no longer of use; None draws them.
    length: events of an item.
    rows: of a batch, even.
    rate: the largest of the optimizer.
    shuffled: whether each item has the answer and the labels of another.
    share: of all items that have labels; None for that of `labelled`.

  Returns:
    trained parameters, and the seconds it took.
  """
  import jax

  from statejax.model import LanguageModel
  model = LanguageModel(config(mixers))
  if params is None:
    params = model.init(jax.random.key(seed))
  inputs = lambda batch: (batch['events'],)
  return fit(functools.partial(answers, model), params, inputs, seed, steps,
             length=length, rows=rows, rate=rate, shuffled=shuffled,
             share=labelled(mixers) if share is None else share)


def fit(answers, params, inputs, seed, steps, *, length=LENGTH, rows=ROWS,
        rate=RATE, shuffled=False, share=LABELLED):
  """Fits parameters to items of `statejax.tasks.lifecycle_events`.

  Args:
    answers: (params, *inputs, hints) -> logits [B, 65] and own losses.
    params: where to begin; its memory is used.
    inputs: of a batch of `labels.batches`, a tuple of arrays.
    seed, steps, length, rows, rate, shuffled: as for `train`.
    share: of all items that have labels; without, no item is seen twice.

  Returns:
    the parameters, and the seconds it took.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from statejax.tasks import lifecycle_events as task
  rates = optax.warmup_cosine_decay_schedule(
      0., rate, min(100, steps // 4), steps, 1e-5)
  optimizer = optax.chain(optax.clip_by_global_norm(1.), optax.adam(rates))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, moments, inputs, answer, hints):
    def loss(params):
      logits, own = answers(params, *inputs, hints)
      cost = optax.softmax_cross_entropy_with_integer_labels(logits, answer)
      own = sum(jax.tree.leaves(own), jnp.float32(0))
      # Losses of tokens: of those with labels, or of all where none has any.
      known = jnp.sum(hints['want'] >= 0)
      known = jnp.where(known > 0, known, hints['want'].size)
      return jnp.mean(cost) + own / known, jnp.mean(
          jnp.argmax(logits, -1) == answer)
    (cost, right), grads = jax.value_and_grad(loss, has_aux=True)(params)
    change, moments = optimizer.update(grads, moments)
    return optax.apply_updates(params, change), moments, cost, right

  moments, begin = optimizer.init(params), time.perf_counter()
  fresh, pool = labels.sources(
      lambda which, size: task.LifecycleEventsSource(
          size, 1000 * (which + 1) + seed, length), steps, rows, share)
  for i, batch in enumerate(labels.batches(fresh, pool, rows, seed)):
    # Items of a batch are independent: the next one's labels are any other's.
    told = {n: np.roll(x, 1, axis=0) if shuffled else x
            for n, x in batch.items()}
    params, moments, cost, right = update(
        params, moments, inputs(batch), told['answer'],
        hinted(told['events'], batch['known']))
    if i % 100 == 0:
      logging.info('update %d: loss %.3f, right %.2f', i, cost, right)
  return jax.block_until_ready(params), time.perf_counter() - begin


def asked(mixers, params, seed, count=600, locks=True):
  """Rows of `probes` of `count` items of the test.

  Args:
    mixers: of a `config`, and of `params`.
    params: trained ones.
    seed: of the test, `TEST` and on, or of the split by which is chosen, `DEV`.
    count: items, a multiple of 60.
    locks: whether those are locked which the events lock.
  """
  import jax
  import numpy as np

  from statejax import account
  from statejax.model import LanguageModel
  from statejax.tasks import lifecycle_events as task
  model, rows = LanguageModel(config(mixers)), []
  size = account.total(account.account(model.config, 1 + task.EVENTS)).total
  last = mixers[-1]

  @jax.jit
  def run(params, events, hints):
    logits, _, _, lent = read(model, params, model.init_state(len(events), 0),
                              events, hints)
    if not isinstance(last, c.SlotsConfig):
      return logits, None
    return logits, lent[model.config.layers[-1].name]['fires'][:, -1]

  for events, answer, _ in batches(count, seed, 60):
    force = np.where(events[..., 0] == task.LOCK, 0, -1)
    logits, fires = run(params, events, {} if locks else {'force': force})
    missed = 'log' if getattr(last, 'fallback', None) else 'none'
    route = (['state'] * len(answer) if fires is None else
             ['slot' if f else missed for f in np.asarray(fires)])
    rows += probes.rows(len(rows), answer, np.argmax(logits, axis=-1), route,
                        [size] * len(answer))
  return rows


def test(mixers, params, seed, count=600):
  """Right answers per family, of `count` / 8 each."""
  from statejax.tasks import lifecycle_events as task
  return probes.counted(probes.hits(asked(mixers, params, TEST + seed, count)),
                        task.FAMILIES)


def dev(mixers, params, count=240):
  """Right answers of items by which is chosen."""
  return int(probes.hits(asked(mixers, params, DEV, count)).sum())


def rules(seed, count=600):
  """Hits [count] of rules that know no locks and keep no version:
  {name: bool}."""
  import numpy as np

  from statejax.tasks import lifecycle_events as task
  out = {'first mention': [], 'last mention': [], 'last set or delete': []}
  for events, answers_, _ in batches(count, TEST + seed, count):
    for (*log, (_, key, _)), answer in zip(events.tolist(), answers_):
      mine = [(op, value) for op, k, value in log if k == key]
      said = [value for _, value in mine if value != task.NONE]
      done = [value for op, value in mine if op in (task.SET, task.DELETE)]
      for name, found in (('first mention', said[:1]),
                          ('last mention', said[-1:]),
                          ('last set or delete', done[-1:])):
        out[name].append(found == [answer])
  return {name: np.array(hit) for name, hit in out.items()}


def size(mixers):
  """Parameters of a model."""
  import math

  import jax

  from statejax.model import LanguageModel
  model = LanguageModel(config(mixers))
  return sum(math.prod(x.shape) for x in jax.tree.leaves(
      jax.eval_shape(model.init, jax.random.key(0))))


def labelled(mixers):
  """The share of items with labels: only slots have a use for them."""
  slots = any(isinstance(m, c.SlotsConfig) for m in mixers)
  return LABELLED if slots else 0.


def settings(mixers, steps):
  """Returns a digest of what a training depends on."""
  return digest([c.to_dict(config(mixers)), steps, ROWS, labelled(mixers),
                 HIDDEN, RATE])


def cell(mixers, steps, key):
  """Returns a digest of what a result depends on, None of no system here.

  Args:
    mixers: {name: mixers of a model}.
    steps: updates.
    key: of the result, see `rates`.
  """
  name = rates.named(key)
  if name not in mixers:
    return None
  of = settings(mixers[name], steps)
  return of if key.startswith('slots/') else digest([of, key.split('/')[0]])
