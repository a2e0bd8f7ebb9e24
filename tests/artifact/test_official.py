"""Signed artifacts before the official verifier of OpenSSF Model Signing.

It accepts ours and refuses what was changed. Beside it stands our own, which
refuses more: the official one never looks at some names. Needs the extra [oms].
"""

import pathlib
import shutil

import bare
import pytest

pytest.importorskip('model_signing', reason='[oms] is not installed')
pytest.importorskip('OpenSSL', reason='[oms] is not installed')

from model_signing import verifying

from statejax.artifact import keys, layout, manifest, objects, trust, verify
from statejax.artifact.outcome import Refused

NAMES = ('manifest.json', 'plain.json', 'tokens.u32', 'state/checkpoint',
         'state/state/d/a')


@pytest.fixture(scope='module')
def private():
  return {name: keys.generate() for name in ('root', 'acme', 'other')}


@pytest.fixture(scope='module')
def shop(tmp_path_factory, private):
  path = tmp_path_factory.mktemp('official')
  for name in ('acme', 'other'):
    (path / f'{name}.pub').write_text(keys.public(private[name]))
  shop = objects.Store(path / 'store', objects.Secrets(path / 'secrets'),
                       root=keys.public(private['root']))
  data = trust.extended(None, keys.public(private['acme']), 'acme')
  trust.install(shop, keys.Signer(private['root']).document('trust', data))
  return shop


@pytest.fixture(scope='module')
def kept(shop, private):
  signer = keys.Signer(private['acme'])
  now = shop.catalog.clock()
  return bare.mint(shop, 1, vouch=signer, created=now,
                   provenance={'producer': signer.name}).id


@pytest.fixture
def place(shop, kept, tmp_path):
  """A copy of an artifact that may be spoilt."""
  for name in layout.walk(shop.place(kept)).files:
    (tmp_path / 'one' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'one' / name).write_bytes(
        (shop.place(kept) / name).read_bytes())
  return tmp_path / 'one'


def official(shop, place, key='acme'):
  """Whether the official verifier accepts a directory."""
  try:
    verifying.Config().use_elliptic_key_verifier(
        public_key=shop.path.parent / f'{key}.pub').verify(
            place, place / layout.SIG)
  except Exception:  # of any type: the library promises none
    return False
  return True


def ours(shop, kept, place):
  """Why ours refuses it, '' where it accepts it: V1 to V5, V9, V11."""
  try:
    found, data, about, _ = verify.head(place, name=kept, foreign=True)
    trust.vouch(shop, place, found, data, about)
    verify.content(place, found, about)
  except Refused as error:
    return error.code
  return ''


def flip(name, at):
  def change(place):
    data = bytearray((place / name).read_bytes())
    data[at] ^= 1
    (place / name).write_bytes(data)
  return change


def put(name):
  def change(place):
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(b'x')
  return change


def twin(place):
  """Two files that have changed places."""
  one, two = place / NAMES[1], place / NAMES[4]
  first = one.read_bytes()
  one.write_bytes(two.read_bytes())
  two.write_bytes(first)


ACCEPTED = {'as it is': lambda place: None,
            'copied': lambda place: shutil.copytree(
                place, place.parent / 'copy')}
TAMPERED = {
    **{f'{name} at {at}': flip(name, at) for name in NAMES for at in (0, -1)},
    **{f'no {name}': lambda place, name=name: (place / name).unlink()
       for name in NAMES},
    'changed places': twin, 'longer': lambda place: (
        place / NAMES[4]).write_bytes(bare.payload(1) + b'x')}
EXTRA = {name: put(name) for name in (
    'surplus', 'state/surplus', 'state/state/d/b', 'README.md', '.hidden',
    'state/.git/config')}
SMUGGLED = {
    **{name: put(name) for name in (
        '.git/config', '.git/hooks/post-checkout', '.github/workflows/x',
        '.gitignore', '.gitattributes')},
    'an empty directory': lambda place: (place / 'state' / 'void').mkdir()}


@pytest.mark.parametrize('kind, cases, accepts', [
    ('accepted', ACCEPTED, True), ('tampered', TAMPERED, False),
    ('extra', EXTRA, False), ('smuggled', SMUGGLED, True)])
def test_official(place, shop, kept, tmp_path, kind, cases, accepts):
  told, refused = [], []
  for number, (name, change) in enumerate(cases.items()):
    one = tmp_path / f'{number}' / 'one'
    shutil.copytree(place, one)
    change(one)
    if official(shop, one) == accepts:
      told.append(name)
    if ours(shop, kept, one):
      refused.append(name)
  wanted = [] if kind == 'accepted' else [*cases]
  print(f'official, {kind}: tried {len(cases)}, as it should '
        f'{len(told)}; ours refused {len(refused)}, accepted wrongly '
        f'{len(set(wanted) - {*refused})}')
  assert told == [*cases] and refused == wanted


def test_another_key(place, shop):
  assert official(shop, place) and not official(shop, place, 'other')
  # And a signature that is another one's.
  folder = pathlib.Path(place)
  data = (folder / manifest.NAME).read_bytes()
  keys.Signer(keys.generate())(folder, data)
  assert not official(shop, place)
