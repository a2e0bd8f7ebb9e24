"""Minting: one row of a state becomes an artifact, or nothing happens.

The row is taken and checked while the state stands still; what follows works on
a copy. See `objects.Store.keep` for what makes it durable.

An artifact is written by one process, which must hold all of the state: there
is no barrier at which several could meet. A state that is spread over the
devices of several processes is refused.
"""

import contextlib
import dataclasses
import errno
import functools
import os
from secrets import token_hex

import numpy as np

from statejax import state as st
from statejax.artifact import (
  access,
  canonical,
  digest,
  grant,
  identity,
  manifest,
  names,
  revoked,
  sealing,
  standing,
  store,
)
from statejax.artifact.access import Principal
from statejax.artifact.objects import Kept, said
from statejax.artifact.outcome import Refused

# Units of the ledger that whoever mints may name; the rest is counted here.
SPENT = ('device_us',)
# No sound leaf holds larger numbers, by role.
CAPS = dict.fromkeys(manifest.ROLES[:8], 1e9)


@dataclasses.dataclass(frozen=True)
class Terms:
  """To whom an artifact belongs and what it may be used for.

  Attributes:
    owner: principal.
    org: organisation, '' for none.
    sensitivity: 'public', 'internal', 'confidential' or 'restricted'.
    acl: (who, rights) of members of the organisation; 'org:NAME' is all.
    export: 'never', 'listed', 'org' or 'any': by whom; see `access.decide`.
    not_after: unix seconds, 0 for no end.
    revoke_scope: 'self', or 'descendants': revoking it revokes these.
    workflow: name for the accounts.
    kind: 'live', 'prefix', 'tuned' or 'compacted'.
    how: 'absorbed', 'trained', 'compacted', 'migrated' or 'exported'.
    sealed: whether to seal it even where it need not be.
  """

  owner: str
  org: str = ''
  sensitivity: str = 'internal'
  acl: tuple[tuple[str, tuple[str, ...]], ...] = ()
  export: str = 'never'
  not_after: int = 0
  revoke_scope: str = 'self'
  workflow: str = ''
  kind: str = 'live'
  how: str = 'absorbed'
  sealed: bool = False

  @classmethod
  def of(cls, about: dict, **changes) -> 'Terms':
    """Returns the terms of a manifest: what stems from it keeps them.

    Args:
      about: the manifest.
      **changes: fields that differ.
    """
    rules = about['governance']
    kept = cls(
        rules['owner'], rules['org'], rules['class'],
        tuple((e['who'], tuple(e['may'])) for e in rules['acl']),
        rules['export'], rules['not_after'], rules['revoke_scope'],
        rules['workflow'], sealed=about['sealed'] != 'none')
    return dataclasses.replace(kept, **changes)

  def check(self, now: int):
    """Raises unless an artifact can have these terms from now on.

    Args:
      now: unix seconds.

    Raises:
      Refused: E_MANIFEST, naming the field; E_EXPIRED: they have ended already.
    """
    try:
      manifest.GRAMMAR.fields['governance'](self.group(''), 'governance')
    except ValueError as error:
      raise Refused('E_MANIFEST', str(error)) from None
    if 0 < self.not_after <= now:
      raise Refused('E_EXPIRED', f'governance.not_after: expected 0 or more '
                    f'than {now}, which is now, got {self.not_after}')

  def group(self, persona: str) -> dict:
    """Returns the group `governance`."""
    return {'org': self.org, 'owner': self.owner, 'class': self.sensitivity,
            'persona': persona, 'workflow': self.workflow,
            'acl': [{'who': who, 'may': list(may)} for who, may in self.acl],
            'export': self.export, 'not_after': self.not_after,
            'revoke_scope': self.revoke_scope}


@dataclasses.dataclass(frozen=True)
class Transcript:
  """What a row has absorbed, as the host knows it.

  Attributes:
    tokens: absorbed ids.
    edits: (length, 64 hex) of each edit; see `names.witness`.
    keep: whether the artifact holds the tokens, so that it can be absorbed
      again; else only their chain key.
  """

  tokens: tuple[int, ...]
  edits: tuple[tuple[int, str], ...] = ()
  keep: bool = False


@dataclasses.dataclass(frozen=True)
class Edited:
  """What edits of a row have left beside it.

  Attributes:
    edits: (length, 64 hex) of each, in order; see `names.witness`. Those of a
      transcript stand for them where there is one.
    salts: of the objects of its slots, 'layer/number' -> 32 hex digits; see
      `journal`. They are in no transfer.
  """

  edits: tuple[tuple[int, str], ...] = ()
  salts: dict[str, str] = dataclasses.field(default_factory=dict)


UNEDITED = Edited()


@dataclasses.dataclass(frozen=True)
class Parent:
  """An artifact from which a state stems: its id and its manifest."""

  id: str
  about: dict


def mint(shop, state, row: int, host: identity.Host, terms: Terms, *,
         principal: Principal | None = None,
         transcript: Transcript | None = None, edited: Edited = UNEDITED,
         parent: Parent | None = None, slots: Parent | None = None,
         stands: standing.Standing | None = None,
         account: dict[str, int] | None = None,
         spent: dict[str, int] | None = None, mint_key: str = '',
         ref: str = '', expect: int = 0, vouch=None) -> Kept:
  """Makes an artifact of one row; the state stays usable.

  Args:
    shop: `objects.Store`.
    state: `ServingState`.
    row: of it.
    host: what this process is; the state must be of its schema.
    terms: see `Terms`; they name who acts as the owner. Of somebody else's
      parent they are its own, `Terms.of`.
    principal: who acts: named in the log, and accounted for the tokens; the
      bytes are the owner's. None is the owner.
    transcript: what the row has absorbed; without it there is no chain key.
    edited: what edits of it are to be kept with it: those of the parent, as a
      load returns them, then others.
    parent: from which the state went on; None for none. Its persona stays, if
      the host names none.
    slots: another one, beside a parent, whose slots were merged into it: the
      principal needs the same rights to it, and revoking what stems from either
      revokes what comes of both.
    stands: where the host knows the row to stand, e.g. where what was loaded
      stood and then `after` more tokens. Without it and a transcript the
      witness is taken as it is.
    account: tokens and times for the manifest's group `account`, of all that
      it took to come here.
    spent: further units for the ledger, of `SPENT`, e.g. {'device_us': 5}:
      what it took since the parent.
    mint_key: of this request of the principal, so that a retry makes no second
      one.
    ref, expect: see `objects.Store.keep`.
    vouch: `keys.Signer`; None vouches by the store's own code.

  Returns:
    `objects.Kept`: id, receipt, name.

  Raises:
    Refused: E_WITNESS, E_DIGEST, E_NONFINITE, E_BOUNDS: the state is not sound,
      or edits of the parent are left out;
      E_REVOKED: the parent is; E_ACL: in another's name, other terms than the
      parent's and not by its owner, or no right to resume or fork the parent;
      E_LIMIT: too many edits; E_NOSPACE, E_IO: it could not be kept. Nothing is
      left then but a row of the log.
    ValueError: it is not a state of the host's model, or not all of it is in
      this process; no such unit; the key of another request; slots of another
      one without a parent that has the rest.
  """
  if slots is not None and parent is None:
    raise ValueError('slots: expected a parent too, of which the rest of the '
                     'state is, got none; name it.')
  principal = principal or Principal(terms.owner, terms.org)
  _check_spent(spent or {})
  decided = functools.partial(shop.catalog.refusals, str(principal), 'mint',
                              ref or (parent.id if parent else ''))
  schema = host.schema_of(st.rows(state), st.capacity(state) or 0,
                          identity.Carried.of(state))
  st.validate(state, schema)
  _require_here(state)
  live = st.live(state, row)
  with decided():
    check(live)
    now = shop.catalog.clock()
    _entitled(shop, parent, terms, principal, slots, now)
    if transcript is not None:
      _check_transcript(live, transcript)
      edited = dataclasses.replace(edited, edits=transcript.edits)
    _goes_on(shop, parent, terms, edited.edits)
    if len(edited.edits) > manifest.MAX_EDITS:
      raise Refused('E_LIMIT', f'edits: expected at most {manifest.MAX_EDITS}, '
                    f'got {len(edited.edits)}; absorb the tokens again, and '
                    'edit what comes of that')
    if stands is not None:
      stands.require(live)
    about = _manifest(live, host, terms, transcript, parent, slots, account,
                      vouch) | {'created': now}
    shop.room(about['state']['logical_bytes'])
  with decided(), said(), shop.stage() as folder:
    if terms.sealed or manifest.must_seal(about):
      key, group = sealing.new_key(
          shop, about, sealing.own_name(shop, about['nonce']))
      about |= {'sealed': 'aes256gcm1', 'seal': group}
      with sealing.scratch(shop) as clear:
        _fill(clear, live, about, transcript, edited)
        sealing.seal_tree(clear, folder, about['nonce'], key)
    else:
      _fill(folder, live, about, transcript, edited)
    tokens = int(live.length) - (
        parent.about['state']['length'] if parent else 0)
    return shop.keep(
        folder, about, mint_key=mint_key or token_hex(16),
        principal=str(principal), action='mint', ref=ref, expect=expect,
        vouch=vouch, code=host.mark,
        charges={'tokens_absorbed': max(0, tokens)} | (spent or {}))


def may_go_on(shop, parent: Parent, terms: Terms, principal: Principal,
              slots: Parent | None = None):
  """Raises where a child as large as its parent may not be made, see `mint`.

  For who writes something down elsewhere before the child is there.

  Args:
    shop: `objects.Store`.
    parent, terms, principal, slots: see `mint`.

  Raises:
    Refused: E_ACL, E_EXPIRED, E_GRANT, E_REVOKED, E_MANIFEST, E_NOSPACE.
  """
  with shop.catalog.refusals(str(principal), 'mint', parent.id):
    _entitled(shop, parent, terms, principal, slots, shop.catalog.clock())
    shop.room(parent.about['state']['logical_bytes'])


def _entitled(shop, parent, terms, principal, slots, now):
  """Raises unless rights and terms let somebody make a child."""
  terms.check(now)
  _may(parent, principal, terms, now)
  for one in filter(None, (parent, slots)):
    # What is revoked while a state lives does not live on in a child.
    revoked.refuse(shop, one.id, one.about)
  about = {'governance': terms.group('')}
  if slots is not None:
    _may_take(slots, principal, now)
    _as_safe(slots, about)
  for one in filter(None, (parent, slots)):
    if not access.owns(one.about, principal):
      _keeps(one, about, terms)


def _check_spent(spent):
  for unit, n in spent.items():
    if unit not in SPENT or type(n) is not int or not (
        0 <= n <= canonical.MAX_INT):
      raise ValueError(f'spent: expected integers from 0 on of {SPENT}, got '
                       f'{unit!r}: {n!r}; the rest is counted by the store.')


def _may(parent, principal, terms, now):
  """Raises unless somebody may make an artifact in the name of an owner.

  It is their own; or of another's, by a right to that, as `_keeps` sees to.
  """
  if parent is not None and not access.owns(parent.about, principal):
    _may_take(parent, principal, now)
  elif not principal.name or (terms.owner, terms.org) != (
      principal.name, principal.org):
    raise Refused('E_ACL', f'owner: expected {str(principal) or "nobody"}, who '
                  f'acts, got {terms.owner} of {terms.org or "no organisation"}'
                  )


def _may_take(parent, principal, now):
  """Raises unless somebody may resume or fork an artifact."""
  rights = [access.decide(parent.about, principal, right, now=now)
            for right in ('resume', 'fork')]
  if not any(found.allowed for found in rights):
    raise Refused(rights[0].code, rights[0].detail)


def _goes_on(shop, parent, terms, edits):
  """Raises unless the edits of what goes on from a parent begin with its own.

  Of a parent that is not here any more, or damaged, nobody knows them; what is
  trained or compacted absorbs anew.
  """
  if parent is None or terms.how not in ('absorbed', 'migrated'):
    return
  try:
    folder, about = shop.place(parent.id), parent.about
    data = sealing.read(shop, folder, about, manifest.PLAIN)
    plain = manifest.parse_plain(data, about)
  except (Refused, OSError):
    return
  before = [(at, mark) for at, mark in plain['edits']]
  if [*edits[:len(before)]] != before:
    raise Refused('E_WITNESS', 'edits: expected them to begin with the '
                  f'{len(before)} of the parent, got {len(edits)}; mint it '
                  'with what the load of the parent returned as edited')


def _require_here(state):
  """Raises unless all of a state is on devices of this process."""
  for path, x, _, _ in st.leaves(state):
    if not getattr(x, 'is_fully_addressable', True):
      raise ValueError(
          f'{path}: expected all of the state on devices of this process, got '
          'parts on those of others; artifacts are written by one process: '
          'gather the row first, e.g. with jax.experimental.multihost_utils.'
          'process_allgather(state, tiled=True), and mint it in one of them.')


def _keeps(parent, about, terms):
  """Raises unless what stems from an artifact is bound as that is."""
  old, new = parent.about['governance'], about['governance']
  for name in old:
    if name != 'persona' and new[name] != old[name]:  # which the host is
      raise Refused('E_ACL', f'governance.{name}: expected {old[name]!r}, as '
                    'of the parent, which only its owner may change, got '
                    f'{new[name]!r}')
  if parent.about['sealed'] != 'none' and not (
      terms.sealed or manifest.must_seal(about)):
    raise Refused('E_ACL', 'sealed: expected it, as the parent is, which only '
                  'its owner may change')


def _as_safe(slots, about):
  """Raises unless slots are guarded here as well as where they come from."""
  theirs, ours = slots.about['governance'], about['governance']
  safe = {
      'class': manifest.CLASSES.index(ours['class']) >= (
          manifest.CLASSES.index(theirs['class'])),
      'export': manifest.EXPORT.index(ours['export']) <= (
          manifest.EXPORT.index(theirs['export'])),
      'not_after': not theirs['not_after'] or (
          0 < ours['not_after'] <= theirs['not_after'])}
  for name, fine in safe.items():
    if not fine:
      raise Refused('E_ACL', f'governance.{name}: expected {theirs[name]!r} or '
                    f'stricter, as of {slots.id}, whose slots are in it, got '
                    f'{ours[name]!r}')


def _fill(folder, live, about, transcript, edited):
  """Writes all files of an artifact but its manifest."""
  named = digest.named_leaves(live)
  try:
    store.save_payload(folder / manifest.PAYLOAD, {
        path: x for path, x in named.items() if x.size})
  except OSError:
    raise
  except Exception as error:  # of any type: the library promises none
    full = os.strerror(errno.ENOSPC) in str(error)
    raise Refused('E_NOSPACE' if full else 'E_IO', 'expected to write the '
                  f'payload, got {type(error).__name__}: {error}') from error
  (folder / manifest.PLAIN).write_bytes(
      _plain(live, about, transcript, edited))
  if edited.salts:
    data = canonical.dumps(edited.salts)
    manifest.parse_slots(data)
    (folder / manifest.SLOTS).write_bytes(data)
  if transcript is not None and transcript.keep:
    waiting = [int(live.pending)] if live.pending >= 0 else []
    (folder / manifest.TOKENS).write_bytes(
        names.pack([*transcript.tokens, *waiting]))


def fork(shop, parent: Parent, principal: Principal, *, ref: str = '',
         mint_key: str = '', vouch=None) -> Kept:
  """Makes a second child of an artifact, which shares its payload's bytes.

  It belongs to whom the parent does, and its list of rights is the same: who
  forks may do with it what they may with the parent, and nothing else. By a
  grant it is a use of that, which names the parent, and so gives nothing of the
  fork unless it is one of the family.

  Args:
    shop: `objects.Store`.
    parent: the artifact, verified.
    principal: who forks: its owner, a member whom its list allows to, or whom a
      grant does.
    ref, mint_key, vouch: see `mint`.

  Raises:
    Refused: of `may_fork`; E_NOSPACE, E_IO.
  """
  with shop.catalog.refusals(str(principal), 'fork', parent.id):
    may_fork(shop, parent, principal)
    return _fork(shop, parent, principal, ref, mint_key, vouch)


def may_fork(shop, parent: Parent, principal: Principal):
  """Raises unless somebody may make a second child of an artifact that stays.

  Raises:
    Refused: E_ACL, E_GRANT, E_EXPIRED, E_REVOKED.
  """
  access.require(
      parent.about, principal, 'fork', now=shop.catalog.clock(), revoked=bool(
          revoked.why(shop, parent.id, parent.about)))


def _fork(shop, parent, principal, ref, mint_key, vouch):
  about = parent.about | {
      'nonce': token_hex(16), 'created': shop.catalog.clock(),
      'provenance': _provenance(parent, 'absorbed', vouch)}
  source = shop.place(parent.id)
  with said(), shop.catalog.lease(parent.id, token_hex(8)), (
      shop.stage()) as folder:
    if about['sealed'] != 'none':
      # Its bytes are bound to its name: they are sealed anew.
      key, about['seal'] = sealing.new_key(
          shop, about, sealing.own_name(shop, about['nonce']))
      with sealing.opened(shop, source, parent.about) as clear:
        sealing.seal_tree(clear, folder, about['nonce'], key)
    else:
      for name, _, _ in parent.about['files']:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).hardlink_to(source / name)
    # A use of a grant is counted with what came of it, or not at all.
    with shop.catalog.transaction() if principal.granted else (
        contextlib.nullcontext()):
      grant.use(shop, principal, parent.id)
      return shop.keep(folder, about, mint_key=mint_key or token_hex(16),
                       principal=str(principal), action='fork', ref=ref,
                       vouch=vouch, code=shop.catalog.code(parent.id),
                       charges={'forks': 1})


def check(live):
  """M3, V15: raises unless the numbers of a row can be those of a sound state.

  Raises:
    Refused: E_NONFINITE, E_BOUNDS; names the leaf.
  """
  for path, x, axes, _ in st.leaves(live):
    cap = CAPS.get(identity.role(path, axes))
    if cap is None or x.dtype.kind in 'iub' or not x.size:
      continue
    most = _largest(x)
    if not np.isfinite(most):
      raise Refused('E_NONFINITE', f'{path}: expected finite numbers, got '
                    f'{most}')
    if most > cap:
      raise Refused('E_BOUNDS', f'{path}: expected at most {cap:g}, got '
                    f'{most:g}')
  if not 0 <= int(live.length) <= manifest.MAX_LENGTH or not (
      -1 <= int(live.pending) < names.MAX_TOKEN):
    raise Refused('E_BOUNDS', f'length, pending: expected a length and a token '
                  f'or -1, got {int(live.length)}, {int(live.pending)}')


def _largest(x) -> float:
  """Largest magnitude; NaN and infinity are larger than every number.

  Without the sign, the bits of a float grow with it: one pass, no conversion,
  and piece by piece, as new memory costs more than looking at it.
  """
  kind = np.dtype(f'u{x.dtype.itemsize}')
  mask, most = kind.type(np.iinfo(kind).max >> 1), kind.type(0)
  pieces = np.nditer(x.view(kind), ['external_loop', 'buffered'], order='K',
                     buffersize=1 << 16)
  for piece in pieces:
    most = max(most, (piece & mask).max())
  return float(most.reshape(1).view(x.dtype)[0])


def _check_transcript(live, transcript):
  if len(transcript.tokens) != int(live.length):
    raise Refused('E_WITNESS', f'expected {int(live.length)} tokens, as the '
                  f'state has absorbed, got {len(transcript.tokens)}')
  got = names.witness(list(transcript.tokens), transcript.edits)
  if got != names.lanes(live.witness):
    raise Refused('E_WITNESS', f'expected witness {got} of these tokens, got '
                  f'{names.lanes(live.witness)} in the state')


def _manifest(live, host, terms, transcript, parent, slots, account, vouch):
  groups = host.groups(identity.Carried(
      live.logits is not None, 0 if live.spans is None else len(live.spans)))
  leaves = identity.describe_row(live)
  keep = transcript is not None and transcript.keep
  pending = int(live.pending) >= 0
  groups['state'] |= {
      'length': int(live.length), 'n_pending': int(pending),
      'logical_bytes': sum(map(manifest.nbytes, leaves)),
      'has_logits': live.logits is not None,
      'transcript': 'keep' if keep else 'none', 'leaves': leaves}
  facts = {'tokens_absorbed': int(live.length), 'prefill_tokens': 0,
           'decode_tokens': 0, 'device_us': 0, 'mflop': 0}
  return groups | {
      'format': manifest.FORMAT, 'version': manifest.VERSION,
      'nonce': token_hex(16), 'kind': terms.kind, 'sealed': 'none',
      'provenance': _provenance(parent, terms.how, vouch, slots),
      'governance': terms.group(_persona(host, parent)),
      'account': facts | (account or {})}


def _persona(host, parent):
  """Who the model plays: whom the host names, else whom the parent did."""
  if parent is not None and not host.texts.persona:
    return parent.about['governance']['persona']
  return host.texts.keyed('governance.persona', host.texts.persona)


def _provenance(parent, how, vouch, slots=None):
  producer = vouch.name if vouch else 'local'
  if parent is None:
    return {'root': 'self', 'parents': [], 'depth': 0, 'producer': producer,
            'how': how}
  source = parent.about['provenance']
  parents = [{'id': parent.id, 'role': (
      how if how == 'migrated' else 'state')}]
  depth = source['depth']
  if slots is not None:
    parents.append({'id': slots.id, 'role': 'slots'})
    depth = max(depth, slots.about['provenance']['depth'])
  return {'root': parent.id if source['root'] == 'self' else source['root'],
          'parents': parents, 'depth': depth + 1, 'producer': producer,
          'how': how}


def _plain(live, about, transcript, edited):
  leaves = digest.leaf_digests(live)
  chain = ''
  if transcript is not None:
    space = names.namespace(about, about['governance']['owner'])
    chain = names.chain(space, list(transcript.tokens))
  return canonical.dumps({
      'tree': 'sha256:' + digest.combine(leaves),
      'witness': names.lanes(live.witness),
      'token_chain': chain, 'leaves': leaves,
      'edits': [[length, mark] for length, mark in edited.edits]})
