import os
import shutil
import sqlite3
import threading

import pytest
from small_store import Clock, store

from statejax.artifact import catalog, chains
from statejax.artifact.objects import Secrets, Store
from statejax.artifact.outcome import Receipt, Refused


@pytest.fixture
def book(tmp_path):
  found = catalog.Catalog(tmp_path / 'index.db', clock=Clock())
  yield found
  found.close()


def test_chain_shows_every_change(book, tmp_path):
  receipts = [book.audit('alice', 'resume', f'sj1-{i}', 'refused', code='E_ID')
              for i in range(4)]
  assert [r.seq for r in receipts] == [1, 2, 3, 4]
  assert book.head() == receipts[-1] and len(book.rows()) == 4
  assert all(map(book.holds, receipts))
  for damage in ("update audit set body = replace(body, 'alice', 'bob') "
                 'where seq = 2', 'delete from audit where seq = 2',
                 'update audit set seq = 9 where seq = 4',
                 "update audit set hash = 'a' || substr(hash, 2) where seq = 3",
                 'update audit set seq = -seq where seq in (2, 3)'):
    shutil.copy(tmp_path / 'index.db', tmp_path / 'copy.db')
    for end in ('-wal', '-shm'):
      if (tmp_path / f'index.db{end}').exists():
        shutil.copy(tmp_path / f'index.db{end}', tmp_path / f'copy.db{end}')
    base = sqlite3.connect(tmp_path / 'copy.db')
    base.execute(damage)
    base.commit()
    base.close()
    other = catalog.Catalog(tmp_path / 'copy.db')
    with pytest.raises(Refused, match='audit row'):
      other.rows()
    other.close()
    for end in ('', '-wal', '-shm'):
      (tmp_path / f'copy.db{end}').unlink(missing_ok=True)
  # Even a row that is right in itself does not fit what follows it.
  (body, _), (_, first) = book._base.execute(
      'select body, hash from audit where seq in (2, 1) order by seq desc')
  other = body.replace('alice', 'mallory')
  with pytest.raises(Refused, match='audit row 3'):
    with book.transaction():
      book._base.execute('update audit set body = ?, hash = ? where seq = 2', (
          other, chains._link('audit', first, other.encode())))
      book.rows()  # the transaction ends undone
  # A log cut short is whole in itself; a receipt tells.
  base = sqlite3.connect(tmp_path / 'index.db')
  base.execute('delete from audit where seq > 2')
  base.commit()
  base.close()
  assert len(book.rows()) == 2
  assert book.holds(receipts[1]) and not book.holds(receipts[3])
  assert not book.holds(Receipt(1, receipts[1].head))


def test_whatever_is_asked_for_can_be_written_down(book):
  book.audit('J\u00fcrgen', 'resume', '\ud800\n', 'refused')
  assert book.rows()[0]['principal'] == 'J?rgen'


def test_all_or_nothing(book):
  with pytest.raises(KeyError):
    with book.transaction():
      book.audit('a', 'mint', 'x', 'allowed')
      book.charge('a', 'x', live_bytes=5)
      raise KeyError
  assert not book.rows() and not book.rows('ledger')
  with pytest.raises(ValueError, match='unit: expected'):
    book.charge('a', 'x', miles=1)


def test_names_move_by_compare_and_set(book):
  assert book.move('chat', 'a', 0) and book.ref('chat') == ('a', 1)
  assert not book.move('chat', 'b', 0) and not book.move('chat', 'b', 2)
  assert book.move('chat', 'b', 1) and book.refs() == {'chat': ('b', 2)}
  book.drop('chat')
  assert book.ref('chat') is None


def test_many_may_make_it_at_once(tmp_path):
  tried, failed = 60, []
  for i in range(tried):
    start = threading.Barrier(8)

    def work(path, start):
      start.wait()
      try:
        catalog.Catalog(path).close()
      except Refused as error:
        failed.append(error)

    threads = [threading.Thread(target=work, args=(tmp_path / str(i), start))
               for _ in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert not failed


def test_many_writers_lose_nothing(tmp_path):
  done, lost = [], []

  def work(number):
    mine = catalog.Catalog(tmp_path / 'index.db')
    for i in range(10):
      mine.audit(f'w{number}', 'resume', str(i), 'allowed')
      found = mine.ref('head')
      version = found[1] if found else 0
      (done if mine.move('head', f'{number}-{i}', version) else lost).append(i)
    mine.close()

  threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  book = catalog.Catalog(tmp_path / 'index.db')
  assert len(book.rows()) == 40 and len(done) + len(lost) == 40
  assert book.ref('head')[1] == len(done)  # each won move counts once
  book.close()


def test_kin_leases_grants_and_lists(book):
  book.add('a', 'k1', 10, 'live', '')
  book.add('b', 'k2', 10, 'live', '', ['a'])
  book.add('c', 'k3', 10, 'live', '', ['b'])
  assert book.parents('c') == ['b'] and book.descendants('a') == ['b', 'c']
  with pytest.raises(sqlite3.IntegrityError):
    book.add('d', 'k3', 10, 'live', '')
  assert book.minted('k3') == 'c' and book.minted('k9') is None
  with book.lease('a', 'reader', 60):
    assert book.leased() == {'a'}
    book.clock.now += 61
    assert book.leased() == set()
  book.bury('a')
  assert set(book.objects()) == {'b', 'c'} and set(book.objects(gone=True))
  assert book.use_grant('g', 2) and book.use_grant('g', 2)
  assert not book.use_grant('g', 2)
  assert book.revocations() is None
  book.keep_revocations({'number': 3, 'entries': []})
  with pytest.raises(ValueError, match='lists never go back'):
    book.keep_revocations({'number': 3, 'entries': []})


def test_a_damaged_catalog_is_refused(tmp_path):
  (tmp_path / 'index.db').write_bytes(b'no database' * 100)
  with pytest.raises(Refused, match='E_IO'):
    catalog.Catalog(tmp_path / 'index.db')


@pytest.mark.parametrize('table, change', [
    ('audit', "body='xx'"), ('audit', "body='[1]'"), ('audit', "body='{}'"),
    ('audit', "body=x'ff'"), ('ledger', "body='[1]'"),
    ('audit', "hash='xx'"), ('crl', "body='{'"), ('crl', "body=x'ff'")])
def test_a_damaged_row_is_refused(book, table, change):
  book.audit('alice', 'mint', 'a', 'allowed')
  book.charge('alice', 'a', live_bytes=1)
  book.keep_revocations({'number': 1, 'entries': []})
  book._base.execute(f'update {table} set {change}')
  asked = [book.revocations] if table == 'crl' else [
      lambda: book.rows(table)] + (
          [] if table == 'ledger' else [book.head] if 'hash' in change else
          [book.newest])
  for ask in asked:
    with pytest.raises(Refused, match=f'E_IO: .*{table}'):
      ask()
  assert book.grant_uses('g') == 0


# The store's directory.


def test_store_opens_again_and_refuses_others(tmp_path):
  one = store(tmp_path)
  assert store(tmp_path).id == one.id
  assert {'STORE.json', 'objects', 'tmp', 'trash', 'index.db'} < {
      p.name for p in one.path.iterdir()}
  (tmp_path / 'other').mkdir()
  with pytest.raises(ValueError, match='expected a store, got something else'):
    Store(tmp_path / 'other', one.secrets)
  about = one.path / 'STORE.json'
  about.write_text(about.read_text().replace('"version":1', '"version":2'))
  with pytest.raises(Refused, match='E_VERSION'):
    store(tmp_path)


def test_secrets_are_kept_apart_and_closed(tmp_path):
  one, secrets = store(tmp_path), Secrets(tmp_path / 'secrets')
  assert len(one.secret) == 32 and one.secret == store(tmp_path).secret
  assert secrets.org('acme') != secrets.org('globex')
  for file in secrets.path.iterdir():
    assert os.stat(file).st_mode & 0o777 == 0o600
    for inside in one.path.rglob('*'):
      assert inside.is_dir() or file.read_bytes() not in inside.read_bytes()


@pytest.mark.parametrize('text', ['', 'zz', '0' * 63, '0' * 66, 'zz' * 32])
def test_a_damaged_secret_is_no_key(tmp_path, text):
  one = store(tmp_path)
  file = one.secrets.path / f'store-{one.id}.secret'
  assert one.secret
  file.write_text(text)
  for ask in (lambda: one.secret, lambda: one.secrets.find(file.stem)):
    with pytest.raises(Refused, match=f'E_IO: {file}: expected 64 hex digits'):
      ask()
  with pytest.raises(Refused, match='E_SEALED: expected a key of 32 bytes'):
    one.secrets.put('data-x', b'short')


@pytest.mark.parametrize('key', ['', 'nothing', 'sj1-', 'sj1-' + '0' * 64,
                                 '../../etc', 'x' * 9999])
def test_what_is_not_there(tmp_path, key):
  with pytest.raises(Refused, match='E_ACL'):
    store(tmp_path).find(key)
  with pytest.raises(ValueError, match='id: expected'):
    store(tmp_path).place(key + '.')


def test_quota(tmp_path):
  with pytest.raises(Refused, match='E_NOSPACE'):
    store(tmp_path, quota=100).room(101)
  with pytest.raises(Refused, match='bytes free'):
    store(tmp_path, quota=1 << 60).room(1 << 50)
