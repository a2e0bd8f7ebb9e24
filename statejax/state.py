"""The carried state: declared leaves, and everything done to rows of it.

A state is a pytree of frozen dataclasses. Each field of a state class declares
its axis names and its kind once, by `leaf`:

  growing  append-only store over the positions of a row; slots at and past
           `length` mean nothing, so rewinding is setting `length`.
  fixed    rewritten as a whole (delta matrices, convolution tails, rings);
           rewinding needs a copy.

The functions below walk these declarations. No mixer repeats them.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ('fixed', 'growing')

# A leaf of a state class: a jax.Array, or what describes one (`Spec`, `Leaf`, a
# sharding), as schemas are states too.
Array = Any


@dataclasses.dataclass(frozen=True)
class Leaf:
  """Schema of one leaf; itself a leaf of the schema tree.

  Attributes:
    axes: logical axis names, one per dimension.
    shape: dimensions.
    dtype: numpy dtype.
    kind: 'growing' or 'fixed'.
    stride: tokens per slot along `capacity`; 1 for token stores.
  """

  axes: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: np.dtype
  kind: str
  stride: int = 1

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  def __str__(self):
    dims = ', '.join(f'{a}={n}' for a, n in zip(self.axes, self.shape))
    return f'[{dims}] {self.dtype}'


@dataclasses.dataclass(frozen=True)
class Spec:
  """Shape, dtype and stride of a leaf, as a mixer's config decides them."""

  shape: tuple[int, ...]
  dtype: str
  stride: int = 1


def leaf(axes: str, kind: str = 'fixed', fill=0, **field):
  """Declares a field of a state class.

  Args:
    axes: logical axis names without the layer axis, 'batch heads key value'.
      Exactly one is `batch`; a growing leaf has `capacity` too.
    kind: 'growing' or 'fixed'.
    fill: value of an empty leaf.
    **field: of `dataclasses.field`, where not every state has the leaf.
  """
  names = tuple(axes.split())
  if kind not in KINDS or 'batch' not in names:
    raise ValueError(
        f'leaf({axes!r}, {kind!r}): expected a batch axis and a kind of '
        f'{KINDS}.')
  if (kind == 'growing') != ('capacity' in names):
    raise ValueError(f'leaf({axes!r}): growing leaves have a capacity axis, '
                     'fixed ones have none.')
  return dataclasses.field(
      metadata={'axes': names, 'kind': kind, 'fill': fill}, **field)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ServingState:
  """Everything a model carries from one step to the next.

  Attributes:
    layers: layer name -> state of that kind, leaves stacked [layers, ...].
    length: tokens absorbed since the start of the row's document, [B] int32.
    pending: sampled but not yet absorbed token, -1 for none, [B] int32.
    witness: rolling hash of the absorbed tokens, [B, 4] uint32; see
      `statejax.ops.witness`.
    key: the row's sampler key data, [B, 2] uint32; the draw at position p
      depends on the key and p alone.
    logits: next-token logits after the last absorbed token, [B, P] float32,
      or None where not asked for.
    spans: first position, position behind the last, and tokens of each span
      that the layers' `shadow` leaves follow, -1 where they follow none,
      [B, R, 3] int32, or None; see `statejax.forget`.
    capacity: tokens that the growing leaves hold, None where there are none;
      static.
    strides: (path, s) of the growing leaves that have a slot for every s > 1
      tokens; static.
  """

  layers: dict
  length: Array = leaf('batch')
  pending: Array = leaf('batch', fill=-1)
  witness: Array = leaf('batch lanes')
  key: Array = leaf('batch words')
  logits: Array | None = leaf('batch vocab')
  spans: Array | None = leaf('batch spans words', fill=-1, default=None)
  capacity: int | None = dataclasses.field(
      default=None, metadata=dict(static=True))
  strides: tuple[tuple[str, int], ...] = dataclasses.field(
      default=(), metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Store:
  """What a layer sees of a growing leaf: the stacked array and its own index.

  Reading and appending address `data[layer]` directly, so that a step over a
  long store copies the rows it touches and not the store.

  Attributes:
    data: [layers, B, ...capacity...], the leaf of `ServingState`.
    layer: index into the first axis, int32 scalar.
  """

  data: jax.Array
  layer: jax.Array

  def read(self):
    """Returns this layer's [B, ...] slice."""
    return jax.lax.dynamic_index_in_dim(self.data, self.layer, keepdims=False)


def _declared(tree, path=(), stacked=False) -> Iterator[
    tuple[tuple[str, ...], Any, dict[str, Any]]]:
  """Yields (path, value, metadata) of every declared leaf of a state."""
  if isinstance(tree, dict):
    for name in sorted(tree):
      yield from _declared(tree[name], (*path, name), stacked)
    return
  for field in dataclasses.fields(tree):
    value = getattr(tree, field.name)
    where = (*path, field.name)
    if value is None or field.metadata.get('static'):
      continue
    if 'axes' in field.metadata:
      yield where, value, {**field.metadata, 'stacked': stacked}
    else:
      yield from _declared(value, where, stacked or field.name == 'layers')


def leaves(state):
  """Yields (path, value, axes, kind) of every leaf, paths like `layers/kda/s`.

  Works on states, on schemas and on trees of `Spec`.
  """
  for path, value, meta in _declared(state):
    axes = ('layers', *meta['axes']) if meta['stacked'] else meta['axes']
    yield '/'.join(path), value, axes, meta['kind']


def map_leaves(function, state, *others):
  """Maps `function(path, axes, kind, value, *others)` over the leaves."""
  rest = [iter(list(leaves(other))) for other in others]
  values = []
  for path, value, axes, kind in leaves(state):
    more = [next(r) for r in rest]
    values.append(function(path, axes, kind, value, *(m[1] for m in more)))
  return _rebuild(state, iter(values))


def _rebuild(tree, values) -> Any:
  if isinstance(tree, dict):
    return {name: _rebuild(tree[name], values) for name in sorted(tree)}
  changes = {}
  for field in dataclasses.fields(tree):
    value = getattr(tree, field.name)
    if value is None or field.metadata.get('static'):
      continue
    changes[field.name] = (
        next(values) if 'axes' in field.metadata else _rebuild(value, values))
  return dataclasses.replace(tree, **changes)


def describe(specs):
  """Turns a tree of `Spec` into a schema: the same tree of `Leaf`."""
  def one(path, axes, kind, spec):
    if len(spec.shape) != len(axes):
      raise ValueError(f'{path}: axes {axes} do not name shape {spec.shape}.')
    return Leaf(axes, tuple(spec.shape), np.dtype(jnp.dtype(spec.dtype)), kind,
                spec.stride)
  return map_leaves(one, specs)


def allocate(schema):
  """Returns the empty state of a schema; every leaf is memory of its own."""
  fills = [meta['fill'] for _, _, meta in _declared(schema)]
  values = (jnp.full(spec.shape, fill, spec.dtype)
            for (_, spec, _, _), fill in zip(leaves(schema), fills))
  return _rebuild(schema, values)


def abstract(schema):
  """Returns the tree of `jax.ShapeDtypeStruct` of a schema."""
  return map_leaves(
      lambda p, a, k, s: jax.ShapeDtypeStruct(s.shape, s.dtype), schema)


def rows(state) -> int:
  """Number of rows B."""
  return state.length.shape[0]


def capacity(state):
  """Tokens that the growing leaves hold, or None where there are none."""
  return state.capacity


def spans(state) -> int:
  """Number R of spans that each row of the state can follow."""
  return 0 if state.spans is None else state.spans.shape[1]


def _indices(state, index):
  index = np.atleast_1d(np.asarray(index))
  if index.dtype.kind not in 'iu':
    raise ValueError(f'rows: expected integers, got {index.dtype}.')
  bad = index[(index < 0) | (index >= rows(state))]
  if bad.size:
    raise ValueError(
        f'rows: {bad.tolist()} not among the {rows(state)} rows of the state.')
  return index


def take(state, index):
  """Returns a state of the rows `index` (an int or a list), in that order."""
  index = _indices(state, index)
  return map_leaves(
      lambda p, axes, k, x: jnp.take(x, index, axis=axes.index('batch')), state)


def fork(state, row: int, copies: int):
  """Returns a state of `copies` copies of one row, free to diverge.

  They share the sampler key, hence the draws, until `rekey`.
  """
  if np.ndim(row) or copies < 1:
    raise ValueError(f'fork: expected one row and copies >= 1, got row={row}, '
                     f'copies={copies}; take() copies several rows.')
  return take(state, np.full((copies,), row))


def rekey(state, key):
  """Returns `state` with new sampler keys, one per row.

  Copies of a row draw alike until they are given keys of their own. A pending
  token is already drawn and stays.

  Args:
    state: any state.
    key: typed threefry key, `jax.random.key(seed)`.
  """
  return dataclasses.replace(state, key=sampler_keys(key, rows(state)))


def sampler_keys(key, count: int):
  """Returns `count` sampler keys folded from one, [count, 2] uint32."""
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
  data = jax.random.key_data(keys)
  if data.shape != (count, 2):
    raise ValueError("key: expected a key of jax.random.key(seed, "
                     f"impl='threefry2x32'), got one of {key.dtype}.")
  return data


def put(state, index, other):
  """Returns `state` with the rows `index` replaced by the rows of `other`.

  Raises:
    ValueError: `other` is of another config or capacity, or a row is named
      twice.
  """
  index = _indices(state, index)
  if len(set(index.tolist())) != len(index) or len(index) != rows(other):
    raise ValueError(
        f'put: expected {rows(other)} distinct rows, got {index.tolist()}.')
  _match(state, other, 'put')
  def one(path, axes, kind, x, y):
    at = (slice(None),) * axes.index('batch') + (index,)
    return x.at[at].set(y)
  return map_leaves(one, state, other)


def concat(states):
  """Returns one state with the rows of all `states`, in order."""
  first, *rest = states
  for other in rest:
    _match(first, other, 'concat')
  return map_leaves(
      lambda p, axes, k, *xs: jnp.concatenate(xs, axis=axes.index('batch')),
      first, *rest)


def clear(state, index):
  """Returns `state` with the rows `index` fresh, whatever they held.

  Rows are replaced, not scaled, so a NaN in an old row does not survive. The
  sampler key stays: it belongs to the row, not to what the row has seen.
  """
  index = _indices(state, index)
  fills = iter([meta['fill'] for _, _, meta in _declared(state)])
  def one(path, axes, kind, x):
    fill = next(fills)
    at = (slice(None),) * axes.index('batch') + (index,)
    return x if path == 'key' else x.at[at].set(fill)
  return map_leaves(one, state)


def grow(state, new: int):
  """Returns `state` with room for `new` tokens; contents keep their slots.

  Args:
    state: any state.
    new: capacity in tokens, at least the present one.
  """
  strides = dict(state.strides)
  _refuse_lost(state)
  def one(path, axes, kind, x):
    if kind == 'fixed':
      return x
    axis = axes.index('capacity')
    slots = -(-new // strides.get(path, 1))
    if slots < x.shape[axis]:
      raise ValueError(f'grow: {path} has capacity {x.shape[axis]}, asked for '
                       f'{slots}; a store never shrinks.')
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, slots - x.shape[axis])
    return jnp.pad(x, pad)
  grown = map_leaves(one, state)
  return grown if state.capacity is None else dataclasses.replace(
      grown, capacity=new)


def _refuse_lost(state):
  """Raises where a row has absorbed more tokens than its stores could hold."""
  longest = int(np.max(np.asarray(state.length), initial=0))
  if state.capacity is not None and longest > state.capacity:
    raise ValueError(
        f'state: a row has absorbed {longest} tokens, its stores have room for '
        f'{state.capacity}; what did not fit is lost. Absorb the tokens again '
        'into a state with room.')


def rewind(state, length, witness):
  """Returns `state` with each row set back to `length` tokens.

  For states whose layers all have growing leaves; others need a `snapshot`.
  Rows that move lose their pending token, and their logits become NaN.

  Args:
    state: a state without fixed layer leaves.
    length: [B] or int, at most the present length.
    witness: of the shorter history, [B, 4] uint32: from a `snapshot`, or
      `statejax.ops.witness.absorb` over the token log.

  Raises:
    ValueError: fixed layer leaves, or a length larger than the present one,
      or negative.
  """
  for path, _, _, kind in leaves(state):
    if kind == 'fixed' and path.startswith('layers/'):
      raise ValueError(f'rewind: {path} is fixed and cannot be set back by '
                       'length; keep a snapshot and use restore_fixed.')
  old = np.asarray(state.length)
  new = np.broadcast_to(np.asarray(length, np.int32), old.shape)
  if (new > old).any() or (new < 0).any():
    raise ValueError(f'rewind: expected lengths in 0..{old.tolist()}, got '
                     f'{new.tolist()}.')
  moved = jnp.asarray(new < old)
  return dataclasses.replace(
      state, length=jnp.asarray(new),
      pending=jnp.where(moved, -1, state.pending),
      witness=jnp.where(moved[:, None], jnp.asarray(witness, jnp.uint32),
                        state.witness),
      logits=None if state.logits is None else jnp.where(
          moved[:, None], jnp.nan, state.logits))


def restore_fixed(state, snapshot):
  """Returns `state` rewound to `snapshot`: its fixed leaves and length.

  The growing leaves stay where they are, so a snapshot needs no copy of them:
  this is how rejected draft tokens leave no trace (law L6). A row whose logits
  became NaN has NaN in its stores: clear it, rewinding is not enough (it would
  go on to give NaN, though never a wrong number).

  Raises:
    ValueError: the snapshot is of another number of rows or another config, or
      no earlier one of these rows: it has absorbed more than they have.
  """
  if rows(state) != rows(snapshot):
    raise ValueError(f'restore_fixed: expected a snapshot of {rows(state)} '
                     f'rows, got {rows(snapshot)}; take the same rows of both.')
  _match(state, snapshot, 'restore_fixed', but=('batch', 'capacity'))
  _earlier(state, snapshot)
  return map_leaves(
      lambda p, a, kind, x, y: x if kind == 'growing' else y, state, snapshot)


def _earlier(state, snapshot):
  """Raises where the stores cannot hold what a snapshot goes on from."""
  traced = [isinstance(x.length, jax.core.Tracer) for x in (state, snapshot)]
  if state.capacity is None or any(traced):
    return
  now, then = np.asarray(state.length), np.asarray(snapshot.length)
  if (then > now).any():
    row = int(np.argmax(then > now))
    raise ValueError(
        f'restore_fixed: row {row}: expected an earlier snapshot of its '
        f'{now[row]} tokens, got one of {then[row]}; take that of this row.')


def snapshot(state):
  """Returns `state` with its growing leaves emptied, to rewind to later."""
  def one(path, axes, kind, x):
    if kind == 'fixed':
      return jnp.copy(x)  # the step after this may donate the original
    return jax.lax.slice_in_dim(x, 0, 0, axis=axes.index('capacity'))
  return map_leaves(one, state)


def nbytes(state) -> dict[str, int]:
  """Returns bytes per kind, `{'fixed': .., 'growing': ..}`.

  Works on states, schemas and abstract states: nothing is allocated.
  """
  total: dict[str, int] = {'fixed': 0, 'growing': 0}
  for _, value, _, kind in leaves(state):
    size = int(np.prod(value.shape, dtype=np.int64))
    total[kind] += size * np.dtype(value.dtype).itemsize
  return total


def live(state, row: int):
  """Returns one row as numpy arrays, batch axis dropped, live prefix only.

  What an artifact stores: slots past `length` are not part of a state.

  Raises:
    ValueError: no such row, or one that outgrew its stores.
  """
  # Indexing an array would take the nearest row instead.
  [row] = _indices(state, row).tolist()
  length = int(state.length[row])
  _refuse_lost(state)
  strides = dict(state.strides)
  def one(path, axes, kind, x):
    batch = axes.index('batch')
    # As an array, so that not every row is a program.
    x = jax.lax.dynamic_index_in_dim(x, np.int32(row), batch)
    if kind == 'fixed':
      return np.squeeze(np.asarray(x), batch)
    axis, slots = axes.index('capacity'), length // strides.get(path, 1)
    # On the device by powers of two, so that not every length is a program.
    x = jax.lax.slice_in_dim(x, 0, min(
        x.shape[axis], 1 << max(0, slots - 1).bit_length()), axis=axis)
    part = (slice(None),) * axis + (slice(0, slots),)
    return np.squeeze(np.asarray(x)[part], batch)
  return map_leaves(one, state)


@dataclasses.dataclass(frozen=True)
class Difference:
  """First difference of two states: row, leaf, index, and both values."""

  row: int
  path: str
  index: tuple[int, ...]
  left: float
  right: float

  def __str__(self):
    return (f'row {self.row}: {self.path}{list(self.index)} is {self.left} '
            f'on the left and {self.right} on the right')


def diff(left, right, *, tolerance: float = 0.0):
  """Returns the first `Difference` of two states, or None.

  Rows are compared on their live prefix, so capacity does not matter.

  Args:
    left: a state.
    right: a state of the same config and number of rows.
    tolerance: largest accepted |a - b| / max(1, max |b|) of a float leaf;
      0 compares bits.
  """
  if rows(left) != rows(right):
    raise ValueError(f'diff: {rows(left)} rows against {rows(right)}.')
  for row in range(rows(left)):
    if int(left.length[row]) != int(right.length[row]):
      return Difference(row, 'length', (), int(left.length[row]),
                        int(right.length[row]))
    pair = (leaves(live(state, row)) for state in (left, right))
    for (path, a, _, _), (_, b, _, _) in zip(*pair):
      at = _first_difference(a, b, tolerance)
      if at is not None:
        return Difference(row, path, at, a[at].item(), b[at].item())
  return None


def _first_difference(a, b, tolerance):
  if a.shape != b.shape or a.dtype != b.dtype:
    raise ValueError(f'diff: {a.shape} {a.dtype} against {b.shape} {b.dtype}; '
                     'these states are of two configs.')
  if not a.size:
    return None
  if tolerance and a.dtype.kind not in 'iub':
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = max(1.0, float(np.max(np.abs(b))))
    bad = ~(np.abs(a - b) <= tolerance * scale)
  else:
    raw = np.dtype(f'u{a.dtype.itemsize}')
    bad = np.ascontiguousarray(a).view(raw) != np.ascontiguousarray(b).view(raw)
  if not bad.any():
    return None
  return tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))


def _match(left, right, what, but=('batch',)):
  """Raises unless both have the same leaves, whatever the sizes of `but`."""
  def facts(tree):
    return {path: (tuple(n for n, a in zip(x.shape, axes) if a not in but),
                   np.dtype(x.dtype), axes)
            for path, x, axes, _ in leaves(tree)}
  mine, theirs = facts(left), facts(right)
  for path in sorted(mine.keys() | theirs.keys()):
    if mine.get(path) == theirs.get(path):
      continue
    show = lambda f: 'nothing' if f is None else '[' + ', '.join(
        f'{a}={n}' for a, n in zip([a for a in f[2] if a not in but], f[0])
    ) + f'] {f[1]}'
    raise ValueError(
        f'{what}: {path}: expected {show(mine.get(path))}, got '
        f'{show(theirs.get(path))}; both states must come from one config and '
        'capacity (see statejax.state.grow).')
  if 'capacity' not in but and left.capacity != right.capacity:
    raise ValueError(f'{what}: expected capacity {left.capacity}, got '
                     f'{right.capacity}; see statejax.state.grow.')


def validate(state, schema):
  """Raises ValueError unless `state` is what `schema` says, leaf by leaf."""
  if not isinstance(state, ServingState):
    raise ValueError(f'state: expected a ServingState, got '
                     f'{type(state).__name__}; make one with '
                     'model.init_state(rows, capacity).')
  got = {path: value for path, value, _, _ in leaves(state)}
  want = {path: value for path, value, _, _ in leaves(schema)}
  for path in sorted(got.keys() | want.keys()):
    if path not in got or path not in want:
      raise ValueError(
          f'{path}: expected {want.get(path, "no such leaf")}, got '
          f'{"a leaf" if path in got else "none"}; allocate the state from '
          'this config, or load it with its own.')
    value, spec = got[path], want[path]
    # Only what has memory can have lost it; a tracer raises when asked.
    if (isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
        and value.is_deleted()):
      raise ValueError(
          'state: already consumed by an earlier step; continue from the state '
          'which that step returned, or fork it before calling.')
    if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
      wrong = [f'{a}={n}' for a, n, m in zip(spec.axes, value.shape, spec.shape)
               if n != m] or [f'{value.dtype} {tuple(value.shape)}']
      raise ValueError(
          f'{path}: expected {spec}, got {", ".join(wrong)}; allocate the '
          'state from this config, or load it with its own.')
