"""Memory in text: written, locked, deleted and read by a model from tokens.

  python -m experiments.lifecycle_text
"""

import dataclasses
import functools
import time

from absl import app, flags, logging

from statejax import config as c

SEEDS = flags.DEFINE_integer('seeds', 3, 'seeds', lower_bound=1)
STEPS = flags.DEFINE_integer('steps', 1500, 'updates')
WIDTH, LENGTH, LABELLED = 64, 1216, 0.1
EARLY = (0.8, 512)  # share of updates with short logs, and their length
ROWS = 16

LOCAL = c.Mamba2Config(heads=4, key=32, value=32)
GLOBAL = c.AttentionConfig(heads=2, kv_heads=2, key=32, value=32, rope=None)
RULES = c.SlotRules(slots=32, key=32, value=64, ring=1, span=5, key_span=4,
                    aliases=8)
SLOTS = c.SlotsConfig(RULES, segment=16, events=2, statement=24, kappa=10.,
                      fallback=c.MoBAConfig(GLOBAL, block=16, k=84))
MEMORY = {
    'slots': SLOTS, 'attention': dataclasses.replace(GLOBAL, heads=4, kv_heads=4, key=16,value=16, rope=c.RopeConfig()),
    'sparse': SLOTS.fallback, 'delta': c.KDAConfig(heads=4, key=16, value=16)}


def short(memory):
  """The same with a quarter of the slots, for logs a quarter as long."""
  if not isinstance(memory, c.SlotsConfig):
    return memory
  rules = dataclasses.replace(memory.rules, slots=memory.rules.slots // 4)
  return dataclasses.replace(memory, rules=rules)


def config(memory):
  """Of a model with one memory layer among local ones."""
  from statejax.tasks import lifecycle_words as words
  mlp = c.SwiGLUConfig(2 * WIDTH)
  return c.ModelConfig(
      vocab=len(words.WORDS), width=WIDTH,
      layers=(c.LayerConfig('local', LOCAL, mlp),
              c.LayerConfig('memory', memory, mlp)),
      groups=(c.GroupConfig(('local', 'local', 'memory', 'local')),))


def run(model, params, batch, hints=None):
  """Logits and the layers' own losses of a batch."""
  from statejax import model as lm
  state = model.init_state(batch['tokens'].shape[0], 0)
  logits, _, losses = lm.forward(
      model, params, state, batch['tokens'], batch['n_valid'], hints=hints)
  return logits, losses


def right(logits, targets):
  """Whether the first answer of each row is right in all its tokens, [B]."""
  import jax.numpy as jnp
  asked = targets >= 0
  return jnp.all(jnp.where(asked, jnp.argmax(logits, -1) == targets, True), -1)


HINTS = ('want', 'part', 'version', 'object', 'alias')


def make_update(optimizer):
  import jax
  import jax.numpy as jnp
  import optax

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
  def update(model, params, moments, batch):
    known = batch['known'][:, None]
    hints = {name: jnp.where(known, batch[name], -1) for name in HINTS}
    targets = batch['targets']

    def loss(params):
      logits, own = run(model, params, batch, hints)
      asked = targets >= 0
      cost = optax.softmax_cross_entropy_with_integer_labels(
          logits, jnp.maximum(targets, 0))
      cost = jnp.sum(jnp.where(asked, cost, 0)) / jnp.maximum(asked.sum(), 1)
      count = lambda hint: jnp.maximum(jnp.sum(hint >= 0), 1)
      own = {n: v for layer in own.values() for n, v in layer.items()}
      parts = {'want': own['want_loss'] / count(hints['part']) * 20,
               'part': own['part_loss'] / count(hints['part']),
               'version': own['version_loss'] / count(hints['version']),
               'object': own['object_loss'] / count(hints['object'])
               } if own else {}
      hit = jnp.sum(asked & (jnp.argmax(logits, -1) == targets))
      return cost + sum(parts.values(), jnp.float32(0)), (
          cost, parts, hit / jnp.maximum(asked.sum(), 1))

    grads, out = jax.grad(loss, has_aux=True)(params)
    change, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, change), moments, out

  return update


def batches(source, rows):
  """Yields batches of the items of a source."""
  import numpy as np
  for i in range(0, len(source), rows):
    items = [source[j] for j in range(i, min(i + rows, len(source)))]
    yield {k: np.stack([x[k] for x in items]) for k in items[0]}


def train(memory, seed, steps, rate=2e-3, early=EARLY, log=100, keep=None):
  import jax
  import numpy as np
  import optax

  from statejax.model import LanguageModel
  from statejax.tasks import lifecycle_text as task
  model = LanguageModel(config(memory))
  params = model.init(jax.random.key(seed))
  schedule = optax.warmup_cosine_decay_schedule(
      0., rate, min(100, steps // 4), steps, rate / 50)
  optimizer = optax.chain(optax.clip_by_global_norm(1.),
                          optax.adamw(schedule, b2=0.98, weight_decay=0.01))
  update, moments = make_update(optimizer), optimizer.init(params)
  random, begin, i = np.random.default_rng(seed), time.perf_counter(), 0
  share, length = early
  phases = ((round(share * steps), length, 0.25, ROWS),
            (steps - round(share * steps), LENGTH, 1.0, ROWS // 2))
  for phase, (count, length, scale, rows) in enumerate(phases):
    model = LanguageModel(config(memory if phase else short(memory)))
    source = task.LifecycleTextSource(
        max(1, count * rows), 10 * seed + phase + 1, 'train', questions=6,
        length=length, scale=scale)
    if not count:
      continue
    for batch in batches(source, rows):
      batch['known'] = random.random(rows) < LABELLED
      batch['known'][0] |= not batch['known'].any()
      params, moments, out = update(model, params, moments, batch)
      if i % log == 0:
        cost, parts, hit = jax.device_get(out)
        logging.info('%d: %.3f, right %.3f, %s, %.0f s', i, cost, hit,
                     {k: round(float(v), 3) for k, v in parts.items()},
                     time.perf_counter() - begin)
        if keep:
          keep(params)
      i += 1
  return jax.block_until_ready(params), time.perf_counter() - begin


def test(memory, params, seed, count=20, split='test', force=None):
  """Right answers per scenario, of `count` each."""
  import jax
  import numpy as np

  from statejax.model import LanguageModel
  from statejax.tasks import lifecycle_text as task
  model = LanguageModel(config(memory))
  source = task.LifecycleTextSource(
      count * len(task.SCENARIOS), 1000 + seed, split, length=LENGTH)
  found = jax.jit(lambda p, b, h: right(run(model, p, b, h)[0], b['targets']))
  out = dict.fromkeys(task.SCENARIOS, 0)
  for batch in batches(source, 20):
    hints = {} if force is None else {'force': force(batch)}
    ok = found(params, batch, hints)
    for i, name in enumerate(task.SCENARIOS):
      out[name] += int(np.sum(ok[batch['scenario'] == i]))
  return out
