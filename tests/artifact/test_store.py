import asyncio
import dataclasses
import logging
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from statejax.artifact import commit, digest, store, tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
  matrix: jax.Array
  conv: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  delta: Delta
  slots: dict
  length: jax.Array
  absent: None = None


def make_tree():
  state = State(
      Delta(jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4) / 7, None),
      {'k': jnp.linspace(-1, 1, 16, dtype=jnp.bfloat16).reshape(8, 2),
       'used': jnp.array([True, False])},
      jnp.array([3, 4], jnp.int32))
  return {'state': state, 'witness': jnp.arange(8, dtype=jnp.uint32) << 29,
          'none': None, 'key': jax.random.key(5), 'step': np.int32(7),
          'host': np.arange(6, dtype=np.int8), 'list': [jnp.float32(1.5)]}


def abstract(tree):
  return jax.eval_shape(lambda: tree)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  path = tmp_path_factory.mktemp('store') / 'one'
  with commit.publish(path) as folder:
    assert store.write_tree(folder, make_tree()) == digest.tree_digest(
        make_tree())
  return path


def assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  assert digest.leaf_digests(got) == digest.leaf_digests(expected)


def test_roundtrip(published):
  commit.check(published)
  loaded = store.read_tree(published, abstract(make_tree()))
  assert_same(loaded, make_tree())
  assert loaded['state'].slots['k'].dtype == jnp.bfloat16
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
  # A concrete tree is a target too: numpy stays numpy.
  assert_same(store.read_tree(published, make_tree()), make_tree())
  assert type(store.read_tree(published, make_tree())['host']) is np.ndarray


def test_loads_onto_the_given_sharding(published):
  mesh = jax.make_mesh((2, 4), ('x', 'y'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  target = abstract(make_tree())
  sharding = NamedSharding(mesh, P('y', 'x'))
  target['state'].slots['k'] = jax.ShapeDtypeStruct(
      (8, 2), jnp.bfloat16, sharding=sharding)
  loaded = store.read_tree(published, target)
  assert loaded['state'].slots['k'].sharding == sharding
  assert_same(loaded, make_tree())


def test_saves_sharded_and_loads_on_one_device(tmp_path):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  value = jnp.arange(64, dtype=jnp.uint32).reshape(16, 4)
  tree = {'a': jax.device_put(value, NamedSharding(mesh, P('x')))}
  store.write_tree(tmp_path / 'one', tree)
  loaded = store.read_tree(
      tmp_path / 'one', {'a': jax.ShapeDtypeStruct((16, 4), jnp.uint32)})
  assert loaded['a'].devices() == {jax.devices()[0]}
  assert_same(loaded, {'a': value})


def test_payload_into_memory(tmp_path):
  """Every dtype of a manifest that can be stored, also into parts of arrays."""
  named = {f'a/{name}': jnp.arange(6).reshape(2, 3).astype(name)
           for name in tree.ITEM_BYTES if ':' not in name and name != 'uint4'}
  store.save_payload(tmp_path / 'one', named)
  opened = store.open_payload(tmp_path / 'one')
  assert store.describe_payload(opened) == {
      f'a.{x.dtype.name}': (x.dtype.name, (2, 3)) for x in named.values()}
  wide = {path: np.zeros((3, 5), x.dtype) for path, x in named.items()}
  store.fill(opened, {path: x[1:, :3] for path, x in wide.items()})
  for path, x in wide.items():
    assert x[1:, :3].tobytes() == np.asarray(named[path]).tobytes(), path
    assert not x[0].any() and not x[:, 3:].any()
  with pytest.raises(ValueError, match='no arrays'):
    store.open_payload(tmp_path / 'two')


def change(**changes):
  target = abstract(make_tree())
  state = dataclasses.replace(target['state'], **changes.pop('state', {}))
  return {**target, 'state': state, **changes}


@pytest.mark.parametrize('target, text', [
    (lambda s: change(state={'length': s((2,), jnp.float32)}),
     r'state/length: expected float32 \[2\], got int32 \[2\]'),
    (lambda s: change(witness=s((8,), jnp.int32)),
     r'witness: expected int32 \[8\], got uint32 \[8\]'),
    (lambda s: change(witness=s((4, 2), jnp.uint32)),
     r'witness: expected uint32 \[4, 2\], got uint32 \[8\]'),
    (lambda s: change(witness=None),
     r'witness: expected nothing, got uint32 \[8\]'),
    (lambda s: change(none=s((), jnp.int32)),
     r'none: expected int32 \[\], got nothing'),
    (lambda s: change(key=abstract(jax.random.key(0, impl='rbg'))),
     r'key: expected key:rbg \[4\], got key:threefry2x32 \[2\]'),
])
def test_other_targets_are_refused(published, target, text):
  with pytest.raises(ValueError, match=text):
    store.read_tree(published, target(jax.ShapeDtypeStruct))


@pytest.mark.parametrize('tree, text', [
    ({}, 'at least one array'),
    ({'a': jnp.zeros((0, 2))}, 'a: expected a size above zero'),
    ({'a.b': jnp.zeros(2), 'a': {'b': jnp.zeros(3)}}, 'a name of its own'),
    ({'a': 1.5}, 'expected an array of numbers'),
])
def test_unstorable_trees_are_refused(tmp_path, tree, text):
  with pytest.raises(ValueError, match=text):
    store.write_tree(tmp_path / 'one', tree)
  assert not os.listdir(tmp_path)


def test_never_overwrites(published):
  with pytest.raises(ValueError, match='nothing stored is overwritten'):
    store.write_tree(published, {'a': jnp.zeros(1)})
  commit.check(published)


def payload_files(path):
  return [file for file in sorted(path.rglob('*')) if file.is_file()]


def test_flipped_or_truncated_files_are_refused(published):
  for file in payload_files(published):
    data = file.read_bytes()
    if not data:
      continue
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    # A damaged listing may accuse any file.
    name = '.' if file.name == commit.LISTING else file.name
    for damaged in (flipped, data[:-1], b''):
      file.write_bytes(damaged)
      with pytest.raises(ValueError, match=name):
        commit.check(published)
    file.write_bytes(data)
  commit.check(published)


def test_damage_that_orbax_overlooks_is_refused(tmp_path):
  """Without `commit.check`, a load is right or refused, never wrong."""
  tree = {'a': jnp.arange(4096, dtype=jnp.float32)}
  store.write_tree(tmp_path / 'one', tree)
  needle = np.float32(2047).tobytes() + np.float32(2048).tobytes()
  (file,) = (f for f in payload_files(tmp_path) if needle in f.read_bytes())
  data = bytearray(file.read_bytes())
  data[data.index(needle)] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match='leaf a: expected digest|readable'):
    store.read_tree(tmp_path / 'one', tree)


def test_unreadable_payload_and_table(tmp_path):
  tree = {'a': jnp.ones(3)}
  store.write_tree(tmp_path / 'one', tree)
  (tmp_path / 'one/state/state/manifest.ocdbt').unlink()
  with pytest.raises(ValueError, match='expected a readable payload'):
    store.read_tree(tmp_path / 'one', tree)
  (tmp_path / 'one/leaves.json').write_text('{"a": 1}')
  with pytest.raises(ValueError, match='got something else'):
    store.read_tree(tmp_path / 'one', tree)
  with pytest.raises(ValueError, match='which write_tree has filled'):
    store.read_tree(tmp_path / 'two', tree)


# What Orbax leaves behind of a save that has failed.
@pytest.mark.filterwarnings(
    'ignore::RuntimeWarning', 'ignore::ResourceWarning',
    'ignore::pytest.PytestUnraisableExceptionWarning',
    'ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_folder_cannot_be_listed(tmp_path, monkeypatch):
  """Whichever it is, the save fails or all of it is there."""
  named = {'a': np.arange(6.), 'b': np.ones((2, 3), np.float32)}
  scandir, number, tried, told, wrong = os.scandir, 0, 0, 0, []
  while tried == number:
    calls = iter(range(99))

    def once(*args, calls=calls, number=number):
      if next(calls) == number:
        raise OSError(5, 'Input/output error')
      return scandir(*args)

    monkeypatch.setattr(os, 'scandir', once)
    try:
      store.save_payload(tmp_path / str(number), named)
    except Exception:  # of any type, where it is Orbax that tells
      told += 1
    else:
      found = {name: np.zeros_like(x) for name, x in named.items()}
      try:
        store.fill(store.open_payload(tmp_path / str(number)), found)
        assert_same(found, named)
      except Exception as error:  # of any type, where it is Orbax that tells
        wrong.append((number, error))
    tried, number = tried + (next(calls) > number), number + 1
  print(f'a folder that cannot be listed: tried {tried}, told {told}, '
        f'accepted wrongly {len(wrong)}')
  assert tried and not wrong, wrong


def test_threads_and_running_loops(tmp_path):
  tree = {'a': jnp.arange(9), 'b': jnp.ones((2, 2))}
  failed = []

  def save(name):
    try:
      for i in range(3):
        store.write_tree(tmp_path / f'{name}{i}', tree)
        assert_same(store.read_tree(tmp_path / f'{name}{i}', tree), tree)
    except BaseException as error:
      failed.append(error)

  threads = [threading.Thread(target=save, args=(n,)) for n in 'abc']
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()

  async def notebook():  # a notebook's cell runs inside an event loop
    save('d')

  asyncio.run(notebook())
  assert not failed


def test_quiet(tmp_path, caplog, capfd):
  logger = logging.getLogger('absl')
  caplog.set_level(logging.INFO, 'absl')
  tree = {'a': jnp.arange(9)}
  store.write_tree(tmp_path / 'one', tree)
  store.read_tree(tmp_path / 'one', tree)
  logger.info('ours')
  assert caplog.messages == ['ours']
  out, err = capfd.readouterr()
  assert not out and 'orbax' not in err
