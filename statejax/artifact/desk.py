"""What is asked about an artifact without touching its arrays. Imports no jax.

Each answer is a decision, and stands in the audit log of the store.
"""

import contextlib
import pathlib
import tempfile

from statejax.artifact import (
  access,
  layout,
  portable,
  revoke,
  sealing,
  trust,
  verify,
)
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused


def examine(shop, key: str, principal: Principal,
            right: str) -> verify.Verified:
  """Verifies an artifact for a right, all but its arrays: V1 to V7, V9, V11.

  Args:
    shop: `objects.Store`.
    key: id, beginning of one, or name.
    principal: who asks.
    right: of `access.RIGHTS`; with 'inspect' a revoked or expired one is shown.

  Raises:
    Refused: the first check that fails; it is in the log.
  """
  id = ''
  try:
    id = shop.find(key)
    place = shop.place(id)
    found, data, about, _ = verify.head(place, name=id)
    vouched = trust.vouch(shop, place, found, data, about)
    hit = revoke.match(shop.catalog.revocations(), about, id)
    allowed = access.require(about, principal, right, revoked=bool(hit),
                             now=shop.catalog.clock())
    layout.check(place, found, about)
    with sealing.opened(shop, place, about) as clear:
      plain, tokens = verify.unsealed(clear, about)
  except Refused as error:
    shop.catalog.audit(principal.name, right, id or key[:80], 'refused',
                       code=error.code)
    raise
  shop.catalog.audit(principal.name, right, id, 'allowed')
  if allowed.redacted:
    about, plain, tokens = access.redact(about), None, None
  return verify.Verified(id, about, plain, tokens, vouched)


@contextlib.contextmanager
def opened(path):
  """Yields the directory of an artifact given as a directory or as a file."""
  path = pathlib.Path(path)
  if path.is_dir():
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    portable.unpack(path, folder)
    yield pathlib.Path(folder)


def withdraw(shop, key: str, principal: Principal) -> list[tuple[str, str]]:
  """Revokes an artifact, and its descendants where its scope says so.

  Returns:
    The entries added to the revocation list: (kind, value).

  Raises:
    Refused: the principal may not.
  """
  found = examine(shop, key, principal, 'revoke')
  entries = [('artifact', found.id)]
  if found.about['governance']['revoke_scope'] == 'descendants':
    entries += [('artifact', id) for id in shop.catalog.descendants(found.id)]
  with shop.catalog.transaction():
    shop.catalog.keep_revocations(revoke.extended(
        shop.catalog.revocations(), entries, now=shop.catalog.clock()))
  return entries


def describe(found: verify.Verified) -> list[str]:
  """Returns what an artifact is, in lines for a person."""
  about = found.about
  state, model, source = about['state'], about['model'], about['provenance']
  rules, size = about['governance'], about['state']['logical_bytes']
  whose = rules['owner'] + (f' of {rules["org"]}' if rules['org'] else '')
  origin = 'of its own' if source['root'] == 'self' else (
      f'from {source["parents"][0]["id"]}, family {source["root"]}')
  lists = ', '.join(f'{entry["who"]} may {"/".join(entry["may"])}'
                    for entry in rules['acl'])
  lines = [
      f'{found.id}',
      f'  what: {about["kind"]} state after {state["length"]} tokens, '
      f'{state["n_pending"]} pending; {len(state["leaves"])} leaves, '
      f'{size:,} bytes',
      f'  whose: {whose}; class {rules["class"]}, export {rules["export"]}, '
      f'{lists or "nobody else may resume it"}',
      f'  until: {rules["not_after"] or "no end"}',
      f'  model: {model["family"] or "unnamed"}, parameters {model["params"]}, '
      f'{len(model["adapters"])} adapters',
      f'  tokenizer: {about["tokenizer"]["digest"] or "none"} of '
      f'{about["tokenizer"]["vocab"]} ids',
      f'  made: {source["how"]} at {about["created"]}, {origin}, depth '
      f'{source["depth"]}, by {source["producer"]}',
      f'  program: jax {about["numerics"]["jax"]} on '
      f'{about["numerics"]["device"]}, {about["numerics"]["mesh"]}',
      f'  transcript: {"kept" if state["transcript"] == "keep" else "not kept"}'
      f'; sealed: {about["sealed"]}',
      f'  policies: system {_short(about["policy"]["system"])}, safety '
      f'{_short(about["policy"]["safety"])}, epoch {about["policy"]["epoch"]}; '
      f'{len(about["tools"]["items"])} tools',
      f'  vouched for by: {found.vouched or "nobody asked"}']
  lines += [f'  {name}: {value}' for name, value in about.items()
            if name.startswith('x-')]
  return lines


def _short(keyed):
  return keyed[:22] or 'none'
