"""The workplace of the laws: compiled steps, comparisons, the error raised."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from statejax import state as st


class LawError(AssertionError):
  """A law does not hold.

  Attributes:
    law: its name in `statejax.laws.LAWS`.
    leaf: path of the leaf, 'output', or what else was found wrong.
    row: the row, or None.
    step: first wrong time step, or None where time plays no part. For an
      output it counts the inputs that the law fed, for a leaf the tokens of
      the row.
    expected: value there.
    got: value there.
  """

  def __init__(self, law, leaf, *, row=None, step=None, expected=None,
               got=None, note=''):
    self.law, self.leaf, self.row, self.step = law, leaf, row, step
    self.expected, self.got = expected, got
    where = [leaf]
    where += [] if row is None else [f'row {row}']
    where += [] if step is None else [f'time step {step}']
    super().__init__(
        f'law {law!r} is broken: {", ".join(where)}: expected {expected}, got '
        f'{got}{"; " if note else ""}{note}.')


class Bench:
  """A subject with parameters, inputs, states, and few compiled programs.

  Compiling costs more than running here, so the laws share programs of two
  lengths, `steps` and 1, and pad what they feed.

  Attributes:
    rows: B; each row stands elsewhere in its document.
    steps: T of a chunk.
    capacity: tokens that a growing store of the states holds.
  """

  rows, steps, capacity = 3, 24, 48
  # Row 1 is fresh; the others are past a small window, in any phase.
  warm_lengths = np.array([7, 0, 13])

  def __init__(self, subject, key, tolerance):
    late = [p for p in getattr(subject, 'phases', ()) if p >= self.steps]
    if late:
      raise ValueError(
          f'subject: a law feeds {self.steps} tokens and would never see what '
          f'happens after {late[0]}; check it with a smaller window or chunk.')
    keys = jax.random.split(key, 5)
    draw = lambda key: np.asarray(
        subject.inputs(key, self.rows, self.steps))
    self.subject, self.tolerance = subject, tolerance
    self.law, self.worst = '', 0.0
    # The compiler would work longer on this than on the steps.
    self.params = jax.jit(lambda key: subject.init(key), **_quickly())(keys[0])
    self.inputs, self.others, self.before = map(draw, keys[1:4])
    self.random = np.random.default_rng(
        np.asarray(jax.random.key_data(keys[4])).tolist())
    declare = getattr(subject, 'state_schema', None)
    self.schema = (None if declare is None
                   else declare(self.rows, self.capacity))
    self.strides = {} if self.schema is None else {
        path: leaf.stride for path, leaf, _, _ in st.leaves(self.schema)}
    self.programs = {}

  @property
  def floats(self):
    """Whether inputs are floats, with gradients and NaN."""
    return jnp.issubdtype(self.inputs.dtype, jnp.floating)

  def fresh(self, capacity=None):
    """Returns an empty state."""
    return self.subject.init_state(self.rows, capacity or self.capacity)

  @functools.cached_property
  def warm(self):
    """A state whose rows have absorbed `warm_lengths` of `before`."""
    return self.run(self.fresh(), self.before, self.warm_lengths)[1]

  # Programs.

  def program(self, name, function, **options):
    """Returns `jit(function)` by name; every shape bears a name of its own."""
    if name not in self.programs:
      # A new function each time: jax caches traces by function, and what this
      # one calls may have been replaced since the last check.
      self.programs[name] = jax.jit(lambda *args: function(*args), **options)
    return self.programs[name]

  def run(self, state, inputs, n=None, segments=None, *, params=None):
    """Absorbs inputs [B, t, ...], t <= T, padded with zeros to T unless t = 1.

    Args:
      state: of any number of rows.
      inputs: numpy array.
      n: valid inputs per row, [B], or None for all t.
      segments: [B, t], or None.
      params: other ones than the subject's.

    Returns:
      outputs [B, t, ...] as numpy, and the state.
    """
    rows, t = inputs.shape[:2]
    length = 1 if t == 1 else self.steps
    name = (f'step of {rows} rows, T={length}, capacity={st.capacity(state)}, '
            f'borders={segments is not None}')
    n = np.full((rows,), t) if n is None else np.broadcast_to(n, (rows,))
    if segments is not None:
      segments = jnp.asarray(_pad(segments, length), jnp.int32)
    outputs, state = self.program(name, self.subject.step)(
        self.params if params is None else params, state,
        jnp.asarray(_pad(inputs, length)), jnp.asarray(n, jnp.int32), segments)
    return np.asarray(outputs)[:, :t], state

  def pull(self, state, d_outputs, d_state=None, *, params=None, inputs=None,
           n=None, segments=None):
    """Pulls cotangents back through one step of T tokens.

    Args:
      state: where the step starts.
      d_outputs: [B, T, ...].
      d_state: cotangents of `float_leaves`, or None for zeros.
      params, inputs, n, segments: of the step; defaults as in `run`.

    Returns:
      Cotangents of params, of the float leaves (by path), and of the inputs
      (None for tokens), as numpy.
    """
    if d_state is None:
      d_state = {p: np.zeros_like(x) for p, x in float_leaves(state).items()}
    n = np.broadcast_to(self.steps if n is None else n, (self.rows,))
    segments = np.zeros((self.rows, self.steps)) if (
        segments is None) else segments
    grads = self.program('gradient', self._pullback, **_quickly())(
        self.params if params is None else params, state,
        jnp.asarray(self.inputs if inputs is None else inputs),
        jnp.asarray(n, jnp.int32), jnp.asarray(segments, jnp.int32),
        jnp.asarray(d_outputs), d_state)
    return jax.tree.map(np.asarray, grads)

  def _pullback(self, params, state, inputs, n, segments, *cotangents):
    def function(params, leaves, inputs):
      outputs, new = self.subject.step(
          params, with_leaves(state, leaves), inputs, n, segments)
      return outputs, float_leaves(new)
    if self.floats:
      _, pull = jax.vjp(function, params, float_leaves(state), inputs)
      return pull(cotangents)
    _, pull = jax.vjp(lambda p, s: function(p, s, inputs), params,
                      float_leaves(state))
    return *pull(cotangents), None

  # Comparisons. Each raises `LawError` or notes the error it saw.

  def same_outputs(self, got, want, n=None, *, at=0, exact=False, rows=None,
                   note=''):
    """Compares the first n[b] outputs of each row.

    Args:
      got: [B, t, ...].
      want: [B, t, ...].
      n: [B] or one for all, or a [B, t] mask; None compares everything.
      at: time step of `got[:, 0]`, an int or [B], for the message.
      exact: compare bits, else up to the tolerance.
      rows: the rows compared; None for all.
      note: what was tried, for the message.
    """
    t = np.arange(got.shape[1])[None]
    n = np.asarray(got.shape[1] if n is None else n)
    real = n if n.ndim == 2 else t < np.broadcast_to(n, len(got))[:, None]
    at = np.broadcast_to(at, (len(got),))
    for row in range(len(got)) if rows is None else rows:
      bad = self._wrong(got[row][real[row]], want[row][real[row]], exact)
      if bad is not None:
        step = int(np.flatnonzero(real[row])[bad[0]])
        index = (row, step, *bad[1:])
        self.fail('output', row=row, step=step + int(at[row]),
                  expected=want[index], got=got[index], note=note)

  def same_state(self, got, want, *, exact=False, rows=None, note=''):
    """Compares two states of equal rows on their live prefixes."""
    rows = range(st.rows(want)) if rows is None else rows
    pairs = list(zip(st.leaves(host(got)), st.leaves(host(want))))
    for row in rows:
      lengths = [int(s.length[row]) for s in (got, want)]
      if lengths[0] != lengths[1]:
        self.fail('length', row=row, expected=lengths[1], got=lengths[0],
                  note=note)
      for (path, a, axes, kind), (_, b, _, _) in pairs:
        stride = self.strides.get(path, 1)
        a, b = (_live(x, axes, kind, row, lengths[0] // stride)
                for x in (a, b))
        bad = self._wrong(a, b, exact)
        if bad is not None:
          step = bad[0] * stride if kind == 'growing' else lengths[0]
          self.fail(path, row=row, step=step, expected=b[bad], got=a[bad],
                    note=note)

  def same_bits(self, got, want, *, rows=None, note=''):
    """Compares whole rows of two states, dead slots of the stores included."""
    rows = range(st.rows(want)) if rows is None else rows
    for (path, a, axes, _), (_, b, _, _) in zip(
        st.leaves(host(got)), st.leaves(host(want))):
      a, b = (np.moveaxis(x, axes.index('batch'), 0) for x in (a, b))
      for row in rows:
        bad = self._wrong(a[row], b[row], exact=True)
        if bad is not None:
          self.fail(path, row=row, step=int(want.length[row]),
                    expected=b[row][bad], got=a[row][bad], note=note)

  def fail(self, leaf, **facts):
    """Raises the error of the law that is running."""
    raise LawError(self.law, leaf, **facts)

  def _wrong(self, got, want, exact):
    """Returns the first wrong index, or None; notes the error otherwise."""
    if got.shape != want.shape or got.dtype != want.dtype:
      self.fail('shape', expected=(want.shape, want.dtype),
                got=(got.shape, got.dtype))
    if not got.size:
      return None
    if exact or want.dtype.kind in 'iub':
      bad = _bits(got) != _bits(want)
    else:
      got, want = got.astype(np.float64), want.astype(np.float64)
      error = np.abs(got - want) / max(1.0, np.max(np.abs(want)))
      bad = ~(error <= self.tolerance)
      if not bad.any():
        self.worst = max(self.worst, float(np.max(error)))
    if not bad.any():
      return None
    return tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))


# States, as the laws need them.


def host(state):
  """Returns the state with numpy leaves."""
  return st.map_leaves(lambda p, a, k, x: np.asarray(x), state)


def float_leaves(state):
  """Returns {path: leaf} of the leaves that have a gradient."""
  return {path: x for path, x, _, _ in st.leaves(state)
          if jnp.issubdtype(x.dtype, jnp.floating)}


def with_leaves(state, values):
  """Returns the state with some leaves replaced, by path."""
  return st.map_leaves(lambda p, a, k, x: values.get(p, x), state)


def fill(state, row, value):
  """Returns the state with all but the key and length of one row overwritten.

  Args:
    state: a state.
    row: the row.
    value: for float leaves; integer leaves become 77.
  """
  def one(path, axes, kind, x):
    if path in ('key', 'length'):
      return x
    x = np.array(x)
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    np.moveaxis(x, axes.index('batch'), 0)[row] = value if floats else 77
    return jnp.asarray(x)
  return st.map_leaves(one, state)


def negative_zeros(state):
  """Returns the state with every float zero made -0.0."""
  def one(path, axes, kind, x):
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.where(x == 0, -jnp.zeros((), x.dtype), x) if floats else x
  return st.map_leaves(one, state)


def poisoned(inputs, real, value):
  """Returns inputs with everything that is not real overwritten.

  Args:
    inputs: [B, T, ...].
    real: [B, T] bool.
    value: for float inputs; token ids become int(value), or -1 for NaN.
  """
  floats = jnp.issubdtype(inputs.dtype, jnp.floating)
  number = value if floats else (-1 if np.isnan(value) else int(value))
  mask = real.reshape(real.shape + (1,) * (inputs.ndim - 2))
  return np.where(mask, inputs, np.asarray(number).astype(inputs.dtype))


def gather(inputs, at, count):
  """Returns inputs `at[b] .. at[b] + count[b]` of each row, zero-padded."""
  # Two wide at least, so that `run` takes a short chunk for a chunk.
  width = max(2, int(np.max(count)))
  out = np.zeros((len(inputs), width, *inputs.shape[2:]), inputs.dtype)
  for row, (a, c) in enumerate(zip(at, count)):
    out[row, :c] = inputs[row, a:a + c]
  return out


def _quickly() -> dict[str, Any]:
  """Options of a program that runs a few times: compiled three times faster.

  Not for steps, whose bits are compared and which are what will be used.
  """
  if jax.default_backend() != 'cpu':
    return {}
  return {'compiler_options': {'xla_backend_optimization_level': 0}}


def _pad(x, length):
  width = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return np.pad(x, width)


def _live(x, axes, kind, row, slots):
  """One row of a leaf; of a store its first slots, slots in front."""
  x = np.take(x, row, axis=axes.index('batch'))
  if kind == 'fixed':
    return x
  rest = [a for a in axes if a != 'batch']
  return np.moveaxis(x, rest.index('capacity'), 0)[:slots]


def _bits(x):
  return np.ascontiguousarray(x).view(np.dtype(f'u{x.dtype.itemsize}'))
