"""Model cards on the command line, and other settings of a run."""

import json

import jax
import pytest
from test_main import run  # noqa: F401
from test_main_state import MODEL

from statejax import asking, states
from statejax.artifact import card

GO = ['--workdir=x', '--temperature=0', '--tokens=1', '--org=acme']


@pytest.fixture
def state(run, monkeypatch, tmp_path):  # noqa: F811
  """Runs `state ...` with a model whose parameters a test may choose."""
  monkeypatch.chdir(tmp_path)
  held = {'params': MODEL.init(jax.random.key(0))}
  monkeypatch.setattr(asking, 'trained', lambda: (MODEL, held['params']))
  def state(*argv, params=None):
    held['params'] = held['params'] if params is None else params
    return run('state', '--store=store', '--secrets=secrets', *argv)
  return state


def test_a_card_says_the_parameters(state, monkeypatch):
  pytest.importorskip('cryptography', reason='the extra [sign] is not there')
  for name in ('root', 'acme'):
    assert state('keygen', name)[0] == 0
  signed, root = ['--signing_key=acme.pem', '--org=acme'], ['--root=root.pub']
  write = ['card', 'a.card', '--workdir=x']
  code, _, err = state(*write)
  assert code == 2 and '--signing_key: name the file' in err
  assert state(*write, *signed)[:2] == (0, 'a.card\n')
  code, _, err = state(*write, *signed)
  assert code == 2 and 'nothing is overwritten' in err
  assert state('mint', 'chat', *GO, '--prompt=ab')[0] == 0
  said = [*root, '--model_card=a.card']
  # Whose signature counts is for the store to say.
  for where, why in (([], 'E_UNSIGNED'), (said, 'E_UNSIGNED')):
    code, _, err = state('resume', 'chat', *GO, '--model_card=a.card', *where)
    assert code == 2 and why in err
  assert 'count here: no, E_UNSIGNED' in state('card', 'a.card')[1]
  assert state('trust', 'acme.pub', '--org=acme', '--signing_key=root.pem')[
      0] == 0
  assert 'count here: yes' in state('card', 'a.card', *root)[1]
  # What would count for nobody is not written.
  code, out, err = state('card', 'b.card', '--workdir=x', '--org=acme',
                         '--signing_key=root.pem')
  assert code == 2 and 'E_TRUST' in err and not out
  code, _, err = state('resume', 'chat', *GO, *said, '--org=other')
  assert code == 2 and 'E_TRUST: card: expected one of other' in err
  # Whichever way it is known, it is the same model.
  for how in ('full', 'fingerprint', 'card'):
    code, _, err = state('resume', 'chat', *GO, *said, f'--verify_params={how}')
    assert code == 0 and 'promise=bit' in err, err
  code, _, err = state('resume', 'chat', *GO, '--verify_params=card')
  assert code == 2 and '--verify_params=card: expected a --model_card' in err
  # Hashing is what the card is to save.
  with monkeypatch.context() as patch:
    from statejax.artifact import digest
    def never(*_):
      raise AssertionError('hashed')
    patch.setattr(digest, 'tree_digest', never)
    out = state('show', 'chat', '--workdir=x', '--org=acme', *said,
                '--verify_params=fingerprint')[1]
    assert 'does it fit here: yes, promise bit' in out
  # How a step takes them is no other sum.
  params = MODEL.init(jax.random.key(0))
  assert card.fingerprint(MODEL.unstack(params)) == card.fingerprint(params)
  # Other weights.
  for how in ('full', 'fingerprint'):
    code, _, err = state('resume', 'chat', *GO, *said, f'--verify_params={how}',
                         params=MODEL.init(jax.random.key(1)))
    assert code == 2 and 'E_WEIGHTS: card: expected parameters of' in err
  out = state('show', 'chat', '--workdir=x', '--org=acme', *said)[1]
  assert 'does it fit here: no, E_WEIGHTS: card: expected parameters' in out
  for verb, *more in (('diff', 'chat', 'chat'), ('audit',)):
    code, _, err = state(verb, *more, '--verify_params=card')
    assert code == 2 and f'--verify_params: state {verb} does not use' in err


def test_more_than_the_memory_is_said_before_the_work(state, monkeypatch):
  def never(*_, **__):
    raise AssertionError('began')
  monkeypatch.setattr(states, '_warm', never)
  monkeypatch.setattr(MODEL.__class__, 'init_state', never)
  code, out, err = state('mint', 'chat', *GO, '--prompt=ab',
                         f'--capacity={2 ** 31 - 1}')
  assert code == 2 and not out and len(err.splitlines()) == 1
  # 8 numbers of 4 bytes twice for each token, beside less than a KiB.
  assert '--capacity=2147483647: expected one of which a state fits' in err
  assert int(err.split('got one of ')[1].split()[0].replace(',', '')) in range(
      2 ** 37 - 64, 2 ** 37 + 1024)
  with pytest.raises(AssertionError, match='began'):
    state('mint', 'chat', *GO, '--prompt=ab')


def test_a_child_plays_whom_its_parent_played(state, tmp_path):
  def persona(err):
    from statejax.artifact import objects, verify
    shop = objects.Store('store', objects.Secrets('secrets'))
    id = json.loads(err.splitlines()[-1])['id']
    return verify.head(shop.place(id))[2]['governance']['persona']
  first = persona(state('mint', 'chat', *GO, '--prompt=ab',
                        '--persona=a pirate')[2])
  assert first.startswith('hmac:')
  assert persona(state('resume', 'chat', *GO)[2]) == first
  assert persona(state('resume', 'chat', *GO, '--persona=a pirate')[
      2]) == first
  other = persona(state('resume', 'chat', *GO, '--persona=a parrot')[2])
  assert other.startswith('hmac:') and other != first
  assert persona(state('resume', 'chat', *GO)[2]) == other
  assert persona(state('mint', 'new', *GO, '--prompt=ab')[2]) == ''
  # What was withdrawn by it takes those along that did not say it.
  assert state('revoke', 'a parrot', '--by=persona', '--org=acme')[0] == 0
  code, _, err = state('resume', 'chat', *GO)
  assert code == 2 and 'E_REVOKED' in err
