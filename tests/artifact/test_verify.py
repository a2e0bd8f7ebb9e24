"""The verifier that needs no store: what it checks, and what it says of it."""

import dataclasses
import json
import subprocess
import sys

import pytest
import small_store as small

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')

from test_trust import OPEN, make, private, signer  # noqa: F401

from statejax.artifact import (
  canonical,
  envelope,
  keys,
  layout,
  leaves,
  manifest,
  mint,
  portable,
  revoke,
  transfer,
  trust,
  verify,
)


@pytest.fixture(scope='module')
def shop(tmp_path_factory, private):  # noqa: F811
  return make(tmp_path_factory.mktemp('verify'), private)


@pytest.fixture
def ask(shop, tmp_path, private, monkeypatch, capsys):  # noqa: F811
  """Runs the command; returns (exit code, what it printed)."""
  (tmp_path / 'root').write_text(keys.public(private['root']))
  (tmp_path / 'other').write_text(keys.public(private['other']))
  (tmp_path / 'trust').write_bytes((
      shop.path / 'trust' / trust.FILE).read_bytes())
  (tmp_path / 'secret').write_text(shop.secret.hex())
  monkeypatch.setattr(verify.time, 'time', shop.catalog.clock)
  def run(folder, **flags):
    argv = [f'--{name}' if value is True else f'--{name}={tmp_path / value}'
            for name, value in flags.items()]
    try:
      code = verify.main([str(folder), *argv])
    except SystemExit as error:
      return error.code, capsys.readouterr().err
    return code, json.loads(capsys.readouterr().out)
  return run


def add(shop, terms=small.TERMS, **options):
  folder = shop.place(mint.mint(shop, small.state(), 0, small.host(), terms,
                                **options).id)
  for path in (folder, *folder.rglob('*')):
    path.chmod(0o700)
  return folder


TRUSTED = {'root': 'root', 'trust': 'trust'}


def test_says_what_it_has_not_checked(shop, ask, signer):  # noqa: F811
  own, signed = add(shop), add(shop, vouch=signer)
  for folder in (own, signed):
    code, found = ask(folder)
    assert code == 3 and found['signature'] == found['arrays'] == (
        found['revoked']) == found['rights'] == 'not checked'
  assert ask(own, secret='secret')[1]['signature'] == 'none, its store vouches'
  code, found = ask(signed, **TRUSTED)
  assert code == 0 and found['signature'] == signer.name
  assert found['expired'] == 'no' and found['revoked'] == 'not checked'
  assert ask(own, **TRUSTED)[1]['code'] == 'E_UNSIGNED'
  assert ask(signed, root='other', trust='trust')[1]['code'] == 'E_SIG'
  assert ask(signed, root='root')[0] == ask(signed, crl='root')[0] == 2
  assert ask(signed, root='secret', trust='trust')[0] in (1, 2)


def test_revoked_and_expired(
    shop, ask, signer, private, tmp_path, monkeypatch):  # noqa: F811
  folder = add(shop, vouch=signer)
  id = 'sj1-' + folder.name
  (tmp_path / 'crl').write_bytes(transfer.issue_revocations(shop, signer))
  code, found = ask(folder, **TRUSTED, crl='crl')
  assert code == 0 and found['revoked'] == 'no'
  (tmp_path / 'crl').write_bytes(signer.document('crl', canonical.dumps(
      revoke.extended(shop.catalog.revocations(), [('artifact', id)],
                      now=shop.catalog.clock()))))
  assert ask(folder, **TRUSTED, crl='crl')[1]['code'] == 'E_REVOKED'
  ended = add(shop, dataclasses.replace(
      small.TERMS, not_after=shop.catalog.clock() + 1), vouch=signer)
  newer = trust.ruled(trust.load(shop), min_epoch=1)
  (tmp_path / 'newer').write_bytes(keys.Signer(private['root']).document(
      'trust', newer))
  monkeypatch.setattr(verify.time, 'time', lambda: shop.catalog.clock() + 1)
  assert ask(folder, root='root', trust='newer')[1]['code'] == 'E_EPOCH'
  assert ask(ended)[0] == 3
  assert ask(ended, **TRUSTED)[1]['code'] == 'E_EXPIRED'


def test_a_stolen_key_cannot_date_back(
    shop, ask, signer, private, tmp_path, monkeypatch):  # noqa: F811
  """Nobody but its producer says when it was made: it is seen now."""
  now = shop.catalog.clock()
  with monkeypatch.context() as patch:
    patch.setattr(shop.catalog.clock, 'now', now - 2000)
    folder = add(shop, vouch=signer)
  assert verify.head(folder)[2]['created'] == now - 2000
  for since, code in ((now - 1000, 'E_REVOKED'), (now, 'E_REVOKED'),
                      (now + 5, None)):
    body = revoke.extended(None, [('key', signer.name)], now=now + 9,
                           since=since)
    (tmp_path / 'crl').write_bytes(signer.document(
        'crl', canonical.dumps(body)))
    status, found = ask(folder, **TRUSTED, crl='crl')
    assert (status, found.get('code')) == (1 if code else 0, code)
  # Nor one whose time is over.
  (tmp_path / 'over').write_bytes(keys.Signer(private['root']).document(
      'trust', trust.extended(trust.load(shop), keys.public(private['acme']),
                              'acme', not_after=now - 1000)))
  assert ask(folder, root='root', trust='over')[1]['code'] == 'E_TRUST'


def test_a_broken_signature_is_seen_without_a_key(
    shop, ask, signer, private):  # noqa: F811
  folder = add(shop, vouch=signer)
  data = layout.read(folder, manifest.NAME)
  payload, raw, hint = envelope.open_bundle(layout.read(folder, layout.SIG))
  other = envelope.statement(data, manifest.parse(data) | {'files': []})
  flipped = bytes([*raw[:-1], raw[-1] ^ 1])
  # (without the root key, with it)
  cases = {
      b'{}': ('E_SIG', 'E_SIG'),
      envelope.bundle(other, raw, hint): ('E_SIG', 'E_SIG'),
      envelope.bundle(payload, flipped, hint): (None, 'E_SIG'),
      envelope.bundle(payload, raw, '0' * 64): (None, 'E_TRUST'),
      envelope.bundle(payload, keys.sign(
          private['other'], envelope.STATEMENT, payload), hint): (
              None, 'E_SIG')}
  tried = wrong = 0
  for text, expected in cases.items():
    (folder / layout.SIG).write_bytes(text)
    for flags, code in zip(({}, TRUSTED), expected):
      status, found = ask(folder, **flags)
      tried += 1
      wrong += found.get('code') != code or status != (1 if code else 3)
      assert code or found['signature'] == 'not checked'
  print(f'signatures: tried {tried}, accepted wrongly {wrong}')
  assert tried == 10 and not wrong


def test_leaves(shop, ask):
  folder = add(shop)
  assert ask(folder, leaves=True)[1]['arrays'] == 'match their digests'
  about = verify.head(folder)[2]
  plain, _ = verify.content(folder, *verify.head(folder)[::2])
  for path in ('layers/kda/memory', *plain['leaves']):
    if path in plain['leaves']:
      bad = plain | {'leaves': plain['leaves'] | {path: '0' * 64}}
      with pytest.raises(verify.Refused, match='E_DIGEST'):
        leaves.check(folder, about, bad)
  state = about['state']
  with pytest.raises(verify.Refused, match='E_SCHEMA'):
    leaves.check(folder, about | {'state': state | {
        'leaves': state['leaves'][1:]}}, plain)
  assert ask(add(shop, OPEN), leaves=True)[1]['code'] == 'E_SEALED'


def test_a_portable_file(shop, ask, signer, tmp_path):  # noqa: F811
  portable.pack(add(shop, vouch=signer), tmp_path / 'one.tar')
  code, found = ask(tmp_path / 'one.tar', **TRUSTED, leaves=True)
  assert code == 0 and found['verified']
  assert found['arrays'] == 'match their digests'
  code, found = ask(tmp_path / 'one.tar')
  assert code == 3 and not found['verified']
  (tmp_path / 'bad.tar').write_bytes(b'0' * 1024)
  code, found = ask(tmp_path / 'bad.tar')
  assert (code, found['code']) == (1, 'E_LAYOUT')
  assert ask(tmp_path / 'nothing')[1]['code'] == 'E_IO'


@pytest.mark.slow
def test_no_jax_is_loaded(shop, tmp_path, signer, private):  # noqa: F811
  folder = add(shop, vouch=signer)
  (tmp_path / 'root').write_text(keys.public(private['root']))
  text = ('import sys; from statejax.artifact import verify; '
          'code = verify.main(sys.argv[1:]); '
          'sys.exit(code or (9 if "jax" in sys.modules else 0))')
  done = subprocess.run(
      [sys.executable, '-c', text, str(folder), '--leaves',
       f'--root={tmp_path}/root', f'--trust={shop.path}/trust/{trust.FILE}'],
      capture_output=True, text=True)
  assert done.returncode == 0, done
