"""Verbs of `state` about other stores: buckets, keys, trust and grants.

See `statejax.states`, which opens the store and knows who asks.
"""

import json
import os
import pathlib

from absl import flags

URL = flags.DEFINE_string('url', None, 'state push: bucket, and path in it')
HOLDER = flags.DEFINE_string(
    'holder', None, 'state grant: file of the public key of whom it is for')
RIGHTS = flags.DEFINE_list(
    'rights', ['inspect', 'resume'], 'state grant: what they may')
SECONDS = flags.DEFINE_integer(
    'seconds', 24 * 3600, 'state grant: until it ends, a day at most')
MAX_USES = flags.DEFINE_integer(
    'max_uses', 1, 'state grant: how often it may be shown')
ADOPT = flags.DEFINE_bool(
    'adopt', False, 'state fsck: enter what no catalog knows, if it is whole')


def push(shop, who, key):
  """Copies an artifact to a bucket as it is."""
  from statejax.artifact import transfer
  if URL.value is None:
    raise ValueError('--url: name the bucket and a path in it, e.g. '
                     'gs://bucket/states.')
  id = transfer.push(shop, key, who, URL.value)
  print(json.dumps({'id': id, 'url': f'{URL.value.rstrip("/")}/{id}'}))


def pull(shop, who, target):
  """Brings an artifact back from a bucket; returns what was kept."""
  from statejax.artifact import bucket, transfer
  url, id = bucket.split(target)
  return transfer.pull(shop, url, id, who, ref=flags.FLAGS['ref'].value or '')


def grant(shop, who, target, signer):
  """Writes a grant of an artifact, or prints what one says.

  Args:
    shop: `objects.Store`.
    who: `Principal`.
    target: name or id, or the file of a grant.
    signer: () -> `keys.Signer`.
  """
  from statejax.artifact import grant
  if pathlib.Path(target).is_file():
    print('\n'.join(grant.describe(shop, pathlib.Path(target).read_bytes())))
    return
  file = flags.FLAGS['file'].value
  if HOLDER.value is None or file is None:
    raise ValueError(f'{target}: expected a grant to print, or with --holder '
                     'and --file a name or id to write one of.')
  data = grant.issue(
      shop, target, who, pathlib.Path(HOLDER.value).read_text(),
      RIGHTS.value, signer(), seconds=SECONDS.value, max_uses=MAX_USES.value)
  with open(file, 'xb') as out:
    out.write(data)
  print(file)


def keygen(name):
  """Writes a new private key and its public one."""
  from statejax.artifact import keys
  private = keys.generate()
  for suffix, mode, data in (('pem', 0o600, private),
                             ('pub', 0o644, keys.public(private).encode())):
    path = f'{name}.{suffix}'
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode),
              'wb') as out:
      out.write(data)
    print(path)


def trust(shop, path, signer):
  """Trusts a public key, or takes an organisation's revocation list.

  Args:
    shop: `objects.Store`.
    path: of the public key, or of the list.
    signer: () -> `keys.Signer` of the root, for a key.
  """
  from statejax.artifact import keys, trust
  data = pathlib.Path(path).read_bytes()
  org = flags.FLAGS['org'].value or ''
  if not data.startswith(b'-----BEGIN PUBLIC KEY'):
    found = trust.install_revocations(shop, org, data)
    print(json.dumps({'crl': found['number'], 'until': found['next_update'],
                      'entries': len(found['entries'])}))
    return
  root = signer()
  shop.root = shop.root or keys.public(root.private)
  body = trust.extended(trust.load(shop), data.decode(), org)
  found = trust.install(shop, root.document('trust', body))
  print(json.dumps({'trust': found.number, 'org': org,
                    'key': keys.hint(data.decode())}))


def crl(shop, path, signer):
  """Writes the store's revocation list, signed, for other stores."""
  from statejax.artifact import transfer
  data = transfer.issue_revocations(shop, signer())
  with open(path, 'xb') as out:
    out.write(data)
  print(path)


def fsck(shop, who):
  """Prints what is wrong with a store; with --adopt takes in what is whole."""
  from statejax.artifact import collect
  from statejax.artifact.outcome import Refused
  for id in collect.orphans(shop) if ADOPT.value else ():
    try:
      print(json.dumps({'adopted': collect.adopt(shop, id, who.name)}))
    except Refused as error:
      print(json.dumps({'not adopted': id, 'why': str(error)}))
  wrong = collect.check(shop)
  for text in wrong:
    print(json.dumps({'wrong': text}))
  if wrong:
    raise ValueError(f'{shop.path}: {len(wrong)} faults, e.g. {wrong[0]}')
  print(json.dumps({'artifacts': len(shop.catalog.objects()), 'wrong': []}))
