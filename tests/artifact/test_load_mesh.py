"""A state is restored onto a mesh: the same leaves, and steps that go on alike.

    pytest -m slow tests/artifact/test_load_mesh.py

Leaves are equal to the bit. Logits of what follows need not be: over `tensor`
the heads' outputs are added in another order, and more rows are another
program. They may differ by `BOUND` of the largest logit: what the laws allow a
tiny model in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store as small
import test_every_mixer as every
from jax.sharding import AxisType

from statejax import config as c
from statejax import model as lm
from statejax import sharding
from statejax import state as st
from statejax.artifact import identity, load, mint, names
from statejax.artifact.access import Principal

ALICE = Principal('alice', 'acme')
BOUND = 1e-5
# data, tensor
MESHES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 2),
          (4, 2), (2, 4)]
ROOM = every.CAPACITY + 16  # another capacity than it was minted with
TOKENS, STEPS = every.tokens_of(13), 3


@functools.cache
def model():
  """Delta and attention, whose heads eight devices divide."""
  layers = (
      c.LayerConfig('kda', c.KDAConfig(heads=8, key=4, value=4, rank=4),
                    c.SwiGLUConfig(16)),
      c.LayerConfig('full', c.AttentionConfig(
          heads=8, kv_heads=8, key=4, value=4), c.SwiGLUConfig(16)))
  return lm.LanguageModel(c.ModelConfig(
      vocab=32, width=16, layers=layers,
      groups=(c.GroupConfig(('kda', 'full')),)))


@functools.cache
def begun():
  """Parameters and a state after 13 tokens, of random numbers."""
  rng = np.random.default_rng(1)
  draw = lambda shape: jnp.asarray(rng.standard_normal(shape) / 4, jnp.float32)
  state = st.map_leaves(
      lambda path, axes, kind, leaf: draw(leaf.shape) if path.startswith(
          'layers/') else jnp.zeros(leaf.shape, leaf.dtype),
      model().state_schema(1, every.CAPACITY))
  mark = np.frombuffer(bytes.fromhex(names.witness(TOKENS)), '<u4')
  return every.drawn(model()), dataclasses.replace(
      state, length=jnp.full(1, len(TOKENS), jnp.int32),
      pending=jnp.full(1, -1, jnp.int32), witness=jnp.asarray(mark)[None])


def following(model, params, state, row):
  """Logits [STEPS, vocab] of a row's next steps; the others stand still."""
  found, valid = [], np.zeros(st.rows(state), np.int32)
  valid[row] = 1
  for token in every.tokens_of(STEPS, 1):
    tokens = np.full((st.rows(state), 1), token, np.int32)
    logits, state = model.step(params, state, tokens, valid, keep='last')
    found.append(np.asarray(logits)[row].reshape(-1))
  return np.stack(found)


def restored(shop, id, model, state, mesh):
  """Restores onto a mesh; returns how it lies there, and its other leaves."""
  found = load.load(shop, id, ALICE, every.host_of(model), capacity=ROOM,
                    mesh=mesh)
  assert str(found.decision) == 'resumed(13)', found.decision.detail
  assert found.decision.promise == 'tolerance'
  strides, other = dict(state.strides), []
  def live(path, axes, x):
    slots = slice(0, 13 // strides.get(path, 1))
    return np.asarray(x)[tuple(
        slots if a == 'capacity' else slice(None) for a in axes)].tobytes()
  def one(path, axes, kind, x, y, where):
    if live(path, axes, x) != live(path, axes, y):
      other.append(path)
    assert x.sharding == where, path
    shape = [n // mesh.shape['tensor'] if sharding.RULES[a] == 'tensor' else n
             for a, n in zip(axes, x.shape)]
    assert [*x.addressable_shards[0].data.shape] == shape, path
    return x
  row = st.map_leaves(one, found.state, state, sharding.row_shardings(
      model.state_schema(1, ROOM), mesh))
  return row, other


def difference(model, params, state, row, mesh):
  """Of the logits over the largest, from a slot of a state that is spread."""
  want = following(model, params, state, 0)
  rows = 2 * mesh.shape['data']
  pool = jax.device_put(model.init_state(rows, ROOM), sharding.state_shardings(
      model.state_schema(rows, ROOM), mesh))
  pool = jax.jit(st.put, static_argnums=1)(pool, rows - 2, row)
  spread = jax.device_put(params, sharding.shardings(
      model.axes(), params, mesh))
  got = following(model, spread, pool, rows - 2)
  return np.abs(got - want).max() / np.abs(want).max()


def test_leaves_are_the_same(tmp_path):
  shop, tried, other = small.store(tmp_path), 0, []
  id = mint.mint(shop, begun()[1], 0, every.host_of(model()), small.TERMS).id
  for data, tensor in MESHES:
    mesh = sharding.make_mesh(data=data, tensor=tensor)
    other += restored(shop, id, model(), begun()[1], mesh)[1]
    tried += 1
  print(f'restored onto a mesh: tried {tried}, other leaves {len(other)}')
  assert not other


@pytest.mark.parametrize('data, tensor', [
    pytest.param(*mesh, marks=() if mesh == (2, 4) else pytest.mark.slow)
    for mesh in MESHES])
def test_goes_on_alike(tmp_path, data, tensor):
  params, state = begun()
  shop = small.store(tmp_path)
  id = mint.mint(shop, state, 0, every.host_of(model()), small.TERMS).id
  mesh = sharding.make_mesh(data=data, tensor=tensor)
  most = difference(model(), params, state, restored(
      shop, id, model(), state, mesh)[0], mesh)
  print(f'data={data}, tensor={tensor}: tried {STEPS}, logits differ by '
        f'{most:.1e} of the largest, allowed {BOUND:.0e}')
  assert most <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize('name', every.MIXERS)
def test_every_mixer(name, tmp_path):
  one = every.model_of(every.MIXERS[name])
  params = one.init(jax.random.key(0))
  state = every.absorb(one, params, one.init_state(1, every.CAPACITY), TOKENS)
  shop = small.store(tmp_path)
  id = mint.mint(shop, state, 0, every.host_of(one), small.TERMS).id
  tried, beyond, refused = 0, 0, 0
  for data, tensor in ((2, 1), (8, 1), (1, 2), (4, 2), (1, 4)):
    mesh = sharding.make_mesh(data=data, tensor=tensor)
    try:
      row, other = restored(shop, id, one, state, mesh)
      assert not other
      beyond += difference(one, params, state, row, mesh) > BOUND
      tried += 1
    except ValueError as error:
      assert tensor > 1 and 'is not divisible by' in str(error)
      refused += 1
  print(f'{name}: tried {tried}, beyond {BOUND:.0e} {beyond}, do not divide '
        f'{refused}')
  assert tried >= 2 and not beyond
  jax.clear_caches()  # a process may map only so many programs


def test_promise_is_that_of_the_mesh(tmp_path):
  """Equal bits only on the mesh that the numerics speak of."""
  def host(mesh):
    return identity.Host(
        model().config, model().state_schema, '0' * 64,
        program=identity.Program(8, capacity=every.CAPACITY, mesh=mesh))
  shop, state = small.store(tmp_path), begun()[1]
  id = mint.mint(shop, state, 0, host('tensor=2'), small.TERMS).id
  for mine, mesh, promise in (
      ('tensor=2', dict(data=1, tensor=2), 'bit'),
      ('tensor=2', dict(data=2, tensor=1), 'tolerance'),
      ('data=2', dict(data=2, tensor=1), 'tolerance'),
      ('tensor=2', dict(data=2, tensor=2), 'tolerance')):
    decision = load.load(shop, id, ALICE, host(mine), mesh=(
        sharding.make_mesh(**mesh))).decision
    assert (decision.outcome, decision.promise) == ('resumed', promise)
    assert decision.warnings == (() if promise == 'bit' else ('W_NUMERICS',))


def test_meshes_that_do_not_fit(tmp_path):
  shop = small.store(tmp_path)
  for mesh, text in (
      (sharding.make_mesh(data=1, tensor=3), 'is not divisible by 3'),
      (jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,)),
       'expected the axes .* got .*make it with')):
    with pytest.raises(ValueError, match=text):
      load.load(shop, 'nothing', ALICE, every.host_of(model()), mesh=mesh)
  assert sharding.mesh_name(sharding.make_mesh(data=2, tensor=4)) == (
      'data=2,tensor=4')


class Elsewhere:
  """Looks like an array that is spread over processes."""

  is_fully_addressable = False

  def __init__(self, x):
    self.shape, self.dtype = x.shape, x.dtype


def test_a_state_of_several_processes_is_refused(tmp_path):
  shop = small.store(tmp_path)
  before = shop.catalog.head()
  for leaf in ('witness', 'length'):
    state = dataclasses.replace(small.state(), **{
        leaf: Elsewhere(getattr(small.state(), leaf))})
    with pytest.raises(ValueError, match=f'{leaf}: .* gather the row first'):
      mint.mint(shop, state, 0, small.host(), small.TERMS)
  assert shop.catalog.head() == before
