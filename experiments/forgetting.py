"""What three deletes leave of a fact, for an attacker who knows all the keys.

  python -m experiments.forgetting

`suppress` writes zero at the fact's key (a slot: deletes it), `revoke`
subtracts its shadow, `replay` reads the log again without it; `never` is a
stream that has not seen it, token by token. See `statejax.forget`.

The attacker has the state, all keys and gates, and the fact's value among 200
others: random unit vectors of 64 channels, one write, then so many later ones,
then the delete. It correlates each value with what is read along the fact's
direction, carried through all that came later (a matched filter). Its AUC is
that of 2,000 trials: 200 would leave 0.02 of pure chance. `left` is the fact's
part of the state after a zero-write, over what was written.

Then four layers of a random delta net without convolutions and with embeddings
of unit size: 64 tokens, a span of 4, and 20 or 100 more. The share of the
span's effect on each layer's matrix that a delete leaves, over 3 networks of 8
rows: `|S_deleted - S_never|` over `|S - S_never|`; of a zero-write at the
span's keys, which harms other facts too, the same after both are written to.
The same of a slot that was read once, in the two delta layers above it: these
have absorbed the answer, and emptying the slot takes nothing of that back.

Expected: figures measured before by other code, each within 0.03; of the
layers, whose network was another, within 0.2. Replay 0.50 +- 0.02 and bit for
bit, slots exactly 0 in the bank.
Three minutes of one slow core.
"""

import functools
import importlib.util
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments import report
from statejax import config as c
from statejax import forget, memory, model
from statejax import state as st
from statejax.artifact import journal
from statejax.layers import block, common, delta
from statejax.ops import delta_rule, lifecycle, shadow
from statejax.ops import slots as sl

OUT = flags.DEFINE_string('out', 'experiments/results', 'where to write')
SMOKE = flags.DEFINE_bool('smoke', False, 'few trials; claims not met')

WIDTH, DECOYS, BLOCK, GRID = 64, 200, 500, 32
LATER, ROOM = (0, 1, 8, 64, 256), (8, 64, 256)
GATES = {'dense': (None, 1.0), 'decay .99, beta .5': (0.99, 0.5)}
# Measured before; AUC after a zero-write.
SUPPRESS = {('dense', 1): .685, ('dense', 8): .958, ('dense', 64): .998,
            ('dense', 256): .748, ('decay .99, beta .5', 64): .899}
BEFORE = {('dense', 256): .757}
LEFT = {1: .096, 16: .40, 64: .47}
LAYERS = {20: (0, .44, .54, .61), 100: (0, .71, .83, .89)}


# The attacker.


def facts(rng, trials, later):
  """Keys and values of a fact and of later writes, and decoys, unit length."""
  def unit(*shape):
    x = rng.standard_normal((trials, *shape, WIDTH), np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
  return unit(later + 1), unit(later + 1), unit(DECOYS)


def auc(found, value, decoys):
  """Share of decoys that correlate less with [trials, V] than the value."""
  mine = np.einsum('nv,nv->n', found, value)[:, None]
  others = np.einsum('nv,ncv->nc', found, decoys)
  return np.mean((mine > others) + 0.5 * (mine == others), axis=1)


@functools.partial(jax.jit, static_argnames=('decay', 'beta'))
def streams(k, v, later, *, decay, beta):
  """States after each delete, and the fact's direction in them.

  Args:
    k, v: of the fact and of T later writes, [trials, 1 + T, 1, WIDTH].
    later: how many of these there are, [trials].
    decay, beta: gates.

  Returns:
    {state: [trials, K, V]} with 'shadow', and two directions [trials, K]: that
    of the fact, and after a zero-write too.
  """
  gate = 0 if decay is None else jnp.full(k.shape[:3], jnp.log(decay))
  cut = lambda a, b: gate if decay is None else gate[:, a:b]
  def write(state, a, b, form=None):
    return delta_rule(k[:, a:b], k[:, a:b], v[:, a:b], cut(a, b), beta, beta,
                      state, later if a else None, implementation=form)[1]
  def after(state):
    return shadow.fade(state[:, None], k[:, 1:], cut(1, None), beta,
                       later)[:, 0]
  fresh = jnp.zeros((k.shape[0], 1, WIDTH, WIDTH))
  new = write(fresh, 0, 1)
  held, followed = write(new, 1, None), after(new - fresh)
  # The direction of the fact is a state with one column.
  along = after(beta * jnp.swapaxes(k[:, :1], 2, 3))
  zeroed, bent = (shadow.zero_write(x, k[:, :1]) for x in (held, along))
  states = {
      'before': held, 'suppress': zeroed, 'shadow': followed,
      'replay': write(fresh, 1, None),
      'never': write(fresh, 1, None, 'reference')}
  return {n: s[:, 0] for n, s in states.items()}, along[:, 0, :, 0], (
      bent[:, 0, :, 0])


def dense(rng, trials, later, decay, beta):
  """AUC of each trial {state: [trials]}, and what a zero-write leaves."""
  # Few programs: what is not there is padding.
  room = min(n for n in ROOM if n >= later)
  k, v, decoys = facts(rng, trials, room)
  states, along, bent = jax.device_get(streams(
      k[:, :, None], v[:, :, None], np.full(trials, later), decay=decay,
      beta=beta))
  states['revoke'] = states['before'] - states.pop('shadow')
  out = {}
  for name, state in states.items():
    way = bent if name == 'suppress' else along
    out[name] = auc(np.einsum('nk,nkv->nv', way, state), v[:, 0], decoys)
  return out, np.linalg.norm(bent, axis=-1) / beta


@functools.partial(jax.jit, static_argnums=0)
def slot_deletes(rules, k, v, later):
  """The banks before and after the fact's slot is deleted."""
  trials, every = k.shape[:2]
  count = jnp.broadcast_to(jnp.arange(every)[None], (trials, every))
  events = sl.events(
      rules, jnp.where(count <= later, sl.WRITE, sl.NULL), key=k, value=v,
      span=count[..., None], key_span=count[..., None], principal=0 * count,
      time=count)
  now = count[:, -1]
  held, _ = lifecycle.commit(rules, sl.empty(rules, trials), events, now)
  zero = jnp.zeros((trials, 1), jnp.int32)
  gone, _ = lifecycle.commit(rules, held, sl.events(
      rules, zero + sl.DELETE, slot=zero, principal=zero), now)
  return held.value[:, 0], gone.value[:, 0]


def slots(rng, trials, later):
  """AUC of each trial of a bank, and the largest number left of the fact."""
  k, v, decoys = facts(rng, trials, ROOM[-1])
  rules = c.SlotRules(slots=ROOM[-1] + 2, key=WIDTH, value=WIDTH, ring=1,
                      span=1, key_span=1, aliases=1)
  held, gone = slot_deletes(rules, k, v, later)
  look = lambda value: auc(np.asarray(value[:, 0]), v[:, 0], decoys)
  return ({'before': look(held), 'suppress': look(gone)},
          float(jnp.abs(gone).max()))


def attack(trials):
  """Returns [{'of', 'later', AUC of each state, 'left'}] and slots' residue."""
  rows, rest = [], 0.0
  for of, (decay, beta) in GATES.items():
    for later in sorted({*LATER, *LEFT}):
      rng, found, left = np.random.default_rng(later), {}, []
      for _ in range(0, trials, BLOCK):
        more, part = dense(rng, min(trials, BLOCK), later, decay, beta)
        left.append(part)
        for name, x in more.items():
          found.setdefault(name, []).append(x)
      rows.append({'of': of, 'later': later, 'left': _mean(left)} | {
          name: _mean(x) for name, x in found.items()})
      logging.info('%s', rows[-1])
  for later in LATER:
    found, most = slots(np.random.default_rng(later), min(trials, 50), later)
    rest = max(rest, most)
    rows.append({'of': 'slots', 'later': later} | {
        name: _mean(x) for name, x in found.items()})
  return rows, rest


def _mean(x):
  return float(np.mean(x))


# The layers.


def net():
  """Four delta layers without convolutions."""
  mixer = c.DeltaNetConfig(heads=2, key=32, value=32, conv=1)
  return model.LanguageModel(c.ModelConfig(
      vocab=256, width=64,
      layers=(c.LayerConfig('delta', mixer, c.SwiGLUConfig(128)),),
      groups=(c.GroupConfig(('delta',), 4),)))


@jax.jit
def keys(params, tokens, state):
  """Keys [L, B, T, H, K] of tokens in every layer."""
  lm = net()
  rows, steps = tokens.shape
  context = common.context(state.length, jnp.full((rows,), steps), None, steps)
  x, found = params['embed'][tokens], []
  for i in range(4):
    name = lm.config.names[i]
    (x, _), said = block.Block(lm.config.layer(name), lm.config.norm).apply(
        {'params': jax.tree.map(lambda p, i=i: p[i],
                                params['group_0']['layer_0'])},
        x, jax.tree.map(lambda a, i=i: a[i], state.layers[name]), context,
        capture_intermediates=lambda module, _: module.name == 'conv_k',
        mutable=('lent', 'losses', 'intermediates'))
    y, _ = said['intermediates']['mixer']['conv_k']['__call__'][0]
    found.append(delta.unit(y))
  return jnp.stack(found)


def feed(lm, params, state, tokens):
  """Absorbs tokens [B, T] into rows of equal length, on one grid."""
  at, rows = int(state.length[0]), tokens.shape[0]
  while tokens.shape[1]:
    count = min(GRID - at % GRID, tokens.shape[1])
    piece = np.zeros((rows, GRID), np.int32)
    piece[:, :count] = tokens[:, :count]
    _, state = lm.step(params, state, piece, np.full(rows, count), keep='last')
    tokens, at = tokens[:, count:], at + count
  return state


def effects(seed, rows, later, span=4, first=64):
  """Shares left by each delete of a span, by layer, in a random network.

  Returns:
    {delete: [L]}, whether the replay is the stream that never saw the span, and
    what zero-writes change of that stream, [L].
  """
  lm = net()
  params = lm.init(jax.random.key(seed))
  # Inputs as large as what the layers add to them.
  params['embed'] *= lm.config.width ** 0.5
  tokens = np.random.default_rng(seed).integers(
      0, lm.config.vocab, (rows, first + span + later)).astype(np.int32)
  said, after = tokens[:, first:first + span], tokens[:, first + span:]
  before = feed(lm, params, lm.init_state(rows, 0), tokens[:, :first])
  state = seen = feed(lm, params, before, said)
  for row in range(rows):
    state, _ = forget.track(lm, before, state, said[row], row=row)
  state, never = (feed(lm, params, s, after) for s in (state, before))
  revoked, replayed = state, feed(lm, params, seen, after)
  for row in range(rows):
    revoked, _ = forget.revoke(lm, revoked, 0, row=row)
    replayed, _ = forget.replay_without(
        lm, params, replayed, before, tokens[row, first:],
        (first, first + span), row=row, chunk=GRID)
  matrix = lambda s: s.layers['delta'].matrix
  zero = jax.jit(jax.vmap(shadow.zero_write))
  k = keys(params, said, before)
  size = lambda x: np.linalg.norm(np.asarray(x).reshape(4, rows, -1), axis=-1)
  whole = size(matrix(state) - matrix(never))
  share = lambda x: (size(x) / whole).mean(axis=1).tolist()
  rest = zero(matrix(never), k)
  out = {'suppress': share(zero(matrix(state), k) - rest),
         'revoke': share(matrix(revoked) - matrix(never)),
         'replay': share(matrix(replayed) - matrix(never))}
  harm = size(rest - matrix(never)) / size(matrix(never))
  return out, st.diff(replayed, never) is None, harm.mean(axis=1).tolist()


def slot_layer(later=20):
  """What deletes of a slot leave in a model's own bank, and in the layers above
  that have read it; 0 is nothing.

  Returns:
    the largest number in the bank after `suppress`, over that before, and
    {delete: [L]}, the shares left of the effect on each delta layer.
  """
  rules = c.SlotRules(slots=4, key=16, value=32, span=2, key_span=1)
  slots = c.SlotsConfig(rules, segment=8, events=2)
  above = [c.LayerConfig(name, c.KDAConfig(heads=2, key=8, value=8))
           for name in ('first', 'second')]
  lm = model.LanguageModel(c.ModelConfig(
      vocab=64, width=32, layers=(c.LayerConfig('memory', slots), *above),
      groups=(c.GroupConfig(('memory', 'first', 'second')),)))
  params = lm.init(jax.random.key(0))
  # A token asks as it writes, for the present value, and wants nothing.
  mixer = params['group_0']['layer_0']['mixer']
  mixer['query'] = mixer['key']
  for name in ('want', 'version'):
    mixer[name] = jax.tree.map(jnp.zeros_like, mixer[name])
  tokens = np.random.default_rng(0).integers(4, 64, 1 + later).astype('i4')
  tokens[0] = 3
  after = functools.partial(feed, lm, params, tokens=tokens[None])
  before = feed(lm, params, lm.init_state(1, 64), np.array([[5, 6]], np.int32))
  with tempfile.TemporaryDirectory() as place:
    mem = memory.Memory(lm, journal=journal.Journal(f'{place}/edits'))
    told, receipt = mem.write(params, before, [1, 2, 3], key=[2], value=[3])
    entry = mem.journal.entries[-1]
    state, never = after(state=told), after(state=before)
    gone, _ = forget.suppress(mem, state, receipt.slot)
  if not mem.bank(state).reads[0, receipt.slot]:
    raise AssertionError('expected a slot that was read')
  replayed, _ = forget.replay_without(
      lm, params, state, before, tokens, edits=[forget.Edit(entry)], chunk=GRID)
  held = lambda state: np.abs(mem.bank(state).value[0, receipt.slot]).max()
  size = lambda one, name: np.linalg.norm(
      one.layers[name].matrix - never.layers[name].matrix)
  return float(held(gone) / held(told)), {
      which: [float(size(one, x.name) / size(state, x.name)) for x in above]
      for which, one in (('suppress', gone), ('replay', replayed))}


def layers(seeds, rows):
  """{later: {delete: [L]}}, whether replays are bit for bit, and the harm."""
  out, same, harm = {}, True, {}
  for later in LAYERS:
    found = [effects(seed, rows, later) for seed in range(seeds)]
    out[later] = {name: np.mean([f[0][name] for f in found], axis=0).tolist()
                  for name in found[0][0]}
    harm[later] = np.mean([f[2] for f in found], axis=0).tolist()
    same &= all(f[1] for f in found)
  return out, same, harm


# The report.


def claims(table, rest, shares, same, slot, above):
  """Rows of expected next to obtained."""
  rows, at = [], {(r['of'], r['later']): r for r in table}
  def near(claim, want, got, tolerance, places=3):
    rows.append(report.Row(
        claim, f'{want:.{places}f} +- {tolerance}', f'{got:.{places}f}',
        abs(want - got) <= tolerance))
  for (of, later), want in BEFORE.items():
    near(f'{of}, {later} later: AUC before', want, at[of, later]['before'], .03)
  for (of, later), want in SUPPRESS.items():
    near(f'{of}, {later} later: AUC after suppress', want,
         at[of, later]['suppress'], .03)
  # What rounding has left of a key that is erased at once tells it was there.
  tell = at['dense', 0]['suppress']
  rows.append(report.Row('dense, 0 later: AUC after suppress, a tell',
                         'not 0.500 +- 0.02 (.05 by other code)', f'{tell:.3f}',
                         abs(tell - .5) > .02))
  for name in ('revoke', 'replay', 'never'):
    far = max((r[name] for r in table if name in r), key=lambda x: abs(x - .5))
    near(f'{name}: the worst AUC', .5, far, .02)
  for later, want in LEFT.items():
    near(f'left of the norm by a zero-write, {later} later', want,
         at['dense', later]['left'], .03)
  rows.append(report.Row('slots: AUC after suppress', '0.5 exactly', ', '.join(
      str(at['slots', n]['suppress']) for n in LATER), all(
          at['slots', n]['suppress'] == .5 for n in LATER)))
  rows.append(report.Row('slots: residue', '0 exactly', f'{max(rest, slot)}',
                         rest == slot == 0))
  for name, want in (('suppress', 1), ('replay', 0)):
    rows.append(report.Row(
        f'left of a slot that was read, {name}, in the layers above',
        f'{want} exactly', ' '.join(f'{x:.2f}' for x in above[name]),
        above[name] == [want] * len(above[name])))
  show = lambda x: ' '.join(f'{v:.2f}' for v in x)
  for later, want in LAYERS.items():
    got = shares[later]
    rows.append(report.Row(
        f'left by layer, revoke, {later} tokens later',
        f'{show(want)}, all but the first +- 0.2',
        show(got['revoke']), got['revoke'][0] < 1e-5 and all(
            abs(a - b) <= .2 for a, b in zip(want, got['revoke']))))
    rows.append(report.Row(
        f'left by layer, suppress, {later} tokens later', 'more than 0 in all',
        show(got['suppress']), min(got['suppress']) > 0))
    rows.append(report.Row(
        f'left by layer, replay, {later} tokens later', '0 exactly',
        show(got['replay']), not any(got['replay'])))
  rows.append(report.Row('replay is never-seen, bit for bit', 'yes',
                         'yes' if same else 'no', same))
  return rows


def draw(path, table, shares):
  """Writes the figure: AUC by later writes, and what is left by layer."""
  from matplotlib import figure
  picture = figure.Figure(figsize=(9.6, 4.4), layout='constrained')
  below = dict(fontsize=8, ncols=2, loc='upper center',
               bbox_to_anchor=(0.5, -0.17))
  left, right = picture.subplots(1, 2)
  for of, name, style in (
      ('dense', 'before', 'k:'), ('dense', 'suppress', 'C3o-'),
      ('decay .99, beta .5', 'suppress', 'C1o-'), ('slots', 'suppress', 'C4s-'),
      ('dense', 'revoke', 'C0^-'), ('dense', 'replay', 'C2v--')):
    points = [(r['later'], r[name]) for r in table if r['of'] == of]
    left.plot(*zip(*points), style, label=f'{name}, {of}')
  left.set_xscale('symlog', base=2, linthresh=1)
  left.set(xlabel='writes after the fact', ylabel="attacker's AUC",
           ylim=(0.4, 1.02), title='the fact in one matrix or bank')
  left.legend(**below)
  for i, (later, found) in enumerate(shares.items()):
    for name, color in (('suppress', 'C3'), ('revoke', 'C0'), ('replay', 'C2')):
      right.plot(range(1, 5), found[name], f'{color}{"o-" if i else "^--"}',
                 label=f'{name}, {later} tokens later')
  right.set(xlabel='layer', ylabel='share of the effect left',
            xticks=range(1, 5), title='a span in a random delta net')
  right.legend(**below)
  picture.savefig(path, dpi=120)


def main(_):
  """Measures, prints tables and claims, writes numbers and the figure."""
  logging.set_verbosity(logging.WARNING)
  out = pathlib.Path('runs' if SMOKE.value else OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  table, rest = attack(100 if SMOKE.value else 2000)
  shares, same, harm = layers(*((1, 2) if SMOKE.value else (3, 8)))
  slot, above = slot_layer()
  rows = claims(table, rest, shares, same, slot, above)
  for row in table:
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v
                      for k, v in row.items()}))
  print('rest of a layer harmed by zero-writes:', {
      n: [round(x, 3) for x in v] for n, v in harm.items()})
  print(report.table(rows))
  report.write(
      out / 'forgetting.json', rows, 'python -m experiments.forgetting',
      auc=table, layers=shares, harm=harm, slots=above)
  if importlib.util.find_spec('matplotlib'):
    draw(out / 'forgetting.png', table, shares)
  raise SystemExit(0 if SMOKE.value or all(r.ok for r in rows) else 1)


if __name__ == '__main__':
  app.run(main)
