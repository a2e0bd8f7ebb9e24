"""Each deliberate one-line mistake in the TPU kernels is caught, interpreted.

A mutant is a line of the source and what stands there instead. The check that
must catch it runs first on the sound kernels, once for all its mutants.
"""

import functools
import importlib
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'ops'))

from delta_rule_cases import (  # noqa: E402
  FAST,
  check,
  make,
  oracle,
  random_weights,
)

import pallas_kernels  # noqa: E402

# In the order in which each imports those before.
NAMES = ('chunk', 'inverse', 'adjoint', 'forward', 'plan', 'vjp')
MODULES = {n: f'delta_rule_tpu_{n}' for n in NAMES} | {'op': 'delta_rule_tpu'}
SOURCES = {
    n: pathlib.Path(importlib.import_module(f'pallas_kernels.{m}').__file__)
    .read_text() for n, m in MODULES.items()
}
HEAD, CHANNEL = 'head', 'channel'
LENGTH = 40


def build(monkeypatch, name, old, new):
  """Returns the op with one place of one module's source changed."""
  assert SOURCES[name].count(old) == 1, f'{name}: not there once: {old}'
  for each, module in MODULES.items():
    source = SOURCES[each]
    full = f'pallas_kernels.{module}'
    fresh = types.ModuleType(full)
    if each == name:
      source = source.replace(old, new)
    exec(compile(source, f'{each} with {new!r}', 'exec'), fresh.__dict__)
    monkeypatch.setitem(sys.modules, full, fresh)
    monkeypatch.setattr(pallas_kernels, module, fresh)
  return fresh.delta_rule


@functools.cache
def problem(kind, decay):
  """Arguments, and what the recurrence in float64 says of them."""
  args = make(
      decay, decay, HEAD, length=LENGTH, batch=2, key_heads=2, heads=4,
      width=8, values=6,
  )
  n_valid = np.array([LENGTH - 3, 0 if kind == 'padding' else 17], np.int32)
  segment_ids = np.zeros([2, LENGTH], np.int32)
  for row, at in enumerate(([5, 16, 33], [9, 15])):
    segment_ids[row, at] = 1
  segment_ids = segment_ids.cumsum(axis=1).astype(np.int32)
  if kind == 'keys':  # much alike, reflected, never forgotten
    n_valid[:], segment_ids[:] = LENGTH, 0
    k = args['k'] + 2 * args['k'][:, :1]
    args['k'] = k / np.linalg.norm(k, axis=-1, keepdims=True)
    args['log_decay'] = np.zeros_like(args['log_decay'])
    args['erase'] = np.full_like(args['erase'], 2)
    args |= {n: args[n].astype(jnp.bfloat16) for n in 'qkv'}
  if kind == 'padding':
    args['state'][1] = -0.0
  want = oracle(args, n_valid, segment_ids)
  return args, n_valid, segment_ids, want


def run(op, kind, decay):
  """Compares with the recurrence; gradients too where they are at stake."""
  args, n_valid, segment_ids, want = problem(kind, decay)
  resets = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
  weights = random_weights(args)

  def loss(args):
    out = op(
        **args, n_valid=n_valid, resets=resets, interpret=True,
        scale=args['q'].shape[-1] ** -0.5, heads_per_step=2,
        chunk_size=32 if kind == 'keys' else 16, backward_heads_per_step=2,
    )
    dots = [jnp.vdot(w, x.astype(w.dtype)) for w, x in zip(weights, out)]
    return sum(dots), out

  if kind == 'gradients':
    graded = jax.jit(
        jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)
    (_, out), grads = graded(args)
    check((out, grads), want, 2e-6, 1e-5)
    return
  _, out = jax.jit(loss, compiler_options=FAST)(args)
  check((out, {}), (want[0], {}), 2e-2 if kind == 'keys' else 2e-6)
  if kind == 'padding':
    assert np.asarray(out[1][1]).tobytes() == args['state'][1].tobytes()


@functools.cache
def sound(kind, decay):
  run(importlib.import_module('pallas_kernels.delta_rule_tpu').delta_rule,
      kind, decay)


MUTANTS = {
    # Layout.
    'reset one token late': (
        'values', HEAD, 'op', 'jnp.where(along(resets, log_decay)',
        'jnp.where(along(jnp.roll(resets, 1, 1), log_decay)'),
    'a row of padding passes through the kernel': (
        'padding', HEAD, 'op', 'n_valid[:, None, None, None] > 0, final, state',
        'n_valid[:, None, None, None] > -1, final, state'),
    'padding decays': (
        'values', CHANNEL, 'op', '  if valid is not None:\n      x =',
        '  if valid is not None and x is not log_decay:\n      x ='),
    # Forward.
    'state not loaded for the next heads': (
        'values', HEAD, 'forward', '@pl.when(step == 0)',
        '@pl.when((step == 0) & (pl.program_id(1) == 0))'),
    'last state in the block of other heads': (
        'values', HEAD, 'forward',
        '(1, plan.heads, width, values), lambda b, h, n: (b, h, 0, 0)',
        '(1, plan.heads, width, values), lambda b, h, n: (b, 0, 0, 0)'),
    'state carried without decay': (
        'values', CHANNEL, 'forward', 'states[h] * intra.decay.tot[n] + ',
        'states[h] + '),
    'diagonal of A missing': (
        'values', HEAD, 'chunk', 'jnp.where(i >= j, reading, 0.0)',
        'jnp.where(i > j, reading, 0.0)'),
    'tokens of a level taken for one another': (
        'values', CHANNEL, 'chunk', '& (i & b != 0)', '& (i & b == 0)'),
    'decay to the end of the wrong half': (
        'values', CHANNEL, 'chunk', 'suf = jnp.where(right, suf, here)',
        'suf = jnp.where(right, here, suf)'),
    'sum over lanes one too far': (
        'values', HEAD, 'chunk', 'jnp.where(lane < size - b, ahead',
        'jnp.where(lane <= size - b, ahead'),
    'sign in the inverse': (
        'values', HEAD, 'inverse', 'top = top - column', 'top = top + column'),
    'substitution ends a row early': (
        'values', CHANNEL, 'inverse', 'range(_BASE - 1)', 'range(_BASE - 2)'),
    'inverse by single products of bfloat16': (
        'keys', HEAD, 'inverse', 'return both[:m] + (both[m:] + low)',
        'return both[:m]'),
    # Backward.
    'gradient of the first state stopped': (
        'gradients', HEAD, 'vjp', 'return grads, d_state\n',
        'return grads, 0 * d_state\n'),
    'states before the chunks not kept': (
        'gradients', HEAD, 'forward', 'starts_ref[0, :, 0] = states[...]',
        'starts_ref[0, :, 0] = 0 * states[...]'),
    'backward runs forwards': (
        'gradients', HEAD, 'vjp', 'lambda n: count - 1 - n', 'lambda n: n'),
    'scale missing in d_q': (
        'gradients', HEAD, 'vjp', 'plan.scale * dy,', 'dy,'),
    'erase * d_e missing in d_k': (
        'gradients', CHANNEL, 'vjp', 'dk += x.erase * de', 'dk += 0 * de'),
    'd_L with the wrong sign': (
        'gradients', HEAD, 'vjp', '[dy, -d_u]', '[dy, d_u]'),
    'heads of a key head not summed': (
        'gradients', HEAD, 'vjp',
        'sums[key] = part if sums[key] is None else sums[key] + part',
        'sums[key] = part'),
    'gradient of the state carried without decay': (
        'gradients', CHANNEL, 'vjp', 'tot * d_states[h] +', 'd_states[h] +'),
    'gradient of the decay across a chunk missing': (
        'gradients', HEAD, 'adjoint', 'jnp.where(last, x, 0.0) for x in d_tot',
        'jnp.where(last, 0 * x, 0.0) for x in d_tot'),
    'decay of a token to itself has a gradient': (
        'gradients', HEAD, 'adjoint', '_suffix_sum(by_pair), pack, strict=True',
        '_suffix_sum(by_pair), pack, strict=False'),
    'gradient of the other half': (
        'gradients', CHANNEL, 'adjoint', 'd_tot = d_tot + chunk.swap(half, b)',
        'd_tot = d_tot + half'),
    'gradient added to the right half': (
        'gradients', CHANNEL, 'adjoint', 'd_suf, k * d_keys, b, 0)',
        'd_suf, k * d_keys, b, 1)'),
}
QUICK = ('reset one token late', 'state not loaded for the next heads')


@pytest.mark.parametrize('name', [
    n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
    for n in MUTANTS])
def test_caught(monkeypatch, name):
  kind, decay, *change = MUTANTS[name]
  sound(kind, decay)
  with pytest.raises(AssertionError):
    run(build(monkeypatch, *change), kind, decay)
