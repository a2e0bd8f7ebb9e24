"""Laws of gradients through the carried state."""

import jax
import jax.numpy as jnp
import numpy as np

from statejax import state as st
from statejax.laws import bench as bn


def initial_gradient(bench):
  """L16: the gradient with respect to the initial state is right.

  One pass equals the chain over a split, within ten times the tolerance; its
  product with a direction equals the finite difference, to two digits and what
  rounding the outputs does to that difference. Where a choice might change
  within a step, a difference to one side is enough. In a model, index keys have
  no cotangent: what they come from is read without gradient. A mixer that is
  `straight_through` has gradients that no difference has: for it, and for a
  model with it, the chain is all.
  """
  cut, rest = 10, bench.steps - 10
  # Not from a fresh row: at S = 0 the norm of what is read has a kink.
  _, origin = bench.run(bench.warm, bench.others, 6)
  outputs, final = bench.run(origin, bench.inputs)
  d_outputs, d_final = _cotangents(bench, outputs, final)
  _, whole, _ = bench.pull(origin, d_outputs, d_final)

  _, middle = bench.run(origin, bench.inputs, cut)
  roll = lambda x: np.roll(x, -cut, axis=1)
  _, d_middle, _ = bench.pull(
      middle, _first(roll(d_outputs), rest), d_final,
      inputs=roll(bench.inputs), n=rest)
  _, chained, _ = bench.pull(origin, _first(d_outputs, cut), d_middle, n=cut)
  for path, want in whole.items():
    _compare(bench, path, chained[path], want)
  # Coarser arithmetic leaves no digits for a finite difference.
  if bench.tolerance < 1e-4 and not getattr(
      bench.subject, 'straight_through', False):
    _finite_difference(bench, origin, whole, d_outputs, d_final)


def _first(x, n):
  """Returns x [B, T, ...] with zeros from time step n on."""
  x = x.copy()
  x[:, n:] = 0
  return x


def _cotangents(bench, outputs, state):
  """Random ones; logits that the state carries count as output.

  An indexer reads its inputs without gradient, so in a model of several layers
  what it keeps would hide from a gradient what a finite difference sees.
  """
  draw = lambda x: bench.random.standard_normal(x.shape).astype(x.dtype)
  state = bn.host(state)
  hidden = set() if bench.floats else {
      path for path, _, axes, _ in st.leaves(state) if 'index' in axes}
  return draw(outputs), {
      path: draw(x) * (path not in hidden)
      for path, x in bn.float_leaves(state).items()}


def _compare(bench, path, got, want):
  if not np.isfinite(want).all():
    bench.fail(path, expected='a finite gradient', got='NaN or infinity')
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  if not want.size:  # keys without a channel that turns
    return
  error = np.max(np.abs(got - want)) / max(1.0, np.max(np.abs(want)))
  bench.worst = max(bench.worst, error)
  if not error <= 10 * bench.tolerance:
    bad = np.unravel_index(np.argmax(np.abs(got - want)), want.shape)
    bench.fail(path, expected=want[bad], got=got[bad],
               note='gradient through a split against one pass')


def _finite_difference(bench, origin, gradients, d_outputs, d_final):
  """Central difference of <outputs, d_outputs> + <state, d_final>."""
  leaves = bn.float_leaves(bn.host(origin))
  for path, gradient in gradients.items():
    if not path.startswith('layers/') or not np.any(gradient):
      continue
    scale = max(np.max(np.abs(leaves[path].astype(np.float64))), 1e-2)
    got = np.sum(np.abs(np.float64(gradient)))
    # The shortest step at which rounding, of outputs that this leaf may hardly
    # move, is no more than half of what is allowed. What chooses might choose
    # otherwise at a longer one.
    chooses = getattr(bench.subject, 'chooses', False)
    both, sides, noise = np.nan, [], np.nan
    for step in scale * np.array([1e-5, 1e-4, 1e-3, 1e-2])[not chooses:]:
      both, *sides, noise = _differences(
          bench, origin, path, leaves[path], step,
          np.sign(np.float64(gradient)), d_outputs, d_final)
      if noise <= 5e-3 * abs(both):
        break
    if not any(abs(got - want) <= 1e-2 * abs(want) + noise
               for want in (both, *sides[:2 * chooses])):
      bench.fail(path, expected=both, got=got,
                 note='gradient against a finite difference')


def _differences(bench, origin, path, leaf, step, direction, d_outputs,
                 d_final):
  """Returns difference quotients along a direction, of both sides, forward and
  backward, and what rounding does to the first."""
  value, mass = [], 0.0
  for sign in (1, 0, -1):
    moved = leaf + sign * step * direction
    moved = jnp.asarray(moved.astype(leaf.dtype))
    state = bn.with_leaves(origin, {path: moved})
    outputs, final = bench.run(state, bench.inputs)
    value.append(_inner(outputs, d_outputs) + sum(
        _inner(x, d_final[p]) for p, x in bn.float_leaves(final).items()))
    mass = np.linalg.norm(np.float64(np.asarray(outputs)) * d_outputs)
  high, middle, low = value
  return ((high - low) / (2 * step), (high - middle) / step,
          (middle - low) / step, np.finfo(np.float32).eps * mass / step)


def _inner(a, b):
  return float(np.sum(np.float64(np.asarray(a)) * np.float64(b)))


def extreme(bench):
  """L10: outputs, states and gradients stay finite at extreme gates.

  Float inputs, and every parameter called `kernel`, are 30 times larger.
  """
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: 30 * x if 'kernel' in jax.tree_util.keystr(path) else x,
      bench.params)
  inputs = 30 * bench.inputs if bench.floats else bench.inputs
  outputs, state = bench.run(bench.fresh(), inputs, params=params)
  _finite(bench, 'output', outputs)
  for path, x in bn.float_leaves(state).items():
    _finite(bench, path, np.asarray(x))
  ones = {p: np.ones(x.shape, x.dtype)
          for p, x in bn.float_leaves(state).items()}
  d_params, d_leaves, d_inputs = bench.pull(
      state, np.ones_like(outputs), ones, params=params, inputs=inputs)
  _finite(bench, 'gradient of inputs', d_inputs)
  for path, x in d_leaves.items():
    _finite(bench, f'gradient of {path}', x)
  for path, x in jax.tree_util.tree_leaves_with_path(d_params):
    _finite(bench, f'gradient of {jax.tree_util.keystr(path)}', x)


def _finite(bench, leaf, x):
  if x is None or np.isfinite(x.astype(np.float32)).all():
    return
  bad = tuple(int(i) for i in np.argwhere(~np.isfinite(
      x.astype(np.float32)))[0])
  step = bad[1] if leaf == 'output' else None
  bench.fail(leaf, row=bad[0] if leaf == 'output' else None, step=step,
             expected='a finite number', got=x[bad])
