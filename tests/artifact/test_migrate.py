"""Migrations: what leads from one layout to another, exactly or not at all."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import small_store as small

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.artifact import (
  collect,
  digest,
  layout,
  load,
  manifest,
  migrate,
  mint,
  names,
)
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE, BOB = Principal('alice', 'acme'), Principal('bob', 'acme')


def host(**changes):
  return small.host(lm.LanguageModel(dataclasses.replace(
      small.CONFIG, **changes)))


NORM = c.NormConfig(eps=1e-3)
WIDE = host(store_dtype='float32')
EDITS = ((5, 'ab' * 32),)


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  return small.store(tmp_path_factory.mktemp('migrate'))


@pytest.fixture(scope='module')
def kept(shop):
  mark = np.frombuffer(bytes.fromhex(names.witness(small.TOKENS, EDITS)), '<u4')
  state = dataclasses.replace(small.state(), witness=jnp.asarray(
      mark, jnp.uint32)[None])
  return mint.mint(shop, state, 0, small.host(), small.TERMS,
                   transcript=small.transcript(edits=EDITS), ref='chat').id


def code_of(*args, **options):
  with pytest.raises(Refused) as error:
    migrate.migrate(*args, **options)
  return error.value.code


def about_of(shop, id):
  return manifest.parse(layout.read(shop.place(id), manifest.NAME))


def leaves(state):
  return {path: x for path, x, _, _ in st.leaves(st.live(state, 0))}


def test_a_cast_there_and_back(shop, kept):
  before = load.load(shop, kept, ALICE, small.host())
  assert str(before.decision) == 'resumed(11)'
  # Never on the way into a slot, never unasked.
  assert str(load.load(shop, kept, ALICE, WIDE).decision) == 'refused(E_DTYPE)'
  assert code_of(shop, kept, ALICE, small.host(), WIDE) == 'E_DTYPE'
  made = migrate.migrate(shop, kept, ALICE, small.host(), WIDE, cast=True,
                         ref='wide')
  about, old = about_of(shop, made.id), about_of(shop, kept)
  assert about['provenance'] == {
      'root': kept, 'parents': [{'id': kept, 'role': 'migrated'}], 'depth': 1,
      'producer': 'local', 'how': 'migrated'}
  for group in ('governance', 'account', 'kind', 'policy', 'tools'):
    assert about[group] == old[group], group
  found = load.load(shop, 'wide', ALICE, WIDE)
  assert str(found.decision) == 'resumed(11)'
  assert found.decision.promise == 'tolerance'
  assert found.decision.warnings == ('W_MIGRATED',)
  assert found.tokens == before.tokens
  new, was = leaves(found.state), leaves(before.state)
  assert new['layers/full/k'].dtype == np.float32
  for path in was:
    np.testing.assert_array_equal(new[path], was[path].astype(new[path].dtype))
  # Back: a bfloat16 is a float32, so that nothing is lost.
  again = migrate.migrate(shop, 'wide', ALICE, WIDE, small.host(), cast=True)
  state = load.load(shop, again.id, ALICE, small.host()).state
  assert digest.leaf_digests(st.live(state, 0)) == digest.leaf_digests(
      st.live(before.state, 0))
  assert about_of(shop, again.id)['provenance']['root'] == kept
  # The old one is as it was.
  assert load.load(shop, 'chat', ALICE, small.host()).id == kept
  assert about_of(shop, kept) == old and not collect.check(shop)


def test_what_leads_nowhere(shop, kept):
  mine, go = small.host(), dict(cast=True)
  other = dataclasses.replace(WIDE, params='1' * 64)
  assert code_of(shop, kept, ALICE, mine, other, **go) == 'E_WEIGHTS'
  names_ = dataclasses.replace(WIDE, tokenizer={'bytes': b'2'})
  assert code_of(shop, kept, ALICE, mine, names_, **go) == 'E_TOKENIZER'
  # Another number of steps in a ring is another memory.
  ring = dataclasses.replace(small.LAYERS[1], mixer=dataclasses.replace(
      small.LAYERS[1].mixer, window=4))
  far = host(layers=(small.LAYERS[0], ring, small.LAYERS[2]))
  assert code_of(shop, kept, ALICE, mine, far, **go) == 'E_SCHEMA'
  # What leaves the layout alone and changes what is computed.
  assert code_of(shop, kept, ALICE, mine, host(
      norm=NORM), **go) == 'E_POSITION'
  assert code_of(shop, kept, ALICE, mine, host(
      norm=NORM, store_dtype='float32'), **go) == 'E_POSITION'
  # It is not of what the caller says it is of.
  assert code_of(shop, kept, ALICE, WIDE, mine, **go) == 'E_DTYPE'
  assert code_of(shop, kept, BOB, mine, WIDE, **go) == 'E_ACL'
  with pytest.raises(ValueError, match='nothing to migrate'):
    migrate.migrate(shop, kept, ALICE, mine, mine)


def regrouped(kv_heads, key):
  """The store of keys and values, cut into heads of another size."""
  full = dataclasses.replace(small.LAYERS[2], mixer=c.AttentionConfig(
      heads=2, kv_heads=kv_heads, key=key, value=key))
  return host(layers=(*small.LAYERS[:2], full))


def cut(leaves, dtypes):
  del dtypes
  def one(x):  # [layers, 1, tokens, 8] -> [layers, 2, tokens, 4]
    return x.reshape(len(x), -1, 2, 4).swapaxes(1, 2)
  return {path: one(x) if 'full/' in path else x for path, x in leaves.items()}


SETTINGS = tuple(f'layers.2.mixer.{name}' for name in (
    'kv_heads', 'key', 'value'))


def pair(shop, kept, there):
  carried = migrate.identity.Carried.by(about_of(shop, kept))
  return (about_of(shop, kept)['state']['schema_digest'],
          there.groups(carried)['state']['schema_digest'])


def test_a_registered_layout(shop, kept):
  there, mine = regrouped(2, 4), small.host()
  assert code_of(shop, kept, ALICE, mine, there, cast=True) == 'E_SCHEMA'
  known = {pair(shop, kept, there): migrate.Migration('cut', SETTINGS, cut)}
  made = migrate.migrate(shop, kept, ALICE, mine, there, registered=known)
  found = load.load(shop, made.id, ALICE, there)
  assert str(found.decision) == 'resumed(11)'
  new, was = (leaves(load.load(shop, id, ALICE, one).state)
              for id, one in ((made.id, there), (kept, mine)))
  assert new['layers/full/k'].shape == (1, 2, 11, 4)
  for path, x in cut(was, {}).items():
    np.testing.assert_array_equal(new[path], x)
  # The same digests of both ends, and a setting that nobody has spoken of.
  known = {pair(shop, kept, there): migrate.Migration('cut', (), cut)}
  assert code_of(shop, kept, ALICE, mine, there, registered=known) == (
      'E_POSITION')


@pytest.mark.parametrize('wrong', [
    lambda old, _: {},
    lambda old, dtypes: cut(old, dtypes) | {'layers/more': np.zeros(1)},
    lambda old, dtypes: cut(old, dtypes) | {'length': np.int32(3)},
    lambda old, _: old,
    lambda old, dtypes: cut({p: x[:, :, 1:] if 'full/' in p else x
                             for p, x in old.items()}, dtypes),
    lambda old, dtypes: cut({p: x.astype(np.float32) for p, x in old.items()},
                            dtypes)])
def test_a_wrong_migration_is_caught(shop, kept, wrong):
  there, mine = regrouped(2, 4), small.host()
  known = {pair(shop, kept, there): migrate.Migration('x', SETTINGS, wrong)}
  count = len(shop.catalog.objects())
  assert code_of(shop, kept, ALICE, mine, there, registered=known) == 'E_SCHEMA'
  assert len(shop.catalog.objects()) == count
