"""Minting and loading: the order of the checks, the three ends of a load."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store as small
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.artifact import (
  canonical,
  digest,
  identity,
  layout,
  load,
  manifest,
  mint,
  names,
  objects,
  revoke,
  store,
  verify,
)
from statejax.artifact.access import Principal
from statejax.artifact.compat import Ask
from statejax.artifact.outcome import Refused

ALICE = Principal('alice', 'acme')
REPLAY = Ask(on_mismatch='reprefill')


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  return small.store(tmp_path_factory.mktemp('load'))


@pytest.fixture(scope='module')
def kept(shop):
  """An artifact with its transcript; must be left as it is."""
  jax.config.update('jax_disable_most_optimizations', True)  # as the tests do
  return mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                   transcript=small.transcript(), ref='chat').id


def end(shop, key, who=ALICE, host=None, ask=None, **options):
  return small.end(shop, key, who, host, ask, **options)


# resumed(n).


def test_resumed_bit_for_bit(shop, kept):
  found = end(shop, 'chat')
  assert str(found.decision) == 'resumed(11)' and found.id == kept
  assert found.decision.promise == 'bit' and not found.decision.warnings
  assert st.diff(found.state, small.state()) is None
  assert jax.tree.structure(found.state) == jax.tree.structure(small.state())
  assert found.tokens[:11] == small.TOKENS and len(found.tokens) == 12
  assert shop.catalog.holds(found.decision.receipt)


@pytest.mark.slow
def test_goes_on_in_another_process(shop):
  jax.config.update('jax_disable_most_optimizations', True)
  tokens, state = small.begun()
  mint.mint(shop, state, 0, small.begun_host(), small.TERMS, ref='begun',
            transcript=mint.Transcript(tokens, keep=True))
  code = ('import sys\n'
          f'sys.path.insert(0, {os.path.dirname(__file__)!r})\n'
          'import json, pathlib, small_store as small\n'
          'from statejax.artifact import load\n'
          'from statejax.artifact.access import Principal\n'
          f'shop = small.store(pathlib.Path({str(shop.path.parent)!r}))\n'
          'found = load.load(shop, "begun", Principal("alice", "acme"),\n'
          '                  small.begun_host())\n'
          'print(json.dumps([str(found.decision), found.decision.promise,\n'
          '                  small.go_on(found.state, 5)[0]]))')
  done = subprocess.run(
      [sys.executable, '-c', code], check=True, stdout=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parent.parent.parent,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '8',
           'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})
  assert json.loads(done.stdout) == [
      'resumed(11)', 'bit', small.go_on(state, 5)[0]]


@pytest.mark.parametrize('capacity', [11, 12, 64])
def test_into_another_capacity(shop, kept, capacity):
  found = end(shop, kept, capacity=capacity)
  assert st.capacity(found.state) == capacity
  assert st.diff(found.state, small.state()) is None
  # Another capacity is another program: no promise of bits.
  assert found.decision.promise == 'tolerance'
  assert found.decision.warnings == ('W_NUMERICS',)


@pytest.mark.slow
def test_into_a_slot(shop, kept):
  found = end(shop, kept)
  engine = small.MODEL.init_state(4, small.CAPACITY)
  engine = st.put(engine, 2, found.state)
  assert st.diff(st.take(engine, 2), small.state()) is None
  fresh = small.MODEL.init_state(1, small.CAPACITY)
  empty = dataclasses.replace(st.take(engine, 1), key=fresh.key)
  assert st.diff(empty, fresh) is None


@pytest.mark.slow
def test_onto_a_mesh(shop, kept):
  found = end(shop, kept)
  for devices in (1, 2, 4, 8):
    mesh = jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,))
    rows = st.map_leaves(
        lambda p, axes, k, x, mesh=mesh: jax.device_put(x, NamedSharding(
            mesh, PartitionSpec(*('data' if a == 'batch' else None
                                  for a in axes)))),
        st.fork(found.state, 0, 8))
    assert digest.tree_digest(st.live(rows, 7)) == digest.tree_digest(
        st.live(small.state(), 0))


def test_with_logits_and_empty(shop):
  state = dataclasses.replace(small.state(), logits=jnp.ones((1, 32)))
  one = mint.mint(shop, state, 0, small.host(), small.TERMS)
  found = end(shop, one.id)
  assert st.diff(found.state, state) is None
  assert found.state.logits is not None and found.tokens is None
  fresh = small.MODEL.init_state(1, small.CAPACITY)
  two = mint.mint(shop, fresh, 0, small.host(), small.TERMS)
  found = end(shop, two.id)
  assert str(found.decision) == 'resumed(0)'
  assert st.diff(found.state, fresh) is None


def test_with_spans(shop):
  schema = small.MODEL.state_schema(1, small.CAPACITY, spans=2)
  state = small.st.allocate(schema)
  one = mint.mint(shop, state, 0, small.host(), small.TERMS)
  found = end(shop, one.id)
  assert str(found.decision) == 'resumed(0)' and st.spans(found.state) == 2
  assert st.diff(found.state, state) is None


def test_retries_make_no_second_artifact(shop, kept):
  again = [mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                     mint_key='once').id for _ in range(2)]
  assert again[0] == again[1] != kept
  assert list((shop.path / 'tmp').iterdir()) == []


def test_lost_race_for_a_name_is_a_fork(shop, kept):
  one = mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                  ref='race')
  two = mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                  ref='race')
  assert not one.conflict and two.conflict and two.ref.startswith('race~')
  assert shop.find('race') == one.id and shop.find(two.ref) == two.id


def test_fork(shop, kept):
  parent = mint.Parent(kept, end(shop, kept).about)
  child = mint.fork(shop, parent, ALICE, ref='branch')
  found = end(shop, 'branch', ask=Ask(right='fork'))
  assert str(found.decision) == 'resumed(11)'
  source = found.about['provenance']
  assert source['root'] == kept and source['depth'] == 1
  assert shop.catalog.descendants(kept) == [child.id]
  name = next(n for n, _, _ in found.about['files'] if n.startswith('state/'))
  assert os.stat(shop.place(kept) / name).st_ino == os.stat(
      shop.place(child.id) / name).st_ino


# refused(code); the first check that fails is the one that is named.


def changed(layer, **fields):
  layers = tuple(
      dataclasses.replace(k, mixer=dataclasses.replace(k.mixer, **fields))
      if k.name == layer else k for k in small.LAYERS)
  return lm.LanguageModel(dataclasses.replace(small.CONFIG, layers=layers))


def hosts():
  texts = identity.Texts(secret=bytes(32), system='be kind')
  less = lm.LanguageModel(dataclasses.replace(small.CONFIG, store_dtype=None))
  return {
      'E_WEIGHTS': dict(params='1' * 64), 'E_ADAPTERS': dict(
          adapters=('1' * 64,)),
      'E_SCHEMA': dict(model=changed('ring', window=4)),
      'E_DTYPE': dict(model=less),
      'E_POSITION': dict(model=changed('full', rope=None)),
      'E_TOKENIZER': dict(tokenizer={'bytes': b'2'}),
      'E_POLICY': dict(texts=texts)}


@pytest.mark.parametrize('code', hosts())
def test_another_process(shop, kept, code):
  host = small.host(**hosts()[code])
  found = end(shop, kept, host=host)
  assert str(found.decision) == f'refused({code})' and found.state is None
  assert found.decision.promise == 'none' and found.decision.detail
  assert shop.catalog.rows()[-1]['code'] == code
  # With the tokens at hand some of them end otherwise.
  found = end(shop, kept, host=host, ask=REPLAY)
  if code in ('E_TOKENIZER', 'E_POLICY'):
    assert str(found.decision) == f'refused({code})'
  else:
    assert str(found.decision) == f'reprefilled(11, {code})'
    assert found.tokens[:11] == small.TOKENS and found.state is None


def test_no_transcript_no_replay(shop):
  bare = mint.mint(shop, small.state(), 0, small.host(), small.TERMS,
                   transcript=small.transcript(keep=False))
  found = end(shop, bare.id, host=small.host(params='1' * 64), ask=REPLAY)
  assert str(found.decision) == 'refused(E_WEIGHTS)'
  assert 'not kept' in found.decision.detail


def test_chunk_and_program_lower_the_promise(shop, kept):
  program = identity.Program(chunk=64, capacity=small.CAPACITY)
  found = end(shop, kept, host=small.host(program=program))
  assert str(found.decision) == 'resumed(11)'
  assert found.decision.promise == 'tolerance'
  assert found.decision.warnings == ('W_CHUNK', 'W_NUMERICS')


@pytest.mark.parametrize('who', [Principal('alice', 'globex'), Principal(''),
                                 Principal('bob', 'acme')])
def test_others_may_not(shop, kept, who):
  assert str(end(shop, kept, who).decision) == 'refused(E_ACL)'


def test_every_end_is_in_the_log_and_accounted(shop, kept):
  before = len(shop.catalog.rows())
  ends = [end(shop, kept), end(shop, 'nothing'),
          end(shop, kept, Principal('eve')),
          end(shop, kept, host=small.host(params='1' * 64), ask=REPLAY)]
  rows = shop.catalog.rows()[before:]
  assert [row['outcome'] for row in rows] == [
      str(found.decision) for found in ends]
  last = [(row['unit'], row['delta']) for row in shop.catalog.rows('ledger')]
  assert last[-3:] == [('resumes', 1), ('tokens_skipped', 11),
                       ('tokens_reprefilled', 11)]


def test_limits(shop, kept):
  assert str(end(shop, kept, capacity=10).decision) == 'refused(E_LIMIT)'
  assert str(end(shop, kept, ask=Ask(max_bytes=9)).decision) == (
      'refused(E_LIMIT)')


def test_arrays_larger_than_their_files(broken):
  shop, place = broken
  about = json.loads((place / 'manifest.json').read_bytes())
  leaf = next(x for x in about['state']['leaves'] if x['path'] == 'witness')
  leaf |= {'shape': [1 << 20], 'tile': [1 << 20]}
  about['state']['logical_bytes'] += (1 << 22) - 16
  id = adopt(shop, place, state=about['state'])
  assert str(end(shop, id, ask=Ask(max_bytes=1 << 20)).decision) == (
      'refused(E_LIMIT)')


# A copy of the store that may be broken.


@pytest.fixture
def broken(shop, kept, tmp_path):
  """The store, copied, and the directory of its artifact, writable."""
  shop.catalog._base.execute('pragma wal_checkpoint(full)')
  shutil.copytree(shop.path.parent, tmp_path / 'copy')
  copy = small.store(tmp_path / 'copy')
  for path in copy.path.rglob('*'):
    path.chmod(0o700)
  return copy, copy.place(kept)


def remade(place, **changes):
  """Changes fields of the manifest in place, coherently or not."""
  about = json.loads((place / 'manifest.json').read_bytes())
  for name, value in changes.items():
    about[name] = about[name] | value if isinstance(value, dict) else value
  (place / 'manifest.json').write_bytes(canonical.dumps(about))


def adopt(shop, place, **changes):
  """The same, with the store's own code and under its right name."""
  remade(place, files=layout.listing(place), **changes)
  data = (place / 'manifest.json').read_bytes()
  (place / 'manifest.mac').write_bytes(verify.mac(shop.secret, data))
  id = manifest.artifact_id(data)
  shop.place(id).parent.mkdir(exist_ok=True)
  place.rename(shop.place(id))
  shop.catalog.add(id, id, 1, 'live', '')
  return id


def link(place):
  (place / 'plain.json').rename(place.parent / 'plain')
  (place / 'plain.json').symlink_to(place.parent / 'plain')


def swap(place):
  one, two = [n for n, s, _ in layout.listing(place)
              if n.startswith('state/') and s][:2]
  (place / one).rename(place / 'x')
  (place / two).rename(place / one)
  (place / 'x').rename(place / two)


BREAKS = {
    'E_LAYOUT': [
        link, lambda p: (p / 'empty').mkdir(),
        lambda p: (p / '.git').mkdir(), lambda p: os.mkfifo(p / 'pipe'),
        lambda p: (p / 'a b').write_bytes(b''),
        lambda p: (p / 'manifest.sig').write_bytes(b'{}'),
        lambda p: (p / 'manifest.mac').unlink(), shutil.rmtree,
        lambda p: (p / 'a/b/c/d/e/f/g').mkdir(parents=True)],
    'E_LIMIT': [
        lambda p: (p / 'manifest.json').write_bytes(b'[' * ((1 << 20) + 1)),
        lambda p: (p / 'manifest.mac').write_bytes(b'0' * 65)],
    'E_MANIFEST': [
        lambda p: (p / 'manifest.json').write_bytes(b'{}'),
        lambda p: (p / 'manifest.json').write_bytes(
            (p / 'manifest.json').read_bytes() + b' '),
        lambda p: remade(p, surplus=1)],
    'E_VERSION': [lambda p: remade(p, version=2)],
    'E_ID': [lambda p: remade(p, created=5)],
    'E_SIG': [lambda p: (p / 'manifest.mac').write_bytes(b'0' * 64),
              lambda p: (p / 'manifest.mac').write_bytes(b'')],
    'E_FILES': [
        swap, lambda p: (p / 'plain.json').unlink(),
        lambda p: (p / 'slots.json').write_bytes(b'[]'),
        lambda p: (p / 'tokens.u32').write_bytes(bytes(48)),
        lambda p: (p / 'state/surplus').write_bytes(b'')],
}


@pytest.mark.parametrize('code, number', [
    (code, i) for code in BREAKS for i in range(len(BREAKS[code]))])
def test_broken(broken, kept, code, number, monkeypatch):
  shop, place = broken
  BREAKS[code][number](place)
  def never(*_):
    raise AssertionError('the payload was opened')
  monkeypatch.setattr(store, 'open_payload', never)
  assert str(end(shop, kept).decision) == f'refused({code})'


def damage(data, rng):
  """A flipped bit, a cut end, nothing at all, one byte more."""
  kind = rng.choice(('flip', 'flip', 'cut', 'empty', 'more'))
  if kind == 'flip' and data:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
  return {'cut': data[:rng.randrange(len(data) or 1)], 'empty': b''}.get(
      kind, data + b'\0')


def corrupt(place, secret, tries, rng):
  """Damages files at random; returns how often it was tried and accepted."""
  files = [p for p in sorted(place.rglob('*')) if p.is_file()]
  accepted = tried = 0
  while tried < tries:
    file = rng.choice(files)
    data = file.read_bytes()
    bad = damage(data, rng)
    if bad == data:
      continue
    tried += 1
    file.write_bytes(bad)
    try:
      verify.verify(place, name='sj1-' + place.name, secret=secret)
      accepted += 1
    except Refused:
      pass
    file.write_bytes(data)
  print(f'corruptions: tried {tried}, accepted wrongly {accepted}')
  return accepted


def test_corruptions(broken):
  shop, place = broken
  assert corrupt(place, shop.secret, 400, random.Random(0)) == 0


@pytest.mark.slow
def test_corruptions_at_length(broken):
  shop, place = broken
  assert corrupt(place, shop.secret, 20_000, random.Random(1)) == 0


# Even who has the store's secret cannot make it resume what is not sound.


def rewritten(place, change):
  """Saves the payload again with changed arrays; the rest stays."""
  about = json.loads((place / 'manifest.json').read_bytes())
  dtypes = {leaf['path']: (leaf['shape'], leaf['dtype'])
            for leaf in about['state']['leaves']}
  targets = {path: np.zeros(shape, jnp.dtype(dtype))
             for path, (shape, dtype) in dtypes.items()}
  arrays = {path: np.array(x) for path, x in store.load_payload(
      place / 'state', targets).items()}
  change(arrays)
  shutil.rmtree(place / 'state')
  store.save_payload(place / 'state', arrays)
  return arrays


def replain(place, arrays, **changes):
  plain = json.loads((place / 'plain.json').read_bytes())
  leaves = {path: digest.leaf_digest(path, x) for path, x in arrays.items()}
  plain |= {'leaves': leaves, 'tree': 'sha256:' + digest.combine(leaves)}
  (place / 'plain.json').write_bytes(canonical.dumps(plain | changes))


def setter(path, value):
  def change(arrays):
    arrays[path].reshape(-1)[:1] = value
  return change


@pytest.mark.parametrize('code, path, value', [
    ('E_NONFINITE', 'layers/kda/matrix', np.nan),
    ('E_NONFINITE', 'layers/full/v', np.inf),
    ('E_BOUNDS', 'layers/kda/matrix', 1e12),
    ('E_WITNESS', 'length', 9), ('E_WITNESS', 'witness', 9),
    ('E_WITNESS', 'pending', -1), ('E_BOUNDS', 'pending', -5)])
def test_unsound_states(broken, code, path, value):
  shop, place = broken
  arrays = rewritten(place, setter(path, value))
  replain(place, arrays)
  assert str(end(shop, adopt(shop, place)).decision) == f'refused({code})'


def test_payload_and_digests_disagree(broken):
  shop, place = broken
  rewritten(place, setter('layers/kda/matrix', 0.5))
  assert str(end(shop, adopt(shop, place)).decision) == 'refused(E_DIGEST)'


def narrower(arrays):
  arrays['layers/kda/matrix'] = arrays['layers/kda/matrix'].astype('float16')


@pytest.mark.parametrize('change', [
    narrower, lambda arrays: arrays.pop('key'),
    lambda arrays: arrays.update(surplus=np.ones(2))])
def test_payload_of_other_arrays(broken, change):
  shop, place = broken
  rewritten(place, change)
  assert str(end(shop, adopt(shop, place)).decision) == 'refused(E_SCHEMA)'


# Orbax's threads may end after the loop that they report to.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_unreadable_payload(broken):
  shop, place = broken
  (place / 'state/state/manifest.ocdbt').unlink()
  assert str(end(shop, adopt(shop, place)).decision) == 'refused(E_PAYLOAD)'


@pytest.mark.parametrize('call', ['open_payload', 'fill'])
@pytest.mark.parametrize('error, code', [
    (OSError(5, 'Input/output error'), 'E_IO'),
    (ValueError("Too many open files [os_error_code='24']"), 'E_IO'),
    (ValueError("No such file or directory [os_error_code='2']"), 'E_PAYLOAD'),
    (ValueError('Invalid checksum'), 'E_PAYLOAD')])
def test_the_disk_or_damage(shop, kept, monkeypatch, call, error, code):
  def fail(*_):
    raise error
  monkeypatch.setattr(store, call, fail)
  found = end(shop, kept)
  assert str(found.decision) == f'refused({code})' and found.state is None
  monkeypatch.undo()
  assert str(end(shop, kept).decision) == 'resumed(11)'


def test_tokens_of_another_state(broken):
  shop, place = broken
  (place / 'tokens.u32').write_bytes(names.pack([*small.TOKENS[::-1], 3]))
  assert str(end(shop, adopt(shop, place)).decision) == 'refused(E_WITNESS)'


def test_plain_contradicts_the_manifest(broken):
  shop, place = broken
  (place / 'plain.json').write_bytes(b'{}')
  assert str(end(shop, adopt(shop, place)).decision) == 'refused(E_PLAIN)'


# Rights that time takes away.


def test_revoked_expired_and_wrong_clock(tmp_path):
  shop = small.store(tmp_path)
  kept = mint.mint(shop, small.state(), 0, small.host(), small.TERMS).id
  parent = load.load(shop, kept, ALICE, small.host(), Ask(right='fork'))
  mint.fork(shop, mint.Parent(kept, parent.about), ALICE, ref='branch')
  ended = dataclasses.replace(small.TERMS, not_after=1_700_000_010)
  one = mint.mint(shop, small.state(), 0, small.host(), ended).id
  assert str(end(shop, one).decision) == 'resumed(11)'
  shop.catalog.clock.now += 20
  assert str(end(shop, one).decision) == 'refused(E_EXPIRED)'
  shop.catalog.clock.now -= 10
  assert str(end(shop, kept).decision) == 'refused(E_CLOCK)'
  shop.catalog.clock.now += 10
  shop.catalog.keep_revocations(revoke.extended(
      None, [('artifact', one), ('root', kept)], now=shop.catalog.clock()))
  assert str(end(shop, kept).decision) == 'refused(E_REVOKED)'
  assert str(end(shop, 'branch').decision) == 'refused(E_REVOKED)'
  two = mint.mint(shop, small.state(), 0, small.host(), small.TERMS).id
  assert str(end(shop, two).decision) == 'resumed(11)'


# Minting refuses what it must not keep.


@pytest.mark.parametrize('change, code', [
    (lambda s: dataclasses.replace(s, witness=s.witness + 1), 'E_WITNESS'),
    (lambda s: dataclasses.replace(s, length=s.length - 1), 'E_WITNESS'),
    (lambda s: dataclasses.replace(s, layers=s.layers | {
        'kda': dataclasses.replace(s.layers['kda'], matrix=s.layers[
            'kda'].matrix.at[0].set(jnp.nan))}), 'E_NONFINITE')])
def test_what_is_not_minted(shop, change, code):
  before = set(shop.catalog.objects())
  with pytest.raises(Refused, match=code):
    mint.mint(shop, change(small.state()), 0, small.host(), small.TERMS,
              transcript=small.transcript(), ref='new')
  assert set(shop.catalog.objects()) == before
  assert not list((shop.path / 'tmp').iterdir())
  row = shop.catalog.rows()[-1]
  assert [row[name] for name in (
      'principal', 'action', 'id', 'outcome', 'code')] == [
          'alice of acme', 'mint', 'new', 'refused', code]


def test_wrong_model_and_names(shop):
  with pytest.raises(ValueError, match='layers/ring/k: expected'):
    mint.mint(shop, small.state(), 0, small.host(changed('ring', window=4)),
              small.TERMS)
  with pytest.raises(ValueError, match='ref: expected'):
    mint.mint(shop, small.state(), 0, small.host(), small.TERMS, ref='../x')
  with pytest.raises(Refused, match='E_MANIFEST.*governance.workflow'):
    mint.mint(shop, small.state(), 0, small.host(),
              dataclasses.replace(small.TERMS, workflow='No!'))


def test_full_disk(shop, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')
  before = set(shop.catalog.objects())
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(Refused, match='E_NOSPACE'):
    mint.mint(shop, small.state(), 0, small.host(), small.TERMS)
  monkeypatch.undo()
  assert set(shop.catalog.objects()) == before
  assert shop.catalog.rows()[-1]['code'] == 'E_NOSPACE'
  assert not list((shop.path / 'tmp').iterdir())


def test_opens_nothing_of_another_store(shop, kept, tmp_path):
  """What another store vouches for, this one does not know."""
  other = objects.Store(tmp_path / 'other', objects.Secrets(tmp_path / 'no'))
  assert other.secret != shop.secret
  other.place(kept).parent.mkdir()
  shutil.copytree(shop.place(kept), other.place(kept))
  other.catalog.add(kept, kept, 1, 'live', '')
  assert str(end(other, kept).decision) == 'refused(E_SIG)'


def test_roles_and_layout_of_the_small_model():
  about = small.host().groups(identity.Carried())['state']
  roles = {leaf['path']: leaf['role'] for leaf in about['leaves']}
  assert roles['layers/kda/matrix'] == 'recurrent'
  assert roles['layers/kda/tail_k'] == 'conv'
  assert roles['layers/full/k'] == roles['layers/ring/v'] == 'kv'
  assert roles['key'] == 'sampler'
  assert c.to_dict(small.CONFIG)['remat'] is False
  again = dataclasses.replace(small.CONFIG, remat=True)
  assert identity.position(again) == identity.position(small.CONFIG)
