"""What a single check stands against: each case here passes all the others."""

import json
import os

import bare
import pytest

from statejax.artifact import canonical, layout, names, verify
from statejax.artifact.outcome import Refused


@pytest.fixture
def shop(tmp_path):
  return bare.store(tmp_path)


def test_chain_of_other_tokens(shop, monkeypatch):
  """The witness is right, so that only the chain tells."""
  about, right = bare.about(0), bare.files(1)
  space = names.namespace(about, about['governance']['owner'])
  tokens = names.unpack(right['tokens.u32'])[:about['state']['length']]
  def verified(chain, number):
    plain = canonical.loads(right['plain.json']) | {'token_chain': chain}
    monkeypatch.setattr(bare, 'files', lambda _: right | {
        'plain.json': canonical.dumps(plain)})
    id = bare.mint(shop, number).id
    return verify.verify(shop.place(id), name=id, secret=shop.secret)
  assert verified('', 1).tokens[:-1] == tokens
  assert verified(names.chain(space, tokens), 2).tokens[:-1] == tokens
  others = (names.chain(space, tokens[:-1]), names.chain(space, tokens[::-1]),
            names.chain(space, [*tokens, 5]),
            names.chain(names.namespace(about, 'bob'), tokens))
  tried = wrong = 0
  for number, other in enumerate(others, 3):
    tried += 1
    try:
      verified(other, number)
      wrong += 1
    except Refused as error:
      assert error.code == 'E_WITNESS' and 'expected chain' in error.detail
  print(f'chains of other tokens: tried {tried}, accepted wrongly {wrong}')
  assert tried == 4 and not wrong


def test_files_that_are_too_large_together(shop):
  id = bare.mint(shop, 1).id
  sizes = layout.walk(shop.place(id)).files.values()
  assert max(sizes) < sum(sizes)
  for look in (layout.walk, verify.head, verify.verify):
    look(shop.place(id), max_bytes=sum(sizes))
    for limit in (sum(sizes) - 1, max(sizes)):
      with pytest.raises(Refused, match=f'E_LIMIT.*at most {limit} bytes, got '
                         f'{sum(sizes)}'):
        look(shop.place(id), max_bytes=limit)


def swap(file, elsewhere):
  """Puts a link in a file's place; what it leads to is the same content."""
  elsewhere.write_bytes(file.read_bytes())
  file.parent.chmod(0o700)
  file.unlink()
  file.symlink_to(elsewhere)


# Where in a verification: after the directory was listed, after all digests.
LINKED = [('walk', name) for name in (
    'manifest.json', 'manifest.mac', 'plain.json', 'tokens.u32',
    'state/state/d/a')] + [('check', 'plain.json'), ('check', 'tokens.u32')]


@pytest.mark.parametrize('when, name', LINKED)
def test_a_file_becomes_a_link(shop, when, name, tmp_path, monkeypatch, capsys):
  """Between two looks at it; another time it may lead elsewhere."""
  def swapped(place):
    original = getattr(layout, when)
    def then(*args, **named):
      found = original(*args, **named)
      swap(place / name, tmp_path / 'elsewhere')
      return found
    return then

  place = shop.place(bare.mint(shop, 1).id)
  verify.verify(place, secret=shop.secret)
  with monkeypatch.context() as patch:
    patch.setattr(layout, when, swapped(place))
    with pytest.raises((Refused, OSError)):
      verify.verify(place, secret=shop.secret)
  assert os.path.islink(place / name)
  place = shop.place(bare.mint(shop, 2).id)
  (tmp_path / 'secret').write_text(shop.secret.hex())
  monkeypatch.setattr(layout, when, swapped(place))
  assert verify.main([str(place), f'--secret={tmp_path}/secret']) == 1
  assert json.loads(capsys.readouterr().out)['code'] == 'E_IO'
