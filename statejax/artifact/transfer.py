"""Artifacts that leave a store as one file, and come into another one.

What leaves is a new artifact: sealed, signed, without its transcript. What
comes in is nobody's word but its signer's: every check of a load is made before
it is kept. Needs the extra [sign].
"""

import pathlib
import shutil
from secrets import token_hex

from statejax.artifact import (
  access,
  bucket,
  canonical,
  desk,
  grant,
  identity,
  keys,
  layout,
  load,
  manifest,
  portable,
  revoke,
  revoked,
  sealing,
  trust,
  verify,
)
from statejax.artifact.access import Principal
from statejax.artifact.objects import Kept, said
from statejax.artifact.outcome import Refused

NO_TEXTS = identity.Texts()


def export(shop, key: str, principal: Principal, signer: keys.Signer, path, *,
           texts: identity.Texts = NO_TEXTS) -> str:
  """Writes an artifact as one new file, or into a bucket; returns its new id.

  Args:
    shop: `objects.Store`.
    key: id, beginning of one, or name.
    principal: needs the right to export it.
    signer: in the name of the artifact's organisation.
    path: of the file, which must not exist; or the URL of a bucket and a path
      in it, see `bucket`.
    texts: those that the artifact was minted under, with the secret of its
      organisation. Digests of them are exchanged for such as the holder of a
      grant can compare, see `sealing.exchange_key`; those of other texts stay,
      and only stores of the organisation can resume it.

  Raises:
    Refused: not allowed, or not whole; E_TRUST: the trust document of the store
      does not let the signer vouch for it, so that nobody would take it in.
  """
  if not bucket.is_url(path) and pathlib.Path(path).exists():
    raise ValueError(f'{path}: exists already, and nothing is overwritten; '
                     'choose another name.')
  found = desk.examine(shop, key, principal, 'export')
  with shop.catalog.refusals(str(principal), 'export', found.id):
    trust.may_sign(shop, signer, found.about['governance']['org'], 'mint')
  source = found.about['provenance']
  about = found.about | {
      'created': shop.catalog.clock(), 'nonce': token_hex(16),
      'sealed': 'aes256gcm1',
      'state': found.about['state'] | {'transcript': 'none'},
      'provenance': {
          'root': found.id if source['root'] == 'self' else source['root'],
          'parents': _exported(found),
          'depth': source['depth'] + 1, 'producer': signer.name,
          'how': 'exported'}}
  data_key = sealing.export_key(sealing.seed(shop, found.id, found.about),
                                about['nonce'])
  about = identity.exchanged(about, texts, sealing.exchange_key(data_key))
  wrapped, about['seal'] = sealing.new_key(
      shop, about, shop.secrets.org_name(about['governance']['org'], 'kek'),
      data_key)
  with shop.catalog.refusals(str(principal), 'export', found.id), said(), (
      shop.catalog.lease(found.id, token_hex(8))), shop.stage() as folder:
    with sealing.opened(shop, shop.place(found.id), found.about) as clear, (
        sealing.scratch(shop)) as bare:
      for name, _, _ in found.about['files']:
        if name not in (manifest.TOKENS, manifest.SLOTS):
          (bare / name).parent.mkdir(parents=True, exist_ok=True)
          shutil.copyfile(clear / name, bare / name)
      sealing.seal_tree(bare, folder, about['nonce'], wrapped)
    data = manifest.dumps(about | {'files': layout.listing(folder)})
    (folder / manifest.NAME).write_bytes(data)
    signer(folder, data)
    id = manifest.artifact_id(data)
    if bucket.is_url(path):
      # Before: from a bucket nothing is taken back.
      _log(shop, principal, found.id, id, 'written')
      bucket.push(folder, path)
      return id
    portable.pack(folder, path)
  try:
    _log(shop, principal, found.id, id, 'written')
  except BaseException:
    pathlib.Path(path).unlink()  # nothing leaves that is not in the log
    raise
  return id


def receive(shop, path, principal: Principal, *, host=None, ref: str = '',
            granted: tuple[bytes, bytes] | None = None) -> Kept:
  """Verifies a file as a stranger's, and keeps it as it is.

  Args:
    shop: `objects.Store`; its trust says whose signatures count.
    path: of the file, or a URL, "/" and an id.
    principal: must at least be allowed to look at it.
    host: `identity.Host`, to verify its arrays too (V12 to V15); None leaves
      that to the first load, which does it anyway.
    ref: a new name for it, '' for none.
    granted: a grant and the holder's private key, of another organisation's.

  Raises:
    Refused: the first check that fails; it is in the log, and nothing is kept.
  """
  id = ''
  try:
    with said(), shop.stage() as folder:
      if bucket.is_url(path):
        bucket.pull(*bucket.split(path), folder, max_bytes=shop.quota)
      else:
        portable.unpack(path, folder, max_bytes=shop.quota)
      found, data, about, id = verify.head(folder, max_bytes=shop.quota,
                                           foreign=True)
      if found.voucher != layout.SIG:
        raise Refused('E_UNSIGNED', f'expected {layout.SIG}, got '
                      f'{found.voucher}, which only its own store can check')
      vouched = trust.vouch(shop, folder, found, data, about)
      revoked.valid(shop, id, about, vouched)
      sealing.check_foreign(about)
      if granted is not None:
        principal = _shown(shop, about, id, principal, *granted)
      access.require(about, principal, 'inspect', now=shop.catalog.clock())
      shop.room(sum(found.files.values()))
      layout.check(folder, found, about)
      if granted is not None and not principal.grant_fault:
        grant.keep_key(shop, granted[1], grant.read(
            shop, granted[0], about, id), about, id, folder)
      with sealing.opened(shop, folder, about) as clear:
        plain, _ = verify.unsealed(clear, about)
        if host is not None:
          load.restore(clear, about, plain, host, about['state']['length'])
      return shop.take_in(folder, id, about, str(principal), ref)
  except Refused as error:
    shop.catalog.audit(str(principal), 'import', id or 'unknown', 'refused',
                       code=error.code)
    raise


def push(shop, key: str, principal: Principal, url: str) -> str:
  """Copies an artifact to a bucket as it is, to `pull` it; returns its id.

  Only what may be exported, which therefore is sealed.

  Args:
    shop: `objects.Store`.
    key: id, beginning of one, or name.
    principal: needs the right to export it.
    url: of the bucket and the path in it.

  Raises:
    Refused: not allowed, or not whole; what `bucket.push` raises.
  """
  found = desk.examine(shop, key, principal, 'export')
  with shop.catalog.refusals(str(principal), 'export', found.id), said(), (
      shop.catalog.lease(found.id, token_hex(8))):
    _log(shop, principal, found.id, found.id, 'pushed')
    # To `pull` it after it was deleted here, which destroys its other key.
    sealing.keep_pushed(shop, found.id, found.about)
    bucket.push(shop.place(found.id), url)
  return found.id


def pull(shop, url: str, id: str, principal: Principal, *,
         ref: str = '') -> Kept:
  """Copies an artifact back from a bucket that this store has pushed it to.

  For what another store vouches for see `receive`.

  Args:
    shop: `objects.Store`.
    url: of the bucket and the path in it.
    id: of the artifact.
    principal: must at least be allowed to look at it.
    ref: a new name for it, '' for none.

  Raises:
    Refused: the first check that fails; it is in the log, and nothing is kept.
  """
  try:
    with said(), shop.stage() as folder:
      bucket.pull(url, id, folder, max_bytes=shop.quota)
      found, data, about, _ = verify.head(folder, name=id, max_bytes=shop.quota)
      verify.vouch(folder, found, data, shop.secret)
      revoked.valid(shop, id, about, 'mac')
      access.require(about, principal, 'inspect', now=shop.catalog.clock())
      shop.room(sum(found.files.values()))
      layout.check(folder, found, about)
      return shop.take_in(folder, id, about, str(principal), ref)
  except Refused as error:
    shop.catalog.audit(str(principal), 'import', id, 'refused',
                       code=error.code)
    raise


def _log(shop, principal, source, id, outcome):
  with shop.catalog.transaction():
    grant.use(shop, principal, source)
    shop.catalog.audit(str(principal), 'export', id, outcome)
    shop.catalog.charge(str(principal), source, exports=1)


def _shown(shop, about, id, principal, data, private):
  """The principal with what their own grant gives."""
  nonce = grant.challenge(shop)
  return grant.present(shop, data, about, id, principal, nonce,
                       grant.prove(private, nonce, data))


def _exported(found):
  """Parents of what is exported: it, and what it was itself exported from.

  All of them are the same by other names, by any of which it can be revoked.
  Of more than a manifest can name the first one stays, its owner's.
  """
  parents = [{'id': found.id, 'role': 'exported'}, *(
      parent for parent in found.about['provenance']['parents']
      if parent['role'] == 'exported')]
  return parents[:7] + parents[7:][-1:]


def issue_revocations(shop, signer: keys.Signer,
                      org: str | None = None) -> bytes:
  """Returns what an organisation has revoked here, as a document for others.

  It also has what its other stores have revoked, as far as their lists are
  installed here: so it can take the place of the list of a store that is there
  no more.

  Args:
    shop: `objects.Store`.
    signer: a key that may revoke.
    org: the organisation; None is the one for which the store's trust document
      lets the key revoke.

  Raises:
    Refused: E_TRUST: it lets it revoke for none, or a list that was installed
      here is not there as it was; E_LIMIT: more entries than a list has room
      for.
    ValueError: no organisation is named, and the trust document names none or
      several.
  """
  org = _revoking(shop, signer) if org is None else org
  trust.may_sign(shop, signer, org, 'revoke')
  entries = [{'entries': revoked.published(shop, org)}]
  if (theirs := revoked.kept(shop, org)) is not None:
    entries.append(theirs)
  with shop.catalog.transaction():
    own = revoke.extended(shop.catalog.revocations(org), (),
                          now=shop.catalog.clock())
    # Of a store with a list of an earlier release no number is used again.
    everybodys = shop.catalog.revocations() or {'number': 0}
    body = own | {'number': own['number'] + everybodys['number'],
                  'entries': revoke.together(entries)}
    revoke.check(body)
    shop.catalog.keep_revocations(own, org, principal=signer.name)
  return signer.document('crl', canonical.dumps(body))


def _revoking(shop, signer):
  """The one organisation for which a key may revoke."""
  known = trust.believed(shop)
  found = [org for org, entries in (known.orgs if known else {}).items()
           if any(f'key:{keys.hint(entry["pem"])}' == signer.name
                  and entry['status'] == 'active' and 'revoke' in entry['may']
                  for entry in entries)]
  if known is not None and not found:
    raise Refused('E_TRUST', f'{signer.name[:20]}: expected a key that the '
                  'trust document lets revoke, got another one: nobody would '
                  'take the list')
  if len(found) != 1:
    raise ValueError(f'--org: expected the organisation whose list it is, got '
                     f'none; the trust document names {len(found)} for this '
                     'key.')
  return found[0]
