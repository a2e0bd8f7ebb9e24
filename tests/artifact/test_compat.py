"""The matrix of rights and what lists revoke, without any array."""

import dataclasses

import example
import pytest

from statejax.artifact import access, canonical, manifest, names, revoke
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

H1 = 'sha256:' + '1' * 64
OTHER_TEXT = names.keyed(example.SECRET, 'policy.system', 'be cruel')


# Rights: 8 principals, 6 rights, as the table has them; see test_authorisation.

LISTED = [{'who': 'bob', 'may': ['resume', 'fork', 'export']}]
ALL = frozenset(('inspect', 'resume', 'fork', 'export'))
PRINCIPALS = {
    'owner': Principal('alice', 'acme'),
    'listed member': Principal('bob', 'acme'),
    'other member': Principal('carol', 'acme'),
    'granted': Principal('dave', 'globex', ALL),
    'expired grant': Principal('dave', 'globex', grant_fault='it has expired'),
    'wrong holder': Principal('erin', 'globex', grant_fault='not its holder'),
    'other org': Principal('alice', 'globex'),
    'anonymous': Principal('', ''),
}
# In the order of access.RIGHTS: y, r(edacted), n; revoked artifacts apart.
MATRIX = {'owner': 'yyyyyy', 'listed member': 'ryyynn',
          'other member': 'rnnnnn', 'granted': 'yyyynn',
          'expired grant': 'nnnnnn', 'wrong holder': 'nnnnnn',
          'other org': 'nnnnnn', 'anonymous': 'nnnnnn'}


@pytest.mark.parametrize('who', PRINCIPALS)
def test_matrix(who):
  for export in ('any', 'org', 'listed', 'never'):
    about = example.make(governance={'acl': LISTED, 'export': export})
    asks = PRINCIPALS[who]
    if asks.granted:
      asks = dataclasses.replace(asks, granted_for=manifest.artifact_id(
          canonical.dumps(about)))
    for right, letter in zip(access.RIGHTS, MATRIX[who]):
      if right == 'export' and (export == 'never' or (
          export != 'any' and asks.granted)):
        letter = 'n'
      found = access.decide(about, asks, right)
      assert found.allowed == (letter != 'n'), right
      assert found.redacted == (letter == 'r'), right
      assert bool(found.code) == (letter == 'n')
      revoked = access.decide(about, asks, right, revoked=True)
      if right in ('resume', 'fork', 'export'):
        assert not revoked.allowed
      elif who == 'owner':
        assert revoked.allowed


def test_lists_expiry_and_redaction():
  everyone = example.make(governance={
      'acl': [{'who': 'org:acme', 'may': ['resume']}]})
  assert access.decide(everyone, PRINCIPALS['other member'], 'resume').allowed
  assert not access.decide(everyone, PRINCIPALS['other org'], 'resume').allowed
  ended = example.make(governance={'not_after': 100})
  assert access.decide(ended, PRINCIPALS['owner'], 'resume', now=99).allowed
  found = access.decide(ended, PRINCIPALS['owner'], 'resume', now=100)
  assert found.code == 'E_EXPIRED'
  # Without an organisation only the owner is anybody.
  mine = example.make(governance={'org': ''})
  assert access.decide(mine, Principal('alice'), 'delete').allowed
  assert not access.decide(mine, Principal('bob'), 'inspect').allowed
  assert not access.decide(mine, Principal(''), 'inspect').allowed
  assert 'files' not in access.redact(mine) and 'state' in access.redact(mine)
  with pytest.raises(Refused, match='E_GRANT: it has expired'):
    access.require(mine, PRINCIPALS['expired grant'], 'resume')
  with pytest.raises(ValueError, match='right: expected one of'):
    access.decide(mine, Principal('alice'), 'fly')


# Revocation lists.

ID = 'sj1-' + 'a' * 64


@pytest.mark.parametrize('kind, value, hit', [
    ('artifact', ID, True), ('artifact', example.OTHER, False),
    ('root', example.OTHER, True), ('root', 'sj1-' + 'b' * 64, False),
    ('org', 'acme', True), ('org', 'acm', False),
    ('params', example.H, True), ('params', H1, False),
    ('persona', OTHER_TEXT, True), ('workflow', 'support', True),
    ('workflow', 'x', False), ('key', 'local', True), ('key', 'key:x', False),
    ('epoch', '2', True), ('epoch', '1', False)])
def test_what_a_list_revokes(kind, value, hit):
  about = example.make(
      provenance={'root': example.OTHER, 'depth': 1, 'parents': [
          {'id': example.OTHER, 'role': 'state'}]},
      governance={'persona': OTHER_TEXT})
  crl = revoke.extended(None, [(kind, value)], now=100)
  if hit:
    assert revoke.match(crl, about, ID) == f'{kind} {value}'
    with pytest.raises(Refused, match='E_REVOKED'):
      revoke.require(crl, about, ID, foreign=False, now=100)
  else:
    assert not revoke.match(crl, about, ID)


def test_lists_grow_and_get_old():
  one = revoke.extended(None, [('artifact', ID), ('artifact', ID)], now=100)
  two = revoke.extended(one, [('org', 'x')], now=200)
  assert (one['number'], two['number']) == (1, 2)
  assert len(one['entries']) == 1 and len(two['entries']) == 2
  about, day = example.make(), 86400
  assert revoke.require(two, about, 'x', foreign=True, now=200) == ()
  assert revoke.require(two, about, 'x', foreign=False,
                        now=200 + 7 * day) == ('W_CRL',)
  with pytest.raises(Refused, match='E_CRL_STALE'):
    revoke.require(two, about, 'x', foreign=True, now=200 + 7 * day)
  with pytest.raises(ValueError, match='kind'):
    revoke.extended(None, [('planet', 'x')], now=0)
  # A key is bad from some time on.
  late = revoke.extended(None, [('key', 'local')], now=about['created'] + 1)
  assert not revoke.match(late, about, 'x')
