"""Artifacts of no model, for tests of the store alone: no jax, so that a
process starts in a moment and a mint takes milliseconds.

All of them is as `mint.mint` makes it, and passes `verify.verify`, but that the
payload is bytes of a number. `fill` writes it as Orbax does, without syncing.
"""

import functools
import hashlib
import pathlib
from secrets import token_hex

import example

from statejax.artifact import (
  access,
  canonical,
  layout,
  manifest,
  names,
  objects,
  sealing,
  tree,
  verify,
)

SIZE = 2100


def about(number, **changes):
  """A manifest but for its list of files."""
  found = example.make(nonce=f'{token_hex(8)}{number:016x}', **changes)
  del found['files']
  return found


def number_of(about):
  return int(about['nonce'][16:], 16)


def fill(folder, number):
  """Writes all files of artifact `number` but its manifest."""
  for name, data in files(number).items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


@functools.cache
def files(number):
  """{path: content}."""
  tokens = [number % 1000, 2, 3]
  leaves = {leaf['path']: hashlib.sha256(b'%d' % number).hexdigest()
            for leaf in example.LEAVES}
  plain = {'tree': 'sha256:' + tree.combine(leaves), 'leaves': leaves,
           'witness': names.witness(tokens), 'token_chain': '', 'edits': []}
  return {'state/checkpoint': b'{}', 'state/state/d/a': payload(number),
          'tokens.u32': names.pack([*tokens, 5]),
          'plain.json': canonical.dumps(plain)}


def payload(number):
  return (b'%d.' % number * SIZE)[:SIZE]


def store(path, **options):
  path = pathlib.Path(path)
  return objects.Store(path / 'store', objects.Secrets(path / 'secrets'),
                       **options)


def mint(shop, number, *, ref='', expect=0, mint_key='', parents=(),
         vouch=None, **changes):
  """As `mint.mint`, of artifact `number`."""
  if parents:
    changes['provenance'] = {
        'root': parents[0], 'depth': 1,
        'parents': [{'id': id, 'role': 'state'} for id in parents]}
  known = about(number, **changes)
  with objects.said(), shop.stage() as folder:
    if known['sealed'] == 'none':
      fill(folder, number)
    else:
      key, known['seal'] = sealing.new_key(
          shop, known, sealing.own_name(shop, known['nonce']))
      with sealing.scratch(shop) as clear:
        fill(clear, number)
        sealing.seal_tree(clear, folder, known['nonce'], key)
    return shop.keep(folder, known, principal=access.owner(known),
                     mint_key=mint_key or f'mint-{number}', action='mint',
                     ref=ref, expect=expect, vouch=vouch)


def minted(shop, number):
  """Returns the id of artifact `number` by its request, None for none."""
  return shop.catalog.minted(objects.request('alice of acme', f'mint-{number}'))


def read(shop, id):
  """Verifies an artifact under a lease; returns its number."""
  with objects.said(), shop.catalog.lease(id, token_hex(8)):
    found = verify.verify(shop.place(id), name=id, secret=shop.secret)
    number = number_of(found.about)
    with sealing.opened(shop, shop.place(id), found.about) as clear:
      if found.plain is None:
        verify.unsealed(clear, found.about)
      assert layout.read(clear, 'state/state/d/a') == payload(number)
  return number


def take_in(shop, source, id, ref=''):
  """As `transfer.receive`, of an artifact in a directory of our own."""
  with objects.said(), shop.stage() as folder:
    for name in layout.walk(source).files:
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(layout.read(source, name))
    data = layout.read(folder, manifest.NAME)
    found = verify.verify(folder, name=id, secret=shop.secret)
    assert manifest.artifact_id(data) == id
    return shop.take_in(folder, id, found.about, 'alice', ref)
