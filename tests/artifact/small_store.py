"""A small model with every kind of leaf, and a store to mint into.

`state` is made of random numbers under the right witness, as most tests need no
model to have run; `begun` has run.
"""

import collections
import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from statejax import config as c
from statejax import generate as gen
from statejax import model as lm
from statejax import state as st
from statejax.artifact import digest, identity, load, mint, names, objects
from statejax.artifact.compat import Ask

MLP = c.SwiGLUConfig(16)
LAYERS = (
    c.LayerConfig('kda', c.KDAConfig(heads=2, key=4, value=4, rank=4), MLP),
    c.LayerConfig('ring', c.AttentionConfig(
        heads=2, kv_heads=1, key=8, value=8, window=3), MLP),
    c.LayerConfig('full', c.AttentionConfig(
        heads=2, kv_heads=1, key=8, value=8), MLP))
CONFIG = c.ModelConfig(
    vocab=32, width=16, layers=LAYERS, store_dtype='bfloat16',
    groups=(c.GroupConfig(('kda', 'ring', 'full')),))
MODEL = lm.LanguageModel(CONFIG)
PROMPT = np.random.default_rng(0).integers(1, 32, (1, 7))
CAPACITY = 24
TERMS = mint.Terms('alice', 'acme')


@functools.cache
def params():
  return MODEL.init(jax.random.key(1))


def host(model=MODEL, **changes):
  known = dict(config=model.config, schema=model.state_schema,
               params='0' * 64, tokenizer={'bytes': b'1'},
               program=identity.Program(capacity=CAPACITY))
  return identity.Host(**(known | changes))


SAMPLING = gen.Sampling(temperature=0.8)


def go_on(state, steps):
  tokens, state = gen.generate(MODEL, params(), state, steps,
                               sampling=SAMPLING)
  return tokens[0].tolist(), state


@functools.cache
def begun():
  """Seven prompt tokens and four generated ones, one pending: tokens, state.
  """
  fresh = MODEL.init_state(1, CAPACITY, key=jax.random.key(3))
  ready = gen.prefill(MODEL, params(), fresh, PROMPT, sampling=SAMPLING)
  more, state = go_on(ready, 4)
  return (*PROMPT[0].tolist(), *more), state


def begun_host():
  return host(params=digest.tree_digest(params()))


TOKENS = tuple(np.random.default_rng(1).integers(0, 32, 11).tolist())


@functools.cache
def state():
  rng = np.random.default_rng(2)
  def one(path, axes, kind, leaf):
    return jnp.asarray(rng.standard_normal(leaf.shape) if path.startswith(
        'layers/') else rng.integers(0, 9, leaf.shape), leaf.dtype)
  mark = np.frombuffer(bytes.fromhex(names.witness(TOKENS)), '<u4')
  return dataclasses.replace(
      st.map_leaves(one, MODEL.state_schema(1, CAPACITY)),
      length=jnp.full(1, len(TOKENS), jnp.int32),
      pending=jnp.full(1, 5, jnp.int32),
      witness=jnp.asarray(mark, jnp.uint32)[None])


class Clock:
  """Seconds that pass when a test says so."""

  now = 1_700_000_000

  def __call__(self):
    return self.now


def store(path, **options):
  return objects.Store(path / 'store', objects.Secrets(path / 'secrets'),
                       clock=Clock(), **options)


def transcript(keep=True, **changes):
  return mint.Transcript(TOKENS, keep=keep, **changes)


# The slots of a server, all of them taken.


@functools.cache
def pool():
  return st.fork(state(), 0, 3)


def bits(slots):
  """Digest of all of a state's memory, also of what no row uses."""
  mark = hashlib.sha256()
  for path, x, _, _ in st.leaves(slots):
    x = np.asarray(x)
    mark.update(f'{path} {x.dtype} {x.shape} '.encode() + x.tobytes())
  return mark.hexdigest()


def facts(shop):
  """What a store holds, but for its logs."""
  catalog = shop.catalog
  return (catalog.objects(), catalog.refs(), catalog.leased(), sorted(
      path.name for path in (shop.path / 'tmp').iterdir()))


# How often loads were refused with a code; how often something else changed.
refusals: collections.Counter = collections.Counter()


def end(shop, key, who, host=None, ask=None, **options):
  """Loads as a server does: what it gets goes into a slot.

  After a refusal every slot and the store must be what they were.
  """
  before, held = bits(pool()), facts(shop)
  found = load.load(shop, key, who, host or globals()['host'](), ask or Ask(),
                    **options)
  if found.decision.outcome == 'refused':
    slots = pool() if found.state is None else st.put(pool(), 1, found.state)
    changed = bits(slots) != before or found.stands or found.host
    refusals[found.decision.code] += 1
    refusals['pool changed'] += bool(changed)
    refusals['store changed'] += facts(shop) != held
    assert not changed and facts(shop) == held, found.decision
  return found
