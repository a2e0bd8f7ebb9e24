"""Law L8 through artifacts: each kind of layer at each phase of a row's life.

    pytest tests/artifact/test_every_phase.py            each once
    pytest -m slow tests/artifact/test_every_phase.py    random schedules

A case is a kind of layer at a phase. Many kinds share a model, so that one
program runs them all; their states are compared leaf by leaf, so that what
differs has the name of its layer. The first of the layers that differ is to
blame: those behind it see what it says.
"""

import collections
import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store as small
import test_every_mixer as every
from jax.sharding import NamedSharding, PartitionSpec

from statejax import config as c
from statejax import model as lm
from statejax import sharding
from statejax import state as st
from statejax.artifact import load, mint, standing

# One of each type but those of which a model needs something special; these
# have a model of their own in `test_every_mixer`. The slots come first, where
# random parameters make them write.
KINDS = (
    ('kda', 'gdn', 'gated_conv', 'delta_net', 'gdn2', 'delta_product', 'gla',
     'retnet', 'lightning'),
    ('mamba2', 'full_rope', 'window_sink', 'mla', 'dsa', 'loza', 'nsa', 'moba',
     'block_max'),
    ('slots', 'qsa', 'kpool', 'hysparse_owner', 'csa', 'xl', 'compressive',
     'dst', 'infini', 'titans'))
TOKENS, MORE = every.tokens_of(17), every.tokens_of(5, 1)
# Of each model; a kind of layer in a schedule is a case.
SCHEDULES = 120
ROOM = every.CAPACITY + 16


class Composite:
  """Many kinds of layers in one model, of which all phases run one program."""

  def __init__(self, kinds, parameters=True):
    layers = tuple(c.LayerConfig(kind, every.MIXERS[kind], c.SwiGLUConfig(8))
                   for kind in kinds)
    self.kinds, self.model = kinds, lm.LanguageModel(c.ModelConfig(
        vocab=32, width=24, layers=layers, groups=(c.GroupConfig(kinds),)))
    self.host = every.host_of(self.model)
    self.params = every.drawn(self.model) if parameters else None

  def fresh(self):
    return self.model.init_state(1, every.CAPACITY)

  def absorb(self, state, tokens, size=every.STEP):
    """Absorbs tokens, `size` of them in a step."""
    for begin in range(0, len(tokens), size):
      state = every.absorb(self.model, self.params, state,
                           tokens[begin:begin + size])
    return state

  def through(self, shop, state, tokens):
    return every.through(shop, self.model, state, tokens)

  def load(self, shop, id, **options):
    found = load.load(shop, id, every.ALICE, self.host, **options)
    assert found.decision.outcome == 'resumed', found.decision
    return found


def facts(live):
  """{path: digest} of a live row; one that overflowed would hide a lot."""
  found = {}
  for path, x, _, _ in st.leaves(live):
    x = np.asarray(x)
    assert x.dtype.kind in 'biu' or np.isfinite(x.astype('f')).all(), path
    found[path] = hashlib.sha256(f'{x.dtype} {x.shape} '.encode()
                                 + x.tobytes()).hexdigest()
  return found


class Law:
  """Counts cases.

  Attributes:
    cases: {(kind, phase): leaves that differ}; the kind of what belongs to no
      layer is 'row'.
  """

  def __init__(self):
    self.cases = {}

  def compare(self, phase, got, want):
    """Compares two rows: states of one, or facts."""
    got, want = (x if isinstance(x, dict) else facts(st.live(x, 0))
                 for x in (got, want))
    assert got.keys() == want.keys()
    for path, value in want.items():
      kind = path.split('/')[1] if path.startswith('layers/') else 'row'
      self.cases.setdefault((kind, phase), []).extend(
          [path] * (got[path] != value))

  def differ(self):
    """What differs, the layer to blame first."""
    order = ['row', *sum(KINDS, ())]
    return {case: self.cases[case] for case in sorted(
        self.cases, key=lambda case: order.index(case[0])) if self.cases[case]}

  def tried(self):
    return sum(kind != 'row' for kind, _ in self.cases)


# The phases; each yields pairs of rows that must be equal.


def on(one, got, want, size=every.STEP):
  yield got, want
  yield tuple(one.absorb(x, MORE, size) for x in (got, want))


def boundary(one, shop):
  """Where chunks and segments end."""
  state = one.fresh()
  for end in (8, 16):
    state = one.absorb(state, TOKENS[end - 8:end])
    yield from on(one, one.through(shop, state, TOKENS[:end]).state, state)


def mid_chunk(one, shop):
  state = one.absorb(one.fresh(), TOKENS[:13])
  yield from on(one, one.through(shop, state, TOKENS[:13]).state, state)


def decode(one, shop):
  """After single tokens, and on by single tokens."""
  state = one.absorb(one.fresh(), TOKENS[:13], 1)
  yield from on(one, one.through(shop, state, TOKENS[:13]).state, state, 1)


def fork(one, shop):
  """Two children go two ways, each as if it were alone; so does the parent."""
  state = one.absorb(one.fresh(), TOKENS[:11])
  found = one.through(shop, state, TOKENS[:11])
  parent = mint.Parent(found.id, found.about)
  children = [mint.fork(shop, parent, every.ALICE).id for _ in range(2)]
  for seed, id in enumerate((found.id, *children)):
    child = one.load(shop, id).state
    yield child, state
    more = every.tokens_of(7, seed)
    yield one.absorb(child, more), one.absorb(state, more)


def commit(one, shop):
  """Of a draft some tokens are accepted; what is minted never saw the rest."""
  state = one.absorb(one.fresh(), TOKENS[:9])
  for accepted in (0, 4):
    end = 9 + accepted
    ahead = one.absorb(state, [*TOKENS[9:end], *every.tokens_of(7, 9)])
    back = one.absorb(st.restore_fixed(ahead, st.snapshot(state)),
                      TOKENS[9:end])
    never = one.absorb(state, TOKENS[9:end])
    yield from on(one, one.through(shop, back, TOKENS[:end]).state, never)


def capacity(one, shop):
  """What grows is stored without its empty slots, and comes into others."""
  state = one.absorb(one.fresh(), TOKENS[:13])
  wide = one.load(shop, one.through(shop, state, TOKENS[:13]).id,
                  capacity=ROOM).state
  assert st.capacity(wide) in (None, ROOM)
  yield wide, state
  # Back into those of the program, as another one may give other bits.
  kept = mint.mint(shop, wide, 0, one.host, small.TERMS)
  yield from on(one, one.load(shop, kept.id).state, state)


def mesh(one, shop):
  """The same bits on each device, restored there or spread over them.

  Compared on the host, as a program per leaf and mesh takes long to compile.
  """
  state = one.absorb(one.fresh(), TOKENS[:13])
  found = one.through(shop, state, TOKENS[:13])
  want = facts(st.live(state, 0))
  for devices in (2, 4, 8):
    grid = sharding.make_mesh(data=devices)
    restored = one.load(shop, found.id, mesh=grid).state
    yield gathered(restored, 0), want
    spread = st.map_leaves(lambda path, axes, kind, x, grid=grid: (
        jax.device_put(np.repeat(np.asarray(x), 8, axes.index('batch')),
                       NamedSharding(grid, PartitionSpec(*(
                           'data' if a == 'batch' else None for a in axes))))
        ), found.state)
    for row in range(0, 8, 8 // devices):  # the first of each device
      one_row = gathered(spread, row)
      standing.check(one_row, {0: found.stands})
      yield one_row, want


def gathered(state, row):
  """One row of a state, from wherever it lies."""
  def pick(path, axes, kind, x):
    at = axes.index('batch')
    return np.asarray(x).take([row], at)
  return st.map_leaves(pick, state)


PHASES = (boundary, mid_chunk, decode, fork, commit, capacity, mesh)


def restart(shop, ids):
  """Facts of what comes of artifacts; run by another process.

  Only the first goes on there, as tracing takes long; all do in
  `test_every_mixer.test_restart`.
  """
  found = []
  for kinds, id in zip(KINDS, ids):
    one = Composite(kinds, parameters=not found)
    row = one.load(shop, id)
    assert row.decision.promise == 'bit', row.decision
    rows = [row.state]
    if one.params is not None:
      rows.append(one.absorb(row.state, MORE))
    found.append([facts(st.live(x, 0)) for x in rows])
  return found


def restarted(path, ids):
  """Starts that process."""
  code = ('import sys\n'
          f'sys.path.insert(0, {os.path.dirname(__file__)!r})\n'
          'import json, pathlib, small_store, test_every_phase as t\n'
          f'shop = small_store.store(pathlib.Path({str(path)!r}))\n'
          f'print(json.dumps(t.restart(shop, {ids!r})))')
  return subprocess.Popen(
      [sys.executable, '-c', code], stdout=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parent.parent.parent,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '8',
           'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})


def spoilt(one, state):
  """Raises unless it is seen what one kind of layer has lost; counts it."""
  tried, want = 0, facts(st.live(state, 0))
  end = facts(st.live(one.absorb(state, MORE), 0))
  for place, kind in enumerate(one.kinds):
    lost = st.map_leaves(
        lambda path, axes, about, x, mine=f'layers/{kind}/': jnp.zeros_like(
            x) if path.startswith(mine) else x, state)
    at_rest, later = Law(), Law()
    at_rest.compare('rest', lost, want)
    assert at_rest.differ().keys() == {(kind, 'rest')}
    later.compare('on', one.absorb(lost, MORE), end)
    # A tail is soon full again; then those behind it have seen that it was not.
    first, _ = next(iter(later.differ()))
    assert first in one.kinds[place:], (kind, first)
    tried += 2
  return tried


def test_every_kind_at_every_phase(tmp_path):
  shop, law, seen = small.store(tmp_path), Law(), 0
  composites, begun = [Composite(kinds) for kinds in KINDS], []
  for one in composites:
    state = one.absorb(one.fresh(), TOKENS[:13])
    begun.append((state, one.through(shop, state, TOKENS[:13]).id))
  other = restarted(tmp_path, [id for _, id in begun])
  try:
    for one, (state, _) in zip(composites, begun):
      for phase in PHASES:
        for got, want in phase(one, shop):
          law.compare(phase.__name__, got, want)
      seen += spoilt(one, state)
    told, _ = other.communicate()
    assert other.returncode == 0
  finally:
    other.kill()
    other.wait()
    other.stdout.close()
  for one, (state, _), rows in zip(composites, begun, json.loads(told),
                                   strict=True):
    for got, want in zip(rows, (state, one.absorb(state, MORE))):
      law.compare('restart', got, want)
  print(f'law L8: tried {law.tried()}, differ {len(law.differ())}; losses seen '
        f'{seen}')
  assert law.differ() == {}
  kinds = sum(map(len, KINDS))
  assert law.tried() == kinds * (len(PHASES) + 1) >= 150 and seen == 2 * kinds


# Schedules.


class Schedule:
  """A row's life at random, beside one that only absorbs the same tokens.

  Attributes:
    events: {what happened: how often}.
  """

  def __init__(self, one, shop, seed):
    self.one, self.shop = one, shop
    self.rng = random.Random(f'{one.kinds} {seed}')
    self.alone = self.state = one.fresh()
    self.tokens, self.id = [], ''
    self.events = collections.Counter()

  def draw(self, count):
    return [self.rng.randrange(32) for _ in range(count)]

  def room(self):
    return every.CAPACITY - len(self.tokens)

  def absorb(self):
    tokens = self.draw(self.rng.randint(0, min(every.STEP, self.room())))
    size = self.rng.randint(1, every.STEP)
    self.alone = self.one.absorb(self.alone, tokens, size)
    self.state = self.one.absorb(self.state, tokens, size)
    self.tokens += tokens

  def reject(self):
    """A draft of which nothing is accepted."""
    kept = st.snapshot(self.state)
    draft = self.draw(self.rng.randint(1, min(every.STEP, self.room())))
    self.state = st.restore_fixed(self.one.absorb(
        self.state, draft, self.rng.randint(1, every.STEP)), kept)

  def artifact(self):
    found = self.one.through(self.shop, self.state, self.tokens)
    self.state, self.parent = found.state, mint.Parent(found.id, found.about)

  def fork(self):
    """A child goes on here; another has gone elsewhere."""
    self.artifact()
    other, child = (mint.fork(self.shop, self.parent, every.ALICE).id
                    for _ in range(2))
    self.one.absorb(self.one.load(self.shop, other).state, self.draw(
        self.rng.randint(1, min(every.STEP, self.room()))))
    self.state = self.one.load(self.shop, child).state

  def wide(self):
    """By way of another capacity."""
    self.artifact()
    state = self.one.load(self.shop, self.parent.id, capacity=ROOM).state
    kept = mint.mint(self.shop, state, 0, self.one.host, small.TERMS)
    self.state = self.one.load(self.shop, kept.id).state

  def run(self):
    end = self.rng.randint(1, every.CAPACITY - 1)
    while len(self.tokens) < end:
      what = self.rng.choices(
          (self.absorb, self.reject, self.artifact, self.fork, self.wide),
          (8, 2, 1, 1, 1))[0]
      what()
      self.events[what.__name__] += 1
    self.artifact()
    self.events['artifact'] += 1


@pytest.mark.slow
@pytest.mark.parametrize('kinds', KINDS, ids=lambda kinds: kinds[0])
def test_schedules_at_random(kinds, memory):
  one, law, events = Composite(kinds), Law(), collections.Counter()
  for seed in range(SCHEDULES):
    # What a schedule has minted goes with it.
    (memory / f'{seed}').mkdir()
    run = Schedule(one, small.store(memory / f'{seed}'), seed)
    run.run()
    law.compare(seed, run.state, run.alone)
    events += run.events
    shutil.rmtree(memory / f'{seed}')
  print(f'law L8 at random: {SCHEDULES} schedules of {len(kinds)} kinds, tried '
        f'{law.tried()}, differ {len(law.differ())}; {dict(events)}')
  assert law.differ() == {} and law.tried() == SCHEDULES * len(kinds)
