"""Dynamic State Transduction: a few vectors go from segment to segment."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import DSTConfig
from statejax.layers import rotary, weights
from statejax.layers.attention import RingState
from statejax.layers.common import project
from statejax.layers.transformer_xl import check_width
from statejax.ops import attend, blocks, norm, segments, window
from statejax.state import Array, Spec, leaf

# Logits of the pool are bent to this, so that a running sum needs no maximum.
_CAP = 30.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DSTState(RingState):
  """The vectors, the open segment, and what is pooled of it so far.

  Attributes:
    k: keys of the open segment, after rope; its token i is in slot i,
      [B, G, S, K], store dtype; fixed.
    v: [B, G, S, V], store dtype; fixed.
    memory: the vectors, [B, m, D] float32; fixed. None where m = 0.
    pooled: sum of the open segment's outputs by weight, [B, m, D] float32;
      fixed. None where nothing is pooled, and so is
    weight: sum of the weights, [B, m] float32; fixed.
  """

  memory: Array | None = leaf('batch entries channels')
  pooled: Array | None = leaf('batch entries channels')
  weight: Array | None = leaf('batch entries')


class DST(nn.Module):
  """Attention to the own segment and to m vectors that stand before it.

  The segment's first token has place m; the vectors s + r, r learned, have
  places 0 to m - 1 and the same projections. Behind the segment

    pool:  s' = (1 - g) s + g tanh(W [s, p]),  g = sigmoid(W_g [s, p])
           p_i = sum_t a_it o_t,  a_i = softmax_t(w_i . o_t),  outputs o
    rows:  s' = norm(s + e + o), where o is what rows s + e, e learned, with
           places behind the segment, see of it, of s and of one another

  Each layer has vectors of its own, which its next segment reads; RMT instead
  runs its rows through all layers before the first one reads them.

  Laws: split (L1), start (L2), padding (L3), packed (L4).
  Reference: arXiv 2207.06881 (RMT) for rows.
  """

  config: DSTConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `DSTState` of `Spec`."""
    c = config
    wide = Spec((rows, c.vectors, c.width), 'float32')
    pools = c.vectors and c.update == 'pool'
    return DSTState(
        k=Spec((rows, c.kv_heads, c.segment, c.key), dtype),
        v=Spec((rows, c.kv_heads, c.segment, c.value), dtype),
        memory=wide if c.vectors else None,
        pooled=wide if pools else None,
        weight=Spec((rows, c.vectors), 'float32') if pools else None)

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    check_width(c, x)
    params, plan = _declare(self, c), context.blocks(c.segment)
    see = functools.partial(attend.attend, scale=c.key ** -0.5)
    q, k, v = _project(c, params, x, context.positions % c.segment + c.vectors)
    k, v = k.astype(state.k.dtype), v.astype(state.v.dtype)
    sources, held = own_segment(state, k, v, context, c.segment)
    memory = after = None
    if c.vectors:
      memory, after = segments.carry(
          plan, state.memory, _parts(plan, q, k, v, c.through),
          functools.partial(_update, c, params, state, plan, see))
      sources.append(_prefixes(c, params, memory, plan, x.dtype))
    y = project(see(q, sources)[0], params['out'], 2)
    pooled, weight = state.pooled, state.weight
    if pooled is not None:
      pooled, weight = _pool_on(params, state, y, plan)
    return y, DSTState(held.k, held.v, after, pooled, weight)


def own_segment(state, k, v, context, size, turn=lambda k, places: k):
  """What queries see of their own segment, and the ring after the step.

  Args:
    state: with `k` and `v`, rings of `size` slots.
    k: keys of the step, [B, G, T, K].
    v: [B, G, T, V].
    context: `Context`.
    size: tokens of a segment.
    turn: function of keys [B, G, N, K] and their places in the segment [B, N],
      applied to what is attended to and not to what is kept.

  Returns:
    segments for `attend`, and the new `RingState`.
  """
  held = window.positions(context.length, size)
  number = context.positions // size
  past = context.visible_past(held) & (
      (held // size)[:, None, :] == number[..., None])
  step = context.visible_chunk() & (
      number[:, None, :] == number[..., None])
  where = (context.base, context.start, context.n_valid)
  return [attend.Segment(turn(state.k, held % size), state.v, past),
          attend.Segment(turn(k, context.positions % size), v, step,
                         causal=True)], RingState(
              window.write(state.k, k, *where),
              window.write(state.v, v, *where))


def _declare(module, config):
  """The parameters, as arrays: a scan over segments uses them too."""
  c = config
  def kernel(name, axes, shape, fan):
    return weights.weight(module, f'kernel_{name}', axes, shape,
                          weights.truncated_normal(fan ** -0.5))
  of = lambda name, side, heads, width: kernel(
      name, ('embed', side, 'value' if name == 'v' else 'key'),
      (c.width, heads, width), c.width)
  out = {'q': of('q', 'heads', c.heads, c.key),
         'k': of('k', 'kv_heads', c.kv_heads, c.key),
         'v': of('v', 'kv_heads', c.kv_heads, c.value),
         'out': kernel('out', ('heads', 'value', 'embed'),
                       (c.heads, c.value, c.width), c.heads * c.value)}
  if not c.vectors:
    return out
  rows = lambda name: weights.weight(
      module, name, ('entries', 'embed'), (c.vectors, c.width),
      weights.normal(1.0))
  out['read'] = rows('read')
  if c.update == 'rows':
    return out | {'write': rows('write')}
  both = lambda name: kernel(
      name, ('embed', 'channels'), (2 * c.width, c.width), 2 * c.width)
  return out | {'ask': rows('ask'), 'new': both('new'), 'gate': both('gate')}


def _project(config, params, x, places):
  """Returns q [B, T, H, K], k [B, G, T, K] and v [B, G, T, V] in x.dtype."""
  turn = rotary.rotation(config.rope, config.key)
  q, k, v = (project(x, params[name]) for name in 'qkv')
  return (turn(q, places), turn(k, places).swapaxes(1, 2), v.swapaxes(1, 2))


def _rows(config, params, memory, name, first, dtype):
  """Rows [B, m, D] of a memory, and their q, k, v from place `first` on."""
  rows = (memory + params[name][None]).astype(dtype)
  places = first + jnp.arange(config.vectors, dtype=jnp.int32)[None]
  return rows, _project(
      config, params, rows, jnp.broadcast_to(places, rows.shape[:2]))


def _prefixes(config, params, memory, plan, dtype):
  """The vectors of all segments, of which a token sees those of its own."""
  rows, count = memory.shape[:2]
  # The last is of a document that has none yet.
  memory = jnp.pad(memory, ((0, 0), (0, 1), (0, 0), (0, 0)))
  _, (_, k, v) = _rows(config, params, memory.reshape(-1, *memory.shape[2:]),
                       'read', 0, dtype)
  flat = lambda a: a.reshape(
      rows, count + 1, *a.shape[1:]).swapaxes(1, 2).reshape(
          rows, a.shape[1], -1, a.shape[-1])
  which, mine = segments.reads(plan)
  which = jnp.where(mine, which, count)
  index = jnp.arange(count + 1, dtype=jnp.int32)
  seen = which[..., None] == index[None, None]
  return attend.Segment(flat(k), flat(v),
                        jnp.repeat(seen, config.vectors, axis=2))


def _parts(plan, q, k, v, through):
  """What the tokens of the step bring to the segments that it completes."""
  index, mask = blocks.members(plan)
  number = jnp.arange(plan.end.shape[1], dtype=jnp.int32)[None]
  return {
      'q': segments.pick(q, index), 'mask': mask,
      'k': segments.pick(k.swapaxes(1, 2), index),
      'v': segments.pick(v.swapaxes(1, 2), index),
      'goes_on': plan.spans[:, None] & (number == 0),
      'cut': ((plan.block + 1) % through == 0) if through is not None
             else jnp.zeros(plan.block.shape, bool)}


def _update(config, params, state, plan, see, memory, part):
  """The vectors [B, m, D] behind a segment."""
  c, dtype = config, part['q'].dtype
  slot = jnp.arange(c.segment, dtype=jnp.int32)[None]
  open_ = part['goes_on'][:, None] & (
      slot < (plan.length % c.segment)[:, None])
  def source(k, v, seen, queries):
    return attend.Segment(k, v, jnp.broadcast_to(
        seen, (*queries.shape[:2], seen.shape[-1])))
  def sources(queries, inside):
    _, (_, k, v) = _rows(c, params, memory, 'read', 0, dtype)
    whole = jnp.ones((1, 1, c.vectors), bool)
    return [source(k, v, whole, queries),
            source(state.k, state.v, open_[:, None], queries),
            source(part['k'].swapaxes(1, 2), part['v'].swapaxes(1, 2), inside,
                   queries)]
  mask = part['mask'][:, None]
  if c.update == 'rows':
    rows, (q, k, v) = _rows(c, params, memory, 'write', c.vectors + c.segment,
                            dtype)
    own = source(k, v, jnp.ones((1, 1, c.vectors), bool), q)
    y = project(see(q, [*sources(q, mask), own])[0], params['out'], 2)
    after = norm.rms_norm((rows + y).astype(jnp.float32), None, eps=c.eps)
  else:
    steps = jnp.arange(mask.shape[-1])
    causal = steps[None, :] <= steps[:, None]
    y, _ = see(part['q'], sources(part['q'], mask & causal[None]))
    pooled, weight = _pool(params, project(y, params['out'], 2), part['mask'])
    old = part['goes_on'].astype(pooled.dtype)[:, None]
    weight = weight + old * state.weight
    pooled = pooled + old[..., None] * state.pooled
    # A segment that does not exist has no weight.
    pooled = pooled / jnp.where(weight > 0, weight, 1.)[..., None]
    both = jnp.concatenate([memory, pooled], axis=-1)
    gate = jax.nn.sigmoid(project(both, params['gate']))
    after = (1 - gate) * memory + gate * jnp.tanh(project(both, params['new']))
  return jnp.where(part['cut'][:, None, None], jax.lax.stop_gradient(after),
                   after)


def _pool(params, outputs, mask):
  """Weighted sum [B, m, D] and weights [B, m] of outputs [B, N, D]."""
  outputs = outputs.astype(jnp.float32)
  ask = params['ask'] * outputs.shape[-1] ** -0.5
  logit = jnp.einsum('bnd,md->bmn', outputs, ask,
                     precision=jax.lax.Precision.HIGHEST)
  weight = jnp.where(mask[:, None], jnp.exp(_CAP * jnp.tanh(logit / _CAP)), 0.)
  return jnp.einsum('bmn,bnd->bmd', weight, outputs,
                    precision=jax.lax.Precision.HIGHEST), weight.sum(axis=-1)


def _pool_on(params, state, outputs, plan):
  """The sums of the open segment after the step's outputs [B, T, D]."""
  index = jnp.arange(outputs.shape[1], dtype=jnp.int32)[None]
  fresh = plan.valid & (index >= (plan.n_valid - plan.phase)[:, None])
  new = _pool(params, outputs, fresh)
  def one(old, new):
    rows = (-1, *(1,) * (old.ndim - 1))
    both = new + jnp.where(plan.continues.reshape(rows), old, 0.)
    # A row without a token keeps its bits.
    return jnp.where((plan.n_valid > 0).reshape(rows), both, old)
  return one(state.pooled, new[0]), one(state.weight, new[1])
