"""Forward kernel of the delta rule on a TPU: the state stays in VMEM.

The grid runs over rows, groups of value heads and, one after the other, the
chunks of the sequence. A step handles `heads_per_step` heads; the state of each
is carried in scratch memory, transposed ([V, K]), so that the decays of its key
channels lie along the lanes. The pair matrices and the inverse never leave the
chip.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import delta_rule_tpu_chunk as chunk
from pallas_kernels import delta_rule_tpu_inverse as inversion
from pallas_kernels import manual

FORGET = -200.0  # exp is 0 in float32, and sums of it stay finite


class Plan(NamedTuple):
  """Static facts of a call.

  Attributes:
    size: tokens per chunk.
    heads: value heads per grid step.
    packed: heads per pack.
    groups: value heads per key head.
    decay, erase, write: 'head' or 'channel'; None for erase 0 and write 1.
    scale: factor on q.
    exact: whether products have float32 operands.
    interpret: passed to `pallas_call`.
    vmem: bytes of VMEM the compiler may use; None for its default.
  """

  size: int
  heads: int
  packed: int
  groups: int
  decay: str
  erase: str | None
  write: str | None
  scale: float
  exact: bool
  interpret: object
  vmem: int | None = None

  @property
  def pack(self):
    return chunk.Pack(self.size, self.packed, self.exact)

  @property
  def packs(self):
    return self.heads // self.packed

  @property
  def key_heads(self):
    """Key heads per grid step."""
    return max(self.heads // self.groups, 1)

  def of_kind(self, kind):
    """The names of the gates of a kind, in the order they are stored."""
    return [n for n in ('decay', 'erase', 'write') if getattr(self, n) == kind]

  def key_head(self, h):
    """Which key head of the step value head h of the step uses."""
    return h // self.groups if self.heads >= self.groups else 0


class Operands(NamedTuple):
  """What the kernels read, head-major and padded to whole tiles and chunks.

  Also what belongs to it, one each: references, block specs, gradients.

  Attributes:
    q: [B, HK, T, K].
    k: [B, HK, T, K].
    v: [B, HV, T, V].
    channel: name -> gates per channel, [B, HV, T, K or V].
    head: gates per head, [B, HV / heads, T / C, gates * packs, p * C]; None if
      there are none. Its log decays have base 2.
  """

  q: Any
  k: Any
  v: Any
  channel: dict
  head: Any


class Rows(NamedTuple):
  """One pack in float32, [p * C, D]; gates per head are columns [p * C, 1].

  A decay per head is (log decays [1, p * C], columns pre and suf).
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  decay: Any
  erase: jax.Array | None
  write: jax.Array | None


class Intra(NamedTuple):
  """What the tokens of a pack are to each other, whatever the states.

  Attributes:
    decay: `chunk.Decay`.
    e: rows whose product with the state is erased.
    reading: A.
    erasing: L without its gate per head.
    lower: L.
    reads: q * pre and e * pre, operands of products with the state.
    keys: k * suf, operand of the product that writes.
  """

  decay: chunk.Decay
  e: jax.Array | None
  reading: jax.Array
  erasing: Any
  lower: jax.Array | None
  reads: list
  keys: jax.Array


class Solved(NamedTuple):
  """What a pack comes to, given the states before it, as rows.

  Attributes:
    inverse: (I + L)^-1 as pairs.
    read: (q * pre) S0.
    erased: (e * pre) S0.
    residual: R.
  """

  inverse: jax.Array | None
  read: jax.Array
  erased: Any
  residual: jax.Array


def base_2(log_decay):
  """Finite log decays, to base 2: what the kernels compute with."""
  return jnp.maximum(log_decay, FORGET) * (1 / math.log(2))


def head_columns(refs, plan):
  """Returns the gates per head as columns, [p * C, packs] each.

  Of the decay it is (log decays [packs, p * C], columns pre, columns suf).
  """
  names = plan.of_kind('head')
  if not names:
    return {}
  packs, size = plan.packs, plan.size
  rows = refs.head[0, 0, 0]
  parts = {n: rows[g * packs : (g + 1) * packs] for g, n in enumerate(names)}
  decay = parts.pop('decay', None)
  if decay is not None:
    after = chunk.lane_shift(decay, size, -1)
    parts['pre'] = jnp.exp2(chunk.lane_prefix(decay, size))
    parts['suf'] = jnp.exp2(chunk.lane_suffix(after, size))
  turned = jnp.concatenate(list(parts.values())).T
  columns = {
      n: turned[:, g * packs : (g + 1) * packs] for g, n in enumerate(parts)
  }
  if decay is None:
    return columns
  of_decay = decay, columns.pop('pre'), columns.pop('suf')
  return {'decay': of_decay, **columns}


def load(refs, columns, i, plan):
  """Returns the `Rows` of pack i from blocks of `Operands`."""
  first = i * plan.packed
  rows = plan.pack.rows
  heads = range(first, first + plan.packed)

  def keys(ref):
    x = [ref[0, plan.key_head(h)] for h in heads]
    return jnp.concatenate(x, axis=0).astype(jnp.float32)

  def values(ref):
    x = ref[0, first : first + plan.packed]
    return x.reshape(rows, x.shape[-1]).astype(jnp.float32)

  def of_head(name, gate):
    if name != 'decay':
      return gate[:, i : i + 1]
    g, pre, suf = gate
    return g[i : i + 1], pre[:, i : i + 1], suf[:, i : i + 1]

  gates = {name: values(ref) for name, ref in refs.channel.items()}
  if 'decay' in gates:  # here, for a pass over all channels would be traffic
    gates['decay'] = base_2(gates['decay'])
  gates |= {name: of_head(name, gate) for name, gate in columns.items()}
  return Rows(
      keys(refs.q), keys(refs.k), values(refs.v), gates['decay'],
      gates.get('erase'), gates.get('write'),
  )


def relate(x, plan):
  """Returns `Intra` for `Rows`."""
  pack = plan.pack
  e = None
  if plan.erase is not None:
    e = x.k if plan.erase == 'head' else x.erase * x.k
  if plan.decay == 'channel':
    decay, reading, erasing = chunk.channel_intra(x.decay, x.q, e, x.k, pack)
  else:
    decay, reading, erasing = chunk.head_intra(x.decay, x.q, e, x.k, pack)
  lower = erasing
  if erasing is not None and plan.erase == 'head':
    lower = chunk.columns_to_pairs(x.erase, pack) * erasing
  reads = [
      pack.operand(rows * decay.pre) for rows in (x.q, e) if rows is not None
  ]
  return Intra(
      decay, e, reading, erasing, lower, reads, pack.operand(x.k * decay.suf)
  )


def solve(x, intra, states, plan):
  """Yields in turns, returns `Solved`; states [V, K] of the pack's heads."""
  pack = plan.pack
  read, erased = _recall(intra.reads, states, pack)
  yield
  residual = x.v if x.write is None else x.write * x.v
  inverse = None
  if erased is not None:
    inverse = yield from inversion.inverse(intra.lower, pack)
    gated = x.erase * erased if plan.erase == 'head' else erased
    residual = chunk.apply_pairs(inverse, residual - gated, pack)
  return Solved(inverse, read, erased, residual)


def _recall(reads, states, pack):
  out = []
  for h, state in enumerate(states):
    rows = [chunk.head_rows(x, h, pack) for x in reads]
    out.append(chunk.product_nt(jnp.concatenate(rows), state, pack.exact))
  read = jnp.concatenate([x[: pack.size] for x in out])
  if len(reads) == 1:
    return read, None
  return read, jnp.concatenate([x[pack.size :] for x in out])


def turn(source, target, plan):
  """Transposes the states of a step: [1, H, K, V] to [H, V, K] or back."""
  def body(h, _):
    if len(target.shape) == 3:
      target[h] = source[0, h].T
    else:
      target[0, h] = source[h].T
    return _

  jax.lax.fori_loop(0, plan.heads, body, 0)


def _kernel(*refs, plan, keep):
  inputs, state_ref, y_ref, final_ref, starts_ref, states = refs
  step, last = pl.program_id(2), pl.num_programs(2) - 1
  pack = plan.pack

  @pl.when(step == 0)
  def _():
    turn(state_ref, states, plan)

  if keep:
    starts_ref[0, :, 0] = states[...]
  columns = head_columns(inputs, plan)

  rows = [load(inputs, columns, i, plan) for i in range(plan.packs)]
  intras = [relate(x, plan) for x in rows]

  def run(i):
    heads = range(i * plan.packed, (i + 1) * plan.packed)
    intra = intras[i]
    solved = yield from solve(rows[i], intra, [states[h] for h in heads], plan)
    yield
    y = chunk.apply_pairs(intra.reading, solved.residual, pack)
    y = plan.scale * (solved.read + y)
    yield
    for n, h in enumerate(heads):
      y_ref[0, h] = chunk.head_rows(y, n, pack).astype(y_ref.dtype)
      states[h] = states[h] * intra.decay.tot[n] + chunk.product(
          chunk.head_rows(solved.residual, n, pack).T,
          chunk.head_rows(intra.keys, n, pack), pack.exact,
      )

  chunk.in_turns([run(i) for i in range(plan.packs)])

  @pl.when(step == last)
  def _():
    turn(states, final_ref, plan)


def specs(operands, plan, chunk_index):
  """Block specs of `Operands`; chunk_index maps the grid to the chunk."""
  heads, size = plan.heads, plan.size
  width, values = operands.q.shape[-1], operands.v.shape[-1]
  if plan.heads >= plan.groups:
    key_block = lambda h: h
  else:
    key_block = lambda h: h * plan.heads // plan.groups
  by_key = pl.BlockSpec(
      (1, plan.key_heads, size, width),
      lambda b, h, n: (b, key_block(h), chunk_index(n), 0),
  )
  by_value = lambda d: pl.BlockSpec(
      (1, heads, size, d), lambda b, h, n: (b, h, chunk_index(n), 0)
  )
  head = None
  if operands.head is not None:
    head = pl.BlockSpec(
        (1, 1, 1, *operands.head.shape[3:]),
        lambda b, h, n: (b, h, chunk_index(n), 0, 0),
    )
  channel = {n: by_value(x.shape[-1]) for n, x in operands.channel.items()}
  return Operands(by_key, by_key, by_value(values), channel, head)


def state_spec(plan, width, values):
  """Block spec of first and last states."""
  return pl.BlockSpec(
      (1, plan.heads, width, values), lambda b, h, n: (b, h, 0, 0)
  )


def starts_spec(plan, width, values, chunk_index):
  """Block spec of the states before every chunk."""
  return pl.BlockSpec(
      (1, plan.heads, 1, values, width),
      lambda b, h, n: (b, h, chunk_index(n), 0, 0),
  )


def forward(operands, state, plan, *, keep):
  """Runs the forward kernel.

  Args:
    operands: `Operands`.
    state: [B, HV, K, V], float32.
    plan: `Plan`.
    keep: whether to return the states before every chunk.

  Returns:
    y [B, HV, T, V] in v.dtype, the final state, and, if kept, the states before
    every chunk, transposed: [B, HV, T / C, V, K] float32; else None.
  """
  batch, heads, length, values = operands.v.shape
  width, count = operands.q.shape[-1], length // plan.size
  same = lambda n: n
  grid = (batch, heads // plan.heads, count)
  inputs = specs(operands, plan, same)
  of_state = state_spec(plan, width, values)
  leaves, tree = jax.tree.flatten(operands)
  shape = functools.partial(manual.struct, like=operands.v)
  out_shape = [
      shape(operands.v.shape, operands.v.dtype),
      shape(state.shape, state.dtype),
  ]
  out_specs = [inputs.v, of_state]
  if keep:
    out_shape.append(
        shape((batch, heads, count, values, width), jnp.float32)
    )
    out_specs.append(starts_spec(plan, width, values, same))

  def kernel(*refs):
    inputs, refs = refs[: len(leaves)], refs[len(leaves) :]
    state, y, final, *starts, states = refs
    _kernel(
        jax.tree.unflatten(tree, inputs), state, y, final,
        starts[0] if keep else None, states, plan=plan, keep=keep,
    )

  out = pl.pallas_call(
      kernel,
      grid=grid,
      in_specs=[*jax.tree.leaves(inputs), of_state],
      out_specs=out_specs,
      out_shape=out_shape,
      scratch_shapes=[pltpu.VMEM((plan.heads, values, width), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary'),
          vmem_limit_bytes=plan.vmem,
      ),
      interpret=plan.interpret,
      name='delta_rule_forward',
  )(*leaves, state)
  return (*out, None) if not keep else tuple(out)
