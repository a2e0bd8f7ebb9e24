"""Signed heads of the audit log: what it has held, told from outside of it.

Where a store has a key for it, `objects.Store.notary`, it signs at every 256th
row and when it is closed

    {origin, rows, hash, time}

the store's id, how many rows there are, the hash of the last, unix seconds. The
newest is kept beside the secrets and not in the store, so that a store which
was put back as a whole is seen as well. A log with fewer rows than a head was
cut short or put back; one with another hash there was written anew. Imports no
jax; signatures need the extra [sign].
"""

import pathlib

from statejax.artifact import canonical, envelope, keys
from statejax.artifact.grammar import Int, Record, Text
from statejax.artifact.outcome import Receipt, Refused

GRAMMAR = Record({
    'origin': Text(32, '[0-9a-f]{32}', empty=False, name='32 hex digits'),
    'rows': Int(), 'time': Int(),
    'hash': Text(64, '[0-9a-f]{64}', empty=False, name='64 hex digits')})


def place(shop) -> pathlib.Path:
  """Returns the file of the newest head that was signed."""
  return shop.secrets.path / f'head-{shop.id}.json'


def sign(shop):
  """Signs the head of the log as it is, if the one kept is older.

  Args:
    shop: `objects.Store` with a notary; without one nothing is done.

  Raises:
    Refused: E_IO: the log does not go on from the head that was signed last;
      E_SIG: that one is of another key.
  """
  if shop.notary is None:
    return
  # One at a time, so that no older head replaces a newer one.
  with shop.catalog.transaction():
    last, rows = 0, shop.catalog.head()
    if place(shop).exists():
      old = parse(place(shop).read_bytes(), keys.public(shop.notary.private))
      last, wrong = old['rows'], differs(shop, old)
      if wrong:
        raise Refused('E_IO', wrong)
    if rows.seq > last:
      shop.secrets.note(f'head-{shop.id}', shop.notary.document(
          'head', canonical.dumps({
              'origin': shop.id, 'rows': rows.seq, 'hash': rows.head,
              'time': shop.catalog.clock()})).decode())


def parse(data: bytes, pem: str) -> dict:
  """Returns what a signed head says.

  Args:
    data: the document.
    pem: the public key that must have signed it.

  Raises:
    Refused: E_SIG.
  """
  payload, signature, hint = envelope.open_document('head', data)
  if hint != keys.hint(pem):
    raise Refused('E_SIG', f'head: expected a signature of the key '
                  f'{keys.hint(pem)[:16]}, got one of {hint[:16]}')
  keys.check(pem, envelope.media('head'), payload, signature)
  return parse_body(payload)


def parse_body(payload: bytes) -> dict:
  """Returns what the payload of a signed head says.

  Raises:
    Refused: E_SIG.
  """
  try:
    value = canonical.loads(payload)
    GRAMMAR(value, '')
  except (ValueError, RecursionError) as error:
    raise Refused('E_SIG', f'head: {error}') from None
  return value


def differs(shop, head: dict) -> str:
  """Says how the log is not one that goes on from a head; '' if it does.

  The rows in between are for `catalog.Catalog.rows` to check.
  """
  if head['origin'] != shop.id:
    return (f'audit: expected a head of the store {shop.id}, got one of '
            f'{head["origin"]}')
  have = shop.catalog.head().seq
  if have < head['rows']:
    return (f'audit: expected at least {head["rows"]} rows, as were signed at '
            f'{head["time"]}, got {have}: the log was cut short, or put back')
  if head['rows'] and not shop.catalog.holds(
      Receipt(head['rows'], head['hash'])):
    return (f'audit row {head["rows"]}: expected the one that was signed at '
            f'{head["time"]}, got another one: the log was written anew')
  return ''
