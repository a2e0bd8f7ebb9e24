"""Verbs of `state` about other stores, keys, trust, grants and revocations.

Store and who asks are those of `statejax.asking`. A key that was lost is
retired, a policy that was bad ends with its epoch; what a key has
signed since some time, or all of a family, a model, a workflow and so on is
revoked, and with a key that may revoke also what will come:

  python -m statejax.main state trust acme.pub --org=acme --retire \
      --signing_key=root.pem
  python -m statejax.main state trust rules --min_epoch=5 --epoch=5 \
      --classes=public,internal --signing_key=root.pem
  python -m statejax.main state revoke chat --by=family
  python -m statejax.main state revoke stolen.pub --by=key --since=1700000000 \
      --org=acme --root=root.pub --signing_key=acme.pem

Where all that was minted under the --epoch of here would end by a rule or a
revocation, it must be said: with the epoch that holds here from now on.
"""

import json
import pathlib
import time

from absl import flags

from statejax import asking

URL = flags.DEFINE_string('url', None, 'state push: bucket, and path in it')
HOLDER = flags.DEFINE_string(
    'holder', None, 'state grant: file of the public key of whom it is for')
RIGHTS = flags.DEFINE_list(
    'rights', ['inspect', 'resume'], 'state grant: what they may')
SECONDS = flags.DEFINE_integer(
    'seconds', 24 * 3600, 'state grant: until it ends, a day at most')
MAX_USES = flags.DEFINE_integer(
    'max_uses', 1, 'state grant: how often it may be used')
FAMILY = flags.DEFINE_bool(
    'family', False, 'state grant: it is for all that stems from the root of '
    'the family')
RETIRE = flags.DEFINE_bool(
    'retire', False, 'state trust: nothing that this key has signed counts')
MIN_EPOCH = flags.DEFINE_integer(
    'min_epoch', None, 'state trust rules: oldest epoch of policies', 0,
    2**53 - 1)
CLASSES = flags.DEFINE_list(
    'classes', None, 'state trust rules: classes that may come from elsewhere')
BY = flags.DEFINE_enum(
    'by', 'artifact', ['artifact', 'descendants', 'family', 'key', 'org',
                       'params', 'persona', 'workflow', 'epoch'],
    'state revoke: what the target names')
SINCE = flags.DEFINE_integer(
    'since', None, 'state revoke --by=key: unix seconds, since when it is bad',
    0)
ADOPT = flags.DEFINE_bool(
    'adopt', False, 'state fsck: enter what no catalog knows, if it is whole')


def push(key):
  """Copies an artifact to a bucket as it is."""
  from statejax.artifact import transfer
  if URL.value is None:
    raise ValueError('--url: name the bucket and a path in it, e.g. '
                     'gs://bucket/states.')
  id = transfer.push(asking.shop(), key, asking.principal(), URL.value)
  print(json.dumps({'id': id, 'url': f'{URL.value.rstrip("/")}/{id}'}))


def pull(target):
  """Brings an artifact back from a bucket."""
  from statejax.artifact import bucket, transfer
  url, id = bucket.split(target)
  asking.say(transfer.pull(asking.shop(), url, id, asking.principal(),
                           ref=asking.flag('ref') or ''))


def grant(target):
  """Writes a grant of an artifact, or prints what the file of one says."""
  from statejax.artifact import grant, keys
  shop = asking.shop()
  if asking.elsewhere(target):
    print('\n'.join(grant.describe(shop, asking.read('target', target))))
    return
  file = asking.flag('file')
  if HOLDER.value is None or file is None:
    raise ValueError(f'{target}: expected a grant to print, or with --holder '
                     'and --file a name or id to write one of.')
  asking.unwritten(file)  # else the log would tell of a grant that nobody has
  asking.write(file, grant.issue(
      shop, target, asking.principal(),
      keys.normal(asking.read('--holder', HOLDER.value)), RIGHTS.value,
      asking.signer(), seconds=SECONDS.value, max_uses=MAX_USES.value,
      scope='root' if FAMILY.value else 'id'))
  print(file)


def keygen(name):
  """Writes a new private key and its public one."""
  from statejax.artifact import keys
  private = keys.generate()
  for suffix, mode, data in (('pem', 0o600, private),
                             ('pub', 0o644, keys.public(private).encode())):
    asking.write(f'{name}.{suffix}', data, mode)
    print(f'{name}.{suffix}')


def card(path):
  """Writes a model card of the run's parameters, or prints what one says."""
  from statejax.artifact import card, trust
  from statejax.artifact.outcome import Refused
  if asking.SIGNING_KEY.value is None and pathlib.Path(path).is_file():
    data, shop = asking.read('target', path), asking.shop()
    body = card.unsure(data)
    try:
      card.read(shop, data, body['org'])
      counts = 'yes'
    except Refused as error:
      counts = f'no, {error}'
    print('\n'.join([*card.describe(body), f'  does it count here: {counts}']))
    return
  signer = asking.signer()
  if asking.is_store():
    trust.may_sign(asking.shop(), signer, asking.ORG.value, 'mint')
  model, params = asking.trained()
  asking.write(path, card.signed(card.make(
      params, model.config, created=int(time.time()), org=asking.ORG.value),
                                 signer))
  print(path)


def trust(path):
  """Trusts a public key or retires it, takes a signed list, or sets rules.

  Args:
    path: of the public key; of an organisation's revocation list, or of a
      trust document that the root has signed; 'rules' for what --min_epoch and
      --classes say.
  """
  from statejax.artifact import envelope, keys, revoked, trust
  rules = path == 'rules'
  if rules != any(x.value is not None for x in (MIN_EPOCH, CLASSES)):
    raise ValueError('--min_epoch, --classes: they are for state trust rules, '
                     'which needs one of them.')
  data = b'' if rules else asking.read('target', path)
  org, key = asking.ORG.value, b'-----BEGIN ' in data
  if RETIRE.value and not key:
    raise ValueError('--retire: name the file of the public key.')
  shop = asking.shop(make=True)
  older = _older(shop, '--min_epoch', MIN_EPOCH.value)
  if not rules and not key:
    if envelope.kind_of(data) == 'trust':
      print(json.dumps({'trust': trust.install(shop, data).number}))
      return
    found = revoked.install(shop, org, data)
    print(json.dumps({'crl': found['number'], 'until': found['next_update'],
                      'entries': len(found['entries'])}))
    return
  pem = keys.normal(data) if key else ''
  root = asking.signer()
  shop.root = shop.root or keys.public(root.private)
  old = trust.load(shop)
  if rules:
    body = trust.ruled(old, min_epoch=MIN_EPOCH.value, classes=CLASSES.value)
  else:
    change = trust.retired if RETIRE.value else trust.extended
    body = change(old, pem, org)
  found = trust.install(shop, root.document('trust', body))
  print(json.dumps({'trust': found.number, **(
      {'min_epoch': found.min_epoch, 'classes': list(found.classes),
       'older': older} if rules
      else {'org': org, 'key': keys.hint(pem),
            'status': 'retired' if RETIRE.value else 'active'})}))


def _older(shop, what, epoch):
  """How many artifacts are of an older epoch, which must not be that of here.
  """
  from statejax.artifact import withdraw
  older = 0 if epoch is None else len(withdraw.hits(shop, 'epoch', str(epoch)))
  if epoch is not None and epoch > asking.EPOCH.value:
    raise ValueError(
        f'{what}={epoch}: expected at most {asking.EPOCH.value}, the --epoch of'
        f' here: nothing minted here could be resumed any more, and {older} '
        f'artifacts are older; say --epoch={epoch} if that is meant, and mint '
        'with it from then on.')
  return older


def revoke(what):
  """Revokes an artifact, or all of some kind; prints what the list names now.

  Args:
    what: name or id, or a value; for --by=key also the file of a public key,
      for --by=persona also its text.
  """
  from statejax.artifact import keys, withdraw
  shop, who = asking.shop(), asking.principal()
  signer = asking.signer() if asking.SIGNING_KEY.value else None
  by, file = BY.value, pathlib.Path(what)
  if by == 'key' and file.is_file():
    what = f'key:{keys.hint(keys.normal(file.read_bytes()))}'
  elif by == 'persona' and not what.startswith('hmac:'):
    what = shop.keyed(who.org, 'governance.persona', what)
  elif by == 'epoch' and what.isdecimal():  # else it is refused as a value
    _older(shop, 'epoch', int(what))
  for kind, value in withdraw.withdraw(shop, what, who, by, signer=signer,
                                       since=SINCE.value):
    print(json.dumps({'revoked': kind, 'value': value}))


def delete(key):
  """Deletes an artifact, whatever points to it."""
  from statejax.artifact import desk
  print(json.dumps({'deleted': desk.delete(asking.shop(), key,
                                           asking.principal())}))


def crl(path):
  """Writes an organisation's revocation list, signed, for other stores."""
  from statejax.artifact import transfer
  asking.unwritten(path)
  asking.write(path, transfer.issue_revocations(
      asking.shop(), asking.signer(), asking.ORG.value or None))
  print(path)


def fsck():
  """Prints what is wrong with a store; with --adopt takes in what is whole.

  And ends what a kill has left of a revocation, and makes anew from the log a
  list of revocations that is lost; says so.
  """
  from statejax.artifact import collect, revoked, told
  from statejax.artifact.outcome import Refused
  shop, who = asking.shop(), asking.principal()
  for text in told.mend(shop):
    print(json.dumps({'mended': text}))
  revoked.destroy(shop)
  for id in collect.orphans(shop) if ADOPT.value else ():
    try:
      print(json.dumps({'adopted': collect.adopt(shop, id, str(who))}))
    except Refused as error:
      print(json.dumps({'not adopted': id, 'why': str(error)}))
  wrong = collect.check(shop)
  for text in wrong:
    print(json.dumps({'wrong': text}))
  if wrong:
    raise ValueError(f'{shop.path}: {len(wrong)} faults, e.g. {wrong[0]}')
  print(json.dumps({'artifacts': len(shop.catalog.objects()), 'wrong': [],
                    **asking.unasked(shop)}))
