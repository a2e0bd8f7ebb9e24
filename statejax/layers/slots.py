"""Editable memory: slots that a model writes, locks, deletes and reads."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import SlotsConfig
from statejax.layers import attention, common, slot_log, weights
from statejax.layers.common import Proj
from statejax.ops import lifecycle, recall, writer
from statejax.ops import slots as sl
from statejax.ops.product import einsum
from statejax.state import Array, Spec, leaf

# What a token may want, in the order of its logits, and what it may be part of.
WANTS = (sl.NULL, sl.WRITE, sl.LOCK, sl.UNLOCK, sl.DELETE, sl.ALIAS)
PARTS = ('none', 'key', 'value', 'name')
_KEY, _VALUE, _NAME = 1, 2, 3
# Steepness of the confidence around its threshold.
_SCALE = 20.0
# Tokens of a row whose object is known, at most, that learn from each other.
_PAIRED = 128
# The principal of what a stream writes.
STREAM = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotsState(sl.Bank):
  """A bank, what waits to be committed, and what a fallback keeps.

  Attributes beside those of `statejax.ops.slots.Bank`:
    want: events of the open segment in order, NULL where none is, [B, E].
    want_strength: by which they were chosen, -1 where none is, [B, E].
    want_key, want_name, want_value, want_span, want_key_span, want_source,
      want_time: see `statejax.ops.slots.Events`.
    near: the last tokens, oldest first, -1 before the document, [B, N - 1].
    near_part: what they are part of, [B, N - 1].
    k: address and salience of every token, [B, 1, N, K + 1]; growing.
    v: its value, [B, 1, N, V]; growing. Both None without a fallback.
  """

  want: Array = leaf('batch events')
  want_strength: Array = leaf('batch events', fill=-1)
  want_key: Array = leaf('batch events key')
  want_name: Array = leaf('batch events key')
  want_value: Array = leaf('batch events value')
  want_span: Array = leaf('batch events tokens', fill=-1)
  want_key_span: Array = leaf('batch events tokens', fill=-1)
  want_source: Array = leaf('batch events words', fill=-1)
  want_time: Array = leaf('batch events')
  near: Array = leaf('batch tokens', fill=-1)
  near_part: Array = leaf('batch tokens', fill=-1)
  k: Array | None = leaf('batch kv_heads capacity key', 'growing')
  v: Array | None = leaf('batch kv_heads capacity value', 'growing')


_BANK = tuple(f.name for f in dataclasses.fields(sl.Bank))
_WAITING = ('key', 'name', 'value', 'span', 'key_span', 'source', 'time')
_LOG = ('k', 'v')


def waiting(held):
  """The `Events` [B, E] that wait in a `SlotsState`."""
  return _decided({n: getattr(held, f'want_{n}') for n in _WAITING} | {
      'op': held.want, 'strength': held.want_strength})


def drop(held, gone):
  """A `SlotsState` without waiting events, [B, E] bool."""
  out = {}
  for field in dataclasses.fields(held):
    if field.name.startswith('want'):
      x = getattr(held, field.name)
      mask = gone.reshape(*gone.shape, *(1,) * (x.ndim - 2))
      fill = jnp.asarray(field.metadata['fill'], x.dtype)
      out[field.name] = jnp.where(mask, fill, x)
  return dataclasses.replace(held, **out)


class Slots(nn.Module):
  """Writes events to a bank of slots, and reads the slot nearest to a query.

    want(t)  = argmax(W_o x_t): nothing, write, lock, unlock, delete, alias
    event(t) = (key(t), value(t), its tokens, want(t)), if it is among the E
               strongest of its segment, 1 - p(nothing)
    key(t)   = unit(W_k x_t), value(t) = W_v x_t
    y_t      = W_r sum_m a_tm value_m of the bank as the segment found it, with
               a = softmax(kappa q . key) cut to the best, q = unit(W_q x_t)

  With `vocab` the last tokens that are part of a key, a value or another name
  spell it, as sum_j S_j e(token j): in place of W_k x_t and W_q x_t where there
  are any, and added to W_v x_t. What was said then need not be learned to be
  carried to the token that writes or asks, and the same words are the same
  address.

  The events of a segment are committed when its last token is absorbed, in
  their order, by `statejax.ops.lifecycle`. So what is written in a segment is
  read from the next on, and any split of a sequence leaves the same bank. The
  bank itself is hard: events happen or not, in training as in service. Hints
  'want' (an index of `WANTS`), 'part' (of `PARTS`) and 'version' (0 is now) add
  cross-entropies `want_loss` and so on; 'object' and 'alias' (numbers of what
  a token writes or asks for, and of the other name that it gives) add
  `object_loss`, which brings the keys and queries of one number together, and
  parts those of two; without them the strength of an event learns straight
  through the value that it has written. Hints 'force' (of `WANTS`)
  and 'force_part' (of `PARTS`) make a token want something, or be part of it.

  A read whose best cosine is below `confidence` is exactly 0, and then
  `fallback`, the log of all that was said, answers in its place, by the same
  addresses (`statejax.layers.slot_log`); the gradient of the cosine is that of
  a soft choice between the two. Who reads well seldom asks the log, which then
  learns little: a hint 'look' of 0 hides the bank from a token. With `asks` the
  log answers only who says that he asks, argmax(W_a x_t) (hint 'ask', 0 or 1,
  adds `ask_loss`); p(asks) learns as if it weighed the answer.

  Lends what each token read, and `active`: how many blocks of the log it saw
  where that answered, or how many slots.

  Laws: split (L1), start (L2), padding (L3), packed (L4).
  Reference: the lifecycle memory of arXiv 2606.28876; its rules are those of
  `statejax.ops.lifecycle`.
  """

  config: SlotsConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `SlotsState` of `Spec`."""
    c, r, e = config, config.rules, config.events
    shapes = {'key': (r.key,), 'name': (r.key,), 'span': (r.span,),
              'key_span': (r.key_span,), 'source': (2,), 'time': ()}
    wants = {f'want_{name}': Spec(
        (rows, e, *shape), 'float32' if name in ('key', 'name') else 'int32')
             for name, shape in shapes.items()}
    log = dict.fromkeys(_LOG)
    if c.fallback is not None:
      log = vars(slot_log.state(c.fallback, rows, capacity, r, dtype))
    bank = sl.specs(r, rows, dtype)
    tail = Spec((rows, c.statement - 1), 'int32')
    return SlotsState(
        **{name: getattr(bank, name) for name in _BANK},
        want=Spec((rows, e), 'int32'),
        want_strength=Spec((rows, e), 'float32'),
        want_value=Spec((rows, e, r.value), dtype), **wants,
        near=tail, near_part=tail, **log)

  @nn.compact
  def __call__(self, x, state, context):
    c, plan = self.config, context.blocks(self.config.segment)
    bank = sl.Bank(**{name: getattr(state, name) for name in _BANK})
    said, tails = self._statement(x, state, context)
    spelled, value = self._spelled(x, said, said.pop('name_span'))
    key, name, query = (
        sl.unit(spelled(_address(x, c.rules, n), n))
        for n in ('key', 'name', 'query'))
    events, waiting = self._events(x, key, name, value, said, state, context,
                                   plan)
    ask, pull, sight = self._ask(x, query, context)
    self._learn_object(query, key, name, context)

    cells, here, at = _readers(plan, context)
    asked = writer.pick(vars(ask) | {'pull': pull}, cells)
    pull = asked.pop('pull')
    asked = recall.Ask(**asked | {'real': asked['real'] & here})

    def turn(slot, alias, ask):
      found = recall.look(slot, alias, ask, sight, c.top)
      return recall.note(slot, ask, found), found

    now, fresh = _borders(plan, context)
    bank, before, receipts, found = lifecycle.segments(
        c.rules, bank, events, now, turn, asked, fresh)
    flat = lambda tree: jax.tree.map(
        lambda a: a.reshape(-1, *a.shape[2:]), tree)
    y, confidence = recall.read(
        flat(before), flat(asked), flat(found), sight, flat(pull),
        doubtful=True)

    # Back from segments to tokens.
    back = lambda a: a.reshape(x.shape[0], -1, *a.shape[cells.ndim:])
    seen = writer.pick(jax.tree.map(back, {
        'y': y.reshape(*cells.shape, -1), 'ids': found.ids,
        'fires': found.fires, 'confidence': confidence.reshape(cells.shape)}),
                       at)
    y, fires, sure = seen.pop('y'), seen['fires'][..., None], seen['confidence']
    other, log = jnp.zeros_like(y), dict.fromkeys(_LOG)
    active = jnp.zeros_like(context.positions)
    if c.fallback is not None:
      other, log, active = self._look_back(c.fallback, x, query, key, value,
                                           state, context)
    read = jnp.sum(seen['ids'] >= 0, axis=-1, dtype=jnp.int32)
    common.lend(self, receipts=receipts, **seen,
                active=jnp.where(seen['fires'], read, active))
    # The gate is hard, and learns as if the confidence mixed the two.
    y = jnp.where(fires, y, other) + _mixed(sure[..., None], y - other)
    y = Proj((x.shape[-1],), ('value', 'embed'), name='out')(y.astype(x.dtype))
    return y, SlotsState(**{n: getattr(bank, n) for n in _BANK}, **waiting,
                         **tails, **log)

  def _look_back(self, config, x, query, key, value, state, context):
    """What the log answers, its leaves, and how many blocks were seen."""
    asked = sure = None
    if self.config.asks:
      logits = Proj((2,), ('embed', 'wants'), name='ask')(x)
      self._learn('ask', logits, context)
      asked = jnp.argmax(logits, axis=-1) == 1
      sure = jax.nn.softmax(logits.astype(jnp.float32))[..., 1:]
    kappa = weights.weight(self, 'log_kappa', ('words',), (1,),
                           weights.constant(math.log(config.kappa)))
    salience = Proj((1,), ('embed', 'words'), name='salience')(x)[..., 0]
    y, log, active = slot_log.read(
        config, jnp.exp(kappa[0]), query, key, salience.astype(jnp.float32),
        value, attention.StoreState(state.k, state.v), context, asked)
    if sure is not None:
      y = y + _mixed(sure, y)
    return y, vars(log), active

  def _ask(self, x, query, context):
    """What each token asks of the bank, and how."""
    c, r = self.config, self.config.rules
    which = Proj((r.ring + 1,), ('embed', 'versions'), name='version')(x)
    pull = jax.nn.softmax(which.astype(jnp.float32))
    self._learn('version', which, context)
    kappa = weights.weight(self, 'kappa', ('words',), (1,), weights.constant(
        math.log(c.kappa)))
    real = context.valid & (context.hints.get('look', context.valid) != 0)
    ask = recall.Ask(
        query=query, principal=jnp.full_like(context.positions, STREAM),
        time=context.positions,
        ago=jnp.argmax(which, axis=-1).astype(jnp.int32), real=real)
    sight = recall.Sight(kappa=jnp.exp(kappa[0]), scale=_SCALE,
                         shift=_SCALE * c.confidence, threshold=0.5)
    return ask, pull, sight

  def _events(self, x, key, name, value, said, state, context, plan):
    """The events of the segments that are completed, and what waits after."""
    c = self.config
    logits = Proj((len(WANTS),), ('embed', 'wants'), name='want')(x)
    self._learn('want', logits, context)
    strength = 1 - jax.nn.softmax(logits.astype(jnp.float32))[..., 0]
    force = context.hints.get('force', jnp.full_like(context.positions, -1))
    choice = jnp.where(force < 0, jnp.argmax(logits, axis=-1), force)
    want = jnp.array(WANTS, jnp.int32)[choice]
    value = value.astype(jnp.float32)
    # Adds 0, and lets the strength learn by how welcome the value is.
    pull = strength - jax.lax.stop_gradient(strength)
    value = value + pull[..., None] * jax.lax.stop_gradient(value)

    wanted = (want != sl.NULL) & context.valid
    # What is forced comes before all that is only wanted.
    score = jnp.where(wanted, jnp.where(force > 0, 2., strength), -1.)
    done, left = writer.strongest(state.want_strength, score, plan, c.events)
    fields = {'op': want, 'strength': score, 'key': key, 'name': name,
              'value': value.astype(state.want_value.dtype),
              'time': context.positions} | said
    held = {'op': state.want, 'strength': state.want_strength} | {
        n: getattr(state, f'want_{n}') for n in _WAITING}
    both = {n: jnp.concatenate([held[n], new], axis=1)
            for n, new in fields.items()}

    fill = dict.fromkeys(('strength', 'span', 'key_span', 'source'), -1)
    # A row without a token keeps its bits, also those that mean nothing.
    moved = context.n_valid > 0
    waits = {('want' if n == 'op' else f'want_{n}'): jnp.where(
        moved.reshape(-1, *(1,) * (a.ndim - 1)), a, held[n])
             for n, a in writer.pick(both, left, fill).items()}
    return self._committed(writer.pick(both, done, fill)), waits

  def _statement(self, x, state, context):
    """The tokens of the key and of the value that each token would write, and
    the last tokens of the step."""
    r, steps = self.config.rules, x.shape[1]
    parts = Proj((len(PARTS),), ('embed', 'parts'), name='part')(x)
    self._learn('part', parts, context)
    force = context.hints.get('force_part')
    if force is None:
      force = jnp.full_like(context.positions, -1)
    part = jnp.where(force < 0, jnp.argmax(parts, axis=-1), force).astype(
        jnp.int32)
    tokens = (context.positions if context.tokens is None else context.tokens)
    at = jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32)[None],
                          tokens.shape)
    look = lambda tail, new: writer.window(tail, new, at, context.positions)
    back, of = look(state.near, tokens), look(state.near_part, part)
    size = back.shape[-1]
    span, begin, count = writer.last_run(back, of == _VALUE, r.span)
    key_span, _, _ = writer.last_run(back, of == _KEY, r.key_span)
    name_span, _, _ = writer.last_run(back, of == _NAME, r.key_span)
    # Without tokens known to be the value it is all that was said last.
    none = count == 0
    last, start, length = writer.last_run(back, back >= 0, r.span)
    begin = jnp.where(none, start, begin)
    first = context.positions - (size - 1) + begin
    said = {'span': jnp.where(none[..., None], last, span),
            'key_span': key_span, 'name_span': name_span,
            'source': jnp.stack([first, jnp.where(none, length, count)],
                                axis=-1)}
    return said, {
        name: writer.keep(getattr(state, name), new, context.start,
                          context.n_valid)
        for name, new in (('near', tokens), ('near_part', part))}

  def _spelled(self, x, said, name_span):
    """How tokens spell addresses, a function of one and its name, and the value
    [B, T, V]."""
    c, width = self.config, self.config.rules.value
    value = Proj((width,), ('embed', 'value'), name='value')(x)
    if not c.vocab:
      return lambda address, which: address, value
    letters = weights.weight(self, 'letters', ('vocab', 'words'),
                             (c.vocab, width), weights.truncated_normal(1.0))
    look_up = lambda ids: jnp.where(
        (ids >= 0)[..., None], letters[jnp.maximum(ids, 0)], 0.).astype(x.dtype)
    # One spelling for all that names an object.
    spell = Proj((c.rules.key,), ('tokens', 'words', 'key'), contract=2,
                 name='spell_key')
    def spelled(address, which):
      ids = name_span if which == 'name' else said['key_span']
      found = spell(look_up(ids)).astype(jnp.float32)
      return jnp.where(ids[..., :1] >= 0, found, address)
    return spelled, value + Proj(
        (width,), ('tokens', 'words', 'value'), contract=2, name='spell_value')(
            look_up(said['span']))

  def _committed(self, fields):
    """`Events` of the segments, and one without any for what stays open."""
    closed = {n: jnp.pad(a, [(0, 0), (0, 1), *[(0, 0)] * (a.ndim - 2)])
              for n, a in fields.items()}
    return _decided(closed)

  def _learn(self, name, logits, context):
    """Adds the cross-entropy of what a hint says."""
    if name not in context.hints:
      return
    hint = context.hints[name]
    known = (hint >= 0) & context.valid
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    cost = -jnp.take_along_axis(
        logp, jnp.maximum(hint, 0)[..., None], axis=-1)[..., 0]
    common.add_loss(self, f'{name}_loss', jnp.sum(jnp.where(known, cost, 0.)))


  def _learn_object(self, query, key, name, context):
    """Adds what keeps the keys, other names and queries of one object near each
    other, and those of two apart."""
    if 'object' not in context.hints:
      return
    none = jnp.full_like(context.positions, -1)
    ids = jnp.stack([context.hints['object'],
                     context.hints.get('alias', none)], axis=-1)
    ids = jnp.where(context.valid[..., None], ids, -1)
    # All pairs of all tokens would cost more than the layer.
    some = jnp.argsort(jnp.all(ids < 0, axis=-1), axis=1)[:, :_PAIRED]
    pick = lambda x: jnp.take_along_axis(
        x, some.reshape(*some.shape, *(1,) * (x.ndim - 2)), axis=1)
    ids = pick(ids)
    about = ids[..., :1]
    keys = jnp.concatenate([pick(key), pick(name)], axis=1)
    other = jnp.concatenate([about, ids[..., 1:]], axis=1).swapaxes(1, 2)
    pair = (about >= 0) & (other >= 0)
    if context.document is not None:
      # The same number means another object there, or the same.
      of = pick(context.document)
      pair &= of[:, :, None] == jnp.concatenate([of, of], axis=1)[:, None]
    # A key is no example of itself.
    at = jnp.arange(ids.shape[1], dtype=jnp.int32)
    itself = at[:, None] == jnp.arange(other.shape[2], dtype=jnp.int32)[None]
    total = jnp.float32(0)
    for side, seen in ((pick(query), pair), (pick(key), pair & ~itself[None])):
      total += _told_apart(
          einsum('bik,bjk->bij', side, keys), seen & (about == other), seen,
          # Half way between where a write hits and a read does not.
          (self.config.rules.threshold + self.config.confidence) / 2)
    common.add_loss(self, 'object_loss', total)


def _decided(fields):
  """`Events` of a stream."""
  fields = dict(fields)
  op, value = fields['op'], fields['value']
  salience = jnp.clip(fields.pop('strength'), 0., 1.) * jnp.linalg.norm(
      jax.lax.stop_gradient(value).astype(jnp.float32), axis=-1)
  none = jnp.full_like(op, -1)
  return sl.Events(
      **fields, salience=jax.lax.stop_gradient(salience),
      principal=jnp.full_like(op, STREAM), expires=none, slot=none,
      expect=none, steps=jnp.zeros_like(op), host=jnp.zeros(op.shape, bool))


def _told_apart(cosine, same, seen, middle):
  """Sum over i of what it costs that objects are hard to tell apart.

  Which of all it is (arXiv 2004.11362, L_out), and whether it is near enough:
  without the first all begin in one place, without the second they stay near.

  Args:
    cosine: of i with j, [B, N, M].
    same: whether j is of i's object, bool.
    seen: whether j is to be compared with i, bool.
    middle: the least cosine of the same.
  """
  mean = lambda x, mask: jnp.sum(jnp.where(mask, x, 0.), axis=-1) / jnp.maximum(
      jnp.sum(mask, axis=-1), 1)
  logits = jnp.where(seen, _SCALE * cosine, -1e30)
  costs = mean(jax.nn.logsumexp(logits, axis=-1, keepdims=True) - logits, same)
  margin = _SCALE * (cosine - middle)
  costs += mean(jax.nn.softplus(-margin), same)
  costs += mean(jax.nn.softplus(margin), seen & ~same)
  return jnp.sum(costs)


def _mixed(share, gain):
  """0, whose gradient is that of `share` of a gain."""
  gain = jax.lax.stop_gradient(gain)
  gain = jnp.where(jnp.isfinite(gain), gain, jnp.zeros((), gain.dtype))
  return (share - jax.lax.stop_gradient(share)).astype(gain.dtype) * gain


def _address(x, rules, name):
  return Proj((rules.key,), ('embed', 'key'), name=name)(x).astype(jnp.float32)


def _readers(plan, context):
  """Which tokens read the bank as each segment finds it.

  Behind the w-th commit stand at most `size` tokens of its document until the
  next; what stands behind a border of documents reads an empty bank.

  Returns:
    cells: indices of tokens, [B, W + 1, M] int32.
    here: whether they read it, of the same shape.
    at: the cell of each token, counted through, [B, T] int32.
  """
  steps = context.positions.shape[1]
  width = min(plan.size, steps)
  begin = jnp.pad(plan.end + 1, ((0, 0), (1, 0)))
  end = jnp.pad(plan.end, ((0, 0), (0, 1)), constant_values=steps)
  cells = begin[..., None] + jnp.arange(width, dtype=jnp.int32)[None, None]
  here = (cells <= end[..., None]) & (cells < steps)
  index = jnp.arange(steps, dtype=jnp.int32)[None]
  which = jnp.sum(plan.end[:, None, :] < index[..., None], axis=-1,
                  dtype=jnp.int32)
  inside = index - jnp.take_along_axis(begin, which, axis=1)
  cells = jnp.minimum(cells, steps - 1)
  if context.document is not None:
    of = jnp.take_along_axis(
        context.document, cells.reshape(cells.shape[0], -1), axis=1)
    mine = jnp.pad(plan.document, ((0, 0), (1, 0)))
    here &= of.reshape(cells.shape) == mine[..., None]
  return cells, here, which * width + jnp.minimum(inside, width - 1)


def _borders(plan, context):
  """When each segment ends, -1 for none, and whether a document begins in it;
  [B, W + 1], the last is what stays open."""
  now = jnp.where(plan.exists, (plan.block + 1) * plan.size, -1)
  now = jnp.pad(now, ((0, 0), (0, 1)), constant_values=-1)
  if context.document is None:
    return now, None
  # The document of the last commit before, and of the next.
  done = jnp.where(plan.exists, plan.document, -1)
  before = jax.lax.cummax(jnp.pad(done, ((0, 0), (1, 0))), axis=1)
  last = jnp.take_along_axis(
      context.document, jnp.maximum(context.n_valid - 1, 0)[:, None], axis=1)
  fresh = jnp.pad(plan.exists & (plan.document != before[:, :-1]),
                  ((0, 0), (0, 1)))
  return now, fresh.at[:, -1].set(last[:, 0] != before[:, -1])
