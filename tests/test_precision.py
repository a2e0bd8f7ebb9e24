"""No product of float32 leaves its precision to the device.

GPUs and TPUs round the operands of float32 products to fewer bits unless told
otherwise, a CPU never does: only the traced program shows what they would do.
"""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from statejax import model as lm

CONFIGS = sorted(p.stem for p in pathlib.Path(
    __file__).parents[1].glob('configs/tiny_*.py'))
# A recurrence and a sparse attention; the others are traced with -m slow.
QUICK = ('tiny_dsa', 'tiny_kda')
HIGHEST = jax.lax.Precision.HIGHEST


def products(jaxpr):
  """Every product and convolution of a jaxpr and of those within."""
  for e in jaxpr.eqns:
    if e.primitive.name in ('dot_general', 'conv_general_dilated'):
      yield e
    for value in e.params.values():
      for sub in value if isinstance(value, (tuple, list)) else (value,):
        sub = getattr(sub, 'jaxpr', sub)
        if hasattr(sub, 'eqns'):
          yield from products(sub)


def careless(function, *args):
  """Returns the float32 products without the highest precision, and how many
  there are in all."""
  found = list(products(jax.make_jaxpr(function)(*args).jaxpr))
  return [str(e) for e in found
          if all(v.aval.dtype == jnp.float32 for v in e.invars)
          and e.params['precision'] not in (HIGHEST, (HIGHEST, HIGHEST))
          ], len(found)


def test_a_careless_product_is_seen():
  x = jnp.ones((2, 2))
  inside = jax.checkpoint(lambda x: jax.lax.scan(
      lambda c, _: (c @ x, None), x, length=2)[0].sum())
  bad, total = careless(jax.grad(inside), x)
  assert len(bad) == total > 1
  exact = lambda x: jnp.matmul(x, x, precision='highest').sum()
  assert careless(jax.grad(exact), x) == ([], 3)


@pytest.mark.parametrize('name', [
    pytest.param(n, marks=() if n in QUICK else pytest.mark.slow)
    for n in CONFIGS])
def test_model(name):
  """A step of several tokens with its gradient, and a step of one."""
  model = lm.LanguageModel(importlib.import_module(
      f'configs.{name}').get_config().model)
  params = jax.eval_shape(model.init, jax.random.key(0))
  state = jax.eval_shape(lambda: model.init_state(2, 24))

  def loss(params, state, tokens):
    logits, _ = model.step(params, state, tokens)
    return jnp.sum(logits)

  for run, steps in ((jax.grad(loss), 17), (loss, 1)):
    tokens = jax.ShapeDtypeStruct((2, steps), jnp.int32)
    bad, total = careless(run, params, state, tokens)
    assert not bad, bad[0]
    assert total
