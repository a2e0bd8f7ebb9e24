import copy
import itertools
import json
import random
import string
import subprocess
import sys

import example
import hypothesis
import hypothesis.strategies as hs
import numpy as np
import pytest

from statejax.artifact import canonical, digest, manifest, names
from statejax.artifact.outcome import CODES, Refused
from statejax.ops import witness

# Canonical JSON.

TEXTS = hs.text(hs.characters(codec='ascii', min_codepoint=32,
                              max_codepoint=126))
VALUES = hs.recursive(
    hs.booleans() | hs.integers(-canonical.MAX_INT, canonical.MAX_INT) | TEXTS,
    lambda inner: hs.lists(inner, max_size=3) | hs.dictionaries(
        TEXTS, inner, max_size=3), max_leaves=6)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(VALUES)
def test_canonical_round_trip(value):
  data = canonical.dumps(value)
  if data.count(b'[') + data.count(b'{') <= canonical.MAX_DEPTH:
    assert canonical.loads(data) == value


@pytest.mark.parametrize('data, text', [
    (b'{"a":1.5}', 'no floats'), (b'{"a":NaN}', 'no floats'),
    (b'{"a":1e3}', 'no floats'), (b'{"a":null}', 'no null'),
    (b'{"a":1,"a":1}', "one field 'a'"), (b'{"b":1,"a":1}', 'canonical'),
    (b'{"a": 1}', 'canonical'), (b'{"a":-0}', 'canonical'),
    (b'{"a":"\\u0041"}', 'canonical'), (b'{"a":"\\/"}', 'canonical'),
    (b'{"a":"\\ud800"}', 'surrogates'), (b'{"a":9007199254740992}', '2\\^53-1'),
    (b'{"a":' + b'9' * 5000 + b'}', '2\\^53-1'), (b'{"a":01}', 'delimiter'),
    (b'{"a":"\xc3\xa9"}', 'printable ASCII'), (b'{"a":1}\n', 'printable ASCII'),
    (b'[' * 7 + b']' * 7, '6 levels'), (b'[' * 9999, '6 levels'),
    (b'', 'value'),
    (b'{"a":"' + b'x' * (1 << 20) + b'"}', 'at most 1048576 bytes'),
    (b'"\\"[[[[[[["x', 'Extra'), (b'{"a":tru}', 'value')])
def test_canonical_refuses(data, text):
  with pytest.raises(ValueError, match=text):
    canonical.loads(data)


# The manifest.


def test_round_trip_and_name():
  data = manifest.dumps(example.make())
  assert manifest.parse(data) == example.make()
  assert manifest.artifact_id(data).startswith('sj1-')
  assert json.loads(data) == example.make()


def paths(value, path=()):
  """Every place in a document: keys and indices."""
  if path:
    yield path
  items = value.items() if isinstance(value, dict) else (
      enumerate(value) if isinstance(value, list) else ())
  for key, item in items:
    yield from paths(item, (*path, key))


def changed(value, path, change):
  value = copy.deepcopy(value)
  here = value
  for key in path[:-1]:
    here = here[key]
  change(here, path[-1])
  return value


def put(new):
  def change(here, key):
    here[key] = new
  return change


def drop(here, key):
  del here[key]


def unknown(here, key):
  if isinstance(here[key], dict):
    here[key]['surplus'] = 1
  else:
    here[key] = [here[key]]


MUTATIONS = {'missing': drop, 'float': put(1.5), 'null': put(None),
             'type': put({'a': 1}), 'huge': put(2 ** 53), 'negative': put(-1),
             'text': put('\u00e9'), 'control': put('a\n'), 'list': put([[]]),
             'long': put('x' * 2000), 'unknown': unknown, 'number': put(3.0),
             'bool': put([True]), 'twice': None}


def drawn(rng):
  """The same kinds of damage, with values at random."""
  def text(low, high):
    return ''.join(rng.choices(string.ascii_letters + string.digits + ' -_:/.',
                               k=rng.randint(low, high)))
  def spliced(letter):
    one = text(1, 40)
    at = rng.randint(0, len(one))
    return one[:at] + letter + one[at:]
  def stranger(here, key):
    if isinstance(here[key], dict):
      here[key]['q' + text(1, 20)] = rng.choice((1, text(0, 9), [], False))
    else:
      here[key] = [here[key]] * rng.randint(1, 3)
  return {
      'missing': drop, 'null': put(None), 'unknown': stranger,
      'float': put(rng.uniform(-1, 1) * 10 ** rng.randint(-9, 18)),
      'number': put(float(rng.randint(0, 2 ** 40))),
      'type': put({text(1, 9): rng.randint(0, 9)
                   for _ in range(rng.randint(1, 3))}),
      'huge': put(rng.choice((1, -1)) * rng.randint(2 ** 53, 2 ** 80)),
      'negative': put(-rng.randint(1, 2 ** 53 - 1)),
      'text': put(spliced(chr(rng.randint(0x7f, 0xd7ff)))),
      'control': put(spliced(chr(rng.randint(0, 31)))),
      'list': put([[text(0, 3)] * rng.randint(0, 2)] * rng.randint(1, 4)),
      'long': put(text(2000, 9000)),
      'bool': put(rng.choices((True, False), k=rng.randint(1, 5)))}


def mutants(kinds=MUTATIONS):
  for path in paths(example.MANIFEST):
    for name, change in kinds.items():
      if name == 'missing' and not isinstance(path[-1], str):
        continue  # a shorter list may be right
      if change is not None:
        yield path, name, changed(example.MANIFEST, path, change)


def twice():
  """Each field twice, in the text."""
  data = canonical.dumps(example.MANIFEST)
  for key in example.MANIFEST:
    one = canonical.dumps({key: example.MANIFEST[key]})[1:-1]
    yield (key,), 'twice', data.replace(one, one + b',' + one, 1)


def refused(cases):
  """Parses texts; returns how many different ones, and what was accepted."""
  seen, wrong = set(), []
  for path, name, data in cases:
    if data in seen:
      continue
    seen.add(data)
    try:
      manifest.parse(data)
      wrong.append((path, name, data))
    except Refused as error:
      assert error.code == 'E_MANIFEST', (path, name)
      assert name != 'twice' or 'one field' in error.detail or (
          'canonical' in error.detail)
  print(f'manifest mutations: tried {len(seen)}, accepted wrongly {len(wrong)}')
  assert wrong == []
  return len(seen)


def test_mutated_fields_are_refused():
  some = itertools.islice(mutants(), 0, None, 3)
  assert refused(itertools.chain(
      ((path, name, canonical.dumps(value)) for path, name, value in some),
      twice())) > 600


@pytest.mark.slow
def test_fields_mutated_at_random():
  rng = random.Random(0)
  kinds = itertools.chain([MUTATIONS], (drawn(rng) for _ in range(8)))
  assert refused(itertools.chain((
      (path, name, canonical.dumps(value)) for one in kinds
      for path, name, value in mutants(one)), twice())) > 20 * 662


@pytest.mark.parametrize('changes, text', [
    (dict(state={'logical_bytes': 7}), 'logical_bytes: expected 256'),
    (dict(state={'length': 4}), 'size of tokens.u32: expected 20'),
    (dict(state={'has_logits': True}), 'has_logits'),
    (dict(state={'transcript': 'none'}), 'presence of files tokens.u32'),
    (dict(state={'leaves': example.LEAVES[::-1]}), 'ascending order'),
    (dict(state={'leaves': example.LEAVES[1:], 'logical_bytes': 248}),
     'role sampler'),
    (dict(sealed='aes256gcm1'), 'presence of seal'),
    (dict(governance={'export': 'any'}), 'sealed: expected aes256gcm1'),
    (dict(governance={'class': 'restricted'}), 'sealed: expected aes256gcm1'),
    (dict(files=example.MANIFEST['files'][1:]), 'plain.json'),
    (dict(files=[['/etc/x', 1, '0' * 64]]), 'files.*expected a plain relative'),
    (dict(files=[['a/../b', 1, '0' * 64]]), 'files.*expected a plain relative'),
    (dict(files=example.MANIFEST['files'] + [['x', 1, '0' * 64]]), 'got x'),
    (dict(provenance={'root': example.OTHER}), 'root is self'),
    (dict(provenance={'depth': 2}), 'depth is 0'),
    (dict(extra=1), "no unknown field, got 'extra'"),
    ({f'x-{i}': '' for i in range(17)}, 'at most 16 further'),
    ({'x-a': 1}, 'x-a: expected text'),
])
def test_what_contradicts_itself(changes, text):
  with pytest.raises(Refused, match=text):
    manifest.dumps(example.make(**changes))


def test_wrong_tile():
  leaves = copy.deepcopy(example.LEAVES)
  leaves[1]['tile'] = [1, 1, 3, 8]
  with pytest.raises(Refused, match='layers/full/k: tile'):
    manifest.dumps(example.make(state={'leaves': leaves}))


def test_shapes_that_overflow_are_counted_right():
  leaves = copy.deepcopy(example.LEAVES)
  leaves[1] |= {'shape': [2 ** 32, 2 ** 32, 1, 1], 'tile': [1, 1, 1, 1]}
  with pytest.raises(Refused, match='E_MANIFEST'):
    manifest.dumps(example.make(state={'leaves': leaves}))


def test_extensions_are_kept():
  about = example.make(**{'x-note': 'a b'})
  assert manifest.parse(manifest.dumps(about))['x-note'] == 'a b'


def test_newer_version():
  data = canonical.dumps(example.make(version=2, news={'a': 1}))
  with pytest.raises(Refused) as error:
    manifest.parse(data)
  assert error.value.code == 'E_VERSION'


def test_random_bytes_are_refused():
  rng, data = random.Random(0), manifest.dumps(example.make())
  for _ in range(300):
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 3)):
      at = rng.randrange(len(damaged))
      damaged[at:at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
    if bytes(damaged) == data:
      continue
    try:
      about = manifest.parse(bytes(damaged))
    except Refused as error:
      assert error.code in ('E_MANIFEST', 'E_VERSION')
    else:  # another manifest, and then of another name
      assert canonical.dumps(about) == damaged
      assert manifest.artifact_id(damaged) != manifest.artifact_id(data)


def test_plain():
  about = example.make()
  digests = {leaf['path']: '5' * 64 for leaf in example.LEAVES}
  plain = {'tree': 'sha256:' + digest.combine(digests), 'witness': '0' * 32,
           'token_chain': '', 'leaves': digests, 'edits': [[1, 'a' * 64]]}
  assert manifest.parse_plain(canonical.dumps(plain), about) == plain
  fewer = {k: v for k, v in digests.items() if k != 'key'}
  for change in ({'tree': example.H}, {'leaves': fewer},
                 {'edits': [[4, 'a' * 64]]}, {'witness': ''}, {'x': 1},
                 {'edits': [[2, 'a' * 64], [1, 'a' * 64]]}):
    with pytest.raises(Refused) as error:
      manifest.parse_plain(canonical.dumps(plain | change), about)
    assert error.value.code == 'E_PLAIN'


# Named digests.


def test_witness_is_that_of_the_step():
  tokens = np.random.default_rng(0).integers(0, 2 ** 30, 100).tolist()
  for n in (0, 1, 99):
    assert names.witness(tokens[:n]) == witness.host(tokens[:n])
  assert names.witness(list(range(256))) == '93d5b445b8859cf75022bfb65827ade9'
  mark = 'aabbccdd' + '0' * 56
  element = 2 ** 30 + 0xddccbbaa % 2 ** 30
  assert names.witness([1, 2, 3], [(2, mark)]) == witness.host(
      [1, 2, element, 3])


def test_keyed():
  one = names.keyed(example.SECRET, 'policy.system', 'be kind')
  assert one == names.keyed(example.SECRET, 'policy.system', 'be kind')
  others = {names.keyed(example.SECRET, 'policy.safety', 'be kind'),
            names.keyed(example.SECRET, 'policy.system', 'be cruel'),
            names.keyed(bytes(32), 'policy.system', 'be kind')}
  assert len({one, *others}) == 4
  assert names.keyed(example.SECRET, 'policy.system', '') == ''
  with pytest.raises(ValueError, match='at least 16 bytes'):
    names.keyed(b'short', 'a', 'b')


def test_chain_and_namespace():
  space = names.namespace(example.make(), 'alice')
  assert space != names.namespace(example.make(), 'bob')
  for group, field, value in (
      ('state', 'schema_digest', 'sha256:' + '1' * 64),
      ('model', 'params', 'sha256:' + '1' * 64), ('model', 'chunk', 1),
      ('model', 'adapters', [example.H]), ('policy', 'safety', example.K),
      ('policy', 'epoch', 2), ('governance', 'org', 'x'),
      ('tokenizer', 'digest', ''),
      ('model', 'position', 'sha256:' + '1' * 64)):
    assert space != names.namespace(example.make(**{group: {field: value}}),
                                    'alice'), field
  tokens = list(range(130))
  keys = {names.chain(space, tokens[:n]) for n in (0, 1, 63, 64, 65, 128, 130)}
  assert len(keys) == 7
  # A whole block's key does not depend on what follows: keys are prefixes.
  assert names.chain(space, tokens[:64]) == names.chain(space, tokens[:64])
  assert names.chain(space, tokens[::-1]) not in keys


def test_tokenizer_and_exact():
  assert names.tokenizer({'a': b'bc'}) != names.tokenizer({'ab': b'c'})
  assert names.exact({'a': (1, 0.5, None)}) == {
      'a': [1, '0x1.0000000000000p-1', 'none']}


def test_every_code_is_explained():
  assert all('; ' not in text[:1] and text for text in CODES.values())
  assert str(Refused('E_ID', 'a')).startswith('E_ID: a; the content is not')


def test_without_jax_and_numpy():
  code = (
      'import sys\n'
      'class Block:\n'
      '  def find_spec(self, name, *rest):\n'
      '    if name.split(".")[0] in ("jax", "numpy", "orbax", "flax"):\n'
      '      raise ImportError(name)\n'
      'sys.meta_path.insert(0, Block())\n'
      'from statejax.artifact import access, compat, verify\n')
  subprocess.run([sys.executable, '-c', code], check=True)
