"""The slot layer against plain Python, token by token, and what it promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax import model as lm
from statejax import state as st
from statejax.layers import common, slots
from statejax.ops import slots as sl
from tests.ops import slot_oracle

RULES = c.SlotRules(slots=3, key=4, value=5, ring=1, span=3, key_span=2,
                    aliases=2)
SLOTS = c.SlotsConfig(RULES, segment=5, events=3, statement=6, top=2,
                      confidence=0.2)
WIDTH, VOCAB = 12, 9


def params_of(config, seed=0):
  model = lm.LanguageModel(c.ModelConfig(
      config.vocab or 1, WIDTH, (c.LayerConfig('m', config),),
      (c.GroupConfig(('m',)),)))
  found = model.init(jax.random.key(seed))['group_0']['layer_0']['mixer']
  return jax.tree.map(lambda p: p[0], found)


def inputs(rows, steps, seed=1):
  """x and tokens; x depends on few things, so that keys come again."""
  rng = np.random.default_rng(seed)
  table = rng.normal(size=(7, WIDTH))
  which = rng.integers(7, size=(rows, steps))
  x = table[which] + 0.02 * rng.normal(size=(rows, steps, WIDTH))
  return (jnp.asarray(x, jnp.float32),
          jnp.asarray(rng.integers(VOCAB, size=(rows, steps)), jnp.int32))


def empty(config, rows):
  return st.allocate(st.describe(slots.Slots.state(config, rows, 0, 'float32')))


@functools.partial(jax.jit, static_argnums=0)
def step(config, params, x, tokens, state, length, n_valid, document=None,
         hints=None):
  context = common.context(length, n_valid, document, x.shape[1])
  context = dataclasses.replace(context, tokens=tokens, hints=hints or {})
  (y, state), said = slots.Slots(config).apply(
      {'params': params}, x, state, context, mutable=('lent', 'losses'))
  return y, state, said, context.new_length


def run(config, params, x, tokens, cuts=()):
  """Pieces of rows, from the empty state."""
  state, outputs = empty(config, x.shape[0]), []
  length = jnp.zeros(x.shape[0], jnp.int32)
  for part, ids in zip(np.split(x, cuts, axis=1), np.split(tokens, cuts, 1)):
    y, state, _, length = step(
        config, params, part, ids, state, length,
        jnp.full(x.shape[0], part.shape[1], jnp.int32))
    outputs.append(y)
  return np.concatenate(outputs, axis=1), state


class Oracle:
  """One row of the layer, in plain Python."""

  def __init__(self, config, params):
    self.config, self.weights = config, jax.tree.map(np.asarray, params)
    self.begin()

  def begin(self):
    self.bank = slot_oracle.Row(self.config.rules)
    self.log, self.wants = [], []

  def project(self, name, x):
    return x @ self.weights[name]['kernel']

  def token(self, x, token):
    """Absorbs one token; returns y."""
    unit = lambda a: a / np.linalg.norm(a)
    position = len(self.log)
    logits, parts = self.project('want', x), self.project('part', x)
    self.log.append((token, int(np.argmax(parts))))
    key_span, _ = self.run_of(1, self.config.rules.key_span)
    y = self.read(unit(self.address('query', x, key_span)),
                  int(np.argmax(self.project('version', x))), position)
    want = slots.WANTS[int(np.argmax(logits))]
    if want != sl.NULL:
      p = np.exp(logits - logits.max())
      self.wants.append((1 - p[0] / p.sum(), -position, self.event(
          want, x, position, 1 - p[0] / p.sum())))
    if (position + 1) % self.config.segment == 0:
      best = sorted(self.wants, key=lambda w: w[:2], reverse=True)
      chosen = [w[2] for w in best[:self.config.events]]
      self.bank.commit(sorted(chosen, key=lambda e: e['time']), position + 1)
      self.wants = []
    return y

  def run_of(self, part, size):
    """The last tokens in a row that are such a part, and where they begin."""
    near = self.log[-self.config.statement:]
    end = max((i for i, t in enumerate(near) if t[1] == part), default=-1)
    begin = end
    while begin >= 0 and near[begin][1] == part and end - begin < size:
      begin -= 1
    found = [t[0] for t in near[begin + 1:end + 1]]
    found += [-1] * (size - len(found))
    return found, len(self.log) - 1 - len(near) + 2 + begin

  def address(self, which, x, span):
    if self.config.vocab and span[0] >= 0:
      return self.spell('key', span)
    return self.project(which, x)

  def spell(self, side, span):
    letters = self.weights['letters']
    kernel = self.weights[f'spell_{side}']['kernel']
    return sum(letters[t] @ kernel[j] for j, t in enumerate(span) if t >= 0)

  def event(self, want, x, position, strength):
    unit = lambda a: (a / np.linalg.norm(a)).astype(np.float32)
    r = self.config.rules
    near = self.log[-self.config.statement:]
    key_span, _ = self.run_of(1, r.key_span)
    span, first = self.run_of(2, r.span)
    count = sum(t >= 0 for t in span)
    if not count:
      span = [t[0] for t in near][-r.span:]
      count, first = len(span), position - len(span) + 1
      span += [-1] * (r.span - count)
    value = self.project('value', x)
    if self.config.vocab:
      value = value + self.spell('value', span)
    value = value.astype(np.float32)
    name_span, _ = self.run_of(3, r.key_span)
    return {'op': want, 'key': unit(self.address('key', x, key_span)),
            'name': unit(self.address('name', x, name_span)), 'value': value,
            'span': np.array(span), 'key_span': np.array(key_span),
            'source': np.array([first, count]), 'time': position,
            'salience': np.float32(strength * np.linalg.norm(value)),
            'principal': 0, 'expires': -1, 'slot': -1, 'expect': -1,
            'steps': 0, 'host': False}

  def read(self, query, ago, position):
    config, bank = self.config, self.bank
    seen = [i for i, s in enumerate(bank.slots) if s.status == sl.LIVE]
    score = {i: float(bank.slots[i].key @ query) for i in seen}
    for alias in bank.aliases:
      for i in seen if alias else ():
        if bank.slots[i].oid == alias[1]:
          score[i] = max(score[i], float(alias[0] @ query))
    total = sum(np.exp(config.kappa * s) for s in score.values())
    best = sorted(seen, key=lambda i: (-score[i], i))[:config.top]
    kept = [i for i in best if ago < len(bank.slots[i].content)]
    gone = max((float(s.key @ query) for s in bank.slots
                if s.status == sl.TOMBSTONE), default=-2.)
    if best and gone > score[best[0]] and gone >= config.confidence:
      return np.zeros(WIDTH)
    if not kept or kept[0] != best[0] or score[best[0]] < config.confidence:
      return np.zeros(WIDTH)
    value = 0
    for i in kept:
      s = bank.slots[i]
      value += np.exp(config.kappa * score[i]) / total * s.content[ago][0]
      s.reads += 1
      s.t_read = position
      s.t_first = position if s.t_first < 0 else s.t_first
    return self.project('out', value)


def same(state, row, oracle):
  want = oracle.bank.arrays()
  for path, x, axes, _ in st.leaves(state):
    if path not in want:
      continue
    got = np.take(np.asarray(x), row, axis=axes.index('batch'))
    np.testing.assert_allclose(got, want[path], atol=2e-5, err_msg=path)


@pytest.mark.parametrize('mode, vocab', [
    ('content', VOCAB), pytest.param('content', 0, marks=pytest.mark.slow),
    pytest.param('hashed', 0, marks=pytest.mark.slow)])
def test_layer_does_what_plain_python_does(mode, vocab):
  config = dataclasses.replace(SLOTS, vocab=vocab, rules=dataclasses.replace(
      RULES, mode=mode, ways=3))
  params, (x, tokens) = params_of(config), inputs(3, 60)
  oracles = [Oracle(config, params) for _ in range(3)]
  y, state = run(config, params, x, tokens, cuts=(1, 2, 31))
  want = np.array([[o.token(np.asarray(a), int(t)) for a, t in zip(*row)]
                   for o, row in zip(oracles, zip(x, tokens))])
  np.testing.assert_allclose(y, want, atol=2e-5)
  for row, oracle in enumerate(oracles):
    same(state, row, oracle)
  # Something of everything has happened.
  assert (np.asarray(state.version) > 2).any() and np.any(y != 0)
  assert np.asarray(state.reads).any() and (np.asarray(state.seq) > 3).any()


@pytest.mark.slow
def test_documents_begin_with_an_empty_bank():
  params, (x, tokens) = params_of(SLOTS), inputs(4, 40)
  # Short ones, one that ends with its segment, one across the call; and one of
  # a token that does not fill the segment that waits, with a short one last or
  # a long one.
  lengths = [7, 5, 3, 17, 8], [33, 7], [1, 36, 3], [1, 39]
  document = jnp.asarray(np.stack([
      np.repeat(np.arange(len(n)), n) for n in lengths]), jnp.int32)
  n = jnp.full((4,), 8, jnp.int32)
  before, ids = inputs(4, 8, 9)
  _, start, _, length = step(SLOTS, params, before, ids, empty(SLOTS, 4), 0 * n,
                             n)
  assert (np.asarray(start.want)[2:] != sl.NULL).any(axis=1).all()
  y, state, _, _ = step(SLOTS, params, x, tokens, start, length,
                        jnp.full((4,), 40, jnp.int32), document)
  for row in range(4):
    oracle = Oracle(SLOTS, params)
    for a, t in zip(before[row], ids[row]):
      oracle.token(np.asarray(a), int(t))
    want = []
    for t in range(40):
      if t and document[row, t] != document[row, t - 1]:
        oracle.begin()
      want.append(oracle.token(np.asarray(x[row, t]), int(tokens[row, t])))
    np.testing.assert_allclose(y[row], want, atol=2e-5)
    same(state, row, oracle)
    near = [-1] * SLOTS.statement + [t for t, _ in oracle.log]
    assert state.near[row].tolist() == near[1 - SLOTS.statement:]
    best = sorted(oracle.wants, key=lambda w: w[:2], reverse=True)
    best = sorted(-w[1] for w in best[:SLOTS.events])
    assert np.asarray(state.want_time)[row][
        np.asarray(state.want_strength)[row] > 0].tolist() == best


@pytest.mark.slow
def test_one_pass_is_token_after_token():
  """Integers to the bit, at every phase of a segment."""
  params, (x, tokens) = params_of(SLOTS), inputs(2, 21)
  y, whole = run(SLOTS, params, x, tokens)
  for cuts in (range(1, 21), (7, 14)):
    z, parts = run(SLOTS, params, x, tokens, cuts)
    np.testing.assert_allclose(y, z, atol=1e-5)
    for (path, a, _, _), (_, b, _, _) in zip(st.leaves(whole),
                                             st.leaves(parts)):
      np.testing.assert_allclose(
          a, b, atol=1e-5 * (a.dtype.kind == 'f'), err_msg=path)


def object_loss(params, x, hints, document, count):
  """What a row's objects cost, pair by pair."""
  unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
  query, key, name = (unit(np.asarray(x, np.float64) @ params[n]['kernel'])
                      for n in ('query', 'key', 'name'))
  ids, tags = (hints[n][0].tolist() for n in ('object', 'alias'))
  middle = (SLOTS.rules.threshold + SLOTS.confidence) / 2
  softplus = lambda a: np.logaddexp(0, a)
  total = 0.
  for side in (query, key):
    for i in range(count):
      here = [j for j in range(count) if document[j] == document[i]]
      seen = [(ids[j], side[i] @ key[j]) for j in here
              if side is query or j != i]
      seen += [(tags[j], side[i] @ name[j]) for j in here if tags[j] >= 0]
      same = np.array([s for n, s in seen if n == ids[i]])
      rest = np.array([s for n, s in seen if n != ids[i]])
      if same.size:
        total += np.mean(np.log(sum(np.exp(20 * s) for _, s in seen))
                         - 20 * same)
        total += np.mean(softplus(20 * (middle - same)))
      if rest.size:
        total += np.mean(softplus(20 * (rest - middle)))
  return total


@pytest.mark.slow
def test_hints_teach_what_a_token_wants():
  """Cross-entropy summed over the labelled tokens, gradient to those alone."""
  params, (x, tokens) = params_of(SLOTS), inputs(1, 6)
  hints = {'want': jnp.array([[1, -1, 0, -1, 4, 2]]),
           'part': jnp.array([[-1, -1, 2, -1, -1, 1]]),
           'object': jnp.array([[9, 3, 3, 9, 9, 9]]),
           'alias': jnp.array([[-1, 9, -1, 3, -1, -1]])}
  document = [0, 0, 0, 1, 1, 1]
  def losses(x):
    n = jnp.full((1,), 5, jnp.int32)
    return step(SLOTS, params, x, tokens, empty(SLOTS, 1), 0 * n, n,
                jnp.array([document]), hints)[2]['losses']
  got = losses(x)
  np.testing.assert_allclose(
      got['object_loss'], object_loss(params, x[0], hints, document, 5),
      rtol=1e-5)
  for name in ('want', 'part'):
    hint = hints[name]
    logp = jax.nn.log_softmax(x[0] @ params[name]['kernel'])
    want = -sum(logp[t, int(h)] for t, h in enumerate(hint[0][:5]) if h >= 0)
    np.testing.assert_allclose(got[f'{name}_loss'], want, rtol=1e-5)
  grad = jax.grad(lambda x: losses(x)['want_loss'])(x)
  assert np.any(np.asarray(grad) != 0, axis=-1).tolist() == [
      [True, False, True, False, True, False]]


@pytest.mark.slow
def test_without_hints_a_write_learns_from_its_reader():
  """Gradient of what is read reaches the strength of its write, straight
  through."""
  params, (x, tokens) = params_of(SLOTS), inputs(1, 10)
  n = jnp.full((1,), 10, jnp.int32)
  def total(kernel):
    changed = params | {'want': {'kernel': kernel}}
    y, *_ = step(SLOTS, changed, x, tokens, empty(SLOTS, 1), 0 * n, n)
    return jnp.sum(y ** 2)
  value, grad = jax.value_and_grad(total)(params['want']['kernel'])
  assert value > 0 and np.isfinite(grad).all() and np.any(grad != 0)


@pytest.mark.slow
def test_a_doubtful_read_falls_back():
  """Where slots say something the fallback is not heard, and the other way."""
  config = dataclasses.replace(SLOTS, top=1, confidence=0.0,
                               fallback=c.LogConfig(block=4, k=2))
  subject = lm.LanguageModel(c.ModelConfig(
      VOCAB, WIDTH, (c.LayerConfig('m', config, c.SwiGLUConfig(8)),),
      (c.GroupConfig(('m',)),)))
  params = subject.init(jax.random.key(4))  # with which it writes and reads
  tokens = inputs(1, 20)[1]
  def outputs(params):
    state = subject.init_state(1, 20)
    logits, state = subject.step(params, state, tokens)
    return np.asarray(logits), np.asarray(state.layers['m'].reads)
  both, reads = outputs(params)
  assert reads.any()
  other = jax.tree.map(lambda x: x, params)
  other['group_0']['layer_0']['mixer']['log_kappa'] -= 5.
  off, _ = outputs(other)
  # The first token has itself alone to look at.
  alike = (both == off).all(axis=-1)[0, 1:]
  # One slot a read, so that reads are the tokens which were answered by one.
  assert alike.sum() == reads.sum() and not alike.all()


@pytest.mark.slow
def test_who_does_not_look_reads_nothing():
  params, (x, tokens) = params_of(SLOTS), inputs(3, 60)
  zero, n = jnp.zeros(3, jnp.int32), jnp.full(3, 60, jnp.int32)
  look = jnp.asarray(np.random.default_rng(0).integers(2, size=(3, 60)),
                     jnp.int32)
  (all_, before, *_), (some, after, *_) = (
      step(SLOTS, params, x, tokens, empty(SLOTS, 3), zero, n, hints=hints)
      for hints in (None, {'look': look}))
  read = np.asarray(look, bool)
  np.testing.assert_array_equal(some[read], all_[read])
  assert np.any(all_[~read] != 0) and not np.any(some[~read] != 0)
  assert 0 < after.reads.sum() < before.reads.sum()
  np.testing.assert_array_equal(after.value, before.value)


@pytest.mark.parametrize('change, message', [
    (dict(top=9), 'top <= rules.slots'), (dict(segment=0), 'segment: expected'),
    (dict(statement=1), 'statement: expected >= 2'),
    (dict(kappa=0.0), 'kappa > 0'),
    (dict(rules=c.SlotRules(mode='router')), "got 'router'")])
def test_configs_say_what_is_wrong(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SLOTS, **change)


def test_a_vocabulary_is_that_of_the_model():
  layer = c.LayerConfig('m', dataclasses.replace(SLOTS, vocab=VOCAB))
  with pytest.raises(ValueError, match='expected a mixer with vocab=0 or 10'):
    c.ModelConfig(VOCAB + 1, WIDTH, (layer,), (c.GroupConfig(('m',)),))
