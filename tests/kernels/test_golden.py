"""The TPU kernels of the delta rule, interpreted, against golden vectors."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule_step_tpu import delta_rule_step
from pallas_kernels.delta_rule_tpu import delta_rule

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
ABOUT = json.loads((GOLDEN / 'ops.json').read_text())
INPUTS = ('q', 'k', 'v', 'g', 'beta', 'initial_state')
# Names of one compiled program: equal shapes, and the same results wanted.
GROUPS = {}
for NAME, FACTS in ABOUT.items():
  if FACTS['op'] in ('gdn', 'kda'):
    SHAPES = FACTS['arrays']
    KEY = FACTS['op'], *SHAPES['q'][0], *SHAPES['v'][0], 'loss' in FACTS
    GROUPS.setdefault(KEY, []).append(NAME)
# The others have lengths of their own; these cover both decays in every way.
SLOW = [group for group in GROUPS.values()
        if {'gdn_short', 'kda_short', 'gdn_strong_decay', 'gdn_base',
            'kda_base', 'kda_grad'} & {*group}]


@functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})
def run(x, weights):
  def loss(x):
    arrays = [x[n] for n in ('q', 'k', 'v', 'g', 'beta', 'beta')]
    options = dict(scale=x['q'].shape[-1] ** -0.5, interpret=True)
    if x['q'].shape[1] == 1:
      out = delta_rule_step(*arrays, x['initial_state'], **options)
    else:
      out = delta_rule(*arrays, x['initial_state'], chunk_size=32, **options)
    return sum(jnp.vdot(w, y) for w, y in zip(weights, out)), out

  if not weights:
    return loss(x)[1], {}
  (_, out), grads = jax.value_and_grad(loss, has_aux=True)(x)
  return out, grads


def unit(x):
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize('group', [
    pytest.param(group, id=group[0],
                 marks=pytest.mark.slow if group in SLOW else ())
    for group in GROUPS.values()])
def test_golden(group):
  for name in group:
    about, arrays = ABOUT[name], dict(np.load(GOLDEN / f'{name}.npz'))
    x = {n: arrays[n] for n in INPUTS if n in arrays}
    x.setdefault('initial_state', np.zeros_like(arrays['final_state']))
    weights = [
        arrays[n] for n in ('loss_w_out', 'loss_w_state') if n in arrays]
    normed, back = x, []
    if about['use_qk_l2norm']:
      turned = {n: jax.vjp(unit, x[n]) for n in 'qk'}
      normed = {**x, **{n: y for n, (y, _) in turned.items()}}
      back = [(n, f) for n, (_, f) in turned.items()]
    out, grads = run(normed, weights)
    if grads:
      grads |= {n: f(grads[n])[0] for n, f in back}
    limits = about['float32_error']['chunk']
    for got, want, limit in zip(out, ('out', 'final_state'), limits):
      error = np.abs(got - arrays[want]).max()
      assert error <= 10 * limit, (name, want, error / limit)
    for n, grad in grads.items():
      want = arrays[f'd_{n}']
      error = np.abs(grad - want).max() / np.abs(want).max()
      assert error <= 5e-6, (name, n, error)
