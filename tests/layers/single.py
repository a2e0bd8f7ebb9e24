"""One mixer alone: parameters, an empty state, and steps over pieces."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.layers import common
from statejax.layers.block import MIXERS


def draw(config, width, seed=0):
  """Parameters of a mixer, and inputs [2, 30, width]."""
  whole = lm.LanguageModel(c.ModelConfig(
      1, width, (c.LayerConfig('m', config),), (c.GroupConfig(('m',)),)))
  params = whole.init(jax.random.key(seed))['group_0']['layer_0']['mixer']
  return (jax.tree.map(lambda p: p[0], params),
          jax.random.normal(jax.random.key(seed + 1), (2, 30, width)))


def empty(config, rows, capacity, dtype='float32'):
  """A state whose stores are of one layer."""
  specs = MIXERS[type(config)].state(config, rows, capacity, dtype)
  held = st.allocate(st.describe(specs))
  return dataclasses.replace(held, **{
      f.name: getattr(held, f.name)[None] for f in dataclasses.fields(held)
      if f.metadata['kind'] == 'growing'
      and getattr(held, f.name) is not None})


@functools.partial(jax.jit, static_argnums=0)
def step(config, params, x, state, length, document=None, lent=None,
         hints=None):
  """Returns y, the new state, and what is lent and lost."""
  n_valid = jnp.full(length.shape, x.shape[1], jnp.int32)
  context = common.context(length, n_valid, document, x.shape[1])
  context = dataclasses.replace(context, lent=lent or {},
                                hints=hints or {})
  stores = [f.name for f in dataclasses.fields(state)
            if f.metadata['kind'] == 'growing' and getattr(state, f.name)
            is not None]
  views = dataclasses.replace(state, **{
      n: st.Store(getattr(state, n), jnp.int32(0)) for n in stores})
  (y, views), said = MIXERS[type(config)](config).apply(
      {'params': params}, x, views, context, mutable=('lent', 'losses'))
  return y, dataclasses.replace(views, **{
      n: getattr(views, n).data for n in stores}), said


def run(config, params, x, cuts=(), capacity=None):
  """Outputs of pieces of x, from an empty state, and the last state."""
  capacity = x.shape[1] if capacity is None else capacity
  state, outputs, done = empty(config, x.shape[0], capacity), [], 0
  for piece in np.split(x, cuts, axis=1):
    y, state, _ = step(config, params, piece, state,
                       jnp.full((x.shape[0],), done, jnp.int32))
    outputs.append(y)
    done += piece.shape[1]
  return np.concatenate(outputs, axis=1), state
