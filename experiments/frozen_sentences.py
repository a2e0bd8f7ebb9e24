"""Memory events as sentences, and what frozen language models make of them.

A sentence tells one event of `statejax.tasks.lifecycle_events` about 'entity a4
n17', a pair of words, and 'v12', one word: a mean forgets order, and so digits.
Half of the pairs are for training. A frozen model is trained on such sentences
as text, about entities of training only, and then never again: what a memory
reads of a sentence is the mean of its hidden states behind each of the two
layers. The last of them alone tell the next word, which is no longer what the
sentence said.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from statejax import config as c
from statejax import model as lm
from statejax.layers import common, groups
from statejax.tasks import lifecycle_events as le

WIDTH, LENGTH, SIDE = 128, 12, 20
ENTITIES = SIDE ** 2
BEHIND = (1, 2)  # layers: where the states of a sentence are taken
SENTENCES = {
    le.NOISE: 'somebody saw {} beside {} .', le.SET: '{} is set to {} .',
    le.MENTION: '{} once held {} .', le.REJECT: '{} may not take {} .',
    le.LOCK: '{} is locked now .', le.DELETE: '{} is struck out .',
    le.NOW: 'what does {} hold now ?', le.BEFORE: 'what did {} hold before ?'}
WORDS = sorted({w for text in SENTENCES.values() for w in text.split()} - {
    '{}'}) + ['entity', 'none', *(f'{kind}{i}' for kind, n in (
        ('a', SIDE), ('n', SIDE), ('v', le.VALUES + 1)) for i in range(n))]
_IDS = {word: i for i, word in enumerate(WORDS)}
_MLP = c.SwiGLUConfig(2 * WIDTH)
_HEADS = dict(heads=4, key=32, value=32)
_KDA, _FULL = c.KDAConfig(**_HEADS), c.AttentionConfig(kv_heads=4, **_HEADS)
FAMILIES = {
    'GDN': (c.GatedDeltaNetConfig(value_heads=4, **_HEADS),) * 2,
    'KDA': (_KDA, _KDA),
    'GDN-2': (c.GatedDeltaNet2Config(value_heads=4, **_HEADS),) * 2,
    'Mamba-2': (c.Mamba2Config(**_HEADS),) * 2,
    'softmax': (_FULL, _FULL),
    'hybrid': (_KDA, _FULL)}


def encode(text):
  """Tokens of a text, [LENGTH] int32, -1 behind the last."""
  found = [_IDS[w] for w in text.split()]
  return np.pad(np.array(found, np.int32), (0, LENGTH - len(found)),
                constant_values=-1)


def entity(number):
  """The name of an entity, 0 to ENTITIES - 1."""
  return f'entity a{number // SIDE} n{number % SIDE}'


@functools.cache
def table():
  """Tokens of all sentences, [8, ENTITIES, 65, LENGTH], and of all names,
  [ENTITIES, LENGTH]."""
  out = np.zeros((8, ENTITIES, le.VALUES + 1, LENGTH), np.int32)
  for op, text in SENTENCES.items():
    for n in range(ENTITIES):
      if text.count('{}') == 1:
        out[op, n] = encode(text.format(entity(n)))
        continue
      for v in range(le.VALUES + 1):
        out[op, n, v] = encode(text.format(entity(n), f'v{v}'))
  return out, np.stack([encode(entity(n)) for n in range(ENTITIES)])


def entities(split):
  """Numbers of the entities of a split, 'train' or 'test'."""
  order = np.random.default_rng(0).permutation(ENTITIES)
  half = ENTITIES // 2
  return order[:half] if split == 'train' else order[half:]


def config(family):
  """Of a frozen model."""
  layers = tuple(c.LayerConfig(f'l{i}', m, _MLP)
                 for i, m in enumerate(FAMILIES[family]))
  return c.ModelConfig(vocab=len(WORDS), width=WIDTH, layers=layers, groups=(
      c.GroupConfig(tuple(x.name for x in layers)),))


def pretrained(family, seed, steps):
  """Parameters of a language model of the sentences, trained for so long."""
  model = lm.LanguageModel(config(family))
  params = model.init(jax.random.key(seed))
  optimizer = optax.chain(optax.clip_by_global_norm(1.), optax.adam(3e-3))
  text, mine = table()[0], entities('train')
  random = np.random.default_rng(seed)

  @jax.jit
  def update(params, moments, tokens):
    def loss(params):
      known = tokens[:, 1:] >= 0
      n = jnp.sum(tokens >= 0, axis=1, dtype=jnp.int32)
      logits, _, _ = lm.forward(
          model, params, model.init_state(tokens.shape[0], 0),
          jnp.maximum(tokens, 0), n)
      cost = optax.softmax_cross_entropy_with_integer_labels(
          logits[:, :-1], jnp.maximum(tokens[:, 1:], 0))
      return jnp.sum(jnp.where(known, cost, 0.)) / jnp.sum(known)
    cost, grads = jax.value_and_grad(loss)(params)
    change, moments = optimizer.update(grads, moments)
    return optax.apply_updates(params, change), moments, cost

  moments, cost = optimizer.init(params), None
  for _ in range(steps):
    op = random.integers(8, size=256)
    value = np.where(np.isin(op, (le.NOISE, le.SET, le.MENTION, le.REJECT)),
                     random.integers(le.VALUES, size=256), le.NONE)
    params, moments, cost = update(
        params, moments, text[op, random.choice(mine, 256), value])
  return params, float(cost)


def whitened(states, known, floor):
  """States that differ where those `known` hardly do.

  Means of hidden states have most in common: their cosines are near 1. Of the
  known ones each direction gets deviation 1.

  Args:
    states: [N, D].
    known: which of them are, [K] int or bool; K > D.
    floor: directions with a deviation below this share of the greatest are left
      out: there is more chance than meaning in them.

  Returns:
    [N, D or less] float32.
  """
  mine = states[known]
  mean = mine.mean(0, keepdims=True)
  square, ways = np.linalg.eigh(np.cov((mine - mean).T, dtype=np.float64))
  size = np.sqrt(np.maximum(square, 0))
  keep = size > floor * size[-1]
  return ((states - mean) @ (ways[:, keep] / size[None, keep])).astype('f4')


def states(family, params):
  """What a frozen model makes of all sentences and names.

  Returns:
    means of the hidden states behind each layer, side by side, of all
    sentences, [8, ENTITIES, 65, 2 WIDTH], and of those behind the last of all
    names, [ENTITIES, WIDTH]. Float32.
  """
  whole = config(family)

  def behind(count):
    layers = whole.layers[:count]
    model = lm.LanguageModel(dataclasses.replace(
        whole, layers=layers, groups=(c.GroupConfig(
            tuple(x.name for x in layers)),)))
    mine = params | {'group_0': {
        f'layer_{i}': params['group_0'][f'layer_{i}'] for i in range(count)}}

    @jax.jit
    def run(tokens):
      n = jnp.sum(tokens >= 0, axis=1, dtype=jnp.int32)
      x = mine['embed'][jnp.maximum(tokens, 0)]
      context = common.context(jnp.zeros_like(n), n, None, tokens.shape[1])
      x, *_ = groups.run(model.config, mine, x, model.init_state(
          tokens.shape[0], 0).layers, context)
      x = jnp.sum(jnp.where(context.valid[..., None], x, 0.), axis=1)
      return x / jnp.maximum(n, 1)[:, None]
    return run

  def all_of(tokens, runs):
    # Many operations have one sentence for all values.
    flat, back = np.unique(tokens.reshape(-1, LENGTH), axis=0,
                           return_inverse=True)
    out = np.concatenate([
        np.concatenate([run(flat[i:i + 4160]) for run in runs], axis=-1)
        for i in range(0, len(flat), 4160)])
    return out[back.reshape(-1)].reshape(*tokens.shape[:-1], -1)

  sentences, names = table()
  runs = [behind(count) for count in BEHIND]
  return all_of(sentences, runs), all_of(names, runs[-1:])
