"""Laws of the compiled step: its types, its memory, its cache."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from statejax import state as st
from statejax.laws import bench as bn
from statejax.laws.rows import reload


def schema(bench):
  """A state has the leaves, shapes, types and bytes that its schema says."""
  state = bench.fresh()
  grows = any(kind == 'growing' for _, _, _, kind in st.leaves(state))
  if st.capacity(state) != (bench.capacity if grows else None):
    bench.fail('capacity', expected=bench.capacity if grows else None,
               got=st.capacity(state))
  if (state.length != 0).any():
    bench.fail('length', expected=0, got=state.length.tolist())
  if not hasattr(bench.subject, 'state_schema'):
    return False
  declared = bench.subject.state_schema(bench.rows, bench.capacity)
  want = {path: spec for path, spec, _, _ in st.leaves(declared)}
  for each in (state, bench.warm):
    got = {path: x for path, x, _, _ in st.leaves(each)}
    for path in sorted(want.keys() | got.keys()):
      spec, x = want.get(path), got.get(path)
      if spec is None or x is None or (
          (spec.shape, spec.dtype) != (x.shape, x.dtype)):
        bench.fail(path, expected=spec, got=x if x is None else x.shape)
  total = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
  for what, counted in (('state', st.nbytes(state)),
                        ('schema', st.nbytes(declared))):
    if sum(counted.values()) != total:
      bench.fail(f'bytes of the {what}', expected=total, got=counted)
  return True


def fixed_point(bench):
  """A step returns a state of the shapes and types that it was given.

  Weak types count: they would compile the second call anew.
  """
  state = bench.fresh()
  for length in (1, bench.steps):
    n = jnp.full((bench.rows,), length, jnp.int32)
    ids = jnp.zeros((bench.rows, length), jnp.int32)
    for arguments in ((n, ids), (n, None), (None, None)):
      _, new = jax.eval_shape(
          lambda *a: bench.subject.step(*a), bench.params, state,
          jnp.asarray(bench.inputs[:, :length]), *arguments)
      for path, want, got in _pairs(bench, state, new):
        if (want.shape, want.dtype) != (got.shape, got.dtype):
          bench.fail(path, expected=f'{want.dtype}{list(want.shape)}',
                     got=f'{got.dtype}{list(got.shape)}')
        if got.weak_type:
          bench.fail(path, expected='weak_type=False', got='weak_type=True')


def _pairs(bench, state, new):
  if jax.tree.structure(state) != jax.tree.structure(new):
    bench.fail('structure', expected=jax.tree.structure(state),
               got=jax.tree.structure(new))
  return [(path, x, y) for (path, x, _, _), (_, y, _, _) in zip(
      st.leaves(state), st.leaves(new))]


def dtype(bench):
  """L9: what accumulates is float32, and matrices hold what float32 can.

  That is every fixed leaf of floats but copies of inputs: tails of `taps`,
  rings of a `window`, `slots` and `events`. A matrix whose every number fits in
  bfloat16 has been rounded on its way.
  """
  found = False
  for path, x, axes, kind in st.leaves(bench.warm):
    if (kind == 'growing' or {'taps', 'window', 'slots', 'events'} & set(axes)
        or not jnp.issubdtype(x.dtype, jnp.floating)):
      continue
    found = True
    if x.dtype != jnp.float32:
      bench.fail(path, expected='float32', got=x.dtype)
    rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
    if {'key', 'value'} <= set(axes) and (x == rounded).all():
      bench.fail(path, expected='float32 precision', got='bfloat16 values',
                 step=int(np.max(bench.warm_lengths)))
  return found


def donation(bench):
  """L14: a donated state is reused in full, and a fork of it survives.

  All old leaves are deleted; the bytes aliased are the bytes of the state.
  """
  token = jnp.asarray(bench.inputs[:, :1])
  n = jnp.ones((bench.rows,), jnp.int32)
  want, final = bench.run(bench.warm, bench.inputs[:, :1])
  state = st.take(bench.warm, np.arange(bench.rows))
  copy = st.fork(state, 2, bench.rows)
  before = bn.host(copy)
  # A program of its own: the others must leave their states alive.
  step = jax.jit(lambda *args: bench.subject.step(*args), donate_argnums=1)
  with warnings.catch_warnings():
    # What jax would warn of is an error here, with the leaf's name.
    warnings.simplefilter('ignore')
    compiled = step.lower(bench.params, state, token, n, None).compile()
  size = sum(st.nbytes(state).values())
  got, new = compiled(bench.params, state, token, n, None)
  for path, x, _, _ in st.leaves(state):
    if not x.is_deleted():
      bench.fail(path, expected='deleted', got='alive after donation')
  bench.same_outputs(np.asarray(got), want, exact=True, note='donated')
  bench.same_bits(new, final, note='donated')
  bench.same_bits(copy, before, note='fork of a donated state')
  aliased = getattr(compiled.memory_analysis(), 'alias_size_in_bytes', None)
  if aliased is not None and aliased != size:
    bench.fail('aliased bytes', expected=size, got=aliased)


def no_recompile(bench):
  """L8: the second step compiles nothing, nor does one of a loaded state."""
  for inputs in (bench.inputs, bench.inputs[:, :1]):
    _, first = bench.run(bench.fresh(), inputs)
    _, second = bench.run(first, inputs)
    bench.run(reload(second), inputs)
  for name, program in bench.programs.items():
    if program._cache_size() != 1:
      bench.fail(name, expected='1 compilation', got=program._cache_size())
