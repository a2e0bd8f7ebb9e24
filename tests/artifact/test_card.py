"""Model cards: whose word counts, and that no other model has it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_store as small

pytest.importorskip('cryptography', reason='the extra [sign] is missing')

from statejax.artifact import (
  canonical,
  card,
  digest,
  envelope,
  keys,
  objects,
  revoked,
  tree,
  trust,
)
from statejax.artifact.outcome import Refused

NOW = 1_700_000_000
PARAMS = {
    'head': {'b': np.arange(5, dtype=np.float32), 'w': np.ones(
        (4, 3), ml_dtypes.bfloat16)}, 'scale': np.float16(2)[None]}


def made(params=PARAMS, **changes):
  return card.make(params, small.CONFIG, created=NOW, org='acme') | changes


@pytest.fixture(scope='module')
def signers():
  return {name: keys.Signer(keys.generate()) for name in (
      'root', 'acme', 'granter', 'stranger', 'globex')}


@pytest.fixture
def shop(signers, tmp_path):
  pem = lambda name: keys.public(signers[name].private)
  shop = objects.Store(tmp_path / 'store', objects.Secrets(
      tmp_path / 'secrets'), root=pem('root'), clock=lambda: NOW + 5)
  for name, org, may in (('acme', 'acme', trust.ROLES),
                         ('granter', 'acme', ('grant', 'revoke')),
                         ('globex', 'globex', trust.ROLES)):
    trust.install(shop, signers['root'].document('trust', trust.extended(
        trust.load(shop), pem(name), org, may=may)))
  yield shop
  shop.close()


def code_of(call, *args):
  try:
    call(*args)
  except Refused as error:
    return error.code
  return ''


def test_whose_word_counts(shop, signers):
  body, tried, wrongly = made(), 0, 0
  data = card.signed(body, signers['acme'])
  assert card.read(shop, data, 'acme') == card.unsure(data) == body
  assert 'of acme' in card.describe(body)[-1]
  dsse = lambda raw: card.signed(body, signers['acme']).replace(
      b'model-card', raw)
  as_head = canonical.dumps(canonical.loads(data) | {
      'payloadType': envelope.media('head')})
  other = envelope.seal('card', canonical.dumps(body), b'0' * 70,
                        signers['acme'].name.removeprefix('key:'))
  head = signers['acme'].document('head', canonical.dumps(body))
  for forged, org, code in (
      (card.signed(body, signers['stranger']), 'acme', 'E_TRUST'),
      (card.signed(body, signers['granter']), 'acme', 'E_TRUST'),
      (card.signed(body, signers['globex']), 'acme', 'E_TRUST'),
      (card.signed(body, signers['globex']), 'globex', 'E_TRUST'),
      (data, 'globex', 'E_TRUST'), (data, '', 'E_TRUST'),
      (card.signed(body | {'org': 'globex'}, signers['acme']), 'globex',
       'E_TRUST'),
      (other, 'acme', 'E_SIG'), (head, 'acme', 'E_SIG'),
      (as_head, 'acme', 'E_SIG'), (b'', 'acme', 'E_SIG'),
      (data + b' ', 'acme', 'E_SIG'), (dsse(b'') + b'}', 'acme', 'E_SIG')):
    tried, wrongly = tried + 1, wrongly + (
        code_of(card.read, shop, forged, org) != code)
  # Nor a card that was signed before its key was valid, or when it has ended.
  pem = keys.public(signers['acme'].private)
  for times, code in (({'not_before': NOW + 1}, 'E_TRUST'),
                      ({'not_after': NOW + 2}, 'E_TRUST'), ({}, '')):
    trust.install(shop, signers['root'].document('trust', trust.extended(
        trust.load(shop), pem, 'acme', **times)))
    tried, wrongly = tried + 1, wrongly + (
        code_of(card.read, shop, data, 'acme') != code)
  print(f'cards that are none: tried {tried}, accepted wrongly {wrongly}')
  assert not wrongly


def test_what_is_revoked_is_no_word(shop, signers):
  body = made()
  data = card.signed(body, signers['acme'])
  def take_back(org):
    old = shop.catalog.revocations(org)
    shop.catalog.keep_revocations(old | {
        'number': old['number'] + 1, 'entries': []}, org)
  for entry in (('key', signers['acme'].name), ('params', body['params']),
                ('org', 'acme')):
    for org in (None, 'acme'):  # everybody's list, and the organisation's own
      assert not code_of(card.read, shop, data, 'acme')
      revoked.withdraw(shop, [entry], 'alice', org=org)
      assert code_of(card.read, shop, data, 'acme') == 'E_REVOKED'
      take_back(org)
  revoked.withdraw(shop, [entry], 'alice', org='globex')
  assert not code_of(card.read, shop, data, 'acme')


def test_without_trust_nothing_counts(signers, tmp_path):
  shop = objects.Store(tmp_path / 'store', objects.Secrets(
      tmp_path / 'secrets'))
  assert code_of(card.read, shop, card.signed(
      made(), signers['acme']), 'acme') == 'E_UNSIGNED'


@pytest.mark.parametrize('change', [
    {'version': 0}, {'version': True}, {'format': 'x'}, {'fingerprint': -1},
    {'fingerprint': 2 ** 32}, {'params': '0' * 64}, {'more': 1},
    {'leaves': []}, {'leaves': made()['leaves'][::-1]}, {'org': 'a\nb'},
    {'leaves': [{'path': 'a b', 'dtype': 'int8', 'shape': []}]},
    {'leaves': [{'path': 'x', 'dtype': 'object', 'shape': []}]}])
def test_one_form(change):
  data = canonical.dumps(made() | change)
  assert code_of(card.parse_body, data) == 'E_SIG'
  assert code_of(card.parse_body, canonical.dumps(
      made(version=2))) == 'E_VERSION'


def flipped(params, path, bit=0):
  """The same parameters but for one bit of the first element of a leaf."""
  named = dict(digest.named_leaves(params))
  x = named[path] = np.array(named[path])
  x.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
  out: dict = {}
  for name, x in named.items():
    *parents, last = name.split('/')
    functools.reduce(lambda d, k: d.setdefault(k, {}), parents, out)[last] = x
  return out


def test_ways_to_know_parameters():
  """Every bit of the first element of every leaf; names, shapes, dtypes."""
  body, want = made(), digest.tree_digest(PARAMS)
  ask = lambda params, how, config=small.CONFIG, **more: card.params_digest(
      body, params, config, how, **more)
  assert {ask(PARAMS, how) for how in card.HOW} == {want}
  assert card.params_digest(None, PARAMS, small.CONFIG) == want
  tried = wrongly = 0
  for path, x in digest.named_leaves(PARAMS).items():
    for bit in range(8 * x.dtype.itemsize):
      bad = flipped(PARAMS, path, bit)
      for how in ('full', 'fingerprint'):
        tried, wrongly = tried + 1, wrongly + (
            code_of(ask, bad, how) != 'E_WEIGHTS')
      # Which the card's word alone does not tell, as it says.
      assert ask(bad, 'card') == want
  named = {**PARAMS, 'more': np.zeros(1, np.int8)}
  wide = {**PARAMS, 'scale': np.float32(2)[None]}
  long = {**PARAMS, 'scale': np.float16([2, 0])}
  less = {k: x for k, x in PARAMS.items() if k != 'scale'}
  for bad in (named, wide, long, less):
    for how in card.HOW:
      tried, wrongly = tried + 1, wrongly + (
          code_of(ask, bad, how) != 'E_WEIGHTS')
  for how in card.HOW:
    other = dataclasses.replace(small.CONFIG, width=32)
    tried, wrongly = tried + 2, wrongly + (
        code_of(ask, PARAMS, how, other) != 'E_POSITION') + (code_of(
            functools.partial(ask, adapters=['0' * 64]), PARAMS, how)
                                        != 'E_ADAPTERS')
  print(f'other parameters than on the card: tried {tried}, accepted wrongly '
        f'{wrongly}')
  assert not wrongly
  for how in ('card', 'fingerprint'):
    with pytest.raises(ValueError, match=f'{how} needs a model card'):
      card.params_digest(None, PARAMS, small.CONFIG, how)
  with pytest.raises(ValueError, match='verify_params: expected one of'):
    ask(PARAMS, 'quick')


def by_hand(params):
  """The same sum, in Python integers of the stored bits."""
  total = 0
  for x in digest.named_leaves(params).values():
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    raw = digest._bytes_of(np.asarray(x))
    total += sum(int.from_bytes(bytes(row), 'little')
                 for row in raw.reshape(-1, raw.shape[-1]))
  return total % 2 ** 32


@pytest.mark.parametrize('dtype', tree.ITEM_BYTES)
def test_the_sum_is_over_the_bits(dtype):
  rng = np.random.default_rng(0)
  if dtype.startswith('key:'):
    x = jax.random.split(jax.random.key(3, impl=dtype[4:]), 3)
  else:
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    x = rng.integers(-8 if dtype == 'int4' else 0, 8, (3, 5))
    x = x.astype(kind) if dtype[:4] in ('int4', 'uint', 'bool') else (
        rng.integers(0, 256, (3, 5 * kind.itemsize), np.uint8).view(kind))
  for tree_of in ({'x': x}, {'x': jnp.asarray(x)}, {'x': x[:2], 'y': x[2:]}):
    assert card.fingerprint(tree_of) == by_hand({'x': x})
  assert made({'x': x})['leaves'][0]['dtype'] == dtype


def test_the_sum_does_not_know_how_parameters_lie():
  rng = np.random.default_rng(0)
  stacked = {'w': rng.standard_normal((16, 3)).astype(ml_dtypes.bfloat16),
             'q': rng.integers(-9, 9, (8, 5), np.int8)}
  want = card.fingerprint(stacked)
  assert want == by_hand(stacked) == card.fingerprint({
      f'repeat_{r}': {'w': stacked['w'][2 * r:2 * r + 2], 'q': stacked['q'][r]}
      for r in range(8)})
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  for axes in (('x',), ()):
    where = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*axes))
    spread = jax.device_put(stacked, where)
    assert len(spread['w'].devices()) == 8
    assert card.fingerprint(spread) == want
  with pytest.raises(ValueError, match='leaf x: expected a dtype of .* float64'
                     ):
    card.fingerprint({'x': np.zeros(2)})
