"""The language model: one step function over one explicit state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from statejax import state as st
from statejax.config import ModelConfig
from statejax.layers import block, common, groups, hyper, weights
from statejax.ops import norm, witness


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A decoder as pure functions of (params, state, tokens).

  Training is a fresh state and T = sequence length; prefill is T = a chunk;
  decode is T = 1. It is the same `step`.

  Attributes:
    config: see `statejax.config.ModelConfig`.

  >>> from configs import tiny_kda
  >>> model = LanguageModel(tiny_kda.get_config().model)
  >>> params = model.init(jax.random.key(0))
  >>> state = model.init_state(rows=2, capacity=16)
  >>> logits, state = model.step(params, state, jnp.ones((2, 3), jnp.int32))
  >>> logits.shape, state.length.tolist()
  ((2, 3, 64), [3, 3])
  """

  config: ModelConfig

  def __post_init__(self):
    if not isinstance(self.config, ModelConfig):
      raise ValueError(
          f'config: expected a ModelConfig, got {type(self.config).__name__}; '
          'a file in configs/ holds it as get_config().model.')
    for name in self.config.names:
      mixer = self.config.layer(name).mixer
      block.lookup(block.MIXERS, mixer, name)
      own = getattr(mixer, 'summary', None)
      if own != self.config.summary:
        raise ValueError(
            f'layer {name!r}: expected a mixer with summary='
            f'{self.config.summary}, as the model has, got a '
            f'{type(mixer).__name__} with {own}; with summary tokens every '
            'mixer is a KSAConfig, without none is.')

  # Parameters.

  def init(self, key):
    """Returns float32 parameters, groups stacked over their repeats.

    Args:
      key: a typed key, `jax.random.key(seed)`.
    """
    return _initialise(self, key)

  def axes(self):
    """Returns the tree of logical axis names, one tuple per parameter."""
    names = jax.tree.map(lambda w: tuple(w.names), self._declared(),
                         is_leaf=_is_weight)
    for group in groups.named(self.config):
      names[group] = jax.tree.map(lambda n: ('layers', *n), names[group],
                                  is_leaf=lambda n: isinstance(n, tuple))
    return names

  def _declared(self):
    """Returns the tree of `weights.Weight`, one repeat of each group."""
    return jax.eval_shape(self._weights, jax.random.key(0))

  def _weights(self, key):
    c = self.config
    table = weights.normal(c.width ** -0.5)
    params: dict = {
        'embed': weights.declare(
            key, ('vocab', 'embed'), (c.vocab, c.width), table),
        'norm': weights.declare(
            key, ('embed',), (c.width,), weights.constant(1.0 - c.norm.offset))}
    if not c.tied:
      params['head'] = weights.declare(
          key, ('embed', 'vocab'), (c.width, c.vocab), table)
    if c.summary is not None:
      params['summary'] = weights.declare(
          key, ('entries', 'embed'), (c.summary.count, c.width), table)
    if c.streams is not None:
      params['streams'] = hyper.declare(key, c.streams, c.width)
    return params | groups.declare(c, key, lambda layer: layer_state(
        self._layer_specs(layer, 1, 1)))

  # State.

  def _layer_specs(self, name, rows, capacity):
    c = self.config
    mixer = c.layer(name).mixer
    return block.lookup(block.MIXERS, mixer, name).state(
        mixer, rows, capacity, c.store_dtype or c.dtype)

  def state_schema(self, rows: int, capacity: int, *, logits: bool = False,
                   spans: int = 0):
    """Returns a `ServingState` of `statejax.state.Leaf`.

    Args:
      rows: B.
      capacity: tokens a growing store can hold. 0 keeps no store: enough for
        one step from a fresh state, as in training.
      logits: whether the state carries the next-token logits.
      spans: how many spans of each row can be followed; see `statejax.forget`.
    """
    if rows < 1 or capacity < 0 or spans < 0:
      raise ValueError(f'state: expected rows >= 1, capacity >= 0 and spans >= '
                       f'0, got rows={rows}, capacity={capacity}, '
                       f'spans={spans}.')
    stacked = {}
    for name in sorted(set(self.config.names)):
      count = self.config.names.count(name)
      specs = self._layer_specs(name, rows, capacity)
      if spans and hasattr(specs, 'shadow'):
        specs = dataclasses.replace(specs, shadow=dataclasses.replace(
            specs.matrix, shape=(rows, spans, *specs.matrix.shape[1:])))
      stacked[name] = dataclasses.replace(specs, **{
          f.name: dataclasses.replace(
              s, shape=(count, *s.shape))
          for f in dataclasses.fields(specs)
          if (s := getattr(specs, f.name)) is not None})
    schema = st.describe(st.ServingState(
        layers=stacked,
        length=st.Spec((rows,), 'int32'),
        pending=st.Spec((rows,), 'int32'),
        witness=st.Spec((rows, 4), 'uint32'),
        key=st.Spec((rows, 2), 'uint32'),
        logits=(st.Spec((rows, self.config.vocab), 'float32')
                if logits else None),
        spans=st.Spec((rows, spans, 3), 'int32') if spans else None))
    growing = [(path, leaf.stride) for path, leaf, _, kind in st.leaves(schema)
               if kind == 'growing']
    return dataclasses.replace(
        schema, capacity=capacity if growing else None,
        strides=tuple((path, s) for path, s in growing if s > 1))

  def init_state(self, rows: int, capacity: int, *, key=None,
                 logits: bool = False, spans: int = 0):
    """Returns the empty `ServingState`; see `state_schema`.

    Args:
      rows: B.
      capacity: tokens a growing store can hold.
      key: typed key from which the rows' sampler keys are folded; None means
        `jax.random.key(0)`.
      logits: whether the state carries the next-token logits.
      spans: see `state_schema`.
    """
    state = st.allocate(self.state_schema(rows, capacity, logits=logits,
                                          spans=spans))
    key = jax.random.key(0, impl='threefry2x32') if key is None else key
    return st.rekey(state, key)

  # The step.

  def step(self, params, state, tokens, n_valid=None, segment_ids=None, *,
           keep: str = 'all'):
    """Absorbs up to T tokens per row and returns next-token logits.

    The given state stays usable, so its stores are copied; a loop that needs
    no old state jits this with `donate_argnames='state'`, as
    `statejax.generate.decode` does.

    Called with concrete arrays it checks values on the host (token range,
    capacity) and runs compiled. Inside `jax.jit` the same function is traced;
    there a token or `n_valid` out of range, or a step on a row that has
    outgrown its capacity, gives NaN logits in that row and touches no other.

    Args:
      params: from `init`; groups stacked, or unstacked (see `unstack`).
      state: `ServingState` of B rows.
      tokens: [B, T] int32, T >= 1.
      n_valid: [B] int32, the first n tokens of each row are real; None means
        all. A row with 0 is bit-identical before and after.
      segment_ids: [B, T] int32. A change between neighbours is a document
        border and resets everything carried. At t = 0 the row's document goes
        on: a border that falls between two calls is made by
        `statejax.state.clear`. A negative id marks padding, anywhere in the
        row. The state that comes back is that of the row's last document.
      keep: 'all' or 'last': logits of every token, or of the last real one.

    Returns:
      logits: [B, T, P] float32, or [B, 1, P]; zero at padding.
      state: `ServingState` of the same shapes.

    Raises:
      ValueError: bad shape, dtype, token id, capacity or state.
    """
    if keep not in ('all', 'last'):
      raise ValueError(f"keep: expected 'all' or 'last', got {keep!r}.")
    inputs = [x if x is None or isinstance(x, jax.Array) else np.asarray(x)
              for x in (tokens, n_valid, segment_ids)]
    self._check(params, state, *inputs)
    traced = any(isinstance(x, jax.core.Tracer)
                 for x in jax.tree.leaves((params, state, inputs)))
    if not traced:
      # Of the values as they came: a cast may wrap one into the range.
      self._check_values(state, *inputs)
    inputs = [x if x is None else jnp.asarray(x, jnp.int32) for x in inputs]
    run = apply if traced else _compiled
    return run(self, params, state, *inputs, keep=keep)

  def _check(self, params, state, tokens, n_valid, segment_ids):
    shape, dtype = np.shape(tokens), jnp.result_type(tokens)
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
      raise ValueError(f'tokens: expected [B, T] integers, got {shape} '
                       f'{dtype}.')
    if shape[1] < 1:
      raise ValueError('tokens: expected T >= 1, got T = 0; to leave a row '
                       'alone pass n_valid = 0.')
    if not isinstance(state, st.ServingState) or shape[0] != st.rows(state):
      have = (st.rows(state) if isinstance(state, st.ServingState)
              else type(state).__name__)
      raise ValueError(f'tokens: expected one row per row of the state '
                       f'({have}), got {shape[0]}.')
    for name, value, want in (('n_valid', n_valid, shape[:1]),
                              ('segment_ids', segment_ids, shape)):
      if value is not None and (
          np.shape(value) != want
          or not jnp.issubdtype(jnp.result_type(value), jnp.integer)):
        raise ValueError(f'{name}: expected {want} integers, got '
                         f'{np.shape(value)} {jnp.result_type(value)}.')
    self._check_carried(params, state)

  def _check_carried(self, params, state):
    """Raises unless params and state are this model's."""
    if not isinstance(state, st.ServingState):
      raise ValueError(f'state: expected a ServingState, got '
                       f'{type(state).__name__}; make one with init_state.')
    st.validate(state, self.state_schema(
        st.rows(state), st.capacity(state) or 0,
        logits=state.logits is not None, spans=st.spans(state)))
    want = _shapes(self)
    for layout in want:
      if jax.tree.structure(params) == layout.structure and (
          [np.shape(x) for x in jax.tree.leaves(params)] == layout.shapes):
        return
    raise ValueError(
        'params: expected the tree and the shapes of model.init(key), stacked '
        f'or unstacked, {len(want[0].shapes)} leaves; got '
        f'{len(jax.tree.leaves(params))} of another model. Load or initialise '
        'them with this config.')

  def _check_values(self, state, tokens, n_valid, segment_ids):
    tokens = np.asarray(tokens)
    rows, steps = tokens.shape
    n = np.full(rows, steps) if n_valid is None else np.asarray(n_valid)
    if ((n < 0) | (n > steps)).any():
      raise ValueError(f'n_valid: expected 0..{steps}, got {n.tolist()}.')
    real = np.arange(steps)[None] < n[:, None]
    if segment_ids is not None:
      real &= np.asarray(segment_ids) >= 0
    if segment_ids is not None and np.asarray(segment_ids).size and (
        np.abs(np.asarray(segment_ids).astype(np.float64)).max() >= 2 ** 31):
      raise ValueError('segment_ids: expected numbers that fit int32; number '
                       'the documents of a call from 0.')
    bad = real & ((tokens < 0) | (tokens >= self.config.vocab))
    if bad.any():
      row, t = np.argwhere(bad)[0]
      raise ValueError(f'tokens[{row}, {t}] = {tokens[row, t]}: expected '
                       f'0 <= token < vocab={self.config.vocab}.')
    room = st.capacity(state)
    if room is None:
      return
    length = np.asarray(state.length)
    # Without a store the one step from a fresh state is still exact.
    end = length if room == 0 else length + np.asarray(
        _last_document(real, segment_ids, length))
    if room and (length > room).any():
      row = int(np.argmax(length > room))
      raise ValueError(
          f'capacity: row {row} has absorbed {length[row]} tokens, its stores '
          f'have room for {room}; what did not fit is lost. Absorb the tokens '
          'again into a state with room.')
    if room == 0 and (end > 0).any():
      raise ValueError(
          'capacity: a state of capacity 0 keeps no store and takes one step '
          'only; allocate it with room to go on.')
    if (end > room).any():
      row = int(np.argmax(end > room))
      raise ValueError(
          f'capacity: row {row} would hold {end[row]} tokens, its stores have '
          f'room for {room}; use statejax.state.grow(state, {end[row]}) first.')

  # Parameter layout.

  def unstack(self, params):
    """Returns parameters with one subtree per layer instead of stacks.

    A step then reads every weight where it lies; on a CPU decoding is about
    three times faster. For accelerators and training keep the stacks.
    """
    out = dict(params)
    for name, group in groups.named(self.config).items():
      out[name] = {
          f'repeat_{r}': jax.tree.map(lambda x, r=r: x[r], params[name])
          for r in range(group.repeats)}
    return out

  def stack(self, params):
    """Undoes `unstack`; returns stacked parameters as they are."""
    out = dict(params)
    for name in groups.named(self.config):
      if 'repeat_0' in params[name]:
        repeats = [params[name][f'repeat_{r}']
                   for r in range(len(params[name]))]
        out[name] = jax.tree.map(lambda *xs: jnp.stack(xs), *repeats)
    return out


def layer_state(specs):
  """Returns the empty state of a single layer, stores as a layer sees them."""
  def one(path, axes, kind, spec):
    if kind == 'fixed':
      return jnp.zeros(spec.shape, spec.dtype)
    return st.Store(jnp.zeros((1, *spec.shape), spec.dtype), jnp.int32(0))
  return st.map_leaves(one, specs)


def _last_document(real, segment_ids, length):
  """Tokens by which each row's length grows, on the host; may be negative."""
  out = real.sum(axis=1)
  if segment_ids is None:
    return out
  for row, keep in enumerate(real):
    ids = np.asarray(segment_ids)[row][keep]
    borders = np.flatnonzero(ids[1:] != ids[:-1])
    if borders.size:
      out[row] = ids.size - (borders[-1] + 1) - length[row]
  return out


def apply(model, params, state, tokens, n_valid=None, segment_ids=None, *,
          keep='all'):
  """`LanguageModel.step` without host checks; pure and traceable."""
  return forward(model, params, state, tokens, n_valid, segment_ids,
                 keep=keep)[:2]


def forward(model, params, state, tokens, n_valid=None, segment_ids=None, *,
            keep='all', hints=None):
  """`apply` with the losses of layers that have one of their own.

  Args:
    model, params, state, tokens, n_valid, segment_ids, keep: as for `step`.
    hints: {name: [B, T] int32}, -1 for none, what layers with a loss of that
      name are to learn; see `statejax.layers.common.HINTS`.

  Returns:
    logits, state, and {layer: {name: total}} of float32 scalars, summed over
    layers and real tokens; see `statejax.layers.common.add_loss`.

  Raises:
    ValueError: hints that no layer knows, or of another shape or dtype.
  """
  c = model.config
  rows, steps = tokens.shape
  hints = common.checked_hints(hints, tokens.shape)
  n_valid = (jnp.full((rows,), steps, jnp.int32) if n_valid is None
             else jnp.asarray(n_valid, jnp.int32))
  # Under jit nobody has looked at the values: what is wrong becomes NaN.
  lost = (n_valid < 0) | (n_valid > steps)
  n_valid = jnp.clip(n_valid, 0, steps)
  document = back = None
  if segment_ids is not None:
    hints = {name: pack(hint, n_valid, segment_ids)[0]
             for name, hint in hints.items()}
    tokens, n_valid, document, back = pack(tokens, n_valid, segment_ids)
  context = dataclasses.replace(
      common.context(state.length, n_valid, document, steps), tokens=tokens,
      hints=hints)
  x = _embed(params['embed'], tokens, context.valid, c.dtype)
  if st.capacity(state) is not None:
    # A row that has outgrown its stores must not answer from a part of them.
    lost |= (state.length > st.capacity(state)) & (n_valid > 0)
  x = jnp.where(lost[:, None, None], jnp.asarray(jnp.nan, x.dtype), x)
  x, context = groups.enter(c, params, x, context)
  x, layers, losses = groups.run(c, params, x, state.layers, context)
  x = groups.leave(c, params, x, context)
  x = norm.rms_norm(x, params['norm'], eps=c.norm.eps, offset=c.norm.offset)
  x = jnp.where(context.valid[..., None], x, jnp.zeros((), x.dtype))
  # Of the two, XLA computes what is used.
  at = jnp.maximum(n_valid - 1, 0)[:, None, None]
  last = _head(params, jnp.take_along_axis(x, at, axis=1))
  x = x if back is None else jnp.take_along_axis(x, back[..., None], axis=1)
  logits = last if keep == 'last' else _head(params, x)
  new = dataclasses.replace(
      state, layers=layers, length=context.new_length,
      witness=witness.absorb(
          state.witness, tokens, n_valid,
          None if document is None else context.start),
      logits=None if state.logits is None else jnp.where(
          (n_valid > 0)[:, None], last[:, 0], state.logits),
      # A span ends with its document.
      spans=(state.spans if state.spans is None or document is None else
             jnp.where((context.start > 0)[:, None, None], -1, state.spans)))
  return logits, new, losses


@dataclasses.dataclass(frozen=True)
class _Layout:
  structure: object
  shapes: list


@functools.lru_cache(maxsize=64)
def _shapes(model):
  """The layouts in which a model takes its parameters."""
  stacked = jax.eval_shape(lambda: _initialise(model, jax.random.key(0)))
  return [_Layout(jax.tree.structure(tree),
                  [x.shape for x in jax.tree.leaves(tree)])
          for tree in (stacked, jax.eval_shape(model.unstack, stacked))]


_compiled = jax.jit(apply, static_argnums=0, static_argnames='keep')


@functools.partial(jax.jit, static_argnums=0)
def _initialise(model, key):
  leaves, tree = jax.tree.flatten(model._declared(), is_leaf=_is_weight)
  height = {name: (g.repeats,)
            for name, g in groups.named(model.config).items()}
  paths, _ = jax.tree.flatten_with_path(tree.unflatten(range(len(leaves))))
  stacked = [height.get(path[0].key, ()) for path, _ in paths]
  return tree.unflatten(weights.draw(key, leaves, stacked))


def _is_weight(x):
  return isinstance(x, weights.Weight)


def pack(tokens, n_valid, segment_ids):
  """Moves the real tokens of each row to its front.

  Returns:
    tokens, n_valid, document numbers [B, T], and for every place of the
    given row where its token went, [B, T].
  """
  steps = tokens.shape[1]
  index = jnp.arange(steps, dtype=jnp.int32)[None]
  segment_ids = jnp.asarray(segment_ids, jnp.int32)
  real = (index < n_valid[:, None]) & (segment_ids >= 0)
  order = jnp.argsort(~real, axis=1, stable=True)
  back = jnp.argsort(order, axis=1)
  tokens = jnp.take_along_axis(tokens, order, axis=1)
  ids = jnp.take_along_axis(segment_ids, order, axis=1)
  n_valid = jnp.sum(real, axis=1, dtype=jnp.int32)
  border = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
  border &= index < n_valid[:, None]
  return tokens, n_valid, jnp.cumsum(border, axis=1, dtype=jnp.int32), back


def _embed(table, tokens, valid, dtype):
  # Padding reads row 0; a bad id of a real token gives NaN, not a neighbour's
  # embedding. Negative ids would wrap, so they are sent past the end.
  ids = jnp.where(tokens < 0, table.shape[0], tokens)
  ids = jnp.where(valid, ids, 0)
  return table.at[ids].get(mode='fill', fill_value=jnp.nan).astype(dtype)


def _head(params, x):
  kernel = params['head'] if 'head' in params else params['embed'].T
  wide = (jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  return common.project(x, kernel, out_dtype=wide)
