import dataclasses
import importlib
import json
import pathlib

import pytest

from statejax import config as c
from statejax import state as st
from statejax.model import LanguageModel

FOLDER = pathlib.Path(__file__).parent.parent / 'configs'
NAMES = sorted(p.stem for p in FOLDER.glob('[a-z]*.py'))


def get(name='tiny_kda'):
  return importlib.import_module(f'configs.{name}').get_config()


def found(config, path):
  """The value at a path of field names and indices."""
  for key in path.split('.'):
    config = config[int(key)] if key.isdigit() else getattr(config, key)
  return config


@pytest.mark.parametrize('assignment, path, value', [
    ('model.width=64', 'model.width', 64),
    (' train.steps = 7 ', 'train.steps', 7),
    ('model.layers.full.mixer.heads=8', 'model.layers.1.mixer.heads', 8),
    ('model.layers.1.mixer.heads=8', 'model.layers.1.mixer.heads', 8),
    ('model.layers.full.mixer.window=16', 'model.layers.1.mixer.window', 16),
    ('model.layers.full.mixer.window=None', 'model.layers.1.mixer.window',
     None),
    ('model.layers.full.mixer.sink=True', 'model.layers.1.mixer.sink', True),
    ('model.groups.0.pattern.3=kda', 'model.groups.0.pattern',
     ('kda',) * 4),
    ("model.groups.0.pattern=('full', 'kda')", 'model.groups.0.pattern',
     ('full', 'kda')),
    ('model.dtype=bfloat16', 'model.dtype', 'bfloat16'),
    ('model.store_dtype=None', 'model.store_dtype', None),
    ('train.peak=1e-2', 'train.peak', 0.01),
    ('train.data=4', 'train.data', 4),
])
def test_override(assignment, path, value):
  config = c.override(get(), assignment)
  assert found(config, path) == value
  assert config != get() or found(get(), path) == value


@pytest.mark.parametrize('path, number', [
    ('train.peak', 1), ('model.layers.kda.mixer.lower_bound', -1),
    ('model.norm.eps', 1)])
def test_an_int_serves_as_float(path, number):
  value = found(c.override(get(), f'{path}={number}'), path.replace('kda', '0'))
  assert value == number and type(value) is float


@pytest.mark.parametrize('assignment, text', [
    ('model.width', r'expected path=value, e\.g\. model\.width=64'),
    ('model.widht=3', "model.widht: unknown key 'widht'; the keys here are "
                      ".*width.* Did you mean 'width'"),
    ('tarin.steps=3', "keys here are model, train, task.* mean 'train'"),
    ('model.layers.ful.norm=post', "keys here are kda, full.* mean 'full'"),
    ('model.layers.2.norm=post', 'keys here are kda, full'),
    ('model.groups.1.repeats=2', "unknown key '1'; the keys here are 0"),
    ('model.width.x=3', "model.width.x: 32 has no field 'x'"),
    ('model.width=3.0', r'model.width: expected int, got 3\.0 \(float\)'),
    ('model.width=True', r'expected int, got True \(bool\)'),
    ('train.peak=True', r'expected float, got True \(bool\)'),
    ('train.peak=high', r"expected float, got 'high' \(str\)"),
    ('model.tied=1', r'expected bool, got 1 \(int\)'),
    ('train.data=True', r'expected int \| None, got True'),
    ('model.layers.full.mixer.window=2.5', r'expected int \| None, got 2\.5'),
    ('model.dtype=16', r'expected str, got 16'),
    ("model.groups.0.pattern=('kda', 1)", r"got \('kda', 1\) \(tuple\)"),
    ('model.groups.0=kda', "expected GroupConfig, got 'kda'"),
    ('model.layers.kda.mixer=gdn', "expected KDAConfig, got 'gdn'"),
])
def test_refused_override(assignment, text):
  with pytest.raises(ValueError, match=text):
    c.override(get(), assignment)


@pytest.mark.parametrize('name', NAMES)
def test_every_config(name):
  config = get(name)
  data = json.loads(json.dumps(c.to_dict(config)))
  assert c.from_dict(data) == config
  assert hash(c.from_dict(data)) == hash(config)
  schema = LanguageModel(config.model).state_schema(rows=2, capacity=8)
  assert sum(st.nbytes(schema).values()) > 0
  assert set(config.model.names) == {k.name for k in config.model.layers}


def test_mixers_of_equal_fields_differ():
  window, full = c.AttentionConfig(window=4), c.AttentionConfig()
  kinds = [c.to_dict(m)['type'] for m in (window, full, c.KDAConfig())]
  assert kinds == ['AttentionConfig', 'AttentionConfig', 'KDAConfig']


@pytest.mark.parametrize('data, text', [
    ({'type': 'NormConfig', 'eps': 1e-6, 'scale': 2}, r"fields \['scale'\]"),
    ({'type': 'MambaConfig'}, "unknown type 'MambaConfig'"),
    ({'type': 'ast'}, "unknown type 'ast'"),
    ({'eps': 1e-6}, 'unknown type None'),
    ({'type': 'GroupConfig', 'repeats': 2}, r"missing fields \['pattern'\]"),
])
def test_refused_dict(data, text):
  with pytest.raises(ValueError, match=text):
    c.from_dict(data)


def test_unknown_layer():
  with pytest.raises(ValueError, match="layer 'x' is not among layers="):
    get().model.layer('x')


@pytest.mark.parametrize('make, text', [
    (lambda: c.AttentionConfig(window=2.5),
     'AttentionConfig.window: expected a whole number, got 2.5'),
    (lambda: c.BlockMaxConfig(k='3'),
     "BlockMaxConfig.k: expected a whole number, got '3'"),
    (lambda: c.KSAConfig(chunks=1.5), 'chunks: expected a whole number'),
    (lambda: c.NSAConfig(compress_block=32.0), 'expected a whole number'),
    (lambda: c.RopeConfig(fraction=-0.5), 'expected theta > 0 and 0 <= frac'),
    (lambda: c.RopeConfig(theta='1e4'), 'RopeConfig.theta: expected a number'),
    (lambda: c.LoZAConfig(mla=c.DSAConfig()),
     'LoZAConfig.mla: expected a MLAConfig'),
    (lambda: c.AttentionConfig(heads=True), 'a whole number, got True'),
])
def test_a_field_of_the_wrong_type(make, text):
  with pytest.raises(ValueError, match=text):
    make()


def test_defaults_never_change():
  """Digests of configs leave them out: a new meaning is a new field, which is
  added to the file."""
  path = pathlib.Path(__file__).parent / 'golden' / 'defaults.json'
  kinds = {n: k for n, k in vars(c).items() if dataclasses.is_dataclass(k)}
  assert json.loads(path.read_text()) == {
      name: {f.name: c.to_dict(f.default) for f in dataclasses.fields(kind)
             if f.default is not dataclasses.MISSING}
      for name, kind in kinds.items()}


@dataclasses.dataclass(frozen=True)
class Later(c.GroupConfig):
  """A group with a field that came later, in a module of its own."""

  more: int = 0


def test_a_field_that_came_later():
  before, now = c.GroupConfig(('kda',), 2), Later(('kda',), 2)
  saved = {**c.to_dict(before), 'type': 'Later'}
  assert c.renewed([saved], (now,)) == [c.to_dict(now)] != [saved]
  assert c.essence(now) == {**c.essence(before), 'type': 'Later'}
  other = dataclasses.replace(now, more=1)
  assert c.essence(other) == {**c.essence(now), 'more': 1}
  with pytest.raises(ValueError, match="unknown type 'Later'"):
    c.renewed(saved, before)
