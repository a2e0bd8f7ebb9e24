"""Needles, chains and frequent words: how far from full attention is each?

  python -m experiments.needle_local --lengths=4096,8192,16384,32768

Two layers of a mixer behind a short convolution read the haystacks of
`needles` and answer. They learn from haystacks of 256 tokens (`TRAINED`) and
are tested on those and on longer ones; all tokens of an answer count.

  attention  all of the past
  window     the last 64 tokens
  sparse     the best 8 blocks of 32 tokens (MoBA) in the second layer, a window
             in the first
  KDA        a fixed state
  hybrid     KDA, then attention

Reported is each kind's gap to full attention in points, at each length. No
attention here has positions, so that none of it ends at the length it learned.

Expected: a window answers at most 'frequent' where haystacks are long. How many
points the others lack is what this measures. Not run yet.
"""

import functools
import pathlib
import time

from absl import app, flags, logging

from experiments import needles, report
from experiments.record import Record, digest
from statejax import config as c

OUT = flags.DEFINE_string('out', 'experiments/results/needle_local.json',
                          'results')
LENGTHS = flags.DEFINE_list('lengths', ['256', '1024', '4096'], 'of the test')
SYSTEMS = flags.DEFINE_list('systems', ['attention', 'window', 'sparse', 'KDA',
                                        'hybrid'], 'systems to train')
STEPS = flags.DEFINE_integer('steps', 3000, 'updates')
SMOKE = flags.DEFINE_bool('smoke', False, 'two systems, a few updates')

WIDTH, ROWS, TRAINED, TEST, RATE, SEED = 64, 32, 256, 200, 3e-3, 0
_HEADS = dict(heads=4, kv_heads=4, key=16, value=16, rope=None)
_FULL = c.AttentionConfig(**_HEADS)
_WINDOW = c.AttentionConfig(**_HEADS, window=64)
_KDA = c.KDAConfig(heads=4, key=16, value=16)
MIXERS = {'attention': (_FULL, _FULL), 'window': (_WINDOW, _WINDOW),
          'sparse': (_WINDOW, c.MoBAConfig(_FULL, block=32, k=8)),
          'KDA': (_KDA, _KDA), 'hybrid': (_KDA, _FULL)}


def config(name):
  """Of a model; a needle has three tokens, which four taps see at once."""
  mlp = c.SwiGLUConfig(2 * WIDTH)
  near = c.LayerConfig('near', c.GatedConvConfig(width=WIDTH, taps=4), mlp)
  layers = (near, *(c.LayerConfig(f'l{i}', m, mlp)
                    for i, m in enumerate(MIXERS[name])))
  return c.ModelConfig(vocab=needles.VOCAB, width=WIDTH, layers=layers, groups=(
      c.GroupConfig(tuple(x.name for x in layers)),))


def batches(source, rows):
  """Yields {name: [rows, ...]} of the items of a source, in order."""
  import numpy as np
  for i in range(0, len(source), rows):
    items = [source[j] for j in range(i, min(i + rows, len(source)))]
    yield {k: np.stack([x[k] for x in items]) for k in items[0]}


def train(name, steps):
  """Returns trained parameters and the seconds it took."""
  import jax
  import jax.numpy as jnp
  import optax

  from statejax import model as lm
  model = lm.LanguageModel(config(name))
  params = model.init(jax.random.key(SEED))
  optimizer = optax.chain(
      optax.clip_by_global_norm(1.), optax.adamw(
          optax.warmup_cosine_decay_schedule(
              0., RATE, min(100, steps // 4), steps, RATE / 50), b2=0.98))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, moments, batch):
    def loss(params):
      logits, _, _ = lm.forward(model, params, model.init_state(ROWS, 0),
                                batch['tokens'])
      asked = batch['targets'] >= 0
      cost = optax.softmax_cross_entropy_with_integer_labels(
          logits, jnp.maximum(batch['targets'], 0))
      return jnp.sum(jnp.where(asked, cost, 0.)) / jnp.sum(asked)
    cost, grads = jax.value_and_grad(loss)(params)
    change, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, change), moments, cost

  moments, begin = optimizer.init(params), time.perf_counter()
  source = needles.NeedlesSource(steps * ROWS, 100 + SEED, TRAINED)
  for i, batch in enumerate(batches(source, ROWS)):
    params, moments, cost = update(params, moments, batch)
    if i % 100 == 0:
      logging.info('%s, update %d: loss %.3f', name, i, cost)
  return jax.block_until_ready(params), time.perf_counter() - begin


def test(name, params, length, count):
  """Right answers per kind, of `count` each; all tokens of an answer count."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from statejax import model as lm
  model = lm.LanguageModel(config(name))

  @jax.jit
  def right(params, batch):
    logits, _, _ = lm.forward(
        model, params, model.init_state(len(batch['tokens']), 0),
        batch['tokens'])
    wrong = (batch['targets'] >= 0) & (
        jnp.argmax(logits, -1) != batch['targets'])
    return ~jnp.any(wrong, axis=-1)

  out = dict.fromkeys(needles.KINDS, 0)
  source = needles.NeedlesSource(count * len(needles.KINDS), 9000 + SEED,
                                 length)
  for batch in batches(source, max(1, 8192 // length)):
    ok = np.asarray(right(params, batch))
    for i, kind in enumerate(needles.KINDS):
      out[kind] += int(ok[batch['kind'] == i].sum())
  return out


def study(name, steps, lengths, count):
  """Returns {'right': {length: {kind: right}}, 'seconds'}."""
  params, took = train(name, steps)
  return {'right': {str(n): test(name, params, n, count) for n in lengths},
          'seconds': round(took)}


def claims(found, lengths, count):
  """Rows of the report, from {system: {length: {kind: right}}}."""
  rows = []
  for name, right in found.items():
    for n in map(str, lengths):
      if name == 'attention' or 'attention' not in found:
        said = ', '.join(f'{k} {x}' for k, x in right[n].items())
        rows.append(report.Row(f'{name}, {n} tokens: right of {count}',
                               'reported', said, True))
        continue
      gap = {k: 100 * (x - found['attention'][n][k]) / count
             for k, x in right[n].items()}
      far = name == 'window' and int(n) >= 32 * _WINDOW.window
      ok = not far or all(right[n][k] <= count // 10 for k in right[n]
                          if k != 'frequent')
      rows.append(report.Row(
          f'{name}, {n} tokens: points over attention',
          'answers nothing else than frequent' if far else 'reported',
          ', '.join(f'{k} {x:+.0f}' for k, x in gap.items()), ok))
  return rows


def main(argv):
  """Trains, tests, prints the table."""
  del argv
  steps, count, systems = STEPS.value, TEST, SYSTEMS.value
  lengths, out = [int(x) for x in LENGTHS.value], OUT.value
  if SMOKE.value:
    steps, count, systems, lengths = 4, 2, ['attention', 'window'], [256, 1024]
    out = pathlib.Path('runs/needle_local.json')
    out.unlink(missing_ok=True)
  record = Record(
      out, f'python -m experiments.needle_local --steps={steps} '
      f'--lengths={",".join(map(str, lengths))} --systems={",".join(systems)}',
      lambda key: digest([c.to_dict(config(key)), steps, lengths, count, ROWS,
                          TRAINED, RATE]))
  found = {name: record.get(name, functools.partial(
      study, name, steps, lengths, count))['right'] for name in systems}
  rows = claims(found, lengths, count)
  print(report.table(rows))
  record.write(rows)


if __name__ == '__main__':
  app.run(main)
