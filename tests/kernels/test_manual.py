"""The TPU kernels inside `jax.shard_map`, one row of two on each device."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'ops'))

from delta_rule_cases import check, jit, make, random_weights  # noqa: E402

from pallas_kernels import aot, delta_rule_step_tpu, delta_rule_tpu  # noqa: E402
from statejax.ops import delta_rule as op  # noqa: E402

SHARED = ('erase', 'state')
KERNELS = {
    1: delta_rule_step_tpu.delta_rule_step,
    16: functools.partial(delta_rule_tpu.delta_rule, chunk_size=16),
    20: functools.partial(delta_rule_tpu.delta_rule, chunk_size=16),
}


def problem(length, shared, heads=1):
  """Arguments of two rows; those in `shared` are the same for both."""
  args = make('head', length=length, batch=2, key_heads=1, heads=heads)
  args |= {n: args[n][:1] for n in shared}
  n_valid = np.array([length, 1], np.int32)
  weights = random_weights(make(length=length, heads=heads))
  return args, n_valid, weights


def graded(run, reduce, args, n_valid, weights):
  """(y, state), and the gradients of a weighted sum of both."""
  def loss(args):
    out = run(**args, n_valid=n_valid)
    dots = [jnp.vdot(w, x) for w, x in zip(weights, out)]
    return reduce(sum(dots)), out

  (_, out), grads = jax.value_and_grad(loss, has_aux=True)(args)
  return out, grads


def sharded(length, shared, mesh, *, check_vma=True, **options):
  run = functools.partial(KERNELS[length], scale=8 ** -0.5, **options)
  reduce = lambda x: jax.lax.psum(x, 'rows')
  specs = {n: P() if n in shared else P('rows') for n in make()}
  return jax.shard_map(
      functools.partial(graded, run, reduce if shared else lambda x: x),
      mesh=mesh, in_specs=(specs, P('rows'), P('rows')),
      out_specs=(P('rows'), specs), check_vma=check_vma)


def whole(args, n_valid, weights):
  """Without devices, in plain JAX."""
  def run(**args):
    args = {n: jnp.broadcast_to(x, (2, *x.shape[1:])) for n, x in args.items()
            if n != 'n_valid'}
    return op(**args, n_valid=n_valid, implementation='xla')
  return graded(run, lambda x: x, args, n_valid, weights)


def compare(length, shared, **options):
  mesh = jax.make_mesh((2,), ('rows',), axis_types=(AxisType.Auto,),
                       devices=jax.devices()[:2])
  args = problem(length, shared)
  got = jit(sharded(length, shared, mesh, **options))(*args)
  check(got, jit(whole)(*args), 1e-6, 2e-6)


@pytest.mark.parametrize('length', [1, 20])
def test_values_and_gradients(length):
  # The quick interpreter of kernels knows nothing of types that vary.
  compare(length, (), check_vma=False, interpret=True)


@pytest.mark.parametrize('length', [
    1, pytest.param(16, marks=pytest.mark.slow)])
def test_gradients_of_what_is_shared_are_summed(length):
  compare(length, SHARED, interpret=pltpu.InterpretParams())


@pytest.mark.parametrize('shared', [(), SHARED])
@pytest.mark.parametrize('length', [1, 20])
def test_it_is_lowered_as_it_is_by_default(length, shared):
  mesh = AbstractMesh((2,), ('rows',), axis_types=(AxisType.Auto,),
                      abstract_device=aot.abstract_device('TPU v5 lite'))
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                      problem(length, shared))
  lowered = jax.jit(sharded(length, shared, mesh)).trace(*args).lower(
      lowering_platforms=('tpu',))
  # One for the step, whose gradient is plain; else one each way.
  assert lowered.as_text().count('tpu_custom_call') == 1 + (length > 1)
