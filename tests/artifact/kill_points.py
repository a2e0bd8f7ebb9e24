"""Kills a mint at every step of the protocol, in every situation; no jax.

    python tests/artifact/kill_points.py DIRECTORY SEED

A step has several moments: each call that changes a disk, the middle of each
write, each statement of the catalog. One of them is drawn for each case, after
a mint that is not killed has counted them. Prints one line of JSON: what came
of each case. Children are forked, so that a kill costs milliseconds.
"""

import collections
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import sys

import bare

from statejax.artifact import (
  collect,
  commit,
  layout,
  manifest,
  sealing,
  verify,
)
from statejax.artifact.outcome import Refused

STEPS = ('M4', 'M5', 'M6', 'M7', 'half a manifest', 'M8', 'M9', 'M10', 'M11',
         'M12', 'M13', 'M14')
SITUATIONS = ('first', 'overwrite', 'concurrent', 'sealed')
VICTIM, RIVAL = 7, 100


class Moments:
  """Counts the moments of each step, and dies at one of them.

  Attributes:
    counts: {step: moments so far}.
    step: the one the mint is in.
  """

  def __init__(self, shop, step='', number=-1, cut=0.5):
    self.shop, self.wanted, self.cut = shop, (step, number), cut
    self.counts = collections.Counter()
    self.step, self.renamed = 'M4', False

  def at(self, step='', half=None):
    """A moment; in that of death a write has done a half."""
    self.step = step or self.step
    if self.wanted == (self.step, self.counts[self.step]):
      if half:
        half()
      os.kill(os.getpid(), signal.SIGKILL)
    self.counts[self.step] += 1

  def around(self, owner, name, step_of):
    """The moments before and after a call, in the step of its arguments."""
    original = getattr(owner, name)
    def call(*args, **named):
      step = step_of(*args)
      self.at(step)
      result = original(*args, **named)
      self.at(step)
      return result
    setattr(owner, name, call)

  def watch(self, sealed):
    """From here on all that a mint does has moments."""
    write, rename = pathlib.Path.write_bytes, os.rename
    staged = str(self.shop.path / 'tmp')

    def writing(path, data):
      name = path.name
      step = {manifest.NAME: 'half a manifest', layout.MAC: 'M8'}.get(name)
      if step is None:
        # Sealed, the staged directory gets all of it after it lies in memory.
        step = 'M6' if name in (manifest.PLAIN, manifest.TOKENS) or (
            sealed and str(path).startswith(staged)) else 'M5'
      self.at(step, lambda: write(path, data[:int(self.cut * len(data))]))
      return write(path, data)

    def renaming(*names):
      self.at('M10')
      rename(*names)
      self.renamed = True
      self.at('M10')

    def statement(text):
      # Before that a key of its own is written down.
      if text.lower().startswith('begin') and self.renamed:
        self.step = 'M12'
      if self.step == 'M12':
        self.at('M13' if text.lower() == 'commit' else '')

    def syncing(path):
      if not str(path).startswith(str(self.shop.path)):
        return ''  # of the artifact's own key, in M4
      if self.renamed:
        return 'M11'
      return 'M9' if str(path).startswith(staged) else 'M10'

    pathlib.Path.write_bytes, os.rename = writing, renaming
    self.around(os, 'chmod', lambda *_: 'M9' if self.counts['M8'] else '')
    self.around(commit, 'sync', syncing)
    self.around(layout, 'listing', lambda *_: 'M7')
    self.around(os, 'mkdir', lambda *_: 'M10' if self.counts['M8'] else '')
    self.around(self.shop, '_enter', lambda *_: '')
    self.shop.catalog._base.set_trace_callback(statement)


def mint(shop, sealed, number, ref, expect, say):
  kind = {'sealed': 'aes256gcm1'} if sealed else {}
  kept = bare.mint(shop, number, ref=ref, expect=expect, **kind)
  say(kept.ref, 1 if kept.conflict else expect + 1, kept.id)


def victim(shop, situation, moments):
  """Mints once, and acknowledges it; returns a function of a say."""
  def run(say):
    expect = (shop.catalog.ref('chat') or ('', 0))[1]
    def told(*event):
      moments.at('M14')
      say(*event)
      moments.at('M14')
    sealed = situation == 'sealed'
    assert shop.secret  # from here on it is there
    moments.watch(sealed)
    mint(shop, sealed, VICTIM, 'chat', expect, told)
    say('counts', moments.counts)
  return run


def rival(shop, stop):
  """Mints under the same name and collects, until a file is there."""
  def run(say):
    for number in itertools.count(RIVAL):
      version = (shop.catalog.ref('chat') or ('', 0))[1]
      mint(shop, False, number, 'chat', version, say)
      collect.collect(shop, grace=0, generations=9)
      if stop.exists():
        return
  return run


def forked(run):
  """Starts a process; returns its number and where it says what it has done."""
  reading, writing = os.pipe()
  number = os.fork()
  if not number:
    try:
      run(lambda *event: os.write(writing, json.dumps(event).encode() + b'\n'))
      os._exit(0)
    finally:
      os._exit(1)
  os.close(writing)
  return number, reading


def heard(number, reading, text=b''):
  """Returns (what a process has said, its status) when it has ended."""
  text += b''.join(iter(lambda: os.read(reading, 1 << 16), b''))
  os.close(reading)
  return [json.loads(line) for line in text.splitlines()], os.waitpid(
      number, 0)[1]


def begin(path, situation):
  """A store before the mint; returns (store, version of the name)."""
  (path / 'scratch').mkdir(parents=True)
  shop = bare.store(path, scratch=str(path / 'scratch'))
  if situation == 'overwrite':
    mint(shop, False, 1, 'chat', 0, lambda *_: None)
    return shop, 1
  return shop, 0


def counted(path, situation):
  """Returns {step: its moments}."""
  shop, _ = begin(path, situation)
  said, status = heard(*forked(victim(shop, situation, Moments(shop))))
  assert status == 0, (situation, status)
  return said[-1][1]


def case(path, situation, step, number, rng):
  """Kills one mint; returns what came of it.

  Returns:
    {'middle': whether it had not acknowledged yet, 'kept': whether it was
    kept, 'lost': [...], 'accepted wrongly': [...], 'wrong': [...], 'aborts':
    [ends of processes other than the kill, or 0 of the rival]}
  """
  shop, expect = begin(path, situation)
  shop.catalog.close()  # no connection may be open over a fork
  def opened(run):
    def inside(say):
      again = bare.store(path, scratch=shop.scratch)
      return run(again)(say)
    return inside
  cut, stop = rng.random(), path / 'stop'
  if situation == 'concurrent':
    other = forked(opened(lambda shop: rival(shop, stop)))
    first = os.read(other[1], 1 << 16)  # from here on it is at it
  said, status = heard(*forked(opened(lambda shop: victim(
      shop, situation, Moments(shop, step, number, cut)))))
  aborts = [] if status == signal.SIGKILL else [f'not killed: {status}']
  acknowledged, more = bool(said), []
  if situation == 'concurrent':
    stop.touch()
    more, status = heard(*other, first)
    aborts += [f'the rival: {status}'] * (status != 0)
  return {'middle': not acknowledged, 'aborts': aborts} | judged(
      bare.store(path, scratch=shop.scratch), step, said + more, expect,
      adopt=rng.random() < 0.5)


def judged(shop, step, said, expect, *, adopt):
  found = {'lost': [], 'accepted wrongly': [], 'wrong': []}
  there, refs = shop.catalog.objects(), shop.catalog.refs()
  kept = bare.minted(shop, VICTIM)
  latest = {}
  for ref, version, id in said:
    if latest.setdefault((ref, version), id) != id:
      found['wrong'].append(f'{ref} had version {version} twice')
  for (ref, version), id in latest.items():
    now = refs.get(ref, ('', 0))
    if now[1] < version or (now[1] == version and now[0] != id):
      found['lost'].append(f'{ref}: {id}')
  if refs.get('chat', ('', 0))[1] < expect:
    found['lost'].append('what the name pointed to')
  early = STEPS.index(step) < STEPS.index('M13')
  if kept and early or step == 'M14' and not kept:
    found['wrong'].append(f'kept: {bool(kept)}')
  found['kept'] = bool(kept)
  def whole(folder, what):
    """What is accepted must be what was minted; a refusal is as good."""
    try:
      about = verify.verify(folder, secret=shop.secret).about
    except Refused:
      return
    if about['sealed'] == 'none' and layout.read(
        folder, 'state/state/d/a') != bare.payload(bare.number_of(about)):
      found['accepted wrongly'].append(what)
  for place in (shop.path / 'tmp').iterdir():
    whole(place, place.name)
  for id in collect.orphans(shop):
    if adopt:
      try:
        collect.adopt(shop, id, 'alice')
      except Refused as error:  # a kill leaves what has its place whole
        found['wrong'].append(f'{id}: {error}')
    os.utime(shop.place(id), (0, 0))
  for id in shop.catalog.objects():
    try:
      bare.read(shop, id)
    except (Refused, AssertionError) as error:
      found['accepted wrongly'].append(f'{id}: {error}')
  collect.collect(shop, grace=0, generations=9)
  found['wrong'] += [str(p) for p in (
      *(shop.path / 'tmp').iterdir(), *(shop.path / 'trash').iterdir(),
      *pathlib.Path(shop.scratch).iterdir())]
  # A retry of the same request makes it once; gc takes the second copy.
  if not adopt and kept in (None, *there):
    again = bare.mint(shop, VICTIM, ref='again').id
    if (again == kept) != bool(kept):
      found['wrong'].append('a retry has made a second one')
    for id in collect.orphans(shop):
      os.utime(shop.place(id), (0, 0))
    collect.collect(shop, grace=0, generations=9)
  found['wrong'] += collect.check(shop)
  # A key goes with its artifact.
  needed = {sealing.own_name(shop, verify.head(shop.place(id))[2]['nonce'])
            for id in shop.catalog.objects()}
  found['wrong'] += shop.secrets.names(sealing.own_name(shop, '')) - needed
  shop.catalog.close()
  return found


def main(path, seed):
  path, rng, done = pathlib.Path(path), random.Random(seed), []
  for situation in SITUATIONS:
    counts = counted(path / 'count', situation)
    shutil.rmtree(path / 'count')
    for step in STEPS:
      number = rng.randrange(counts[step])
      found = case(path / 'case', situation, step, number, rng)
      done.append({'situation': situation, 'step': step, 'moment': number,
                   'of': counts[step], **found})
      shutil.rmtree(path / 'case')
  print(json.dumps(done))


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]))
