"""Every code that a load can be refused with; none of them changes a slot."""

import collections
import dataclasses
import shutil

import jax
import numpy as np
import pytest
import small_store as small
import test_load as cases

from statejax.artifact import (
  identity,
  mint,
  objects,
  outcome,
  revoke,
  sealing,
  store,
  withdraw,
)
from statejax.artifact.access import Principal
from statejax.artifact.compat import Ask

SECRET = bytes(range(32))
# What only a mint or the reader of a single file raises beside them.
ELSEWHERE = {'E_NOSPACE'}
SIGNED = ('E_TRUST', 'E_CRL_STALE', 'E_SEALED', 'E_EPOCH')


def texts(**changes):
  return identity.Texts(secret=SECRET, system='be kind', **changes)


HOST = small.host(texts=texts(safety='do no harm', tools={'a': 'A'}))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A store with one artifact, to be copied: its path, its id."""
  jax.config.update('jax_disable_most_optimizations', True)  # as the tests do
  shop = small.store(tmp_path_factory.mktemp('refusals'))
  terms = dataclasses.replace(small.TERMS, not_after=1_700_000_100)
  id = mint.mint(shop, small.state(), 0, HOST, terms, ref='chat',
                 transcript=small.transcript()).id
  shop.catalog._base.execute('pragma wal_checkpoint(full)')
  return shop.path.parent, id


def here(**changes):
  return lambda shop, id, patch: dict(host=dataclasses.replace(HOST, **changes))


def other_texts(**changes):
  return here(texts=dataclasses.replace(HOST.texts, **changes))


def model(code):
  """A host of `test_load`, with the texts of here."""
  made = small.host(**cases.hosts()[code])
  return lambda shop, id, patch: dict(
      host=dataclasses.replace(made, texts=HOST.texts))


def broken(code, number=0):
  def cause(shop, id, patch):
    cases.BREAKS[code][number](shop.place(id))
    return {}
  return cause


def unsigned(shop, id, patch):
  (shop.place(id) / 'manifest.mac').rename(shop.place(id) / 'manifest.sig')
  return {}


def later(seconds):
  def cause(shop, id, patch):
    shop.catalog.clock.now += seconds
    return {}
  return cause


def revoked(shop, id, patch):
  shop.catalog.keep_revocations(revoke.extended(
      None, [('artifact', id)], now=shop.catalog.clock()))
  return {}


def by(**changes):
  who = dataclasses.replace(Principal('eve', 'globex'), **changes)
  return lambda shop, id, patch: dict(who=who)


def unsound(path, value, replain=True):
  def cause(shop, id, patch):
    place = shop.place(id)
    arrays = cases.rewritten(place, cases.setter(path, value))
    if replain:
      cases.replain(place, arrays)
    return dict(key=cases.adopt(shop, place))
  return cause


def contradicting(shop, id, patch):
  (shop.place(id) / 'plain.json').write_bytes(b'{}')
  return dict(key=cases.adopt(shop, shop.place(id)))


def unreadable(error):
  def cause(shop, id, patch):
    def fail(*_):
      raise error
    patch.setattr(store, 'open_payload', fail)
    return {}
  return cause


def signed(code):
  """An artifact of a signer, and what is wrong with it."""
  def cause(shop, id, patch):
    from statejax.artifact import keys, trust
    root, acme = keys.generate(), keys.generate()
    other = objects.Store(shop.path.parent / code, shop.secrets,
                          clock=shop.catalog.clock, root=keys.public(root))
    trust.install(other, keys.Signer(root).document('trust', trust.extended(
        None, keys.public(acme), 'acme',
        may=['grant'] if code == 'E_TRUST' else ['mint'])))
    if code == 'E_EPOCH':
      trust.install(other, keys.Signer(root).document('trust', trust.ruled(
          trust.load(other), min_epoch=1)))
    terms = dataclasses.replace(small.TERMS, sealed=code == 'E_SEALED')
    key = mint.mint(other, small.state(), 0, HOST, terms, vouch=(
        None if code == 'E_SEALED' else keys.Signer(acme))).id
    if code == 'E_SEALED':
      for name in other.secrets.names(sealing.own_name(other, '')):
        other.secrets.destroy(name)
    return dict(shop=other, key=key)
  return cause


CAUSES = {
    'E_LAYOUT': broken('E_LAYOUT'), 'E_LIMIT': broken('E_LIMIT'),
    'E_MANIFEST': broken('E_MANIFEST'), 'E_VERSION': broken('E_VERSION'),
    'E_ID': broken('E_ID'), 'E_UNSIGNED': unsigned, 'E_SIG': broken('E_SIG'),
    'E_TRUST': signed('E_TRUST'), 'E_CLOCK': later(-10),
    'E_CRL_STALE': signed('E_CRL_STALE'), 'E_REVOKED': revoked,
    'E_EXPIRED': later(100), 'E_ACL': by(), 'E_GRANT': by(
        name='bob', org='acme', grant_fault='it has expired'),
    'E_WEIGHTS': model('E_WEIGHTS'), 'E_ADAPTERS': model('E_ADAPTERS'),
    'E_SCHEMA': model('E_SCHEMA'), 'E_DTYPE': model('E_DTYPE'),
    'E_TOKENIZER': model('E_TOKENIZER'), 'E_POSITION': model('E_POSITION'),
    'E_CHAT': lambda *_: dict(ask=Ask(chat=True), host=dataclasses.replace(
        HOST, special={'end': 1})),
    'E_HORIZON': here(max_pos=10), 'E_POLICY': other_texts(system='be cruel'),
    'E_EPOCH': signed('E_EPOCH'), 'E_TOOLS': other_texts(tools={'b': 'B'}),
    'E_KEYED': other_texts(secret=bytes(32)), 'E_FILES': broken('E_FILES'),
    'E_SEALED': signed('E_SEALED'), 'E_PLAIN': contradicting,
    'E_PAYLOAD': unreadable(ValueError('Invalid checksum')),
    'E_DIGEST': unsound('layers/kda/matrix', 0.5, replain=False),
    'E_NONFINITE': unsound('layers/kda/matrix', np.nan),
    'E_BOUNDS': unsound('layers/kda/matrix', 1e12),
    'E_WITNESS': unsound('witness', 9),
    'E_IO': unreadable(OSError(5, 'Input/output error'))}


def test_refusals_leave_the_slots_as_they_were(source, tmp_path, monkeypatch):
  try:
    import cryptography  # noqa: F401
    left_out = set()
  except ImportError:  # the extra [sign]
    left_out = set(SIGNED)
  tried = CAUSES.keys() - left_out
  assert CAUSES.keys() == {
      code for code in outcome.CODES if code[0] == 'E'} - ELSEWHERE
  small.refusals.clear()
  folder, id = source
  for code in sorted(tried):
    shutil.copytree(folder, tmp_path / code)
    for path in (tmp_path / code / 'store').rglob('*'):
      path.chmod(0o700)
    shop = small.store(tmp_path / code)
    with monkeypatch.context() as patch:
      options = dict(shop=shop, key=id, who=cases.ALICE, host=HOST)
      found = small.end(**options | CAUSES[code](shop, id, patch))
    assert str(found.decision) == f'refused({code})', found.decision.detail
  counts = collections.Counter(small.refusals)
  changed = [counts.pop(name) for name in ('pool changed', 'store changed')]
  print(f'refusals: tried {counts.total()} with {len(counts)} codes, pool '
        f'changed {changed[0]}, store changed {changed[1]}')
  assert counts.keys() == tried


def test_what_is_revoked_has_no_child(tmp_path):
  shop, state = small.store(tmp_path), (
      small.state(), 0, small.host(), small.TERMS)
  id = mint.mint(shop, *state).id
  parent = mint.Parent(id, small.end(shop, id, cases.ALICE).about)
  withdraw.withdraw(shop, id, cases.ALICE)
  with pytest.raises(outcome.Refused, match='E_REVOKED'):
    mint.mint(shop, *state, parent=parent)
