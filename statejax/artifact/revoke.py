"""Revocation lists: what is no longer valid, and how an artifact is matched.

A list holds everything revoked so far; a newer one replaces it. Imports no jax.
"""

import time

from statejax.artifact import canonical, grammar, manifest
from statejax.artifact.outcome import Refused

# What an entry may name; `root` is a family: an artifact and all that stems
# from it.
KINDS = ('artifact', 'root', 'key', 'org', 'params', 'persona', 'workflow',
         'epoch')
EPOCH = grammar.Text(16, '0|[1-9][0-9]*', empty=False, name='an integer')
GRAMMAR = grammar.Record({
    'number': grammar.Int(1), 'this_update': manifest.U,
    'next_update': manifest.U,
    'entries': grammar.Items(grammar.Record({
        'kind': grammar.OneOf(KINDS), 'value': manifest.word(128),
        'from': manifest.U}), 65536)})


def check(body: dict):
  """Raises ValueError unless `body` is a revocation list."""
  GRAMMAR(body, '')
  for i, entry in enumerate(body['entries']):
    if entry['kind'] == 'epoch':
      EPOCH(entry['value'], f'entries[{i}].value')


def parse(payload: bytes) -> dict:
  """Returns the list of these bytes.

  Raises:
    Refused: E_TRUST.
  """
  try:
    body = canonical.loads(payload)
    check(body)
  except (ValueError, RecursionError) as error:
    raise Refused('E_TRUST', f'crl: {error}') from None
  return body


def extended(old: dict | None, entries, *, now: int, valid: int = 7 * 86400,
             since: int | None = None):
  """Returns the list that follows `old` and revokes `entries` too.

  Args:
    old: the newest list, None for the first.
    entries: (kind, value) of `KINDS`.
    now: unix seconds.
    valid: seconds until another list must follow.
    since: unix seconds from which on a key is bad; None is now. Of two times
      the earlier one counts.

  Raises:
    ValueError: an entry is of no known kind.
  """
  kept = {(e['kind'], e['value']): e['from']
          for e in (old['entries'] if old else ())}
  for entry in entries:
    kept[entry] = min(kept.get(entry, now), now if since is None else since)
  body = {'number': old['number'] + 1 if old else 1, 'this_update': now,
          'next_update': now + valid, 'entries': [
              {'kind': kind, 'value': value, 'from': when}
              for (kind, value), when in kept.items()]}
  check(body)
  return body


def match(crl: dict | None, about: dict, id: str) -> str:
  """Returns what revokes an artifact, '' where nothing does.

  Args:
    crl: a list, None for none.
    about: the artifact's manifest.
    id: its name.
  """
  if crl is None:
    return ''
  source, rules = about['provenance'], about['governance']
  root = id if source['root'] == 'self' else source['root']
  above = {role: {p['id'] for p in source['parents'] if p['role'] == role}
           for role in {p['role'] for p in source['parents']}}
  facts = {
      # What was exported is the same, under another name.
      'artifact': {id, *above.get('exported', ())},
      'root': {root, id}.union(*above.values()),
      'org': {rules['org']}, 'params': {about['model']['params']},
      'persona': {rules['persona']}, 'workflow': {rules['workflow']},
      'key': {source['producer']}}
  for entry in crl['entries']:
    kind, value = entry['kind'], entry['value']
    if kind == 'epoch':
      hit = about['policy']['epoch'] < int(value)
    else:
      hit = value in facts[kind]
    # A key is bad from some time on; what it made before stays good.
    if hit and (kind != 'key' or about['created'] >= entry['from']):
      return f'{kind} {value}'
  return ''


def require(crl: dict | None, about: dict, id: str, *, foreign: bool,
            now: int | None = None) -> tuple[str, ...]:
  """V6: raises where an artifact is revoked; returns warnings.

  Args:
    crl: the newest list, None where none was ever made.
    about: the artifact's manifest.
    id: its name.
    foreign: whether it comes from another store: then an old list is refused.
    now: unix seconds; None is the clock.

  Raises:
    Refused: E_REVOKED, E_CRL_STALE.
  """
  why = match(crl, about, id)
  if why:
    raise Refused('E_REVOKED', f'the revocation list names {why}')
  now = int(time.time()) if now is None else now
  if crl is None or now < crl['next_update']:
    return ()
  if foreign:
    raise Refused('E_CRL_STALE', 'expected a revocation list valid until after '
                  f'{now}, got one until {crl["next_update"]}')
  return ('W_CRL',)
