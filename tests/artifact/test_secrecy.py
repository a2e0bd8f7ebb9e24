"""What a thief finds who has every byte of a store, its exports and its bucket.

Of sealed artifacts nothing; of those whose key was destroyed nothing, even with
all other secrets; and no exported digest is that of a text that can be guessed.
Each search is shown to find what is not protected.
"""

import base64
import hashlib
import hmac
import itertools
import os
import random
import re
import shutil

import bare
import pytest

pytest.importorskip('cryptography', reason='[sign] is not installed')

from statejax.artifact import (
  canonical,
  collect,
  desk,
  keys,
  layout,
  manifest,
  mint,
  names,
  portable,
  sealing,
  transfer,
  tree,
  verify,
)
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE, EVE = Principal('alice', 'acme'), Principal('eve', 'acme')
COUNT = 1000
OPEN = {'governance': {'export': 'any'}, 'sealed': 'aes256gcm1'}


# Canaries.


def canaries(rng):
  """Half of them four token ids, half sixteen bytes of an array."""
  tokens = [[rng.randrange(1 << 30) for _ in range(4)]
            for _ in range(COUNT // 2)]
  return tokens, [rng.randbytes(16) for _ in range(COUNT // 2)]


def forms(tokens, arrays):
  """Every way in which a canary may stand somewhere: a list for each."""
  found = [[names.pack(ids), ','.join(map(str, ids)).encode(),
            ', '.join(map(str, ids)).encode()] for ids in tokens]
  found += [[raw] for raw in arrays]
  for one in found:
    raw = one[0]
    one += [raw.hex().encode(), raw[::-1]]
    # Whatever stands before it, some of these are in its base64.
    one += [base64.b64encode(bytes(i) + raw)[4:-4] for i in range(3)]
  return found


def fill(tokens, arrays):
  """As `bare.fill`: an artifact that holds all canaries."""
  flat = [*itertools.chain(*tokens)]
  leaves = {leaf['path']: '0' * 64 for leaf in bare.example.LEAVES}
  files = {
      'state/checkpoint': b'{}', 'state/state/d/a': b''.join(arrays),
      'tokens.u32': names.pack([*flat, 5]), 'plain.json': canonical.dumps({
          'tree': 'sha256:' + tree.combine(leaves), 'leaves': leaves,
          'witness': names.witness(flat), 'token_chain': '', 'edits': []})}

  def write(folder, number):
    for name, data in files.items():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(data)
  return write


def contents(path, of=lambda file: True):
  return [p.read_bytes() for p in sorted(path.rglob('*'))
          if p.is_file() and of(p)]


def opened(path):
  """What opens by any secret that lies anywhere, or that alone opens a file."""
  secrets = {bytes.fromhex(text.decode()) for data in contents(path)
             if len(data) < 1000 for text in re.findall(
                 rb'\b[0-9a-f]{64}\b', data)}
  found = []
  for head in path.rglob(manifest.NAME):
    about = manifest.parse(head.read_bytes())
    if about['sealed'] == 'none':
      continue
    for secret in secrets:
      try:
        key = sealing.unwrap(secret, about['seal']['wrapped'], about['nonce'])
      except Refused:
        key = secret
      for name, _, _ in about['files']:
        try:
          found.append(sealing.unseal(key, about['nonce'], name, layout.read(
              head.parent, name)))
        except Refused:
          pass
  return found


def recovered(path, forms):
  """Number of canaries that somebody has who has all below a directory."""
  for archive in [*path.rglob('*.tar')]:
    folder = path / 'unpacked' / archive.stem
    if not folder.exists():
      folder.mkdir(parents=True)
      portable.unpack(archive, folder)
  whole = b'\0'.join(contents(path) + opened(path))
  # Most beginnings are nowhere, and are not looked for one by one.
  begins = {whole[i:i + 8] for i in range(len(whole) - 7)}
  return sum(any(form[:8] in begins and form in whole for form in one)
             for one in forms)


def used(path, monkeypatch, sealed):
  """A store in which canaries were minted, moved, copied and refused."""
  content = canaries(random.Random(0))
  monkeypatch.setattr(bare, 'fill', fill(*content))
  (path / 'scratch').mkdir(parents=True)
  shop = bare.store(path, scratch=str(path / 'scratch'))
  length = dict(state={'length': 2 * COUNT})
  if not sealed:
    kept = bare.mint(shop, 1, ref='chat', **length)
  else:
    kept = bare.mint(shop, 1, ref='chat', **length, **OPEN)
    bare.mint(shop, 2, ref='chat', expect=1, **length, **OPEN)
    signer = keys.Signer(keys.generate())
    transfer.export(shop, kept.id, ALICE, signer, path / 'out.tar')
    transfer.push(shop, kept.id, ALICE, f'file://{path}/bucket')
    about = desk.examine(shop, kept.id, ALICE, 'resume').about
    mint.fork(shop, mint.Parent(kept.id, about), ALICE, ref='child')
    collect.collect(shop, grace=0, generations=0)
    assert kept.id not in shop.catalog.objects()
    transfer.pull(shop, f'file://{path}/bucket', kept.id, ALICE, ref='back')
    with pytest.raises(Refused, match='E_ACL'):
      desk.examine(shop, kept.id, EVE, 'resume')
  shop.catalog._base.execute('pragma wal_checkpoint')
  return shop, kept.id, forms(*content)


def test_canaries(tmp_path, monkeypatch):
  clear, sealed = tmp_path / 'clear', tmp_path / 'sealed'
  _, _, wanted = used(clear, monkeypatch, False)
  control = recovered(clear, wanted)
  shop, id, wanted = used(sealed, monkeypatch, True)
  assert collect.check(shop) == []
  # Without the secrets, which lie elsewhere.
  shutil.move(sealed / 'secrets', tmp_path / 'secrets')
  shut = recovered(sealed, wanted)
  shutil.move(tmp_path / 'secrets', sealed / 'secrets')
  with_key = recovered(sealed, wanted)
  for each in shop.catalog.objects():
    desk.withdraw(shop, each, ALICE)
  copy = recovered(sealed, wanted)
  # What was exported its receivers can open, until they lose this one too.
  shop.secrets.destroy(shop.secrets.org_name('acme', 'kek'))
  destroyed = recovered(sealed, wanted)
  with pytest.raises(Refused, match='E_REVOKED'):
    desk.examine(shop, id, ALICE, 'resume')
  print(f'canaries: tried {len(wanted)}, recovered of sealed {shut}, of key '
        f'destroyed {destroyed}; in clear {control}, with the key {with_key}, '
        f'of what was exported {copy}')
  assert len(wanted) == control == with_key == COUNT
  assert copy == COUNT // 2  # an export leaves the tokens out
  assert shut == destroyed == 0


# Digests of what can be guessed.

FIELDS = ('policy.system', 'policy.safety', 'tools.schema',
          'governance.persona')
WORDS = [[f'{kind}{i}' for i in range(100)]
         for kind in ('kind', 'clerk', 'tongue')]


def guess(number):
  one, two, three = (WORDS[k][number // 100 ** k % 100] for k in range(3))
  return f'You are a {one} {two} and answer in {three}.'


def digests(path):
  """All that may be a digest in a file: 64 hex digits, or any 32 bytes."""
  (path.parent / path.stem).mkdir(exist_ok=True)
  portable.unpack(path, path.parent / path.stem)
  found = set()
  for data in contents(path.parent / path.stem):
    found |= {bytes.fromhex(text.decode()) for text in re.findall(
        rb'(?=([0-9a-f]{64}))', data)}
    if len(data) < 100_000:
      found |= {data[i:i + 32] for i in range(len(data) - 31)}
  return found


def matched(found, texts):
  """Texts whose digest is there, under any key that anybody knows."""
  known = [b'', bytes(32)]
  hits = []
  for text in texts:
    raw = text.encode()
    tries = [hashlib.sha256(raw).digest()]
    for field in FIELDS:
      body = b'statejax.kd.v1\0' + field.encode() + b'\0' + raw
      tries.append(hashlib.sha256(body).digest())
      tries += [hmac.digest(key, body, 'sha256') for key in known]
    if not found.isdisjoint(tries):
      hits.append(text)
  return hits


def exported(path, texts, secret=None, **changes):
  """A file of an artifact whose keyed fields hold these texts."""
  shop = bare.store(path)
  if secret is not None:
    shop.secrets.put(shop.secrets.org_name('acme', 'keyed'), secret)
  marks = {field: shop.keyed('acme', field, text)
           for field, text in zip(FIELDS, texts)}
  kept = bare.mint(
      shop, 1, sealed='aes256gcm1', **changes,
      policy={'system': marks['policy.system'],
              'safety': marks['policy.safety']},
      tools={'schema': marks['tools.schema'], 'items': []},
      governance={'export': 'any', 'persona': marks['governance.persona']})
  file = path / 'out.tar'
  transfer.export(shop, kept.id, ALICE, keys.Signer(keys.generate()), file)
  return digests(file)


@pytest.mark.parametrize('size', [
    3000, pytest.param(10 ** 6, marks=pytest.mark.slow)])
def test_no_digest_can_be_guessed(tmp_path, size):
  numbers = random.Random(1).sample(range(size), 5)
  *texts, other = map(guess, numbers)
  for name in ('keyed', 'known', 'unkeyed'):
    (tmp_path / name).mkdir()
  found = exported(tmp_path / 'keyed', texts)
  hits = matched(found, map(guess, range(size)))
  # What is not keyed, or by a key that others know, is found.
  few = [*texts, other, 'not in it']
  known = matched(exported(tmp_path / 'known', texts, bytes(32)), few)
  unkeyed = matched(exported(tmp_path / 'unkeyed', texts, **{
      'x-note': hashlib.sha256(other.encode()).hexdigest()}), few)
  print(f'dictionary: tried {size} texts on {len(found)} digests, matched '
        f'{len(hits)}; under a known key {len(known)} of {len(texts)}, without '
        f'a key {len(unkeyed)} of 1')
  assert hits == [] and known == texts and unkeyed == [other]


def test_secrets_are_not_in_the_store(tmp_path):
  """Nor is a key in any other form."""
  shop = bare.store(tmp_path)
  kept = bare.mint(shop, 1, sealed='aes256gcm1')
  about = verify.verify(shop.place(kept.id)).about
  secrets = [bytes.fromhex(p.read_text())
             for p in shop.secrets.path.glob('*.secret')]
  secrets.append(sealing.data_key(shop, kept.id, about))
  whole = b'\0'.join(contents(shop.path))
  assert len(secrets) >= 3 and os.listdir(shop.path / 'tmp') == []
  for secret in secrets:
    for form in (secret, secret.hex().encode(), base64.b64encode(secret)[:40]):
      assert form not in whole
