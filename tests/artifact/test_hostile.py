"""Artifacts, manifests and archives that somebody has made to do harm.

Each is refused by the library's own error, and nothing is written outside.
Forged signatures and replayed grants: see `test_trust` and `test_grant`.
"""

import copy
import io
import os
import re
import socket
import tarfile

import bare
import example
import pytest

from statejax.artifact import (
  canonical,
  layout,
  manifest,
  portable,
  verify,
)
from statejax.artifact.outcome import Refused


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
  return bare.store(tmp_path_factory.mktemp('hostile'))


@pytest.fixture(scope='module')
def kept(shop):
  return bare.mint(shop, 1).id


def copied(shop, kept, path):
  """A copy of an artifact that may be spoilt, in a new directory."""
  for name in layout.walk(shop.place(kept)).files:
    (path / 'one' / name).parent.mkdir(parents=True, exist_ok=True)
    (path / 'one' / name).write_bytes((shop.place(kept) / name).read_bytes())
  return path / 'one'


def refuse_all(kind, cases, attempt, codes=''):
  """Raises unless every case is refused; prints how many were tried.

  Args:
    kind: for the line that is printed.
    cases: {name: what `attempt` gets}.
    attempt: raises `Refused`, or returns where it accepts.
    codes: regular expression of those that are meant, '' for any.
  """
  accepted, tried = [], 0
  for name, case in cases.items():
    tried += 1
    try:
      attempt(case)
    except Refused as error:
      assert re.fullmatch(codes or '.*', error.code), (name, error)
      continue
    accepted.append(name)
  print(f'hostile {kind}: tried {tried}, accepted wrongly {len(accepted)}')
  assert not accepted and tried == len(cases) > 10


def linked(name, how):
  """A file that is but a link to its content, which lies elsewhere."""
  def change(p):
    (p / name).rename(p.parent / 'elsewhere')
    getattr(p / name, how)(p.parent / 'elsewhere')
  return change


def huge(name):
  def change(p):
    with open(p / name, 'ab') as file:
      file.truncate(1 << 41)  # takes no room
  return change


def bind(p):
  here = os.getcwd()
  os.chdir(p)  # its name may be as long as a few letters
  try:
    with socket.socket(socket.AF_UNIX) as end:
      end.bind('s')
  finally:
    os.chdir(here)


def many(p):
  for i in range(4200):
    (p / 'state' / f'{i}').write_bytes(b'')


def deep(p):
  (p / 'state/a/b/c/d/e/f').mkdir(parents=True)
  (p / 'state/a/b/c/d/e/f/g').write_bytes(b'')


def odd(name):
  return lambda p: open(os.fsencode(p) + b'/' + name, 'wb').close()


DIRECTORIES = {
    **{f'link {how} {name}': linked(name, how)
       for how in ('symlink_to', 'hardlink_to')
       for name in ('manifest.json', 'manifest.mac', 'plain.json',
                    'state/state/d/a', 'tokens.u32')},
    'link to a directory': lambda p: (
        (p / 'state').rename(p.parent / 'there'),
        (p / 'state').symlink_to(p.parent / 'there')),
    'link to nothing': lambda p: (p / 'state/x').symlink_to('/nowhere'),
    'link to itself': lambda p: (p / 'state/x').symlink_to('x'),
    'link upwards': lambda p: (p / 'state/x').symlink_to('..'),
    'pipe': lambda p: os.mkfifo(p / 'state/x'), 'socket': bind,
    'empty directory': lambda p: (p / 'state/x').mkdir(),
    '.git': lambda p: ((p / '.git').mkdir(), (p / '.git/a').touch()),
    '.gitignore': odd(b'.gitignore'), 'space': odd(b'a b'),
    'line': odd(b'a\nb'), 'no UTF-8': odd(b'\xff'), 'letter': odd('é'.encode()),
    'backslash': odd(b'..\\a'), 'colon': odd(b'c:a'), 'long': odd(b'a' * 129),
    'case twin of a file': odd(b'Plain.json'),
    'case twin of the manifest': odd(b'MANIFEST.JSON'),
    'case twin of the payload': lambda p: (
        (p / 'State').mkdir(), (p / 'State/a').touch()),
    'two vouchers': odd(b'manifest.sig'), 'a manifest of another kind': odd(
        b'manifest.cbor'),
    'the manifest is a directory': lambda p: (
        (p / 'manifest.json').unlink(), (p / 'manifest.json').mkdir(),
        (p / 'manifest.json/a').touch()),
    'huge payload': huge('state/state/d/a'), 'huge manifest': huge(
        'manifest.json'), 'huge code': huge('manifest.mac'),
    'huge plain.json': huge('plain.json'), 'many files': many, 'deep': deep}


def test_directories(shop, kept, tmp_path):
  def attempt(case):
    number, change = case
    place = copied(shop, kept, tmp_path / f'{number}')
    change(place)
    verify.verify(place, name=kept, secret=shop.secret, foreign=True)
  refuse_all('directories', dict(zip(
      DIRECTORIES, enumerate(DIRECTORIES.values()))), attempt)
  place = copied(shop, kept, tmp_path / 'sound')
  verify.verify(place, name=kept, secret=shop.secret, foreign=True)


def files(*names):
  rows = [*example.MANIFEST['files'], *([n, 1, '0' * 64] for n in names)]
  return dict(files=sorted(rows))


def leaf(**changes):
  leaves = copy.deepcopy(example.LEAVES)
  leaves[1] |= changes
  return dict(state={'leaves': leaves})


MANIFESTS = {
    **{f'file {name!r}': files(name) for name in (
        '../x', '/x', 'state/../../x', 'state//x', './x', 'state/./x',
        'state/', 'state\\x', 'state/\x00', 'state/x\n', '..', '.', '', '~/x',
        '.ssh/x', 'state/.git/x', 'x', 'STATE/x', 'Plain.json',
        'manifest.json', 'manifest.sig', 'state/' + 'a' * 129,
        'state/a/b/c/d/e/f')},
    'case twins': files('state/state/A'),
    'case twins of directories': files('state/State/b', 'state/state/B'),
    'twice': files('plain.json'),
    **{f'leaf {path!r}': leaf(path=path) for path in (
        '/x', 'a//b', 'a/', '', 'a\\b')},
    # Products that are small in 64 or 32 bits.
    **{f'shape {shape}': leaf(shape=shape, tile=shape) for shape in (
        [2 ** 32, 2 ** 32, 1, 1], [2 ** 40] * 8, [2 ** 31, 2, 3, 8], [-1, -96],
        [2 ** 63, 1], [1, 2, 3, -8], [48.0], [0, 2 ** 40], [1] * 9)},
    'bytes of a state': dict(state={'logical_bytes': 2 ** 53 - 1}),
    'length': dict(state={'length': 2 ** 31}),
    'many leaves': dict(state={'leaves': [
        example.leaf(f'l{i:05}', 'bool', [], 'fixed', 'slot')
        for i in range(2049)]}),
    'many files': files(*(f'state/x{i:05}' for i in range(4096))),
    'many extensions': {f'x-{i}': '' for i in range(17)}}


def test_manifests():
  refuse_all('manifests', MANIFESTS, lambda changes: manifest.parse(
      canonical.dumps(example.make(**changes))), 'E_MANIFEST')
  manifest.parse(canonical.dumps(example.make()))


TEXTS = {
    'nested lists': b'[' * 500_000, 'nested objects': b'{"a":' * 100_000,
    'closed': b'[' * 8 + b']' * 8, 'digits': b'{"a":' + b'9' * 900_000 + b'}',
    'exponent': b'{"a":1e999999999}', 'escapes': b'{"a":"' + b'\\u0041' * 99
    + b'"}', 'unclosed': b'{"a":"' + b'\\' * 99_999, 'keys': b'{' + b','.join(
        b'"%d":1' % i for i in range(90_000)) + b'}', 'nothing': b'',
    'nul': bytes(1000), 'bom': b'\xef\xbb\xbf{}',
    'utf-16': '{}'.encode('utf-16'),
    'long': b' ' * (1 << 21), 'no object': b'[]', 'number': b'1'}


def test_texts():
  refuse_all('texts', TEXTS, manifest.parse, 'E_MANIFEST')


def entry(name, data=b'x', **changes):
  """One entry of an archive, as any program may write it."""
  info = tarfile.TarInfo(name)
  info.size, info.mode = len(data), 0o400
  for field, value in changes.items():
    setattr(info, field, value)
  return (info.tobuf(tarfile.USTAR_FORMAT, 'ascii', 'surrogateescape')
          + data + bytes(-len(data) % 512))


def compressed(kind):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode=f'w:{kind}') as archive:
    archive.addfile(tarfile.TarInfo('manifest.json'))
  return out.getvalue()


def sized(field):
  """A header whose size is these 12 bytes, its sum right."""
  head = bytearray(entry('plain.json')[:512])
  head[124:136], head[148:156] = field, b' ' * 8
  head[148:156] = b'%06o\0 ' % sum(head)
  return bytes(head) + bytes(512)


END = bytes(1024)
ARCHIVES = {
    **{f'name {name!r}': entry(name) + END for name in (
        '../x', '/tmp/x', 'a/../../x', './x', 'a//b', '.x', 'a b', 'a/',
        'a\\b', '..', 'a/b/c/d/e/f/g')},
    **{f'type {kind}': entry('x', b'', type=kind, linkname=to) + END
       for kind, to in ((tarfile.SYMTYPE, '/etc/passwd'),
                        (tarfile.SYMTYPE, '../..'), (tarfile.LNKTYPE, '../x'),
                        (tarfile.DIRTYPE, ''), (tarfile.FIFOTYPE, ''),
                        (tarfile.CHRTYPE, ''), (tarfile.BLKTYPE, ''),
                        (tarfile.CONTTYPE, ''), (tarfile.GNUTYPE_LONGNAME, ''),
                        (tarfile.GNUTYPE_SPARSE, ''), (tarfile.XHDTYPE, ''),
                        (tarfile.XGLTYPE, ''))},
    'twice': entry('a') + entry('a') + END,
    'disorder': entry('b') + entry('a') + END,
    'the manifest last': entry('plain.json') + entry('manifest.json') + END,
    'a file in a file': entry('a') + entry('a/b') + END,
    'set-uid': entry('a', mode=0o4755) + END, 'owner': entry('a', uid=5) + END,
    'a size beyond the end': sized(b'00000007777\0') + END,
    'a huge size': sized(b'77777777777\0') + END,
    'a huge manifest': entry('manifest.json', bytes(1 << 21)) + END,
    'a size in base 256': sized(b'\x80' + bytes(10) + b'\x01') + END,
    'a negative size': sized(b'\xff' * 12) + END,
    'a size with spaces': sized(b'         1 \0') + END,
    'content after the end': entry('a') + END + b'x',
    'no end': entry('a'), 'half an end': entry('a') + END[:512],
    'rest of a block': entry('a')[:-1] + b'x' + END,
    'half a header': entry('a')[:100], 'nothing': b'', 'zeros': bytes(511),
    'gzip': compressed('gz'), 'xz': compressed('xz')}


def unpacked(path, data, max_bytes, then=lambda place: None):
  """Unpacks an archive, and does more with it; nothing else may come of it."""
  (path / 'in' / 'to').mkdir(parents=True)
  (path / 'file').write_bytes(data)
  try:
    portable.unpack(path / 'file', path / 'in/to', max_bytes=max_bytes)
    then(path / 'in/to')
  finally:
    assert {p.name for p in path.iterdir()} == {'file', 'in'}
    assert [p.name for p in (path / 'in').iterdir()] == ['to']
    # What came before the fault is all there is.
    assert sum(p.stat().st_size for p in (path / 'in').rglob('*')
               if p.is_file()) <= min(len(data), max_bytes)
    (path / 'file').unlink()


def test_archives(tmp_path):
  def attempt(case):
    number, data = case
    unpacked(tmp_path / f'{number}', data, 1 << 30)
  refuse_all('archives', dict(zip(ARCHIVES, enumerate(ARCHIVES.values()))),
             attempt, 'E_LAYOUT|E_LIMIT')
  attempt(('sound', entry('a') + END))


def test_of_other_artifacts(shop, kept, tmp_path):
  """Parts that are right in themselves, of another artifact or store."""
  place = copied(shop, kept, tmp_path)
  other = bare.mint(shop, 2).id
  (tmp_path / 'elsewhere').mkdir()
  elsewhere = bare.store(tmp_path / 'elsewhere')
  stranger = elsewhere.place(bare.mint(elsewhere, 1).id)
  whole = {name: (place / name).read_bytes()
           for name in layout.walk(place).files}
  verify.verify(place, name=kept, secret=shop.secret, foreign=True)
  tried, accepted = 0, []
  for source in (shop.place(other), stranger):
    for names in (*([name] for name in whole), [*whole]):
      for name in names:
        (place / name).write_bytes((source / name).read_bytes())
      if any((place / n).read_bytes() != whole[n] for n in whole):
        tried += 1
        try:
          verify.verify(place, name=kept, secret=shop.secret, foreign=True)
          accepted.append(names)
        except Refused:
          pass
      for name, data in whole.items():
        (place / name).write_bytes(data)
  with pytest.raises(Refused, match='E_SIG'):
    verify.verify(stranger, secret=shop.secret)
  print(f'hostile parts: tried {tried}, accepted wrongly {len(accepted)}')
  assert not accepted and tried > 8
