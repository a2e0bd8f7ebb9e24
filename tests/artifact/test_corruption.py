"""Every kind of damage to every kind of file of an artifact is refused."""

import random

import bare
import pytest

from statejax.artifact import keys, layout, manifest, objects, trust, verify
from statejax.artifact.outcome import Refused

# Kind of file -> what its name begins with.
CLASSES = {'manifest': manifest.NAME, 'mac': layout.MAC, 'signature':
           layout.SIG, 'plain': manifest.PLAIN, 'tokens': manifest.TOKENS,
           'payload': 'state/state/', 'about the payload': 'state/checkpoint'}
ORG = 'acme'


class Mac:
  """An artifact that its store vouches for."""

  def __init__(self, path):
    self.shop = bare.store(path)
    self.id = bare.mint(self.shop, 7).id

  def accepts(self):
    place = self.shop.place(self.id)
    verify.verify(place, name=self.id, secret=self.shop.secret)


class Signed:
  """An artifact that a key vouches for."""

  def __init__(self, path):
    root, own = keys.generate(), keys.Signer(keys.generate())
    self.shop = objects.Store(path / 'store', objects.Secrets(
        path / 'secrets'), root=keys.public(root))
    trust.install(self.shop, keys.Signer(root).document(
        'trust', trust.extended(None, keys.public(own.private), ORG)))
    self.id = bare.mint(self.shop, 7, vouch=own,
                        provenance={'producer': own.name}).id

  def accepts(self):
    place = self.shop.place(self.id)
    found, data, about, _ = verify.head(place, name=self.id)
    trust.vouch(self.shop, place, found, data, about)
    verify.content(place, found, about)


def damaged(files, name, rng):
  """Returns the files with one of them damaged, and how.

  Args:
    files: {name: content}.
    name: of the file.
    rng: `random.Random`.
  """
  data, new = files[name], dict(files)
  how = rng.choice(('flip', 'truncate', 'delete', 'swap', 'append'))
  if how == 'flip':
    at = rng.randrange(8 * len(data))
    new[name] = (data[:at // 8] + bytes([data[at // 8] ^ 1 << at % 8])
                 + data[at // 8 + 1:])
  elif how == 'truncate':
    new[name] = data[:rng.randrange(len(data))]
  elif how == 'delete':
    del new[name]
  elif how == 'swap':
    other = rng.choice([n for n in sorted(files) if n != name])
    new[name], new[other] = files[other], data
  else:
    new[name] = data + rng.randbytes(rng.choice((1, 7, 4096)))
  return new, how


def write(place, old, new):
  for name in old.keys() | new.keys():
    if old.get(name) != new.get(name):
      if name in new:
        (place / name).write_bytes(new[name])
      else:
        (place / name).unlink()


def corrupt(case, kind, tries, rng):
  """Returns {how: times accepted}; prints what was tried.

  Whatever is raised that is no refusal is an abort.
  """
  place = case.shop.place(case.id)
  for path in (place, *place.rglob('*')):
    path.chmod(0o700)
  files = {str(p.relative_to(place)): p.read_bytes()
           for p in place.rglob('*') if p.is_file()}
  name = next(n for n in files if n.startswith(CLASSES[kind]))
  case.accepts()
  accepted, tried, aborts = {}, {}, []
  for _ in range(tries):
    new, how = damaged(files, name, rng)
    write(place, files, new)
    tried[how] = tried.get(how, 0) + 1
    try:
      case.accepts()
      accepted[how] = accepted.get(how, 0) + 1
    except Refused:
      pass
    except Exception as error:
      aborts.append(f'{how}: {error!r}')
    write(place, new, files)
  case.accepts()
  print(f'corruptions of {kind}: tried {tries} ({tried}), accepted wrongly '
        f'{sum(accepted.values())}, aborts {len(aborts)}')
  assert aborts == []
  return accepted


@pytest.mark.parametrize('tries', [
    60, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', CLASSES)
def test_corruptions(tmp_path, kind, tries):
  if kind == 'signature':
    pytest.importorskip('cryptography', reason='the extra [sign] is missing')
  case = (Signed if kind == 'signature' else Mac)(tmp_path)
  assert corrupt(case, kind, tries, random.Random(tries)) == {}
