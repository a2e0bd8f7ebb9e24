"""What is asked about an artifact without touching its arrays. Imports no jax.

Each answer is a decision, and stands in the audit log of the store.
"""

import dataclasses
import time
from secrets import token_hex

from statejax.artifact import (
  access,
  collect,
  foreign,
  layout,
  manifest,
  revoked,
  sealing,
  trust,
  verify,
)
from statejax.artifact.access import Principal
from statejax.artifact.objects import said
from statejax.artifact.outcome import Refused, absent


def examine(shop, key: str, principal: Principal, right: str, *,
            action: str = '') -> verify.Verified:
  """Verifies an artifact for a right, all but its arrays: V1 to V7, V9, V11.

  V9 and V11 not where it shall be revoked or deleted. What does not count any
  more, as its key was retired, can be looked at, revoked and deleted all the
  same.

  Args:
    shop: `objects.Store`.
    key: id, beginning of one, or name.
    principal: who asks.
    right: of `access.RIGHTS`; with 'inspect' a revoked or expired one is shown.
    action: for the log: what it is asked for; '' is the right.

  Raises:
    Refused: the first check that fails; it is in the log. Who may not see the
      artifact is told that there is none; the log tells why.
  """
  id, plain, tokens = '', None, None
  try:
    id = shop.find(key)
    place = shop.place(id)
    with said(), shop.catalog.lease(id, token_hex(8)):
      found, data, about, _ = verify.head(place, name=id)
      vouched, why = _vouched(shop, place, found, data, about, right)
      # To end it nobody need know whether it is ended.
      hit = right in access.GRANTABLE and revoked.why(shop, id, about)
      stems = foreign.above(shop, about)
      allowed = access.require(about, principal, right, revoked=bool(hit),
                               now=shop.catalog.clock())
      if right in access.USES:  # what somebody else has revoked counts too
        revoked.valid(shop, id, about, vouched, stems)
      if right in access.GRANTABLE:  # to end one it need not be whole
        layout.check(place, found, about)
      # The key of what is sealed and revoked is destroyed.
      if right in access.GRANTABLE and not (hit and about['sealed'] != 'none'):
        with sealing.opened(shop, place, about) as clear:
          plain, tokens = verify.unsealed(clear, about)
  except Refused as error:
    shop.catalog.audit(str(principal), action or right, id or key[:80],
                       'refused', code=error.code)
    if unseen(shop, id, principal):
      raise absent(key) from None
    raise
  shop.catalog.audit(str(principal), action or right, id, 'allowed')
  if allowed.redacted:
    about, plain, tokens = access.redact(about), None, None
  return verify.Verified(id, about, plain, tokens, vouched, why,
                         tuple(map(str, stems)))


def _vouched(shop, folder, found, data, about, right):
  """(who vouches for an artifact, why nobody does) if that will do for a right.
  """
  try:
    return trust.vouch(shop, folder, found, data, about), ''
  except Refused as error:
    # What is asked for by its name, the digest of its manifest, says itself
    # whose it is.
    if right in access.USES or right == 'inspect' and error.code not in (
        'E_TRUST', 'E_UNSIGNED'):
      raise
    return '', str(error)


def unseen(shop, id: str, principal: Principal) -> bool:
  """Whether an artifact must be told as one that is not there.

  Of one whose manifest cannot be read nobody knows whose it is: it is not
  hidden.

  Args:
    shop: `objects.Store`.
    id: of the artifact, '' where none was found.
    principal: who asks.
  """
  try:
    data = layout.read(shop.place(id), manifest.NAME) if id else b''
    about = manifest.parse(data)
  except (Refused, OSError):
    return False
  return manifest.artifact_id(data) == id and not access.sees(
      about, principal, shop.catalog.clock())


def known(shop, folder) -> verify.Verified:
  """Verifies an artifact from elsewhere, all but its arrays.

  Nobody vouches for it where only another store can know it, or where it is
  signed by nobody who is trusted here; `obstacle` says why.

  Args:
    shop: `objects.Store`.
    folder: the artifact.

  Raises:
    Refused: the first check that fails; E_SIG also of a signature that is none.
  """
  found = verify.verify(folder)
  walk, data, about, _ = verify.head(folder)
  try:
    vouched = trust.vouch(shop, folder, walk, data, about)
  except Refused as error:
    if walk.voucher == layout.SIG and error.code == 'E_SIG':
      raise
    return dataclasses.replace(found, why=str(error))
  return dataclasses.replace(found, vouched=vouched)


def obstacle(shop, folder, principal: Principal,
             right: str = 'resume') -> Refused | None:
  """Returns the first reason why a right does not hold here, None for none.

  Who vouches for the artifact, what was revoked, who asks, whether the key of a
  sealed one is here: all that no model decides. Nothing is written down.

  Args:
    shop: `objects.Store`.
    folder: the artifact, of this store or from elsewhere, its files verified.
    principal: who asks.
    right: of `access.RIGHTS`.
  """
  try:
    found, data, about, id = verify.head(folder)
    vouched = trust.vouch(shop, folder, found, data, about)
    revoked.valid(shop, id, about, vouched)
    access.require(about, principal, right, now=shop.catalog.clock())
    if about['sealed'] != 'none':
      sealing.data_key(shop, id, about)
  except Refused as error:
    return error
  return None


def ended(shop, found: verify.Verified) -> dict[str, str]:
  """Returns in words whether an artifact is revoked here, and whether its time
  is over, for a line of output.
  """
  hit = revoked.why(shop, found.id, found.about)
  end = found.about['governance']['not_after']
  over = 0 < end <= shop.catalog.clock()
  return {'revoked': f'by {hit}' if hit else 'no',
          'expired': f'at {end}' if over else 'no'}


def withdraw(shop, key: str, principal: Principal) -> list[tuple[str, str]]:
  """Revokes an artifact, and its descendants where its scope says so.

  By what else there is see `withdraw.withdraw`. The keys of what is sealed are
  destroyed; see `shred`.

  Returns:
    The entries added to the revocation list: (kind, value).

  Raises:
    Refused: the principal may not.
  """
  found = examine(shop, key, principal, 'revoke')
  entries = [('artifact', found.id)]
  if found.about['governance']['revoke_scope'] == 'descendants':
    entries.append(('root', found.id))
  revoked.withdraw(shop, entries, str(principal), org=principal.org)
  return entries


def delete(shop, key: str, principal: Principal) -> str:
  """Deletes an artifact; returns its id.

  Of one that is damaged or lost the ledger knows whose it is.

  Raises:
    Refused: the principal may not.
  """
  id = _damaged(shop, key, principal) or examine(
      shop, key, principal, 'delete').id
  collect.delete(shop, id, str(principal), action='deleted')
  return id


def _damaged(shop, key, principal):
  """Id of the principal's artifact that does not say any more whose it is, ''
  of any other one.
  """
  try:
    id = shop.find(key)
  except Refused:
    return ''
  try:
    verify.head(shop.place(id), name=id)
    return ''
  except (Refused, OSError):
    if not principal.name or shop.catalog.owner(id) != str(principal):
      return ''
  shop.catalog.audit(str(principal), 'delete', id, 'allowed')
  return id


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
      f'  until: {_date(rules["not_after"]) or "no end"}',
      f'  model: {model["family"] or "unnamed"}, parameters {model["params"]}, '
      f'{len(model["adapters"])} adapters',
      f'  tokenizer: {about["tokenizer"]["digest"] or "none"} of '
      f'{about["tokenizer"]["vocab"]} ids',
      f'  made: {source["how"]} at {_date(about["created"])}, {origin}, depth '
      f'{source["depth"]}, by {source["producer"]}',
      f'  program: jax {about["numerics"]["jax"]} on '
      f'{about["numerics"]["device"]}, {about["numerics"]["mesh"]}',
      f'  transcript: {"kept" if state["transcript"] == "keep" else "not kept"}'
      f'; sealed: {about["sealed"]}',
      f'  edits: {_edits(found.plain)}',
      f'  policies: system {_short(about["policy"]["system"])}, safety '
      f'{_short(about["policy"]["safety"])}, epoch {about["policy"]["epoch"]}; '
      f'{len(about["tools"]["items"])} tools',
      f'  vouched for by: {found.vouched or _nobody(found)}',
      *(f'  as long as counts: {one}' for one in found.stems)]
  lines += [f'  {name}: {value}' for name, value in about.items()
            if name.startswith('x-')]
  return lines


def lineage(shop, key: str, principal: Principal) -> list[str]:
  """Returns an artifact's family in lines, parents before children.

  Only what the principal may inspect, each by a decision of its own. Of a
  parent that may not be seen, or is not here, its child tells the id.

  Args:
    shop: `objects.Store`.
    key: id, beginning of one, or name.
    principal: who asks.

  Raises:
    Refused: the artifact itself is not whole, or may not be inspected.
  """
  first = examine(shop, key, principal, 'inspect')
  names: dict[str, list[str]] = {}
  for name, (id, _) in shop.catalog.refs().items():
    names.setdefault(id, []).append(name)
  seen: dict[str, verify.Verified | Refused] = {first.id: first}
  def look(id):
    if id not in seen:
      try:
        seen[id] = examine(shop, id, principal, 'inspect')
      except Refused as error:
        seen[id] = error
    return seen[id]
  above, edge = [first.id], [first.id]
  while edge:
    edge = [parent['id'] for id in edge
            for parent in _parents(look(id)) if parent['id'] not in above]
    above += dict.fromkeys(edge)
  below = [id for id in shop.catalog.descendants(first.id)
           if isinstance(look(id), verify.Verified)]
  depths = {id: found.about['provenance']['depth']
            for id in (*above, *below)
            if isinstance(found := look(id), verify.Verified)}
  lines = []
  for id in sorted({*above, *below}, key=lambda id: (depths.get(id, -1), id)):
    mark = '*' if id == first.id else ' '
    found = look(id)
    if isinstance(found, Refused):
      lines.append(f'{mark} {id}  not to be seen here')
      continue
    about = found.about
    parents = ', '.join(f'{parent["role"]} of {parent["id"][:16]}'
                        for parent in _parents(found)) or 'of its own'
    lines.append(
        f'{mark} {id}  depth {depths[id]}, {about["kind"]}, '
        f'{about["state"]["length"]} tokens, {about["provenance"]["how"]} at '
        f'{about["created"]}, {parents}'
        + ''.join(f', named {name}' for name in names.get(id, ())))
  return lines


def _parents(found):
  """The parents that an artifact names; none where it cannot be seen."""
  return [] if isinstance(found, Refused) else (
      found.about['provenance']['parents'])


def difference(one: verify.Verified, two: verify.Verified) -> list[str]:
  """Returns in lines what two verified artifacts do not have in common.

  Fields of their manifests, then leaves by their digests and kept tokens where
  both may be seen; no arrays are read.
  """
  left, right = (dict(_flat(found.about)) for found in (one, two))
  lines = [f'{name}: {left.get(name, "none")} | {right.get(name, "none")}'
           for name in sorted(left.keys() | right.keys())
           if left.get(name) != right.get(name)]
  if one.plain is not None and two.plain is not None:
    a, b = one.plain['leaves'], two.plain['leaves']
    other = [path for path in sorted(a.keys() | b.keys())
             if a.get(path) != b.get(path)]
    lines.append(f'leaves: {len(other)} of {len(a.keys() | b.keys())} differ'
                 + ''.join(f'\n  {path}' for path in other))
    a, b = one.plain['edits'], two.plain['edits']
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y),
                min(len(a), len(b)))
    if a or b:
      lines.append(f'edits: the first {same} are the same, then '
                   f'{_places(a[same:])} | {_places(b[same:])}')
  if one.tokens is not None and two.tokens is not None:
    same = next((i for i, (x, y) in enumerate(zip(one.tokens, two.tokens))
                 if x != y), min(len(one.tokens), len(two.tokens)))
    lines.append(f'tokens: the first {same} are the same, then '
                 f'{len(one.tokens) - same} | {len(two.tokens) - same}')
  return lines


def _edits(plain):
  """Edits of a state for a person."""
  return 'not to be seen' if plain is None else _places(plain['edits'])


def _places(edits):
  """How many edits, and after how many tokens each, the first of them."""
  at = [str(length) for length, _ in edits[:8]] + ['...'] * (len(edits) > 8)
  return f'{len(edits)}, after {", ".join(at)} tokens' if edits else 'none'


def _flat(about, prefix=''):
  """Yields (name, value) of a manifest's fields, but for what always differs.
  """
  for name, value in about.items():
    if isinstance(value, dict):
      yield from _flat(value, f'{prefix}{name}.')
    elif prefix + name not in ('nonce', 'created', 'files', 'state.leaves'):
      yield prefix + name, value


def _date(seconds):
  """A time for a person, '' for none."""
  return seconds and time.strftime('%Y-%m-%d %H:%M:%S UTC',
                                   time.gmtime(seconds))


def _nobody(found):
  return f'nobody who counts here: {found.why}' if found.why else 'nobody asked'


def _short(keyed):
  return keyed[:22] or 'none'
