"""Grants from the command line: shown by every verb that takes them."""

import json

import pytest
from test_main import run  # noqa: F401
from test_main_state import model, state  # noqa: F401

pytest.importorskip('cryptography', reason='the extra [sign] is not installed')


def test_to_another_organisation(state, tmp_path, monkeypatch):  # noqa: F811
  monkeypatch.chdir(tmp_path)
  for name in ('root', 'acme', 'bob'):
    assert state('keygen', name)[0] == 0
  acme = ['--org=acme', '--signing_key=acme.pem']
  texts, there = ['--system=be kind'], ['--store=there', '--secrets=theirs']
  bob = ['--org=globex', '--principal=bob', '--root=root.pub',
         '--grant=bob.grant', '--holder_key=bob.pem']
  root = ['trust', 'acme.pub', '--org=acme', '--signing_key=root.pem']
  assert state(*root)[0] == state(*root, *there)[0] == 0
  assert state('mint', 'chat', '--workdir=x', '--temperature=0', '--prompt=ab',
               '--tokens=3', '--export=any', '--org=acme', *texts)[0] == 0
  # What nobody could use is not written, nor told as granted.
  for argv in (['grant', 'chat', '--org=acme', '--signing_key=root.pem',
                '--holder=bob.pub', '--file=bob.grant'],
               ['crl', 'acme.crl', '--signing_key=root.pem']):
    code, _, err = state(*argv)
    assert code == 2 and 'E_TRUST' in err
  assert state('grant', 'chat', *acme, '--holder=bob.pub', '--file=bob.grant',
               '--rights=inspect,resume,fork,export', '--max_uses=3')[0] == 0
  assert state('crl', 'acme.crl', *acme)[0] == 0
  # Before the row of the list.
  last = json.loads(state('audit', '--root=root.pub')[1].splitlines()[-3])
  assert state('grant', 'chat', *acme, '--holder=bob.pub',
               '--file=bob.grant')[0] == 2
  assert last['principal'] == 'local of acme' and last['action'] == 'grant'
  # In its own store: looked at, forked, transferred.
  out = state('show', 'chat', *bob)[1]
  assert 'may bob of globex resume it here: yes' in out
  for argv in (['diff', 'chat', 'chat'], ['lineage', 'chat'],
               ['fork', 'chat', '--ref=mine']):
    assert state(*argv, *bob)[0] == 0
  code, _, err = state('transfer', 'chat', *bob, '--signing_key=acme.pem',
                       '--file=bare.tar')
  assert code == 0 and 'minted under texts that were not given here' in err
  assert 'whose: local of acme' in state('show', 'mine', '--org=acme')[1]
  # In theirs.
  code, _, err = state('transfer', 'chat', *acme, *texts, '--file=chat.tar')
  assert code == 0 and not err
  assert state('trust', 'acme.crl', '--org=acme', '--root=root.pub',
               *there)[0] == 0
  assert state('transfer', 'chat.tar', *bob, *there, '--ref=chat')[0] == 0
  out = state('show', 'chat', '--workdir=x', *texts, *bob, *there)[1]
  assert 'does it fit here: yes, promise bit' in out
  code, _, err = state('resume', 'chat', '--workdir=x', '--tokens=1', *texts,
                       *bob, *there)
  assert code == 0 and err.startswith('resumed(5) promise=bit')
