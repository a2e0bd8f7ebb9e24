"""Rows of the table of compatibility that a load decides with the artifact."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_store as small
import test_load as cases
from test_load import ALICE, broken, kept, shop  # noqa: F401

from statejax import state as st
from statejax.artifact import collect, identity, load, mint, standing, tree
from statejax.artifact.compat import Ask

REPLAY = Ask(on_mismatch='reprefill')
UPGRADE = Ask(policy_upgrade='replay')
CROSS = Ask(unsafe_cross_weights=True)
TEXTS = identity.Texts(secret=bytes(32), system='be kind', safety='no harm',
                       tools={'a': 'A'})
ALL = (*small.TOKENS, 5)  # the last one is pending


def end(shop, key, **host):  # noqa: F811
  ask = host.pop('ask', None)
  return small.end(shop, key, ALICE, small.host(**host), ask)


def said(found):
  return str(found.decision)


def test_horizons(shop, kept):  # noqa: F811
  for name in ('max_pos', 'active_horizon'):
    assert said(end(shop, kept, **{name: 11})) == 'resumed(11)'
    for ask in (Ask(), REPLAY, UPGRADE):
      found = end(shop, kept, ask=ask, **{name: 10})
      assert said(found) == 'refused(E_HORIZON)'
      assert f'at most {name}=10' in found.decision.detail
  one = mint.mint(shop, small.state(), 0, small.host(max_pos=64), small.TERMS)
  found = end(shop, one.id)
  assert said(found) == 'resumed(11)' and found.decision.promise == 'bit'
  assert found.about['horizon']['max_pos'] == 64


def test_another_tokenizer_of_the_same_ids(shop, kept):  # noqa: F811
  asked = []
  def same(digest, ids):
    asked.append((digest, tuple(ids)))
    return list(ids)
  other = dict(tokenizer={'bytes': b'2'})
  found = end(shop, kept, ask=REPLAY, retokenize=same, **other)
  assert said(found) == 'reprefilled(11, E_TOKENIZER)'
  assert found.tokens == ALL and found.state is None
  assert asked == [(small.host().groups(identity.Carried())['tokenizer'][
      'digest'], ALL)]
  # Weights that are absorbed again anyway do not excuse the tokenizer.
  both = dict(params='1' * 64, ask=REPLAY, **other)
  assert said(end(shop, kept, retokenize=same, **both)) == (
      'reprefilled(11, E_WEIGHTS)')
  for wrong in (lambda _, ids: None, lambda _, ids: ids[:-1],
                lambda _, ids: [*ids, 1], lambda _, ids: [*ids[:-1], 6],
                lambda _, ids: []):
    for host in (both, dict(ask=REPLAY, **other)):
      assert said(end(shop, kept, retokenize=wrong, **host)) == (
          'refused(E_TOKENIZER)')
  # Nobody has asked for it; nobody can tell; nothing is kept.
  assert said(end(shop, kept, retokenize=same, **other)) == (
      'refused(E_TOKENIZER)')
  assert said(end(shop, kept, ask=REPLAY, **other)) == 'refused(E_TOKENIZER)'
  bare = mint.mint(shop, small.state(), 0, small.host(), small.TERMS).id
  assert said(end(shop, bare, ask=REPLAY, retokenize=same, **other)) == (
      'refused(E_TOKENIZER)')


def test_what_else_decides_on_numbers(monkeypatch):
  mine = lambda: identity.numerics(identity.Program())['id']
  before, found = mine(), []
  for change in (jax.threefry_partitionable(False), jax.disable_jit(True),
                 jax.default_prng_impl('rbg'),
                 jax.default_matmul_precision('float32')):
    with change:
      found.append(mine())
  for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'NVIDIA_TF32_OVERRIDE'):
    with monkeypatch.context() as patch:
      patch.setenv(name, '0')
      found.append(mine())
  with monkeypatch.context() as patch:
    patch.setattr(identity, '_cpus', lambda: 99)
    found.append(mine())
  assert before not in found and len({*found}) == len(found) == 8
  assert mine() == before


def test_fewer_ids_than_the_transcript_has(shop, kept):  # noqa: F811
  config = dataclasses.replace(small.CONFIG, vocab=max(ALL))
  model = small.lm.LanguageModel(config)
  found = end(shop, kept, model=model, ask=REPLAY,
              retokenize=lambda digest, ids: ids)
  assert said(found) == 'refused(E_TOKENIZER)'
  assert f'below {max(ALL)}' in found.decision.detail


def with_key(shop, place, key, axes=None):  # noqa: F811
  """Gives an artifact another sampler's key; returns its id."""
  def change(arrays):
    arrays['key'] = np.asarray(
        key if isinstance(key, np.ndarray) else jax.random.key_data(key))
  arrays = cases.rewritten(place, change)
  # The chain's namespace has the digest of the layout.
  cases.replain(place, arrays | {'key': key}, token_chain='')
  about = json.loads((place / 'manifest.json').read_bytes())
  leaf = next(x for x in about['state']['leaves'] if x['role'] == 'sampler')
  dtype, shape = small.digest.describe(key)
  leaf |= {'dtype': dtype, 'shape': list(shape), 'tile': list(
      tree.tile_shape(shape, tree.ITEM_BYTES[dtype]))}
  schema = identity.layout(small.MODEL.state_schema(1, 0), leaf)
  about['state'] |= {
      'logical_bytes': about['state']['logical_bytes'] - 8 + 4 * shape[0],
      'schema_digest': axes or schema['schema_digest']}
  return cases.adopt(shop, place, state=about['state'])


@pytest.mark.parametrize('key', [
    np.arange(4, dtype=np.uint32), jax.random.key(5, impl='rbg')],
    ids=['words', 'named'])
def test_another_sampler(broken, key):  # noqa: F811
  shop, place = broken  # noqa: F811
  id = with_key(shop, place, key)
  found = end(shop, id)
  assert said(found) == 'resumed(11)'
  assert found.decision.warnings == ('W_SAMPLER',)
  assert found.decision.promise == 'none'
  # All but the key is to the bit what it was; the key is new, and ours.
  ours = dataclasses.replace(found.state, key=small.state().key)
  assert st.diff(ours, small.state()) is None
  mine = load.verify.unsealed(shop.place(id), found.about)[0]['tree']
  assert np.array_equal(found.state.key, st.sampler_keys(
      jax.random.key(int(mine[-8:], 16)), 1))
  again = end(shop, id)
  assert np.array_equal(found.state.key, again.state.key)
  # It stands where it says, also in a slot, and is minted as ours.
  slots = st.put(small.pool(), 1, found.state)
  standing.check(slots, {1: found.stands})
  one = mint.mint(shop, found.state, 0, found.host, small.TERMS,
                  stands=found.stands)
  assert end(shop, one.id).decision.warnings == ()


def test_another_sampler_must_be_all(broken):  # noqa: F811
  shop, place = broken  # noqa: F811
  id = with_key(shop, place, np.arange(4, dtype=np.uint32),
                axes='sha256:' + '1' * 64)
  assert said(end(shop, id)) == 'refused(E_SCHEMA)'


def test_another_sampler_is_verified(broken):  # noqa: F811
  shop, place = broken  # noqa: F811
  place = shop.place(with_key(shop, place, np.arange(4, dtype=np.uint32)))
  for path in place.rglob('*'):
    path.chmod(0o700)
  cases.rewritten(place, cases.setter('key', 9))
  assert said(end(shop, cases.adopt(shop, place))) == 'refused(E_DIGEST)'


@pytest.mark.parametrize('change', [
    dict(params='1' * 64), dict(adapters=('1' * 64,))])
def test_crossed_weights_are_marked(shop, kept, change):  # noqa: F811
  found = end(shop, kept, ask=CROSS, **change)
  assert said(found) == 'resumed(11)' and found.decision.promise == 'none'
  assert found.decision.warnings == ('W_WEIGHTS',)
  assert found.decision.mark == 'W_WEIGHTS'
  assert shop.catalog.rows()[-1]['code'] == 'W_WEIGHTS'
  # So is what comes of it, and nothing resumes that unasked.
  one = mint.mint(shop, found.state, 0, found.host, small.TERMS,
                  parent=mint.Parent(kept, found.about)).id
  row = shop.catalog.rows()[-1]
  assert (row['action'], row['id'], row['code']) == ('mint', one, 'W_WEIGHTS')
  for host in ({}, change):
    assert said(end(shop, one, **host)) == 'refused(E_WEIGHTS)'
    found = end(shop, one, ask=CROSS, **host)
    assert found.decision.mark == 'W_WEIGHTS'
    assert found.host.params not in (small.host().params, '1' * 64)
  # Who did not need to ask gets a state like any other.
  found = end(shop, kept, ask=CROSS)
  assert not found.decision.mark and found.host == small.host()


def test_crossed_weights_of_ones_own_only(shop, kept, monkeypatch):  # noqa: F811
  monkeypatch.setattr(load.trust, 'vouch', lambda *_: 'key:other')
  monkeypatch.setattr(load.revoked, 'valid', lambda *_: ())
  assert said(end(shop, kept, ask=CROSS, params='1' * 64)) == (
      'refused(E_WEIGHTS)')


def test_texts(shop):  # noqa: F811
  host = small.host(texts=TEXTS)
  id = mint.mint(shop, small.state(), 0, host, small.TERMS,
                 transcript=small.transcript()).id
  def ends(ask=None, **changes):
    return said(end(shop, id, ask=ask, texts=dataclasses.replace(
        TEXTS, **changes)))
  assert ends() == 'resumed(11)'
  for name in ('system', 'safety'):
    other = {name: 'anything goes'}
    assert ends(**other) == ends(REPLAY, **other) == 'refused(E_POLICY)'
    assert ends(UPGRADE, **other) == 'reprefilled(11, E_POLICY)'
    assert ends(UPGRADE, **{name: ''}) == 'reprefilled(11, E_POLICY)'
    for ask in (Ask(), UPGRADE, REPLAY):
      assert ends(ask, secret=bytes(31) + b'1') == 'refused(E_KEYED)'
  assert ends(tools={'a': 'A', 'b': 'B'}) == 'resumed(11)'
  assert ends(tools={'b': 'B'}) == 'refused(E_TOOLS)'
  assert ends(REPLAY, tools={'b': 'B'}) == 'reprefilled(11, E_TOOLS)'
  # What is absorbed again was not kept.
  bare = mint.mint(shop, small.state(), 0, host, small.TERMS).id
  assert said(end(shop, bare, ask=UPGRADE, texts=dataclasses.replace(
      TEXTS, system=''))) == 'refused(E_POLICY)'


def test_as_a_chat(shop, kept):  # noqa: F811
  for other in (dict(special={'end': 1}), dict(chat_template='<{text}>')):
    found = end(shop, kept, **other)
    assert found.decision.warnings == ('W_CHAT',)
    chat = dict(chat=True)
    assert said(end(shop, kept, ask=Ask(**chat), **other)) == 'refused(E_CHAT)'
    assert said(end(shop, kept, ask=Ask(
        **chat, on_mismatch='reprefill'), **other)) == 'reprefilled(11, E_CHAT)'


def test_what_a_load_has_saved(tmp_path):
  shop = small.store(tmp_path)  # noqa: F811
  one = mint.mint(
      shop, small.state(), 0, small.host(), small.TERMS, ref='one',
      transcript=small.transcript(), account={'device_us': 70},
      spent={'device_us': 70})
  host = dict(work=lambda tokens: 3 * tokens)
  assert said(end(shop, one.id, **host)) == 'resumed(11)'
  assert said(end(shop, one.id, params='1' * 64, ask=REPLAY, **host)) == (
      'reprefilled(11, E_WEIGHTS)')
  assert said(end(shop, one.id)) == 'resumed(11)'  # whose work is not known
  sums = collect.account(shop)[0]
  assert sums['device_us'] == 70 and sums['device_us_avoided'] == 140
  assert sums['mflop_avoided'] == 33 and sums['resumes'] == 2
  assert (sums['tokens_skipped'], sums['tokens_reprefilled']) == (22, 11)
  assert collect.check(shop) == []
  # What was charged and never replied, or the other way round.
  for unit in ('tokens_skipped', 'tokens_reprefilled', 'resumes'):
    shop.catalog.charge('alice', one.id, **{unit: 1})
    wrong, = collect.check(shop)
    assert f'got {sums[unit] + 1}' in wrong and unit in wrong
    shop.catalog.charge('alice', one.id, **{unit: -1})
  shop.catalog.audit('alice', 'resume', one.id, 'resumed(5)')
  assert len(collect.check(shop)) == 2
