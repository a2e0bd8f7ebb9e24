"""Each deliberate one-line mistake in the chunked form is caught by a check.

A mutant is a line of the source and what stands there instead. The check that
must catch it runs first on the sound code, once for all its mutants.
"""

import functools
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import FAST, cast, error, make, random_weights, x64

from statejax import ops
from statejax.ops import delta_chunk, delta_intra
from statejax.ops.delta_rule import delta_rule

# In the order in which each imports the one before.
MODULES = {
    'delta_intra': delta_intra, 'delta_chunk': delta_chunk,
    'delta_rule': sys.modules[delta_rule.__module__],
}
SOURCES = {
    name: pathlib.Path(module.__file__).read_text()
    for name, module in MODULES.items()
}


def build(monkeypatch, name, old, new):
  """Returns the op with one place of one module's source changed."""
  assert SOURCES[name].count(old) == 1, f'{name}: not there once: {old}'
  for each, module in MODULES.items():
    source = SOURCES[each]
    fresh = types.ModuleType(module.__name__)
    if each == name:
      source = source.replace(old, new)
    exec(compile(source, f'{each} with {new!r}', 'exec'), fresh.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, fresh)
    if each != 'delta_rule':  # there the package has the function
      monkeypatch.setattr(ops, each, fresh)
  return fresh.delta_rule


# Checks: each is given the op and compares it with the recurrence in float64.


def evaluate(op, args, weights, n_valid=None, segments=None, **options):
  """Returns y and state; given weights also the gradients of everything."""
  op = functools.partial(
      op, n_valid=n_valid, segment_ids=segments, scale=0.7, **options
  )

  def loss(args):
    out = op(**args)
    return sum(jnp.vdot(w, x) for w, x in zip(weights, out)), out

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(args):
    if weights is None:
      return dict(zip(('y', 'final'), op(**args)))
    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(args)
    return dict(y=out[0], final=out[1]) | {f'd_{n}': grads[n] for n in grads}

  return jax.tree.map(np.asarray, run(args))


@functools.cache
def problem(kind, decay):
  """Arguments, and what the recurrence in float64 says of them."""
  length = 16 if kind == 'keys' else 11
  args = make(
      decay, decay, 'head', length=length, batch=2, key_heads=1, heads=2,
      width=4, values=3,
  )
  n_valid = segments = None
  if kind == 'spikes':
    rng = np.random.default_rng(3)
    for low, share in ((-30, 0.3), (-300, 0.1), (-1000, 0.1)):
      spikes = rng.random(args['log_decay'].shape) < share
      args['log_decay'] = np.where(
          spikes, np.float32(low), args['log_decay']
      )
  elif kind == 'keys':
    args['k'] = np.broadcast_to(args['k'][:, :1], args['k'].shape)
    args['log_decay'] = np.zeros_like(args['log_decay'])
    args['erase'] = args['write'] = np.ones_like(args['write'])
    args['v'] = 100 * args['v']
  elif kind == 'packed':
    segments = np.array([[0] * 3 + [1] * 4 + [2] * 4] * 2, np.int32)
  elif kind == 'padding':
    n_valid = np.array([6, 0], np.int32)
    segments = np.array([[0] * 6 + [1] * 5] * 2, np.int32)
    args['state'][1] = -0.0
  weights = random_weights(args)
  with x64():
    want = evaluate(
        delta_rule, cast(args, 'float64'),
        [w.astype(np.float64) for w in weights], n_valid, segments,
        implementation='reference',
    )
  if kind == 'padding':
    padded = np.arange(length)[None] >= n_valid[:, None]
    args = {n: x if n == 'state' else np.where(
        padded.reshape(padded.shape + (1,) * (x.ndim - 2)),
        np.float32(np.nan), x) for n, x in args.items()}
  return args, weights, n_valid, segments, want


def against_recurrence(op, kind, decay):
  """Values within 2e-6, gradients within 1e-5, zeros exact."""
  args, weights, n_valid, segments, want = problem(kind, decay)
  size = 16 if kind == 'keys' else 4
  got = evaluate(
      op, args, weights if kind == 'gradients' else None, n_valid, segments,
      implementation='xla', chunk_size=size,
  )
  for name, x in got.items():
    limit = 1e-5 if name.startswith('d_') else 2e-6
    e = error(x, want[name])
    assert e <= limit, f'{name}: relative error {e:.1e}'
  if kind == 'padding':
    assert got['final'][1].tobytes() == args['state'][1].tobytes(), 'sign'


def isolation(op, kind, decay):
  """The loss sees the middle document: no gradient outside of it."""
  del kind
  args, (y, state), _, segments, _ = problem('packed', decay)
  inside = (segments == 1)[:, :, None, None]
  got = evaluate(
      op, args, [np.where(inside, y, 0), 0 * state], None, segments,
      implementation='xla', chunk_size=4,
  )
  assert not got['d_state'].any(), 'd_state'
  for name in ('d_q', 'd_k', 'd_v', 'd_log_decay', 'd_erase', 'd_write'):
    assert not np.delete(got[name], np.s_[3:7], axis=1).any(), name


def one_token(op, kind, decay):
  """The single step, from a first token on."""
  del kind
  args = make(decay, decay, length=1, key_heads=1, heads=2)
  got = op(**args, implementation='xla')
  want = delta_rule(**args, implementation='reference')
  for name, a, b in zip(('y', 'final'), got, want):
    assert error(a, b) <= 2e-6, name


CHECKS = {
    kind: against_recurrence
    for kind in ('values', 'gradients', 'spikes', 'keys', 'packed', 'padding')
} | {'isolation': isolation, 'one token': one_token}


@functools.cache
def sound(kind, decay):
  CHECKS[kind](delta_rule, kind, decay)


INTRA, CHUNK, OP = MODULES
HEAD, CHANNEL = 'head', 'channel'
DOUBLING = '''\
  power = -lower
  result = jnp.eye(lower.shape[-1])[None, None, None] + power
  for _ in range(lower.shape[-1].bit_length() - 2):
    power = dot('bhrij,bhrjk->bhrik', power, power)
    result += dot('bhrij,bhrjk->bhrik', result, power)
  return result
  size = 0'''

MUTANTS = {
    # The scan over chunks.
    'gradient of the first state stopped': (
        'gradients', HEAD, CHUNK, 'return grads, d_state, None, None',
        'return grads, 0 * d_state, None, None'),
    'first state ignored': (
        'values', HEAD, CHUNK, 'lax.scan(body, (state, y), jnp.ar',
        'lax.scan(body, (0 * state, y), jnp.ar'),
    'state after a chunk saved as that before': (
        'gradients', HEAD, CHUNK, 'return y, after, kept',
        'return y, after, kept._replace(state=after)'),
    'backward runs forwards': (
        'gradients', HEAD, CHUNK, 'reverse=True', 'reverse=False'),
    'tail dropped': (
        'values', CHANNEL, CHUNK, 'padding = -length % chunk_size',
        'padding = 0'),
    'state in bfloat16': (
        'values', HEAD, CHUNK, 'return (after, store(y',
        'after = after.astype(jnp.bfloat16).astype(state.dtype)\n'
        '    return (after, store(y'),
    'gate in bfloat16': (
        'values', CHANNEL, CHUNK, '  log_decay = x.log_decay\n',
        '  log_decay = x.log_decay.astype(jnp.bfloat16).astype(dtype)\n'),
    # One chunk.
    'state not decayed to its read': (
        'values', HEAD, CHUNK, 'join(x.q * intra.pre',
        'join(x.q * intra.pre ** 0'),
    'erase before decay': (
        'values', CHANNEL, CHUNK, 'x.e * intra.pre\n', 'x.e\n'),
    'state carried without decay': (
        'values', HEAD, CHUNK, 'after = intra.tot[..., None] * state',
        'after = state'),
    'keys not decayed to the end': (
        'values', CHANNEL, CHUNK, "x.k * intra.suf, residual", 'x.k, residual'),
    'write forgotten': (
        'gradients', HEAD, CHUNK, 'd_v = x.write * d_u', 'd_v = d_u'),
    'scale missing in d_q': (
        'gradients', HEAD, CHUNK, 'q=grads.q * scale', 'q=grads.q'),
    'erase * d_e missing in d_k': (
        'gradients', HEAD, CHUNK, 'd_k += sum_groups(x.erase * d_e)', 'pass'),
    'd_L with the wrong sign': (
        'gradients', HEAD, CHUNK, 'd_erased = -d_u', 'd_erased = d_u'),
    'd_tot without the state, one decay': (
        'gradients', HEAD, CHUNK, "'bhrkv,bhrkv->bhr', state",
        "'bhrkv,bhrkv->bhr', 0 * state"),
    'd_tot without the state, many decays': (
        'gradients', CHANNEL, CHUNK, "'bhrkv,bhrkv->bhrk', state",
        "'bhrkv,bhrkv->bhrk', 0 * state"),
    # Pairs and the inverse.
    'value heads of a key head not summed': (
        'gradients', HEAD, INTRA,
        'return functools.reduce(operator.add, parts)',
        'return parts[0]'),
    'token does not read itself': (
        'values', HEAD, INTRA, '(decay * inclusive)', '(decay * strict)'),
    'keys not decayed to their erasing': (
        'values', HEAD, INTRA, '1:] * (decay * strict)', '1:] * strict'),
    'inverse stops a level early': (
        'values', HEAD, INTRA, '  while b < size:', '  while b < size // 2:'),
    'inverse multiplies the wrong way': (
        'values', HEAD, INTRA, "dot('bhrij,bhrjk->bhrik', left, result)",
        "dot('bhrij,bhrjk->bhrik', result, left)"),
    'inverse by doubling': (
        'keys', HEAD, INTRA, '  size = lower.shape[-1]', DOUBLING),
    'decay to the end off by one': (
        'values', HEAD, INTRA, "'bhrt,tj->bhrj', g, strict",
        "'bhrt,tj->bhrj', g, inclusive"),
    'decays factored': (
        'spikes', HEAD, INTRA,
        "jnp.exp(dot('bhrit,tj->bhrij', to_token, strict[0, 0, 0]))",
        "jnp.exp(s := jnp.sum(to_token, -1))[..., None] "
        '* jnp.exp(-s)[..., None, :]'),
    'decays from differences of sums': (
        'spikes', HEAD, INTRA,
        "jnp.exp(dot('bhrit,tj->bhrij', to_token, strict[0, 0, 0]))",
        "jnp.exp(jnp.minimum((s := jnp.sum(to_token, -1))[..., None] "
        '- s[..., None, :], 0))'),
    'gate clipped': (
        'isolation', HEAD, INTRA, '_NO_MEMORY = -1e4', '_NO_MEMORY = -20.0'),
    'd_g by an exclusive sum': (
        'gradients', HEAD, INTRA, 'spans * inclusive, ones',
        'spans * strict, ones'),
    'decay across the chunk without gradient': (
        'gradients', HEAD, INTRA, '  d_g += d_tot\n', ''),
    # The tree.
    'tree forgets the left half': (
        'values', CHANNEL, INTRA, 'pre_right * tot_left]', 'pre_right]'),
    'tree takes the wrong half for the total': (
        'values', CHANNEL, INTRA, 'tot = tot_left * tot_right',
        'tot = tot_left * tot_left'),
    'tree exchanges left and right keys': (
        'values', CHANNEL, INTRA, '_halves(k)[0] * suf_left',
        '_halves(k)[1] * suf_left'),
    'decays multiplied up and divided': (
        'spikes', CHANNEL, INTRA, 'keys = _halves(k)[0] * suf_left',
        'keys = _halves(k)[0] * tot_left / pre_left'),
    'adjoint of the tree skips a level': (
        'gradients', CHANNEL, INTRA, '_lower(d_pre) + d_level)',
        '_lower(d_pre))'),
    'adjoint of the totals from the wrong half': (
        'gradients', CHANNEL, INTRA, 'jnp.sum(_lower(d_pre)',
        'jnp.sum(_upper(d_pre)'),
    'tree starts without the diagonal': (
        'values', CHANNEL, INTRA, 'reading = jnp.broadcast_to(sum_last(x.q * x',
        'reading = jnp.broadcast_to(0 * sum_last(x.q * x'),
    # Documents and padding.
    'memory fades at a border': (
        'packed', CHANNEL, CHUNK, 'jnp.asarray(-jnp.inf, dtype)',
        'jnp.asarray(-5.0, dtype)'),
    'memory emptied one token late': (
        'packed', HEAD, OP, 'jnp.pad(changes, [(0, 0), (1, 0)])',
        'jnp.pad(changes, [(0, 0), (2, 0)])[:, :-1]'),
    'padding is read': (
        'padding', HEAD, CHUNK, 'x = jnp.where(valid[:, :, None, None], x, '
        'jnp.zeros((), dtype))', 'pass'),
    'padding empties the memory': (
        'padding', HEAD, CHUNK, 'reset = reset & valid', 'pass'),
    'rows without tokens are multiplied by one': (
        'padding', HEAD, CHUNK, '> 0, final, state)', '> 0, final, final)'),
    # The single step.
    'step does not read what it wrote': (
        'one token', HEAD, OP, 'y = recalled[:, :, 0] + attention * residual',
        'y = recalled[:, :, 0]'),
    'step carries without decay': (
        'one token', CHANNEL, OP, 'after = decay[..., None] * state + x.k',
        'after = state + x.k'),
}


# What the others cover as well, and takes the longest.
SLOW = ('gate clipped', 'd_tot without the state, one decay',
        'd_tot without the state, many decays')


@pytest.mark.parametrize('name', [
    pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n
    for n in MUTANTS])
def test_caught(monkeypatch, name):
  kind, decay, *change = MUTANTS[name]
  sound(kind, decay)
  mutant = build(monkeypatch, *change)
  with pytest.raises(AssertionError) as caught:
    CHECKS[kind](mutant, kind, decay)
  assert caught.traceback[-1].name in ('against_recurrence', 'isolation',
                                       'one_token')
