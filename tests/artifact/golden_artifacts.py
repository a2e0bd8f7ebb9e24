"""Artifacts of each release, for good: models, states, and the files' maker.

  PYTHONPATH=. python tests/artifact/golden_artifacts.py

writes those of this version into tests/golden/artifacts which are not there
yet; none is ever made anew. Their states are random numbers under a right
witness, of models that need never run.
"""

import dataclasses
import json
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np

from statejax import __version__
from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.artifact import identity, manifest, mint, names, objects, portable
from statejax.artifact import layout as files
from statejax.artifact.access import Principal

FOLDER = pathlib.Path(__file__).parent.parent / 'golden' / 'artifacts'
EXPECTED = FOLDER / 'expected.json'
# Of every store that shall know them by its own code; it protects nothing.
SECRET = bytes(range(32))
ALICE, CAPACITY, LENGTH = Principal('alice', 'acme'), 12, 11
MLP = c.SwiGLUConfig(8)
KDA = c.LayerConfig('kda', c.KDAConfig(heads=2, key=4, value=4, rank=4), MLP)
FULL = c.LayerConfig('full', c.AttentionConfig(
    heads=2, kv_heads=1, key=8, value=8), MLP)
SLOTS = c.LayerConfig('slots', c.SlotsConfig(
    c.SlotRules(slots=4, key=6, value=5, span=3, key_span=2, aliases=2),
    segment=4, events=2, statement=6), MLP)


def _model(*layers):
  return lm.LanguageModel(c.ModelConfig(
      vocab=32, width=8, layers=layers, store_dtype='bfloat16',
      groups=(c.GroupConfig(tuple(layer.name for layer in layers)),)))


MODELS = {'hybrid': _model(KDA, FULL), 'slots': _model(KDA, SLOTS)}
TOKENS = tuple(3 * i % 32 for i in range(LENGTH))


def host(name: str) -> identity.Host:
  """What mints and loads the artifacts of a model."""
  model = MODELS[name]
  return identity.Host(
      model.config, model.state_schema, '1' * 64, tokenizer={'bytes': b'1'},
      program=identity.Program(capacity=CAPACITY), special={'end': 0})


def store(folder) -> objects.Store:
  """A new store that knows artifacts of `SECRET` as its own."""
  folder = pathlib.Path(folder)
  shop = objects.Store(folder / 'store', objects.Secrets(folder / 'secrets'),
                       clock=lambda: 1_700_000_000)
  shop.secrets.put(f'store-{shop.id}', SECRET)
  return shop


def state(name: str):
  """A state after `TOKENS`, of random numbers."""
  rng = np.random.default_rng(0)
  def one(path, axes, kind, leaf):
    del axes, kind
    return jnp.asarray(rng.standard_normal(leaf.shape) if path.startswith(
        'layers/') and leaf.dtype.kind not in 'iu' else rng.integers(
            0, 3, leaf.shape), leaf.dtype)
  mark = np.frombuffer(bytes.fromhex(names.witness(TOKENS)), '<u4')
  schema = MODELS[name].state_schema(1, CAPACITY, logits=name == 'slots')
  return dataclasses.replace(
      st.map_leaves(one, schema), length=jnp.full(1, LENGTH, jnp.int32),
      pending=jnp.full(1, 5, jnp.int32),
      witness=jnp.asarray(mark, jnp.uint32)[None])


def minted(shop, name: str, found) -> str:
  """Mints a state with its transcript; returns the id."""
  return mint.mint(shop, found, 0, host(name), mint.Terms(
      'alice', 'acme', acl=(('bob', ('resume',)),), workflow='golden'),
                   transcript=mint.Transcript(TOKENS, keep=True)).id


def main():
  """Writes what is missing, and what shall be found in it."""
  FOLDER.mkdir(parents=True, exist_ok=True)
  expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
  for name in MODELS:
    file = FOLDER / f'{__version__}_{name}.tar'
    if file.exists():
      continue
    with tempfile.TemporaryDirectory() as folder:
      shop = store(folder)
      id = minted(shop, name, state(name))
      portable.pack(shop.place(id), file)
      about = manifest.parse(files.read(shop.place(id), manifest.NAME))
      plain = manifest.parse_plain(
          files.read(shop.place(id), manifest.PLAIN), about)
    expected[file.name] = {'id': id, 'model': name, 'leaves': plain['leaves']}
    print(file.name, file.stat().st_size, 'bytes', id)
  EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + '\n')


if __name__ == '__main__':
  main()
