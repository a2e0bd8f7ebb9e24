"""Every seed is read, and what fuzzing has found stays found.

The long runs are `python -m experiments.fuzz_artifacts`.
"""

import dataclasses
import json
import random
import time

import pytest

from experiments import fuzz_mutate, fuzz_seeds
from experiments import fuzz_targets as targets
from statejax.artifact import canonical, manifest, tree

SIGN = {name for name, target in targets.TARGETS.items() if target.sign}


@pytest.fixture(autouse=True)
def watched():
  with targets.watched():
    yield


def corpus(name, kind):
  if name in SIGN:
    pytest.importorskip('cryptography', reason='the extra [sign] is not there')
  return targets.corpus(name, kind)


@pytest.mark.parametrize('name', targets.TARGETS)
def test_corpus(name):
  seeds = corpus(name, 'seed')
  assert seeds
  for file, data in seeds.items():
    outcome, fault = targets.execute(targets.TARGETS[name], data,
                                     seeds.values())
    # Documents of another kind than the one asked for are refused.
    assert not fault and (outcome == 'accepted' or name == 'document'), (
        file, outcome, fault)
  for file, data in corpus(name, 'found').items():
    assert targets.execute(targets.TARGETS[name], data)[1] == '', file


def test_seeds_are_what_their_script_makes():
  for name, value in (('small', fuzz_seeds.small()),
                      ('full', fuzz_seeds.full())):
    data = targets.corpus('manifest', 'seed')[f'seed_{name}']
    assert data == manifest.dumps(value)


@pytest.mark.parametrize('name, parse, fault', [
    # A parser with one check less each.
    ('canonical', json.loads, 'accepted what it does not write itself'),
    ('tokens', lambda data: list(data)[::4], 'accepted what'),
    ('manifest', lambda data: json.loads(data)['state'] and json.loads(data),
     'KeyError'),
    ('header', lambda data: ('a', data.index(b'0')), 'ValueError'),
    ('crl', lambda data: int(canonical.loads(data)['entries'][7]['value']),
     'IndexError')])
def test_it_finds(name, parse, fault):
  broken = dataclasses.replace(targets.TARGETS[name], parse=parse)
  mutator = fuzz_mutate.Mutator(random.Random(0), 4096)
  seeds = list(targets.corpus(name, 'seed').values())
  for _ in range(2000):
    data = getattr(mutator, broken.change)(
        mutator.of(seeds), mutator.of(seeds))
    if targets.execute(broken, data, seeds)[1].startswith(fault):
      return
  raise AssertionError(f'{fault}: not found')


def test_it_finds_what_hangs_or_takes_all_memory(monkeypatch):
  monkeypatch.setattr(targets, 'SECONDS', 0.1)
  def hang(data):
    while True:
      time.sleep(0) if data == b'never' else sum(range(1000))
  def hoard(data):
    raise MemoryError('much')
  for parse, fault in ((hang, 'too slow'), (hoard, 'MemoryError: much')):
    slow = targets.Target(parse, canonical.dumps, ())
    assert targets.execute(slow, b'x')[1] == fault


def spent(data):
  began = time.process_time()
  with pytest.raises(ValueError):
    canonical.loads(data)
  return time.process_time() - began


def test_time_grows_with_the_length_alone():
  # Each took seconds: a string without an end, in which every quote was tried
  # as the beginning of another one; names of which the last stands twice.
  assert spent(b'"' + b'\\"' * 16_000) < 1
  names = b''.join(b'"%06x":0,' % i for i in range(16_000))
  assert spent(b'{' + names + b'"003e7f":0}') < 1


def test_tiles_of_shapes_that_no_machine_has():
  # 2048 leaves of 2^320 elements each, halved until they fit.
  about, shape = fuzz_seeds.full(), [2 ** 40] * 8
  about['state']['leaves'] = [
      {'path': f'a{i:04}', 'dtype': 'int8', 'shape': shape,
       'tile': list(tree.tile_shape(shape, 1)), 'kind': 'fixed', 'role': 'kv'}
      for i in range(2048)]
  began = time.process_time()
  with pytest.raises(ValueError, match='logical_bytes'):
    manifest.check(about)
  assert time.process_time() - began < 1


def test_keys_that_are_none():
  pytest.importorskip('cryptography', reason='the extra [sign] is not there')
  from cryptography.hazmat.primitives import serialization as s
  from cryptography.hazmat.primitives.asymmetric import ec, ed25519

  from statejax.artifact import keys
  secret = s.BestAvailableEncryption(b'x')
  pems = [key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, how)
          for key, how in (
              (ec.generate_private_key(ec.SECP256R1()), secret),
              (ed25519.Ed25519PrivateKey.generate(), s.NoEncryption()),
              (ec.generate_private_key(ec.SECP256K1()), s.NoEncryption()))]
  for pem in (*pems, b'', pems[0].replace(b'EI', b'EJ')):
    with pytest.raises(ValueError, match='key: expected'):
      keys.public(pem)
  with pytest.raises(ValueError, match='key: expected'):
    keys.encrypt(keys.public(keys.generate()).replace('MFkw', 'MFkx'), b'x')
