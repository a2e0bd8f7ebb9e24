"""Model cards: who says which parameters these are, and how that is checked.

A card is a signed document that tells the identity of parameters, which is the
digest of all their bits, beside what is cheap to look at:

    {format, version, created, org, family, position, params, adapters,
     fingerprint, leaves: [{path, dtype, shape}]}

Whoever trusts its signer need not hash gigabytes at every start. Then
`params_digest` takes the card's word, where the config and the names, shapes
and dtypes of all leaves are those that it says ('card'), or compares a sum over
all bits on the device besides ('fingerprint'); else it hashes them ('full').
The sum tells other weights by mistake, a file of yesterday, a bit that has
flipped; it is no proof against somebody who chooses weights to have it. Loads
jax only to compute; signatures need the extra [sign].
"""

import functools

from statejax.artifact import (
  canonical,
  digest,
  envelope,
  keys,
  manifest,
  revoked,
  tree,
  trust,
)
from statejax.artifact.grammar import Int, Items, OneOf, Record, Text
from statejax.artifact.outcome import Refused

FORMAT, VERSION = 'statejax-model-card', 1
HOW = ('full', 'card', 'fingerprint')
GRAMMAR = Record({
    'format': OneOf((FORMAT,)), 'version': OneOf((VERSION,)),
    'created': manifest.U, 'org': manifest.text(128),
    'family': manifest.text(64), 'position': manifest.HASH,
    'params': manifest.HASH, 'adapters': Items(manifest.HASH, 16),
    'fingerprint': Int(0, 2 ** 32 - 1),
    'leaves': Items(Record({
        'path': Text(256, r'[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*', empty=False),
        'dtype': OneOf(tuple(tree.ITEM_BYTES)),
        'shape': Items(Int(0, 2 ** 40), 8)}), 4096, 1,
                    lambda leaf: leaf['path'])})


def make(params, config, *, created: int, org: str = '', adapters=()) -> dict:
  """Returns the card of parameters, not yet signed.

  Args:
    params: all that a step computes with, after quantisation and merges: a tree
      of arrays, stacked as `init` and checkpoints have it.
    config: `ModelConfig` that they are of.
    created: unix seconds.
    org: whose card it is.
    adapters: tree digest of each adapter, 64 hex, in order applied.

  Raises:
    ValueError: a leaf of a dtype that no artifact has, or too many of them.
  """
  from statejax.artifact import identity
  body = {
      'format': FORMAT, 'version': VERSION, 'created': created, 'org': org,
      'family': identity.family(config), 'position': identity.position(config),
      'params': f'sha256:{digest.tree_digest(params)}',
      'adapters': _hashes(adapters), 'fingerprint': fingerprint(params),
      'leaves': _leaves(params)}
  GRAMMAR(body, '')
  return body


def fingerprint(params) -> int:
  """Returns the sum of the bits of all parameters modulo 2^32.

  Over every element of every leaf: its bits as an unsigned integer of its own
  width; a bool counts as 0 or 1, a typed PRNG key as its words. So it is the
  same however leaves are sharded, stacked, cut or named, and whatever their
  order. One program on the device of the arrays; nothing is copied to the host.

  Args:
    params: a tree of numpy or jax arrays, of dtypes that an artifact may have.

  Raises:
    ValueError: another dtype.
  """
  _leaves(params)
  return int(_program()(list(digest.named_leaves(params).values())))


def signed(body: dict, signer: keys.Signer) -> bytes:
  """Returns a card, signed by a key that may mint for its organisation.

  Whoever may sign artifacts says of which parameters they are anyhow: it is the
  same right.
  """
  GRAMMAR(body, '')
  return signer.document('card', canonical.dumps(body))


def read(shop, data: bytes, org: str) -> dict:
  """Returns what a signed card says, after all but the parameters was checked.

  Args:
    shop: `objects.Store`, whose trust document counts.
    data: the document.
    org: whose card it must be.

  Raises:
    Refused: E_UNSIGNED: nobody is trusted here; E_SIG; E_VERSION; E_TRUST: by a
      key that may not mint for the organisation, then and now, or a card of
      another one; E_REVOKED: its key, its parameters, or all of the
      organisation.
  """
  payload, signature, hint = envelope.open_document('card', data)
  body, known, now = parse_body(payload), trust.require(shop), (
      shop.catalog.clock())
  if body['org'] != org:
    raise Refused('E_TRUST', f'card: expected one of {org or "no organisation"}'
                  f', got one of {body["org"] or "no organisation"}')
  pem = known.key(hint, org, 'mint', body['created'])
  known.key(hint, org, 'mint', max(now, body['created']))
  keys.check(pem, envelope.media('card'), payload, signature)
  # A key that is bad since some time: when it was signed is its word alone.
  names = {('key', f'key:{hint}'), ('params', body['params']), ('org', org)}
  for crl in revoked.concerning(shop)(org):
    for entry in crl['entries'] if crl else ():
      if (entry['kind'], entry['value']) in names:
        raise Refused('E_REVOKED', f'card: the revocation list names '
                      f'{entry["kind"]} {entry["value"]}')
  return body


def unsure(data: bytes) -> dict:
  """Returns what a card says, of which nothing was checked but its form.

  Raises:
    Refused: E_SIG, E_VERSION.
  """
  return parse_body(envelope.open_document('card', data)[0])


def parse_body(payload: bytes) -> dict:
  """Returns what a card says, whoever has signed it.

  Raises:
    Refused: E_VERSION of a newer one, E_SIG of what is none.
  """
  try:
    value = canonical.loads(payload)
    version = value.get('version') if isinstance(value, dict) else None
    if type(version) is int and value.get('format') == FORMAT and (
        version > VERSION):
      raise Refused('E_VERSION', f'card: expected version {VERSION}, got '
                    f'{version}')
    GRAMMAR(value, '')
  except (ValueError, RecursionError) as error:
    if isinstance(error, Refused):
      raise
    raise Refused('E_SIG', f'card: {error}') from None
  return value


def params_digest(card: dict | None, params, config, how: str = 'full',
                  adapters=()) -> str:
  """Returns the tree digest by which parameters are known, 64 hex.

  Args:
    card: of `read`; None for none, which leaves 'full' alone.
    params, config, adapters: what was loaded; see `make`.
    how: 'full' hashes all of them, and a card must say the same; 'card' takes
      it from the card, where the config and the names, shapes and dtypes of all
      leaves are its own; 'fingerprint' does so where also `fingerprint` is.

  Raises:
    Refused: E_WEIGHTS, E_POSITION, E_ADAPTERS: what was loaded is not what the
      card says. Nothing falls back to another way.
    ValueError: an unknown way, or one that needs a card.
  """
  if how not in HOW:
    raise ValueError(f'verify_params: expected one of {HOW}, got {how!r}.')
  if card is None:
    if how != 'full':
      raise ValueError(f'verify_params: {how} needs a model card; name one, or '
                       'verify in full.')
    return digest.tree_digest(params)
  _require_like(card, params, config, adapters)
  if how == 'fingerprint' and (got := fingerprint(params)) != (
      card['fingerprint']):
    raise Refused('E_WEIGHTS', 'card: expected parameters of fingerprint '
                  f'{card["fingerprint"]:08x}, got {got:08x}')
  found = card['params'].removeprefix('sha256:')
  if how == 'full' and (got := digest.tree_digest(params)) != found:
    raise Refused('E_WEIGHTS', f'card: expected parameters of digest {found}, '
                  f'got {got}')
  return found


def describe(card: dict) -> list[str]:
  """Returns what a card says, in lines for a person."""
  return [
      card['params'],
      f'  model: {card["family"] or "unnamed"}, config {card["position"]}',
      f'  {len(card["leaves"])} leaves, {len(card["adapters"])} adapters, '
      f'fingerprint {card["fingerprint"]:08x}',
      f'  of {card["org"] or "no organisation"}, at {card["created"]}']


def _require_like(card, params, config, adapters):
  """Raises unless all that is cheap to see of a model is as its card says."""
  from statejax.artifact import identity
  for code, field, got in (
      ('E_POSITION', 'position', identity.position(config)),
      ('E_ADAPTERS', 'adapters', _hashes(adapters))):
    if card[field] != got:
      raise Refused(code, f'card: {field}: expected {card[field]}, got {got}')
  theirs, mine = ({leaf['path']: f'{leaf["dtype"]}{leaf["shape"]}'
                   for leaf in leaves}
                  for leaves in (card['leaves'], _leaves(params)))
  for path in sorted(theirs.keys() | mine.keys()):
    if theirs.get(path) != mine.get(path):
      raise Refused('E_WEIGHTS', f'card: leaf {path}: expected '
                    f'{theirs.get(path, "none")}, got '
                    f'{mine.get(path, "none")}')


def _hashes(adapters):
  return [f'sha256:{one}' for one in adapters]


def _leaves(params):
  found = []
  for path, leaf in digest.named_leaves(params).items():
    dtype, shape = digest.describe(leaf)
    if dtype not in tree.ITEM_BYTES:
      raise ValueError(f'leaf {path}: expected a dtype of '
                       f'{", ".join(tree.ITEM_BYTES)}, got {dtype}.')
    found.append({'path': path, 'dtype': dtype, 'shape': list(shape)})
  return found


@functools.cache
def _program():
  import jax
  return jax.jit(lambda leaves: sum(map(_sum, leaves)))


def _sum(x):
  """The sum of a leaf's bits, uint32, which wraps."""
  import jax
  import jax.numpy as jnp
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype != bool:
    info = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    x = jax.lax.bitcast_convert_type(
        x, jnp.dtype(f'uint{info(x.dtype).bits}'))
  return jnp.sum(x.astype(jnp.uint32), dtype=jnp.uint32)
