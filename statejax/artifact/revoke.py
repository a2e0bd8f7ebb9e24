"""Revocation lists: what is no longer valid, and how an artifact is matched.

A list is of one organisation and concerns its artifacts alone. It holds
everything revoked so far; a newer one replaces it. Imports no jax.
"""

import dataclasses
import time

from statejax.artifact import canonical, envelope, grammar, manifest
from statejax.artifact.outcome import Refused

# What an entry may name; `root` is a family: an artifact and all that stems
# from it.
KINDS = ('artifact', 'root', 'key', 'org', 'params', 'persona', 'workflow',
         'epoch')
# What one signed document has room for, also where a list is the store's own:
# about 26,000 entries.
MAX_BYTES = envelope.MAX_BYTES // 4 * 3 - 4096
EPOCH = grammar.Text(16, '0|[1-9][0-9]*', empty=False, name='an integer')
GRAMMAR = grammar.Record({
    'number': grammar.Int(1), 'this_update': manifest.U,
    'next_update': manifest.U,
    'entries': grammar.Items(grammar.Record({
        'kind': grammar.OneOf(KINDS), 'value': manifest.word(128),
        'from': manifest.U}), 65536)})


def check(body: dict):
  """Raises unless `body` is a revocation list.

  Raises:
    ValueError: it is none.
    Refused: E_LIMIT: it is larger than what is read again.
  """
  size = len(canonical.dumps(body))
  if size > MAX_BYTES:
    raise Refused('E_LIMIT', f'crl: expected a list of at most {MAX_BYTES} '
                  f'bytes, got {size} with {len(body["entries"])} entries; '
                  'revoke by what they have in common: one entry names a '
                  'family, a workflow, a model')
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
    body = canonical.loads(payload, max_bytes=MAX_BYTES)
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
    Refused: E_LIMIT: there would be too many.
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


def covers(new: dict, old: dict) -> bool:
  """Whether a list revokes all that another one does, and since as early."""
  since = {(e['kind'], e['value']): e['from'] for e in new['entries']}
  never = manifest.U.high + 1
  return all(since.get((e['kind'], e['value']), never) <= e['from']
             for e in old['entries'])


def joined(lists) -> dict | None:
  """Returns what several lists of an organisation say together.

  Numbers are those of one store: of lists by two stores neither is the newer
  one. So an entry counts that any of them has, since the earliest time. One
  that another covers says nothing more. Of the others each must be fresh: what
  one store has revoked lately another's list does not tell.

  Args:
    lists: as parsed.

  Returns:
    A list like any other; None of none.
  """
  left: list[dict] = []
  # Of two that say the same the later one stays.
  for body in sorted(lists, key=lambda body: (
      -body['next_update'], -body['number'])):
    if not any(covers(other, body) for other in left):
      left = [*(x for x in left if not covers(body, x)), body]
  return {'number': max(body['number'] for body in left),
          'this_update': min(body['this_update'] for body in left),
          'next_update': min(body['next_update'] for body in left),
          'entries': together(left)} if left else None


def together(lists) -> list[dict]:
  """Returns the entries of all lists, each since the earliest of its times."""
  since: dict[tuple[str, str], int] = {}
  for body in lists:
    for entry in body['entries']:
      one = entry['kind'], entry['value']
      since[one] = min(since.get(one, entry['from']), entry['from'])
  return [{'kind': kind, 'value': value, 'from': when}
          for (kind, value), when in since.items()]


@dataclasses.dataclass(frozen=True)
class Known:
  """What a store knows of an artifact beside its manifest.

  Attributes:
    same: ids under which it was exported from elsewhere before.
    above: ids of all from which it stems.
    seen: unix seconds when the store first had it, 0 where none has: then the
      manifest's own time counts, which is its producer's word.
  """

  same: frozenset[str] = frozenset()
  above: frozenset[str] = frozenset()
  seen: int = 0


ALONE = Known()


def match(crl: dict | None, about: dict, id: str, known: Known = ALONE) -> str:
  """Returns what revokes an artifact, '' where nothing does.

  Args:
    crl: a list, None for none.
    about: the artifact's manifest.
    id: its name.
    known: what the store knows besides.
  """
  if crl is None:
    return ''
  source, rules = about['provenance'], about['governance']
  root = id if source['root'] == 'self' else source['root']
  parents = {role: {p['id'] for p in source['parents'] if p['role'] == role}
             for role in {p['role'] for p in source['parents']}}
  facts = {
      # What was exported is the same, under another name.
      'artifact': {id, *parents.get('exported', ()), *known.same},
      'root': {root, id}.union(known.above, *parents.values()),
      'org': {rules['org']}, 'params': {about['model']['params']},
      'persona': {rules['persona']}, 'workflow': {rules['workflow']},
      'key': {source['producer']}}
  made = max(about['created'], known.seen)
  for entry in crl['entries']:
    kind, value = entry['kind'], entry['value']
    if kind == 'epoch':
      hit = about['policy']['epoch'] < int(value)
    else:
      hit = value in facts[kind]
    # A key is bad from some time on; what was there before stays good. Whoever
    # has stolen it can write an earlier time into a manifest.
    if hit and (kind != 'key' or made >= entry['from']):
      return f'{kind} {value}'
  return ''


def require(crl: dict | None, about: dict, id: str, *, foreign: bool,
            now: int | None = None, known: Known = ALONE) -> tuple[str, ...]:
  """V6: raises where an artifact is revoked; returns warnings.

  Args:
    crl: the newest list, None where none was ever made.
    about: the artifact's manifest.
    id: its name.
    foreign: whether it comes from another store: then an old list is refused.
    now: unix seconds; None is the clock.
    known: see `match`.

  Raises:
    Refused: E_REVOKED, E_CRL_STALE.
  """
  why = match(crl, about, id, known)
  if why:
    raise Refused('E_REVOKED', f'the revocation list names {why}')
  now = int(time.time()) if now is None else now
  if crl is None or now < crl['next_update']:
    return ()
  if foreign:
    raise Refused('E_CRL_STALE', 'expected a revocation list valid until after '
                  f'{now}, got one until {crl["next_update"]}')
  return ('W_CRL',)
