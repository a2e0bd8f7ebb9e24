"""Reading a slot bank: the nearest slots of a query, or exactly nothing.

With cosines s[m] of a query with keys and other names of what it may see,

  a = softmax(kappa s), cut to the k best;   y = sum_m a[m] value[m]

and the confidence is sigmoid(scale * max s - shift). Below `threshold` the read
is exactly 0, which tells the caller to look elsewhere. Where a tombstone, or
what is in quarantine, is nearer than all that lives, and near enough, the read
is exactly 0 as well, and there is nothing to look for: a caller that looked
elsewhere would find what was deleted. What is not selected contributes no byte
of a value, and is not counted as read; that it is there lessens the weights of
the others. What somebody owns comes before what nobody owns and is as near.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from statejax.ops import lifecycle, select
from statejax.ops import slots as sl

# Of cosines: the same words give the same, up to the rounding of `select.top`.
_AS_NEAR = 2.0 ** -10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ask:
  """What is asked of the banks of B rows, T times each.

  Attributes:
    query: unit vectors, [B, T, K] float32.
    principal: who asks, [B, T] int32: sees what it owns, and what nobody owns.
    time: position of the token, [B, T] int32.
    ago: versions back, 0 for the present value, [B, T] int32.
    real: whether anything is asked, [B, T] bool.
  """

  query: jax.Array
  principal: jax.Array
  time: jax.Array
  ago: jax.Array
  real: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
  """How a read weighs what it finds, float32 scalars.

  Attributes:
    kappa: inverse temperature.
    scale, shift: of the confidence; scale > 0.
    threshold: least confidence of a read.
  """

  kappa: jax.Array | float = 20.0
  scale: jax.Array | float = 20.0
  shift: jax.Array | float = 14.0
  threshold: jax.Array | float = 0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
  """The slots that each query reads.

  Attributes:
    ids: best first, -1 for none, for a version that is not kept, and for all
      where a tombstone is nearest, [B, T, k] int32.
    fires: whether the confidence suffices, of a slot or of a tombstone,
      [B, T] bool.
  """

  ids: jax.Array
  fires: jax.Array


def choose(bank, ask, sight, k=1):
  """Returns `Found`: which slots each query reads. Passes no gradient.

  Args:
    bank: `slots.Bank` of B rows.
    ask: `Ask`.
    sight: `Sight`.
    k: slots per query at most.
  """
  return jax.vmap(functools.partial(look, sight=sight, k=k))(
      *lifecycle.parts(bank), ask)


def look(slot, alias, ask, sight, k=1):
  """`choose` of a row, for `lifecycle.segments`: leaves [M, ...], [T, ...]."""
  score, seen, gone = _scores(*jax.lax.stop_gradient((slot, alias, ask)))
  ids = select.top(score - jnp.where(slot['owner'] < 0, _AS_NEAR, 0.)[None],
                   seen, k)
  at = jnp.maximum(ids, 0)
  ago = jnp.clip(ask.ago, 0, slot['span'].shape[1] - 1)
  kept = slot['span'][at, ago[:, None], 0] >= 0
  kept &= (ask.ago == ago)[:, None] & (ids >= 0)
  best = jnp.where(ids[:, 0] >= 0, _best(score, ids), -jnp.inf)
  dead = _nearest(score, gone)
  over = jnp.any(gone, axis=-1) & (dead > best) & (
      _confidence(dead, True, sight) >= sight.threshold)
  fires = _confidence(best, kept[:, 0], sight) >= sight.threshold
  return Found(jnp.where(kept & ~over[:, None], ids, -1),
               ask.real & (over | fires & kept[:, 0]))


def noted(bank, ask, found):
  """Returns the bank with the reads of `choose` counted and dated."""
  slot, _ = lifecycle.parts(bank)
  return dataclasses.replace(bank, **jax.vmap(note)(slot, ask, found))


def note(slot, ask, found):
  """What reading leaves on the slots of one row: fields to replace."""
  read = jnp.any(select.to_mask(found.ids[:, :, None], slot['oid'].shape[0]),
                 axis=1) & found.fires[:, None]
  count = jnp.sum(read, axis=0, dtype=jnp.int32)
  time = ask.time[:, None]
  most = jnp.iinfo(jnp.int32).max
  first = jnp.min(jnp.where(read, time, most), axis=0)
  last = jnp.max(jnp.where(read, time, -1), axis=0)
  fresh = (slot['t_first'] < 0) & (count > 0)
  # Counters stop at the largest number, they never wrap.
  room = most - slot['reads']
  return {'reads': slot['reads'] + jnp.minimum(count, room),
          't_first': jnp.where(fresh, first, slot['t_first']),
          't_read': jnp.maximum(slot['t_read'], last)}


def read(bank, ask, found, sight, pull=None, doubtful=False):
  """The values that were found.

  Args:
    bank: `slots.Bank` of B rows.
    ask: `Ask`.
    found: of `choose`, or of `look` inside `lifecycle.segments`.
    sight: `Sight`; gradients reach all but `threshold`.
    pull: probabilities of which `ask.ago` is the largest, [B, T, R + 1], or
      None: they change nothing that is read of finite values, and are what
      gradients see.
    doubtful: whether to return what does not fire too.

  Returns:
    y: [B, T, V] in the values' dtype; exactly 0 where no read fires, or with
      `doubtful` where there is nothing to read.
    confidence: of what was found, a slot or a tombstone, [B, T] float32.
  """
  value = bank.value
  score, seen, gone = jax.vmap(_scores)(*lifecycle.parts(bank), ask)
  # Guarded: a softmax over nothing has no gradient.
  logits = jnp.where(seen, sight.kappa * score, -1e30)
  a = jax.nn.softmax(logits, axis=-1)
  at = jnp.maximum(found.ids, 0)
  a = jnp.take_along_axis(a, at, axis=-1)
  used = (found.ids >= 0) & (found.fires[..., None] | doubtful)
  a = jnp.where(used, a, 0.)
  rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None, None]
  ago = jnp.clip(ask.ago, 0, value.shape[2] - 1)[..., None]
  picked = value[rows, at, jnp.broadcast_to(ago, at.shape)]
  picked = jnp.where(used[..., None], picked, jnp.zeros((), value.dtype))
  picked = picked.astype(jnp.float32)
  if pull is not None:
    all_of = jnp.where(used[..., None, None], value[rows, at],
                       jnp.zeros((), value.dtype))
    picked = picked + jnp.einsum(
        'btr,btkrv->btkv', pull - jax.lax.stop_gradient(pull),
        all_of.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
  y = jnp.einsum('btk,btkv->btv', a, picked,
                 precision=jax.lax.Precision.HIGHEST)
  live = found.ids[..., 0] >= 0
  best = jnp.where(live, _best(score, found.ids), _nearest(score, gone))
  confidence = _confidence(best, live | found.fires, sight)
  return y.astype(value.dtype), confidence


def _best(score, ids):
  return jnp.take_along_axis(
      score, jnp.maximum(ids[..., :1], 0), axis=-1)[..., 0]


def _nearest(score, mask):
  return jnp.max(jnp.where(mask, score, -2.), axis=-1)


def _confidence(best, kept, sight):
  found = jax.nn.sigmoid(sight.scale * best - sight.shift)
  return jnp.where(kept, found, 0.)


def _scores(slot, alias, ask):
  """Cosines [T, M] of one row, what each query may see of what lives, and of
  tombstones and what is in quarantine."""
  keys = jnp.sum(ask.query[:, None] * slot['key'][None], axis=-1)
  names = jnp.sum(ask.query[:, None] * alias['key'][None], axis=-1)
  target = lifecycle.targets(slot, alias)
  for i in range(target.shape[0]):
    other = jnp.arange(keys.shape[1], dtype=jnp.int32) == target[i]
    keys = jnp.where(other[None], jnp.maximum(keys, names[:, i:i + 1]), keys)
  owner = slot['owner'][None]
  mine = (owner == ask.principal[:, None]) | (owner < 0)
  mine &= ask.real[:, None]
  mine &= (slot['expires'] < 0)[None] | (
      ask.time[:, None] < slot['expires'][None])
  return (keys, mine & (slot['status'] == sl.LIVE)[None],
          mine & ((slot['status'] == sl.TOMBSTONE)
                  | (slot['status'] == sl.QUARANTINED))[None])
