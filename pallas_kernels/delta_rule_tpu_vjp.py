"""Backward kernel of the delta rule on a TPU, and the differentiable function.

Only the operands and the states before every chunk are kept. The kernel takes
the chunks in reverse, forms each anew and carries the gradient of the state.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import delta_rule_tpu_adjoint as adjoint
from pallas_kernels import delta_rule_tpu_chunk as chunk
from pallas_kernels import delta_rule_tpu_forward as primal
from pallas_kernels import manual


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(plan, backward_plan, operands, state):
  """Returns y [B, HV, T, V] and the final state, see `primal.forward`.

  The plans may differ in heads per step; `operands.head` is then a dict of the
  gates per head, [B, HV, T].
  """
  y, final, _ = primal.forward(
      _arrange(operands, plan), state, plan, keep=False
  )
  return y, final


def _run_forward(plan, backward_plan, operands, state):
  y, final, starts = primal.forward(
      _arrange(operands, plan), state, plan, keep=True
  )
  return (y, final), (operands, starts)


def _run_backward(plan, backward_plan, residuals, cotangents):
  operands, starts = residuals
  dy, d_final = cotangents
  arranged = _arrange(operands, backward_plan)
  grads, d_state = backward(arranged, starts, dy, d_final, backward_plan)
  heads = operands.q.shape[1]
  grads = grads._replace(
      q=_sum_partial(grads.q, operands.q), k=_sum_partial(grads.k, operands.k),
      head=_restore(grads.head, heads * plan.groups, backward_plan),
  )
  return grads, d_state


run.defvjp(_run_forward, _run_backward)


def _sum_partial(grad, x):
  """Adds up what several grid steps found for one key head."""
  parts = grad.shape[1] // x.shape[1]
  if parts == 1:
    return grad
  grad = grad.reshape(*x.shape[:2], parts, *x.shape[2:])
  return jnp.sum(grad, axis=2).astype(x.dtype)


def _arrange(operands, plan):
  """Gates per head [B, HV, T] to blocks, their log decays to base 2."""
  names = plan.of_kind('head')
  if not names:
    return operands._replace(head=None)

  def blocks(x):
    batch, heads, _ = x.shape
    x = x.reshape(
        batch, heads // plan.heads, plan.packs, plan.packed, -1, plan.size
    )
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(
        batch, heads // plan.heads, -1, plan.packs, plan.pack.rows
    )

  head = dict(operands.head)
  if 'decay' in head:
    head['decay'] = primal.base_2(head['decay'])
  blocked = [blocks(head[n]) for n in names]
  return operands._replace(head=jnp.concatenate(blocked, axis=3))


def _restore(head, heads, plan):
  """Blocks of gates per head back to a dict of [B, HV, T]."""
  names = plan.of_kind('head')
  if not names:
    return {}

  def rows(x):
    batch, steps, count = x.shape[:3]
    x = x.reshape(batch, steps, count, plan.packs, plan.packed, plan.size)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, heads, -1)

  parts = jnp.split(head, len(names), axis=3)
  return {n: rows(x) for n, x in zip(names, parts, strict=True)}


def _kernel(*refs, plan):
  inputs, starts, dy_ref, d_final, grads, d_state_ref, d_states = refs
  step, last = pl.program_id(2), pl.num_programs(2) - 1
  pack = plan.pack

  @pl.when(step == 0)
  def _():
    primal.turn(d_final, d_states, plan)

  columns = primal.head_columns(inputs, plan)
  dq, dk = [None] * plan.key_heads, [None] * plan.key_heads
  d_columns = {}

  def run(i):
    heads = range(i * plan.packed, (i + 1) * plan.packed)
    x = primal.load(inputs, columns, i, plan)
    dy = jnp.concatenate([dy_ref[0, h] for h in heads]).astype(jnp.float32)
    out, d_before = yield from _pack_backward(
        x, [starts[0, h, 0] for h in heads], plan.scale * dy,
        [d_states[h] for h in heads], plan,
    )
    for n, h in enumerate(heads):
      d_states[h] = d_before[n]
      grads.v[0, h] = chunk.head_rows(out.v, n, pack).astype(grads.v.dtype)
      for name, ref in grads.channel.items():
        grad = chunk.head_rows(getattr(out, name), n, pack)
        ref[0, h] = grad.astype(ref.dtype)
      key = plan.key_head(h)
      for sums, part in ((dq, out.q), (dk, out.k)):
        part = chunk.head_rows(part, n, pack)
        sums[key] = part if sums[key] is None else sums[key] + part
    for name in plan.of_kind('head'):
      of_name = getattr(out, name)
      of_name = of_name if name == 'decay' else (of_name,)
      for part, column in enumerate(of_name):
        d_columns[name, part, i] = column

  chunk.in_turns([run(i) for i in range(plan.packs)])
  for key in range(plan.key_heads):
    grads.q[0, key] = dq[key].astype(grads.q.dtype)
    grads.k[0, key] = dk[key].astype(grads.k.dtype)
  if d_columns:
    grads.head[0, 0, 0] = _head_rows(d_columns, plan)

  @pl.when(step == last)
  def _():
    primal.turn(d_states, d_state_ref, plan)


def _head_rows(columns, plan):
  """Gradients of the gates per head, from columns by (gate, part, pack)."""
  lane = chunk.iota((plan.pack.rows, len(columns)), 1)
  joined = jnp.zeros(lane.shape, jnp.float32)
  for at, key in enumerate(sorted(columns)):
    joined = jnp.where(lane == at, columns[key], joined)
  rows, packs = joined.T, plan.packs
  rows = [rows[at : at + packs] for at in range(0, rows.shape[0], packs)]
  if plan.decay == 'head':
    own, d_pre, d_suf, *rows = rows
    rows.insert(0, adjoint.sum_spans(own, d_pre, d_suf, plan.size))
  return jnp.concatenate(rows)


def _pack_backward(x, states, dy, d_states, plan):
  """Yields in turns; returns gradients of `primal.Rows` and of the states."""
  pack, exact = plan.pack, plan.exact
  intra = primal.relate(x, plan)
  yield
  s = yield from primal.solve(x, intra, states, plan)
  per_head = lambda rows: [
      chunk.head_rows(rows, h, pack) for h in range(pack.heads)
  ]
  decay, e = intra.decay, intra.e
  d_u = adjoint.apply_transposed(intra.reading.T, dy, pack)
  d_u += jnp.concatenate([
      chunk.product_nt(rows, d, exact)
      for rows, d in zip(per_head(intra.keys), d_states)
  ])
  d_reads = [dy]
  yield
  if s.inverse is not None:
    d_u = adjoint.apply_transposed(s.inverse.T, d_u, pack)
    d_reads.append(-x.erase * d_u if plan.erase == 'head' else -d_u)
    yield

  # Through the state.
  d_read, d_keys, d_tot, d_before = [], [], [], []
  residual = per_head(s.residual)
  for h in range(pack.heads):
    of_head = lambda parts, h=h: jnp.concatenate(
        [chunk.head_rows(p, h, pack) for p in parts]
    )
    d_rows = of_head(d_reads)
    tot = decay.tot[h]
    d_read.append(chunk.product(d_rows, states[h], exact))
    d_keys.append(chunk.product(residual[h], d_states[h], exact))
    d_before.append(
        tot * d_states[h] + chunk.product(d_rows.T, of_head(intra.reads), exact)
    )
    both = jnp.sum(states[h] * d_states[h], axis=0, keepdims=True)
    if plan.decay == 'head':
      both = jnp.sum(both, axis=1, keepdims=True)
    d_tot.append(tot * both)
  size, zero = pack.size, jnp.zeros((), jnp.float32)
  dq = jnp.concatenate([d[:size] for d in d_read]) * decay.pre
  dk = jnp.concatenate(d_keys) * decay.suf
  d_pre, d_suf, de = x.q * dq, x.k * dk, zero
  if e is not None:
    de = jnp.concatenate([d[size:] for d in d_read]) * decay.pre
    d_pre += e * de

  yield

  # Through the pairs.
  left = [dy] if e is None else [dy, -d_u]
  pairs = chunk.product_nt(jnp.concatenate(left), s.residual, exact)
  d_reading = chunk.to_pairs(pairs[: pack.rows], pack)
  d_reading = adjoint.lower(d_reading, pack, strict=False)
  d_erasing, d_gated = None, zero
  if e is not None:
    d_gated = chunk.to_pairs(pairs[pack.rows :], pack)
    d_gated = d_erasing = adjoint.lower(d_gated, pack, strict=True)
    if plan.erase == 'head':
      d_erasing = chunk.columns_to_pairs(x.erase, pack) * d_gated
  yield
  if plan.decay == 'channel':
    by_q, by_e, by_k, d_decay = yield from adjoint.channel_adjoint(
        x.q, e, x.k, decay, d_reading, d_erasing, d_pre, d_suf, d_tot, pack
    )
    itself = jnp.sum(dy * s.residual, axis=1, keepdims=True)
    dq, dk = dq + itself * x.k, dk + itself * x.q
  else:
    over_keys = lambda rows: jnp.sum(rows, axis=1, keepdims=True)
    by_q, by_e, by_k, d_decay = adjoint.head_adjoint(
        x.q, e, x.k, decay, (intra.reading, intra.erasing),
        d_reading, d_erasing, over_keys(d_pre), over_keys(d_suf), d_tot, pack,
    )
  dq, dk = dq + by_q, dk + by_k
  d_erase = d_write = None
  de += zero if by_e is None else by_e
  if plan.erase == 'head':
    dk += de
    d_erase = adjoint.pairs_to_column(d_gated * intra.erasing, pack)
    d_erase -= jnp.sum(d_u * s.erased, axis=1, keepdims=True)
  elif plan.erase == 'channel':
    dk += x.erase * de
    d_erase = x.k * de
  d_v = d_u
  if plan.write is not None:
    d_v = x.write * d_u
    d_write = x.v * d_u
    if plan.write == 'head':
      d_write = jnp.sum(d_write, axis=1, keepdims=True)
  return primal.Rows(dq, dk, d_v, d_decay, d_erase, d_write), d_before


def backward(operands, starts, dy, d_final, plan):
  """Runs the backward kernel.

  Args:
    operands: `primal.Operands`.
    starts: states before every chunk, [B, HV, T / C, V, K], float32.
    dy: [B, HV, T, V].
    d_final: gradient of the final state, [B, HV, K, V], float32.
    plan: `primal.Plan`.

  Returns:
    The gradients of `operands` and of the first state. Where the value heads of
    a key head are spread over grid steps, each adds heads to those of q and k.
  """
  batch, heads, length, values = operands.v.shape
  width, count = operands.q.shape[-1], length // plan.size
  reverse = lambda n: count - 1 - n
  inputs = primal.specs(operands, plan, reverse)
  state_spec = primal.state_spec(plan, width, values)
  starts_spec = primal.starts_spec(plan, width, values, reverse)
  grad_specs = primal.specs(operands, plan, reverse)
  shape = functools.partial(manual.struct, like=operands.v)
  shapes = jax.tree.map(lambda x: shape(x.shape, x.dtype), operands)
  if plan.heads < plan.groups:
    partial = shape((batch, heads // plan.heads, length, width), jnp.float32)
    spec = pl.BlockSpec(
        (1, 1, plan.size, width), lambda b, h, n: (b, h, reverse(n), 0)
    )
    shapes = shapes._replace(q=partial, k=partial)
    grad_specs = grad_specs._replace(q=spec, k=spec)
  leaves, tree = jax.tree.flatten(operands)
  many = len(leaves)

  def kernel(*refs):
    unflatten = functools.partial(jax.tree.unflatten, tree)
    _kernel(
        unflatten(refs[:many]), *refs[many : many + 3],
        unflatten(refs[many + 3 : 2 * many + 3]), *refs[2 * many + 3 :],
        plan=plan,
    )

  grads = pl.pallas_call(
      kernel,
      grid=(batch, heads // plan.heads, count),
      in_specs=[*jax.tree.leaves(inputs), starts_spec, inputs.v, state_spec],
      out_specs=[*jax.tree.leaves(grad_specs), state_spec],
      out_shape=[
          *jax.tree.leaves(shapes), shape(d_final.shape, d_final.dtype)
      ],
      scratch_shapes=[pltpu.VMEM((plan.heads, values, width), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'arbitrary'),
          vmem_limit_bytes=plan.vmem,
      ),
      interpret=plan.interpret,
      name='delta_rule_backward',
  )(*leaves, starts, dy, d_final)
  return jax.tree.unflatten(tree, grads[:many]), grads[-1]
