"""As `test_hostile`, drawn at random: what harms is put together by chance.

    pytest -m slow tests/artifact/test_hostile_random.py

Each of five kinds is tried so many times. An exception that is no refusal is
an abort, and fails the test; so does a file that is written outside.
"""

import os
import random
import tarfile

import bare
import example
import pytest
import test_hostile as hostile
from test_hostile import kept, shop  # noqa: F401

from statejax.artifact import (
  canonical,
  envelope,
  layout,
  manifest,
  objects,
  portable,
  verify,
)

pytestmark = pytest.mark.slow

TRIES = 400
LETTERS = 'abcdefghijklmnopqrstuvwxyzABCXYZ0123456789_-'
FILES = ('manifest.json', 'manifest.mac', 'plain.json', 'tokens.u32',
         'state/checkpoint', 'state/state/d/a')
PLACES = ('', 'state/', 'state/state/', 'state/state/d/')


def word(rng, low=1, high=20):
  return ''.join(rng.choices(LETTERS, k=rng.randint(low, high)))


def cases(make, seed):
  """{number: case} of as many drawn ones."""
  return {n: make(random.Random(f'{seed} {n}')) for n in range(TRIES)}


def twin(rng, path):
  """A path that differs in the case of letters."""
  at = rng.choice([i for i, x in enumerate(path) if x.isalpha()])
  return path[:at] + path[at].swapcase() + path[at + 1:]


# Directories.


def link(rng):
  file, there = rng.choice(FILES), rng.choice(('far', 'near', 'chain'))
  if rng.random() < 0.3:
    return hostile.linked(file, 'hardlink_to')
  def change(p):
    (p / file).rename(p.parent / 'elsewhere')
    target = p.parent / 'elsewhere'
    if there == 'chain':
      (p.parent / 'between').symlink_to(target)
      target = p.parent / 'between'
    elif there == 'near':
      target = os.path.relpath(target, (p / file).parent)
    (p / file).symlink_to(target)
  return change


def stranger(rng):
  """Something new, of a name that may be right."""
  place, name = rng.choice(PLACES), word(rng)
  target = rng.choice(('/', '..', '/etc/passwd', '../' * rng.randint(1, 9),
                       name, '/proc/self/mem', word(rng)))
  what = rng.choice((
      lambda p: p.symlink_to(target), os.mkfifo, lambda p: p.mkdir(),
      lambda p: p.write_bytes(rng.randbytes(rng.randint(0, 99)))))
  return lambda p: what(p / place / name)


def odd(rng):
  bad = rng.choice((b' ', b'\n', b'\\', b':', b'*', b'\xff', '\u00e9'.encode(),
                    b'\x7f', b'~', b'\x01', b';', b"'", b'$('))
  name = word(rng).encode() + bad + word(rng, 0).encode()
  name = rng.choice((name, b'.' + word(rng).encode(),
                     word(rng, 129, 250).encode()))
  place = rng.choice(PLACES).encode()
  return lambda p: open(os.fsencode(p) + b'/' + place + name, 'wb').close()


def sized(rng):
  file = rng.choice(FILES)
  size = rng.choice((rng.randint(0, 20), 1 << rng.randint(13, 42)))
  def change(p):
    with open(p / file, 'r+b') as open_file:
      open_file.truncate(size)
  return change


def deep(rng):
  path = '/'.join(word(rng) for _ in range(rng.randint(6, 12)))
  def change(p):
    (p / 'state' / path).mkdir(parents=True)
    (p / 'state' / path / 'x').touch()
  return change


def cased(rng):
  path = twin(rng, rng.choice(FILES))
  def change(p):
    (p / path).parent.mkdir(parents=True, exist_ok=True)
    (p / path).write_bytes(b'x')
  return change


def lost(rng):
  file = rng.choice(FILES)
  return lambda p: (p / file).unlink()


def test_directories(shop, kept, tmp_path):  # noqa: F811
  def attempt(case):
    number, change = case
    place = hostile.copied(shop, kept, tmp_path / f'{number}')
    change(place)
    verify.verify(place, name=kept, secret=shop.secret, foreign=True)
  drawn = cases(lambda rng: rng.choice(
      (link, link, stranger, stranger, odd, sized, deep, cased, lost))(rng),
                'directories')
  hostile.refuse_all('directories at random', {
      n: (n, case) for n, case in drawn.items()}, attempt)


# Manifests.


def path_of(rng):
  """A path that leads elsewhere, or may on another system."""
  bad = rng.choice(('..', '.', '', '.' + word(rng), word(rng, 129, 200),
                    word(rng) + rng.choice('\\ :*~\x00\n\x1b$'),
                    '/'.join(word(rng) for _ in range(7))))
  parts = [word(rng) for _ in range(rng.randint(0, 4))]
  parts.insert(rng.randint(0, len(parts)), bad)
  return '/'.join(['state'] * (rng.random() < 0.8) + parts)


def shape(rng):
  """Sizes whose product is small in 32 or 64 bits, or no sizes."""
  bits = rng.choice((32, 64))
  first = rng.randint(bits - 40 if bits > 40 else 0, min(bits, 40))
  sizes = [1 << first, 1 << bits - first,
           *(rng.randint(1, 48) for _ in range(rng.randint(0, 4)))]
  if rng.random() < 0.3:
    sizes = [rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(3)]
    sizes.append(-rng.randint(1, 99))
  rng.shuffle(sizes)
  return sizes


def changes(rng):
  kind = rng.randrange(6)
  if kind == 0:
    return hostile.files(path_of(rng))
  if kind == 1:
    return hostile.files(twin(rng, rng.choice(('state/state/a', 'plain.json',
                                               'tokens.u32'))))
  if kind == 2:
    sizes = shape(rng)
    return hostile.leaf(shape=sizes, tile=sizes)
  if kind == 3:
    field, low = rng.choice((('logical_bytes', 257), ('length', 4),
                             ('n_pending', 2)))
    return dict(state={field: rng.randint(low, 1 << rng.randint(10, 60))})
  if kind == 4:
    return hostile.leaf(path=rng.choice((
        '/' + word(rng), word(rng) + '/', word(rng) + '//' + word(rng),
        word(rng) + '\\' + word(rng), word(rng, 257, 400))))
  return rng.choice((
      lambda: hostile.files(*(f'state/x{i:05}' for i in range(
          rng.randint(4096, 4200)))),
      lambda: {f'x-{i}': '' for i in range(rng.randint(17, 200))},
      lambda: dict(state={'leaves': [
          example.leaf(f'l{i:05}', 'bool', [], 'fixed', 'slot')
          for i in range(rng.randint(2049, 2100))]})))()


def test_manifests():
  hostile.refuse_all(
      'manifests at random', cases(changes, 'manifests'),
      lambda case: manifest.parse(canonical.dumps(example.make(**case))),
      'E_MANIFEST')


def text(rng):
  """A bomb, or what is no text of a manifest."""
  whole = canonical.dumps(example.make())
  count = int(10 ** rng.uniform(1, 5.5))
  return rng.choice((
      lambda: b'[' * count, lambda: b'{"a":' * count,
      lambda: b'[' * count + b']' * count,
      lambda: b'{"a":' + rng.choice((b'', b'-', b'1e', b'0.')) + b'9' * count
      + b'}', lambda: b'{"a":"' + b'\\u0041' * count + b'"}',
      lambda: b'{' + b','.join(b'"%d":1' % i for i in range(count)) + b'}',
      lambda: rng.randbytes(min(count, 9999)), lambda: bytes(count),
      lambda: whole[:rng.randrange(len(whole))],
      lambda: whole + rng.randbytes(rng.randint(1, 9)),
      lambda: b' ' * rng.randint(1, 9) + whole,
      lambda: whole.decode().encode(rng.choice(('utf-16', 'utf-32'))),
      lambda: b'\xef\xbb\xbf' + whole))()


def test_texts():
  hostile.refuse_all('texts at random', cases(text, 'texts'), manifest.parse,
                     'E_MANIFEST')


# Archives.


def blocks(rng, whole):
  """The archive of an artifact, with its blocks or bits disturbed."""
  data, block = bytearray(whole), 512
  at = rng.randrange(len(data) // block) * block
  how = rng.randrange(6)
  if how == 0:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  elif how == 1:
    del data[rng.randrange(len(data)):]
  elif how == 2:
    data[at:at] = rng.choice((rng.randbytes(block), bytes(block)))
  elif how == 3:
    del data[at:at + block]
  elif how == 4:
    data += rng.choice((b'\0', rng.randbytes(rng.randint(1, 2000))))
  else:
    data = hostile.entry(word(rng)) + data
  return bytes(data)


def archive(rng, whole):
  """An archive: that of an artifact disturbed, or of entries to do harm."""
  if rng.random() < 0.5:
    return blocks(rng, whole)
  kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
           tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.CONTTYPE,
           tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE)
  name = word(rng)
  bad = rng.choice((
      lambda: hostile.entry(path_of(rng)[:99].encode(
          'ascii', 'replace').decode().replace('\x00', '?') + '\\'),
      lambda: hostile.entry('../' * rng.randint(1, 9) + name),
      lambda: hostile.entry('/' + name),
      lambda: hostile.entry(name, b'', type=rng.choice(kinds), linkname=(
          rng.choice(('/etc/passwd', '../' + name, name)))),
      lambda: hostile.entry(name, mode=rng.randint(0o401, 0o7777)),
      lambda: hostile.entry(name, uid=rng.randint(1, 9999)),
      lambda: hostile.entry(name, mtime=rng.randint(1, 1 << 30)),
      lambda: hostile.entry(name) * 2,
      lambda: hostile.entry(name) + hostile.entry(f'{name}/{word(rng)}'),
      # A bomb: more than it may hold, though each file is small.
      lambda: b''.join(hostile.entry(f'b{i}', bytes(1 << 20))
                       for i in range(rng.randint(5, 6))),
      lambda: hostile.sized(b'%011o\0' % rng.randint(1 << 22, (1 << 33) - 1)),
      lambda: hostile.sized(bytes((rng.choice((0x80, 0xff)),))
                            + rng.randbytes(11))))()
  return bad + hostile.END


def test_archives(shop, kept, tmp_path):  # noqa: F811
  portable.pack(shop.place(kept), tmp_path / 'whole')
  whole = (tmp_path / 'whole').read_bytes()
  def attempt(case):
    number, data = case
    hostile.unpacked(
        tmp_path / f'{number}', data, 1 << 22, lambda place: verify.verify(
            place, name=kept, secret=shop.secret, foreign=True))
  drawn = cases(lambda rng: archive(rng, whole), 'archives')
  hostile.refuse_all('archives at random', {
      n: (n, data) for n, data in drawn.items()}, attempt)
  attempt(('sound', whole))


# Signatures.


def test_signatures(tmp_path):
  """Of others, of other artifacts, of keys whose time is over, and broken."""
  pytest.importorskip('cryptography', reason='[sign] is not installed')
  from statejax.artifact import keys, trust
  root, now = keys.Signer(keys.generate()), 1_700_000_000
  signers = {name: keys.Signer(keys.generate()) for name in (
      'own', 'over', 'early', 'retired', 'reader', 'foreign', 'unknown')}
  public = {name: keys.public(one.private) for name, one in signers.items()}
  store = objects.Store(
      tmp_path / 'store', objects.Secrets(tmp_path / 'secrets'),
      root=keys.public(root.private), clock=lambda: now)
  for name, org, named in (
      ('own', 'acme', {}), ('over', 'acme', dict(not_after=now - 1)),
      ('early', 'acme', dict(not_before=now + 1)), ('retired', 'acme', {}),
      ('reader', 'acme', dict(may=['revoke'])), ('foreign', 'other', {})):
    trust.install(store, root.document('trust', trust.extended(
        trust.load(store), public[name], org, **named)))
  trust.install(store, root.document('trust', trust.retired(
      trust.load(store), public['retired'], 'acme')))
  own = signers['own']
  ids = [bare.mint(store, n, vouch=own, created=now,
                   provenance={'producer': own.name}).id for n in range(4)]
  places = [store.place(id) for id in ids]

  def attempt(case):
    place, text = case
    sig = place / layout.SIG
    sig.chmod(0o600)
    right = sig.read_bytes()
    try:
      sig.write_bytes(text)
      found, data, about, _ = verify.head(place)
      trust.vouch(store, place, found, data, about)
    finally:
      sig.write_bytes(right)

  def forged(rng):
    place, other = rng.sample(places, 2)
    right = layout.read(place, layout.SIG)
    payload, raw, hint = envelope.open_bundle(right)
    who = rng.choice([name for name in signers if name != 'own'])
    sign = lambda key, what: keys.sign(  # noqa: E731
        key.private, envelope.STATEMENT, what)
    flip = lambda data: (lambda at: data[:at] + bytes(  # noqa: E731
        (data[at] ^ 1 << rng.randrange(8),)) + data[at + 1:])(
            rng.randrange(len(data)))
    return place, rng.choice((
        lambda: layout.read(other, layout.SIG),
        lambda: envelope.bundle(payload, sign(signers[who], payload),
                                keys.hint(public[who])),
        lambda: envelope.bundle(payload, sign(signers[who], payload), hint),
        lambda: envelope.bundle(payload, raw, keys.hint(public[who])),
        lambda: envelope.bundle(payload, raw, rng.randbytes(32).hex()),
        lambda: envelope.bundle(payload, flip(raw), hint),
        lambda: envelope.bundle(payload, rng.randbytes(rng.randint(0, 99)),
                                hint),
        lambda: envelope.bundle(flip(payload), raw, hint),
        lambda: (lambda what: envelope.bundle(what, sign(own, what), hint))(
            flip(payload)),
        lambda: own.document(rng.choice(envelope.KINDS), payload),
        lambda: flip(right), lambda: right[:rng.randrange(len(right))],
        lambda: right + rng.randbytes(rng.randint(1, 9))))()

  for place in places:
    attempt((place, layout.read(place, layout.SIG)))
  hostile.refuse_all('signatures at random', cases(forged, 'signatures'),
                     attempt, 'E_SIG|E_TRUST|E_LAYOUT|E_LIMIT')
