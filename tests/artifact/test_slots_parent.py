"""Whose slots may come into whose state, and what then binds what comes of it.
"""

import dataclasses
import functools
from secrets import token_hex

import pytest
import small_store as small

from statejax.artifact import mint, revoked, verify
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE, BOB = Principal('alice', 'acme'), Principal('bob', 'acme')
EVE = Principal('eve', 'globex')
OPEN = dataclasses.replace(small.TERMS, acl=(('bob', ('resume',)),))
NOW = small.Clock.now


def terms(**changes):
  return dataclasses.replace(small.TERMS, **changes)


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  return small.store(tmp_path_factory.mktemp('slots'))


@functools.cache
def minted(shop):
  kept = mint.mint(shop, small.state(), 0, small.host(), small.TERMS)
  return verify.head(shop.place(kept.id))[2]


def parent(shop, terms):
  """As if it had been minted so: of a parent only what it says is looked at.
  """
  return mint.Parent(f'sj1-{token_hex(32)}', minted(shop) | {
      'governance': terms.group('')})


def child(shop, first, second, who=ALICE, **changes):
  """The manifest of what comes of both, or the code and why there is none."""
  try:
    kept = mint.mint(
        shop, small.state(), 0, small.host(),
        mint.Terms.of(first.about, **changes), principal=who, parent=first,
        slots=second)
  except Refused as error:
    return f'{error.code} {error.detail}'
  return verify.head(shop.place(kept.id))[2]


def test_both_are_its_parents(shop):
  one, two = parent(shop, small.TERMS), parent(shop, small.TERMS)
  about = child(shop, one, two)
  assert about['provenance'] == one.about['provenance'] | {
      'root': one.id, 'depth': 1, 'parents': [
          {'id': one.id, 'role': 'state'}, {'id': two.id, 'role': 'slots'}]}
  old = mint.Parent('sj1-' + '0' * 64, about)
  for pair in ((one, old), (old, one)):
    assert child(shop, *pair)['provenance']['depth'] == 2
  with pytest.raises(ValueError, match='slots: expected a parent too'):
    mint.mint(shop, small.state(), 0, small.host(), small.TERMS, slots=two)


def test_whose(shop):
  """Owner, a member whom the list lets, one whom it does not, a stranger."""
  mine, open_, theirs = (parent(shop, x) for x in (
      small.TERMS, OPEN, mint.Terms('eve', 'globex')))
  bobs = parent(shop, mint.Terms('bob', 'acme'))
  tried = wrongly = 0
  for first, second, who, may in (
      (mine, open_, ALICE, True), (open_, mine, ALICE, True),
      (open_, open_, BOB, True), (open_, mine, BOB, False),
      (mine, open_, BOB, False), (open_, bobs, BOB, True),
      # What would come of it is no longer bound as alice has it.
      (bobs, open_, BOB, False), (mine, bobs, ALICE, False),
      (mine, theirs, ALICE, False), (theirs, mine, EVE, False),
      (theirs, open_, EVE, False), (theirs, theirs, EVE, True)):
    found = child(shop, first, second, who)
    tried, wrongly = tried + 1, wrongly + (may != isinstance(found, dict))
    assert may or found.startswith('E_ACL'), found
  print(f'merges by whom: tried {tried}, accepted wrongly {wrongly}')
  assert not wrongly


def test_as_safe_as_where_they_come_from(shop):
  plain = parent(shop, small.TERMS)
  for changes, field in (
      ({'sensitivity': 'confidential'}, 'class'),
      ({'not_after': NOW + 9}, 'not_after')):
    strict = parent(shop, terms(**changes))
    assert f'E_ACL governance.{field}: expected' in child(shop, plain, strict)
    assert isinstance(child(shop, strict, plain), dict)
    assert isinstance(child(shop, plain, strict, **changes), dict)
  wide = parent(shop, terms(export='org'))
  assert 'E_ACL governance.export: expected' in child(shop, wide, plain)
  assert isinstance(child(shop, plain, wide), dict)
  later = parent(shop, terms(not_after=NOW + 99))
  soon = parent(shop, terms(not_after=NOW + 9))
  assert 'E_ACL governance.not_after' in child(shop, later, soon)
  assert isinstance(child(shop, soon, later), dict)


def test_what_is_revoked_goes_into_nothing(shop):
  one, two = parent(shop, small.TERMS), parent(shop, small.TERMS)
  about = child(shop, one, two)
  revoked.withdraw(shop, [('artifact', two.id)], 'alice', org=None)
  assert child(shop, one, two).startswith('E_REVOKED')
  # What came of it before falls with the family of either.
  revoked.withdraw(shop, [('root', two.id)], 'alice', org=None)
  id = next(id for id in shop.catalog.descendants(two.id))
  assert revoked.why(shop, id, about) == f'root {two.id}'
