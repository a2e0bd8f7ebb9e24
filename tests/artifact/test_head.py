"""Signed heads of the audit log: whoever has one sees a log that was cut short,
put back or written anew.
"""

import shutil

import pytest

pytest.importorskip('cryptography', reason='the extra [sign] is missing')

from statejax.artifact import canonical, chains, envelope, head, keys, objects
from statejax.artifact.outcome import Refused

EVERY = 8


@pytest.fixture(scope='module')
def signer():
  return keys.Signer(keys.generate())


@pytest.fixture
def opened(tmp_path, monkeypatch, signer):
  """Opens the store of the test, with a key or without."""
  monkeypatch.setattr(chains, 'EVERY', EVERY)
  def one(notary=signer):
    return objects.Store(tmp_path / 'store', objects.Secrets(
        tmp_path / 'secrets'), clock=lambda: 1_700_000_000, notary=notary)
  return one


def write(shop, rows, who='alice'):
  for _ in range(rows):
    shop.catalog.audit(who, 'mint', 'chat', 'allowed')


def kept(shop, signer):
  return head.parse(head.place(shop).read_bytes(), keys.public(signer.private))


def test_signed_every_so_many_rows_and_at_the_end(opened, signer):
  shop = opened()
  write(shop, EVERY - 1)
  assert not head.place(shop).exists()
  write(shop, EVERY + 3)
  assert kept(shop, signer) == {
      'origin': shop.id, 'rows': 2 * EVERY, 'time': 1_700_000_000,
      'hash': shop.catalog._all('select hash from audit where seq = ?',
                                (2 * EVERY,))[0][0]}
  # A group of rows is signed when all of it is there.
  with shop.catalog.transaction():
    write(shop, EVERY)
    assert kept(shop, signer)['rows'] == 2 * EVERY
  assert kept(shop, signer)['rows'] == 3 * EVERY + 2
  write(shop, 1)
  with pytest.raises(KeyError), shop.catalog.transaction():
    write(shop, EVERY)
    raise KeyError
  assert kept(shop, signer)['rows'] == 3 * EVERY + 2
  shop.close()
  assert kept(shop, signer)['rows'] == 3 * EVERY + 3
  other = opened().again()  # as of another thread
  write(other, EVERY)
  assert kept(other, signer)['rows'] == 4 * EVERY
  other.close()
  assert not head.differs(opened(None), kept(other, signer))


def test_without_a_key_nothing_is_signed(opened):
  shop = opened(None)
  write(shop, 2 * EVERY)
  shop.close()
  assert not head.place(shop).exists()


def shorter(shop, seq):
  shop.catalog._base.execute('delete from audit where seq > ?', (seq,))


def test_a_log_that_does_not_go_on_is_seen(opened, signer, tmp_path):
  """Cut at every row; put back with all of the store, and then gone on with."""
  shop = opened()
  write(shop, 5)
  shop.close()
  shutil.copytree(tmp_path / 'store', tmp_path / 'old')
  early = kept(shop, signer)
  shop = opened()
  write(shop, EVERY)
  shop.close()
  late, tried, wrongly = kept(shop, signer), 0, 0
  assert late['rows'] == EVERY + 5
  shutil.copytree(tmp_path / 'store', tmp_path / 'new')

  def attacked(folder, how):
    nonlocal tried, wrongly
    shutil.rmtree(tmp_path / 'store')
    shutil.copytree(tmp_path / folder, tmp_path / 'store')
    shop = opened(None)
    how(shop)
    shop.catalog.rows()  # in itself it is whole
    tried, wrongly = tried + 1, wrongly + (not head.differs(shop, late))
    shop.close()
    # Nor is such a log signed.
    with pytest.raises(Refused, match='E_IO: audit'):
      opened().close()
    assert kept(shop, signer) == late

  for seq in range(late['rows']):
    attacked('new', lambda shop, seq=seq: shorter(shop, seq))
  for rows in (0, 1, EVERY, 2 * EVERY):
    attacked('old', lambda shop, rows=rows: write(shop, rows, 'eve'))
  print(f'logs that were cut short or put back: tried {tried}, accepted '
        f'wrongly {wrongly}')
  assert tried == late['rows'] + 4 and not wrongly
  # What goes on from a head is no fault, of an old head either.
  shutil.rmtree(tmp_path / 'store')
  shutil.copytree(tmp_path / 'new', tmp_path / 'store')
  shop = opened()
  write(shop, 3)
  assert [head.differs(shop, one) for one in (early, late)] == ['', '']
  assert head.differs(shop, late | {'origin': '0' * 32}).startswith(
      'audit: expected a head of the store')
  shop.close()


def test_only_the_key_signs_heads(opened, signer):
  shop = opened()
  write(shop, 3)
  shop.close()
  data, pem = head.place(shop).read_bytes(), keys.public(signer.private)
  other = keys.Signer(keys.generate())
  body = envelope.open_document('head', data)[0]
  tried = wrongly = 0
  for forged, key in (
      (data, keys.public(other.private)),
      (other.document('head', body), pem),
      (signer.document('crl', body), pem),
      (signer.document('head', body + b' '), pem),
      (signer.document('head', canonical.dumps(
          canonical.loads(body) | {'more': 1})), pem),
      (data.replace(b'"payload":"e', b'"payload":"f'), pem), (b'', pem)):
    tried += 1
    try:
      head.parse(forged, key)
      wrongly += 1
    except Refused as error:
      assert error.code == 'E_SIG'
  print(f'heads that are none: tried {tried}, accepted wrongly {wrongly}')
  assert not wrongly
  # Nor does a store go on from one of another key.
  head.place(shop).write_bytes(other.document('head', body))
  with pytest.raises(Refused, match='E_SIG: head: expected a signature of'):
    opened().close()


def test_what_was_written_is_done_without_its_head(opened, monkeypatch):
  shop = opened()
  def fail(*_):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(objects.Secrets, 'note', fail)
  write(shop, EVERY)
  assert shop.catalog.head().seq == EVERY and not head.place(shop).exists()
  with pytest.raises(OSError, match='No space'):
    shop.close()
