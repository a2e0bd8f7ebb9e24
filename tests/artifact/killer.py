"""Kills a busy process at random times, again and again; no jax.

    python tests/artifact/killer.py DIRECTORY KILLS SEED

The process mints, imports, deletes, collects and revokes in a store, and says
what it has done. After each kill what it said must hold. Prints one line of
JSON. Children are forked, so that a kill costs milliseconds.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import bare

from statejax.artifact import collect, desk, revoke
from statejax.artifact.access import Principal

ALICE = Principal('alice', 'acme')
MOST = 30  # artifacts that have names


class Work:
  """What the process does; each thing says what it is about to do, or has."""

  def __init__(self, path, sent, seed, say):
    self.path, self.sent, self.say = path, sent, say
    self.shop, self.rng, self.number = bare.store(path), random.Random(
        seed), seed * 1000

  def once(self):
    pins = [name for name in self.shop.catalog.refs() if name != 'chat']
    weights = {self.mint: 4, self.move: 2, self.loose: 2, self.import_: 3,
               self.delete: 4 * (len(pins) > MOST), self.revoke: 1,
               self.collect: 2}
    self.rng.choices([*weights], [*weights.values()])[0](pins)

  def mint(self, pins):
    self.number += 1
    kept = bare.mint(self.shop, self.number, ref=f'pin/{self.number}')
    self.say('kept', kept.id, kept.ref)

  def move(self, pins):
    version = (self.shop.catalog.ref('chat') or ('', 0))[1]
    self.number += 1
    kept = bare.mint(self.shop, self.number, ref='chat', expect=version)
    self.say('moved', kept.id, version + 1)

  def loose(self, pins):
    self.number += 1
    bare.mint(self.shop, self.number)

  def import_(self, pins):
    source = self.rng.choice(self.sent)
    id = 'sj1-' + source.name
    if id not in self.shop.catalog.objects():
      bare.take_in(self.shop, source, id, f'sent/{id[4:12]}')
      self.say('kept', id, f'sent/{id[4:12]}')

  def delete(self, pins):
    id, _ = self.shop.catalog.ref(self.rng.choice(pins))
    self.say('deleting', id)
    collect.delete(self.shop, id, 'alice')
    self.say('deleted', id)

  def revoke(self, pins):
    if pins:
      id, _ = self.shop.catalog.ref(self.rng.choice(pins))
      desk.withdraw(self.shop, id, ALICE)
      self.say('revoked', id)

  def collect(self, pins):
    collect.collect(self.shop, grace=0, generations=0)


def child(path, sent, seed, pipe):
  """Works until it is killed."""
  work = Work(path, sent, seed, lambda *event: os.write(
      pipe, json.dumps(event).encode() + b'\n'))
  while True:
    work.once()


def one_kill(path, sent, seed, wait):
  """Returns what a process has said before it was killed, and its status."""
  reading, writing = os.pipe()
  number = os.fork()
  if not number:
    try:
      child(path, sent, seed, writing)
    finally:
      os._exit(1)  # it may only be killed
  os.close(writing)
  time.sleep(wait)
  os.kill(number, signal.SIGKILL)
  text = b''.join(iter(lambda: os.read(reading, 1 << 16), b''))
  os.close(reading)
  status = os.waitpid(number, 0)[1]
  return [json.loads(line) for line in text.splitlines()], status


class Said:
  """All that was acknowledged so far."""

  def __init__(self):
    self.kept, self.ending, self.gone, self.revoked = {}, set(), set(), set()
    self.version, self.count = 0, 0

  def add(self, events):
    # Where a kill has fallen into it, a deletion is done or is not.
    self.kept = {id: ref for id, ref in self.kept.items()
                 if id not in self.ending}
    self.ending = set()
    for kind, id, *more in events:
      self.count += 1
      if kind == 'kept':
        self.kept[id] = more[0]
        self.gone.discard(id)
      elif kind == 'moved':
        self.version = more[0]
      elif kind == 'deleting':
        self.ending.add(id)
      elif kind == 'deleted':
        self.ending.discard(id)
        self.kept.pop(id, None)
        self.gone.add(id)
      else:
        self.revoked.add(id)

  def faults(self, shop, *, all):
    """Returns what is lost or wrong; looks at every byte if asked."""
    there, refs = shop.catalog.objects(), shop.catalog.refs()
    wrong = [f'{id} is lost' for id, ref in self.kept.items()
             if id not in self.ending and (
                 id not in there or refs.get(ref, ('',))[0] != id)]
    wrong += [f'{id} is back' for id in self.gone & there.keys()
              if not any(target == id for target, _ in refs.values())]
    if refs.get('chat', ('', 0))[1] < self.version:
      wrong.append('chat fell back')
    crl = shop.catalog.revocations('acme')
    wrong += [f'{id}: its revocation is lost' for id in self.revoked
              if not revoke.match(crl, bare.about(0), id)]
    collect.collect(shop, grace=0, generations=0)
    for name in ('tmp', 'trash'):
      wrong += [str(p) for p in (shop.path / name).iterdir()]
    if all:
      wrong += collect.check(shop)
      for id in shop.catalog.objects():
        bare.read(shop, id)
    return wrong


def senders(path, count):
  """Directories of artifacts that this store has made and deleted."""
  shop = bare.store(path)
  for number in range(count):
    id = bare.mint(shop, number).id
    shutil.copytree(shop.place(id), path / 'sent' / id[4:])
    collect.delete(shop, id, 'alice')
  shop.catalog.close()
  return sorted((path / 'sent').iterdir())


def main(path, kills, seed):
  path, rng, said, wrong = pathlib.Path(path), random.Random(seed), Said(), []
  start = time.monotonic()
  sent = senders(path, 6)
  pace = (time.monotonic() - start) / 6  # of a thing done, on this machine
  cut, aborts = 0, []
  for number in range(kills):
    events, status = one_kill(path, sent, seed * 10_000 + number + 1,
                              rng.uniform(0, 6 * pace))
    said.add(events)
    aborts += [status] * (status != signal.SIGKILL)  # it died by itself
    shop = bare.store(path)
    cut += any(next(iter(p.iterdir()), None) for p in (
        shop.path / 'tmp', shop.path / 'trash')) or bool(collect.orphans(shop))
    wrong += said.faults(shop, all=number % 20 == 19 or number == kills - 1)
    shop.catalog.close()
  print(json.dumps({'kills': kills, 'acknowledged': said.count, 'cut': cut,
                    'wrong': wrong, 'aborts': aborts}))


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
