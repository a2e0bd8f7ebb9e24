"""Arguments, oracle and comparison for the tests of the delta rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from statejax.ops.delta_rule import delta_rule

DECAYS = ('head', 'channel')
# Most of the time here is compilation.
FAST = {'xla_backend_optimization_level': 0}
jit = functools.partial(jax.jit, compiler_options=FAST)


def make(
    decay='head', erase='head', write='head', *, length=21, batch=2,
    key_heads=2, heads=4, width=8, values=6, dtype='float32', seed=0,
):
  """Random arguments; K, V, HK and HV all differ."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.standard_normal(shape)

  def unit(*shape):
    x = normal(*shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  def gate(kind, channels):
    if isinstance(kind, int):
      return kind
    shape = (batch, length, heads)
    return normal(*shape if kind == 'head' else (*shape, channels))

  squash = lambda x: x if isinstance(x, int) else 1 / (1 + np.exp(-x))
  log_decay = gate(decay, width)
  if log_decay is not decay:
    log_decay = -np.log1p(np.exp(log_decay))
  args = dict(
      q=unit(batch, length, key_heads, width),
      k=unit(batch, length, key_heads, width),
      v=normal(batch, length, heads, values),
      log_decay=log_decay,
      erase=squash(gate(erase, width)),
      write=squash(gate(write, values)),
      state=normal(batch, heads, width, values),
  )
  return cast(args, dtype)


def cast(args, dtype):
  return {
      name: x if isinstance(x, int) else np.asarray(x, dtype)
      for name, x in args.items()
  }


def both(args, n_valid=None, segment_ids=None, weights=None, **options):
  """Returns (y, state) and the gradients of a weighted sum of both."""
  arrays = {n: x for n, x in args.items() if not isinstance(x, int)}
  static = tuple((n, x) for n, x in args.items() if isinstance(x, int))
  return _both(
      arrays, weights or random_weights(args), n_valid, segment_ids,
      static=static, options=tuple(options.items()),
  )


def random_weights(args):
  """Time is drawn first, so that a prefix of tokens has the same weights."""
  batch, length, *rest = args['v'].shape
  rng = np.random.default_rng(1)
  state = rng.standard_normal(args['state'].shape)
  y = rng.standard_normal((length, batch, *rest)).swapaxes(0, 1)
  return [x.astype(args['state'].dtype) for x in (y, state)]


@functools.partial(jit, static_argnames=('static', 'options'))
def _both(arrays, weights, n_valid, segment_ids, *, static, options):
  def loss(arrays):
    out = delta_rule(
        **arrays, **dict(static), n_valid=n_valid, segment_ids=segment_ids,
        **dict(options),
    )
    dots = [jnp.vdot(w, x.astype(w.dtype)) for w, x in zip(weights, out)]
    return sum(dots), out

  (_, out), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
  return out, grads


def oracle(args, n_valid=None, segment_ids=None, weights=None):
  """`both` of the recurrence in float64."""
  weights = weights and [np.asarray(x, np.float64) for x in weights]
  with x64():
    return jax.tree.map(np.asarray, both(
        cast(args, 'float64'), n_valid, segment_ids, weights,
        implementation='reference',
    ))


def x64():
  if hasattr(jax, 'enable_x64'):
    return jax.enable_x64(True)
  return jax.experimental.enable_x64()


def error(got, want):
  """Relative RMS; an exact zero must be met exactly."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  size = np.sqrt(np.mean(want ** 2)) if want.size else 0.0
  off = np.sqrt(np.mean((got - want) ** 2)) if want.size else 0.0
  return off / size if size else off


def check(got, want, values, gradients=None):
  """Compares outputs and gradients, naming the one that is off."""
  for name, a, b in zip(('y', 'state'), got[0], want[0], strict=True):
    assert error(a, b) <= values, (name, error(a, b))
  for name in want[1]:
    e = error(got[1][name], want[1][name])
    assert e <= (gradients or 5 * values), (f'd_{name}', e)


def tokens(args, low, high):
  """Some tokens of everything that has a time axis."""
  return {
      n: x if n == 'state' or isinstance(x, int) else x[:, low:high]
      for n, x in args.items()
  }
