"""Verbs of `state` that look: at an artifact, at two, at the whole store."""

import contextlib
import json
import sys

from statejax import asking


def show(key):
  """Prints what an artifact is, whose, and whether it would load here."""
  from statejax.artifact import desk
  who = _who(key)
  with _examined(key, who) as (found, folder):
    may = _may_resume(folder, who)
    print('\n'.join([
        *desk.describe(found),
        *_opens(found),
        f'  may {asking.PRINCIPAL.value} of '
        f'{asking.ORG.value or "no organisation"} resume it here: {may}',
        f'  does it fit here: {_fits(found)}']))


def diff(left, right):
  """Prints what two artifacts do not have in common, without their arrays."""
  from statejax.artifact import desk
  with _examined(left, _who(left)) as (one, _), (
      _examined(right, _who(right))) as (two, _):
    print('\n'.join([f'{one.id} | {two.id}', *desk.difference(one, two)]))


def lineage(key):
  """Prints what an artifact comes from and what came of it."""
  from statejax.artifact import desk
  shop = asking.shop()
  who = asking.who(shop, key)
  print('\n'.join(desk.lineage(shop, who.granted_for or key, who)))


def verify(key):
  """Verifies every byte; with a run also that the arrays load there.

  It is verified where its files match, somebody vouches for it who counts here,
  it is not revoked and its time is not over. It exits with 0 where besides the
  principal may resume it here, and with a run it loads there; with 1 where
  anything of that is not so, and says what. Who vouches for it only a store
  knows. Where none is asked, as of a file and without a store, all files may
  match and the whole may yet be forged: it exits with 3.
  """
  from statejax.artifact import desk, verify
  own, who = not asking.elsewhere(key), _who(key)
  with _examined(key, who) as (found, folder):
    result = verify.said(found.vouched, found.why)
    if found.stems:
      result['as long as counts'] = list(found.stems)
    ended = desk.ended(asking.shop(), found) if asking.is_store() else dict(
        revoked='not checked', expired='not checked')
    verified = bool(found.vouched) and {*ended.values()} == {'no'}
    result |= ended | {'resume': _may_resume(folder, who)}
    if asking.flag('workdir') is not None:
      result |= (_load(key, found.about, who) if own
                 else _arrays(folder, found))
    print(json.dumps({'verified': verified, 'id': found.id,
                      'files': 'match their digests', **result}))
  if not asking.is_store():
    print(f'{key}: files that match, and nobody was asked who vouches for them;'
          ' name a store with --store, or ask python -m '
          f'statejax.artifact.verify {key} --root=...', file=sys.stderr)
    sys.exit(3)
  if not verified or result['resume'] != 'yes' or result.get(
      'load', '').startswith('refused'):
    print(f'{key}: expected one for which somebody vouches whom '
          f'{asking.STORE.value} knows, and that may be resumed here, got files'
          ' that match; see "signature", "resume" and "load"', file=sys.stderr)
    sys.exit(1)


def _who(key):
  """Who asks for a target, with what a grant gives of one in the store."""
  if asking.elsewhere(key) or not asking.is_store():
    return asking.principal()
  return asking.who(asking.shop(), key)


@contextlib.contextmanager
def _examined(key, who):
  """Yields (what a target is, verified but for its arrays; its directory).

  Args:
    key: name or id, or a directory or file that holds an artifact.
    who: `Principal` who asks.
  """
  from statejax.artifact import desk, verify
  if not asking.elsewhere(key):
    if not asking.is_store():
      raise ValueError(f'{key}: expected a directory or file, or a name in a '
                       f'store, got nothing there and no store at '
                       f'{asking.STORE.value}; name one with --store.')
    shop = asking.shop()
    found = desk.examine(shop, who.granted_for or key, who, 'inspect')
    yield found, shop.place(found.id)
    return
  if asking.flag('root') is not None and not asking.is_store():
    raise ValueError('--root: expected a store, whose trust documents say who '
                     f'counts, got none at {asking.STORE.value}; ask without '
                     f'one: python -m statejax.artifact.verify {key} '
                     f'--root={asking.flag("root")} --trust=... --crl=...')
  with verify.opened(key) as folder:
    if asking.is_store():
      yield desk.known(asking.shop(), folder), folder
    else:
      yield verify.verify(folder), folder


def _may_resume(folder, who):
  """Whether the store would let the principal, in words."""
  from statejax.artifact import desk
  if not asking.is_store():
    return (f'not asked, there is no store at {asking.STORE.value}; name one '
            'with --store')
  fault = desk.obstacle(asking.shop(), folder, who)
  return 'yes' if fault is None else f'no, {fault}'


def _opens(found):
  """A line on the key of an artifact that is sealed."""
  from statejax.artifact import sealing
  from statejax.artifact.outcome import Refused
  if found.about['sealed'] == 'none':
    return []
  if not asking.is_store():
    return [f'  does its key open here: not tried, there is no store at '
            f'{asking.STORE.value}; its key is with the organisation '
            f'{found.about["governance"]["org"]} and in grants of it']
  try:
    sealing.data_key(asking.shop(), found.id, found.about)
  except Refused as error:
    return [f'  does its key open here: no, {error.detail}']
  return ['  does its key open here: yes']


def _fits(found):
  """Whether a state goes with the run and its settings, in words."""
  if asking.flag('workdir') is None:
    return 'name the run with --workdir to know'
  from statejax.artifact import compat, identity, load
  from statejax.artifact.outcome import CODES
  about = found.about
  try:
    model, _, digest = asking.model()
  except ValueError as error:
    return f'no, {error}'
  host = asking.host(asking.changed(model), digest, asking.room(
      about['state']['length']))
  if asking.is_store():
    host = load.compared(asking.shop(), found.id, about, host)
  verdict = compat.compare(about, host.groups(identity.Carried.by(about)))
  if verdict.action == 'go':
    return ' '.join(('yes, promise', verdict.promise, *verdict.warnings))
  return f'no, {verdict.code}: {verdict.detail}; {CODES[verdict.code]}'


def _load(key, about, who):
  """Whether an artifact of the store loads in the run."""
  from statejax.artifact import load
  shop = asking.shop()
  model, _, digest = asking.model()
  host = asking.host(asking.changed(model), digest, asking.room(
      about['state']['length']))
  decision = load.load(shop, who.granted_for or key, who, host,
                       charged=False).decision
  return {'load': str(decision), 'promise': decision.promise,
          'why': decision.detail}


def _arrays(folder, found):
  """Whether the arrays of an artifact that is in no store load in the run."""
  from statejax.artifact import compat, identity, load, sealing, verify
  from statejax.artifact.outcome import Refused
  model, _, digest = asking.model()
  about = found.about
  room = asking.room(about['state']['length'])
  host = asking.host(asking.changed(model), digest, room)
  if asking.is_store():
    host = load.compared(asking.shop(), found.id, about, host)
  verdict = compat.compare(about, host.groups(identity.Carried.by(about)))
  try:
    if verdict.action != 'go':
      raise Refused(verdict.code, verdict.detail)
    keys = contextlib.nullcontext(folder) if about['sealed'] == 'none' else (
        sealing.opened(asking.shop(), folder, about))
    with keys as clear:
      load.restore(clear, about, verify.unsealed(clear, about)[0], host, room)
  except Refused as error:
    return {'load': f'refused({error.code})', 'promise': 'none',
            'why': error.detail}
  return {'load': f'resumed({about["state"]["length"]})',
          'promise': verdict.promise, 'why': ''}


def audit():
  """Prints the audit log; fails if it, or what is stored, is not whole."""
  from statejax.artifact import collect, head
  from statejax.artifact.outcome import Refused
  shop, signed = asking.shop(), 0
  wrong = collect.check(shop)
  try:
    for one in asking.heads(shop):
      signed = max(signed, one['rows'])
      wrong += [text for text in [head.differs(shop, one)] if text]
    if shop.notary is not None and not head.place(shop).exists() and (
        shop.catalog.head().seq):
      wrong.append(f'head: expected the newest that was signed at '
                   f'{head.place(shop)}, got none: somebody took it away, or '
                   'no verb has ended since the key is there; compare with a '
                   'copy, --signed_head')
  except Refused as error:
    wrong.append(str(error))
  if not any('audit' in text for text in wrong):
    for row in shop.catalog.rows():
      print(json.dumps(row))
  last = shop.catalog.head()
  print(json.dumps({'rows': last.seq, 'head': last.head, 'signed': signed,
                    'wrong': wrong, **asking.unasked(shop)}))
  if wrong:
    raise ValueError(f'{asking.STORE.value}: {len(wrong)} faults, e.g. '
                     f'{wrong[0]}')


def account():
  """Prints bytes times seconds, tokens and resumes of each principal."""
  from statejax.artifact import collect
  for row in collect.account(asking.shop()):
    print(json.dumps(row))
