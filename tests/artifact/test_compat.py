"""The table of compatibility and the matrix of rights, without any array."""

import copy

import example
import pytest

from statejax.artifact import access, compat, names, revoke
from statejax.artifact.access import Principal
from statejax.artifact.compat import Ask
from statejax.artifact.outcome import Refused

H1 = 'sha256:' + '1' * 64
OTHER_KEY = names.keyed(bytes(32), 'policy.system', 'be kind')
OTHER_TEXT = names.keyed(example.SECRET, 'policy.system', 'be cruel')
TOOL = [names.keyed(example.SECRET, 'tools.items', name) for name in 'abc']
REPLAY = Ask(on_mismatch='reprefill')


def leaves(**changes):
  found = copy.deepcopy(example.LEAVES)
  found[2] |= changes
  return {'schema_digest': H1, 'leaves': found}


def tools(*items, schema=example.K):
  return {'tools': {'schema': schema, 'items': sorted(items)}}


# What differs here, what is asked; code, action, promise.
CASES = [
    ({}, {}, Ask(), '', 'go', 'bit'),
    ({}, dict(model={'params': H1}), Ask(), 'E_WEIGHTS', 'refuse', 'none'),
    ({}, dict(model={'adapters': [H1]}), Ask(), 'E_ADAPTERS', 'refuse', 'none'),
    ({}, dict(state=leaves(shape=[1, 2, 5, 4])), Ask(), 'E_SCHEMA', 'refuse',
     'none'),
    ({}, dict(state=leaves(path='layers/z')), Ask(), 'E_SCHEMA', 'refuse',
     'none'),
    ({}, dict(state=leaves()), Ask(), 'E_SCHEMA', 'refuse', 'none'),
    ({}, dict(state=leaves(dtype='bfloat16')), Ask(), 'E_DTYPE', 'refuse',
     'none'),
    ({}, dict(tokenizer={'digest': H1}), Ask(), 'E_TOKENIZER', 'refuse',
     'none'),
    ({}, dict(tokenizer={'digest': H1}), REPLAY, 'E_TOKENIZER', 'refuse',
     'none'),
    ({}, dict(tokenizer={'chat_template': H1}), Ask(), 'W_CHAT', 'go', 'bit'),
    ({}, dict(tokenizer={'special': H1}), Ask(chat=True), 'E_CHAT', 'refuse',
     'none'),
    ({}, dict(model={'position': H1}), Ask(), 'E_POSITION', 'refuse', 'none'),
    ({}, dict(horizon={'max_pos': 2}), Ask(), 'E_HORIZON', 'refuse', 'none'),
    ({}, dict(horizon={'active_horizon': 2}), REPLAY, 'E_HORIZON', 'refuse',
     'none'),
    ({}, dict(model={'chunk': 64}), Ask(), 'W_CHUNK', 'go', 'tolerance'),
    ({}, dict(numerics={'id': H1}), Ask(), 'W_NUMERICS', 'go', 'tolerance'),
    ({}, dict(numerics={'code': '9'}), Ask(), 'W_CODE', 'go', 'bit'),
    ({}, dict(policy={'system': OTHER_TEXT}), Ask(), 'E_POLICY', 'refuse',
     'none'),
    ({}, dict(policy={'safety': OTHER_TEXT}), Ask(), 'E_POLICY', 'refuse',
     'none'),
    ({}, dict(policy={'safety': OTHER_TEXT}), Ask(policy_upgrade='replay'),
     'E_POLICY', 'replay', 'none'),
    ({}, dict(policy={'system': OTHER_TEXT}), REPLAY, 'E_POLICY', 'refuse',
     'none'),
    ({}, dict(policy={'system': OTHER_KEY}), Ask(policy_upgrade='replay'),
     'E_KEYED', 'refuse', 'none'),
    ({}, {}, Ask(min_epoch=2), 'E_EPOCH', 'refuse', 'none'),
    (tools(TOOL[0]), tools(*TOOL), Ask(), 'W_TOOLS', 'go', 'bit'),
    (tools(*TOOL), tools(TOOL[0]), Ask(), 'E_TOOLS', 'refuse', 'none'),
    (tools(TOOL[0]), tools(TOOL[1]), REPLAY, 'E_TOOLS', 'replay', 'none'),
    (tools(TOOL[0]), tools(OTHER_KEY, schema=OTHER_KEY), Ask(), 'E_KEYED',
     'refuse', 'none'),
    ({}, dict(env={'assumptions': []}), Ask(), 'W_ENV', 'go', 'bit'),
    *[({}, here, REPLAY, code, 'replay', 'none') for here, code in (
        (dict(model={'params': H1}), 'E_WEIGHTS'),
        (dict(model={'adapters': [H1]}), 'E_ADAPTERS'),
        (dict(state=leaves(role='conv')), 'E_SCHEMA'),
        (dict(state=leaves(dtype='float16')), 'E_DTYPE'),
        (dict(model={'position': H1}), 'E_POSITION'))],
    ({}, dict(tokenizer={'special': H1}), Ask(
        chat=True, on_mismatch='reprefill'), 'E_CHAT', 'replay', 'none'),
    # The strongest wins, whatever stands first in the table.
    ({}, dict(model={'params': H1}, policy={'safety': OTHER_TEXT}), REPLAY,
     'E_POLICY', 'refuse', 'none'),
    ({}, dict(model={'params': H1, 'chunk': 1}), Ask(), 'E_WEIGHTS', 'refuse',
     'none'),
    ({}, dict(numerics={'id': H1, 'code': '9'}), Ask(), 'W_NUMERICS', 'go',
     'tolerance'),
]


@pytest.mark.parametrize('theirs, ours, ask, code, action, promise', CASES)
def test_table(theirs, ours, ask, code, action, promise):
  verdict = compat.compare(example.make(**theirs), example.make(**ours), ask)
  assert (verdict.action, verdict.promise) == (action, promise)
  if action == 'go':
    assert code in (*verdict.warnings, '') and not verdict.code
    assert bool(verdict.warnings) == bool(code)
  else:
    assert verdict.code == code and verdict.detail


def test_the_ask_is_checked():
  with pytest.raises(ValueError, match='right: expected'):
    Ask(right='delete')
  with pytest.raises(ValueError, match='on_mismatch: expected'):
    Ask(on_mismatch='guess')


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
  for export in ('any', 'never'):
    about = example.make(governance={'acl': LISTED, 'export': export})
    for right, letter in zip(access.RIGHTS, MATRIX[who]):
      if right == 'export' and export == 'never':
        letter = 'n'
      found = access.decide(about, PRINCIPALS[who], right)
      assert found.allowed == (letter != 'n'), right
      assert found.redacted == (letter == 'r'), right
      assert bool(found.code) == (letter == 'n')
      revoked = access.decide(about, PRINCIPALS[who], right, revoked=True)
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
