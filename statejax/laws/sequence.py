"""Laws of time: chunks, padding, documents, and who may see whom."""

import numpy as np

from statejax import state as st
from statejax.laws import bench as bn


def split(bench):
  """L1: any split of a sequence gives the state and outputs of one pass.

  Chunks of length 0, 1, and around every window, convolution and chunk length,
  in another order in each row, and random ones. After each chunk the state is
  that of one pass over the prefix. Within tolerance; at multiples of the
  subject's `grid` exact.
  """
  grid = getattr(bench.subject, 'grid', None)
  if grid is not None and bench.steps % grid == 0:
    even = np.full((bench.rows, bench.steps // grid), grid)
    _run_chunks(bench, even, exact=True)
  for lengths in _partitions(bench):
    _run_chunks(bench, lengths, exact=False)


def _run_chunks(bench, lengths, exact):
  """Compares chunks of `lengths` [B, chunks] with one pass."""
  whole, _ = bench.run(bench.warm, bench.inputs)
  state, at = bench.warm, np.zeros(bench.rows, int)
  note = f'chunks {lengths.tolist()}'
  for count in lengths.T:
    part, state = bench.run(state, bn.gather(bench.inputs, at, count), count)
    bench.same_outputs(part, bn.gather(whole, at, count), count, at=at,
                       exact=exact, note=note)
    at = at + count
    _, prefix = bench.run(bench.warm, bench.inputs, at)
    bench.same_state(state, prefix, exact=exact, note=note)


def _partitions(bench):
  """Yields chunk lengths [B, chunks], each row a rotation of the others."""
  total = bench.steps
  lists = []
  for phase in getattr(bench.subject, 'phases', ()) or (4,):
    lengths = []
    for length in (1, 0, phase - 1, phase, phase + 1):
      if sum(lengths) + length <= total:
        lengths.append(length)
    lists.append([*lengths, total - sum(lengths)])
  for _ in range(2):
    cuts = np.sort(bench.random.integers(0, total + 1, 4))
    lists.append(np.diff([0, *cuts, total]).tolist())
  for lengths in lists:
    yield np.stack([np.roll(lengths, r) for r in range(bench.rows)])


def decode(bench):
  """L1: single steps give the state and outputs of one pass.

  Rows pause at different times, as requests of a batch do. Within tolerance.
  """
  whole, final = bench.run(bench.warm, bench.inputs)
  state, at = bench.warm, np.zeros(bench.rows, int)
  for call in range(2 * bench.steps):
    n = ((np.arange(bench.rows) + call) % 3 > 0) & (at < bench.steps)
    n = n.astype(int)
    token = bn.gather(bench.inputs, at, n)[:, :1]
    output, state = bench.run(state, token, n)
    bench.same_outputs(output, bn.gather(whole, at, n)[:, :1], n, at=at,
                       note='decoding token by token')
    at = at + n
    if call % 4 == 0:
      _, prefix = bench.run(bench.warm, bench.inputs, at)
      bench.same_state(state, prefix, note='decoding token by token')
  bench.same_state(state, final, note='decoding token by token')


def true_start(bench):
  """L2: a cleared row is a fresh row, whatever it held before.

  A row full of NaN and one full of old content are cleared; in the same batch
  the others continue. Prefill and decode. Exact.
  """
  row, rest = 2, [0, 1]
  origin = st.put(bench.warm, row, st.take(bench.fresh(), row))
  spoilt = {'NaN': bn.fill(bench.warm, row, np.nan), 'old content': bench.warm}
  for what, state in spoilt.items():
    cleared = st.clear(state, row)
    note = f'row {row} held {what} and was cleared'
    bench.same_bits(cleared, origin, rows=[row], note=note)
    for inputs in (bench.inputs, bench.inputs[:, :1]):
      got, new = bench.run(cleared, inputs)
      want, fresh = bench.run(origin, inputs)
      bench.same_outputs(got, want, exact=True, note=note)
      bench.same_bits(new, fresh, note=note)
      want, continued = bench.run(bench.warm, inputs)
      bench.same_outputs(got, want, exact=True, rows=rest, note=note)
      bench.same_bits(new, continued, rows=rest, note=note)


def padding(bench):
  """L3: padding changes neither outputs nor state, wherever it stands.

  Padded places hold 1e9 and NaN, or ids that do not exist. `n_valid = 0` is
  the identity on every bit of every leaf, -0.0 included; what the padding
  holds is without effect, exact; against the unpadded run within tolerance.
  """
  for value in (1e9, np.nan):
    _empty_rows(bench, value)
    _right_padding(bench, value)
    _any_padding(bench, value)


def _empty_rows(bench, value):
  state = bn.negative_zeros(bench.warm)
  none = np.zeros((bench.rows, bench.steps), bool)
  inputs = bn.poisoned(bench.inputs, none, value)
  note = f'n_valid = 0 and padding {value}'
  for length in (bench.steps, 1):
    _, same = bench.run(state, inputs[:, :length], 0)
    bench.same_bits(same, state, note=note)
  _, same = bench.run(state, inputs, segments=none - 1)
  bench.same_bits(same, state, note='all segment ids negative')


def _right_padding(bench, value):
  n = np.array([9, 0, bench.steps - 1])
  real = np.arange(bench.steps)[None] < n[:, None]
  note = f'right padding of {value}'
  inputs = bn.poisoned(bench.inputs, real, value)
  got, state = bench.run(bench.warm, inputs, n)
  want, clean = bench.run(bench.warm, bench.inputs, n)
  bench.same_outputs(got, want, n, exact=True, note=note)
  bench.same_bits(state, clean, note=note)
  unpadded, final = bench.run(bench.warm, bench.inputs)
  bench.same_outputs(got, unpadded, n, note=note)
  rest = bench.steps - n
  _, state = bench.run(state, bn.gather(bench.inputs, n, rest), rest)
  bench.same_state(state, final, note=note)


def _any_padding(bench, value):
  """Left padding in row 0, in row 1 interior, in row 2 both, and right."""
  real = np.ones((bench.rows, bench.steps), bool)
  real[0, :6] = False
  real[1, 3:5] = real[1, 9] = False
  real[2, 0] = real[2, 2:9] = False
  n = np.array([bench.steps, bench.steps, 17])
  kept = real & (np.arange(bench.steps)[None] < n[:, None])
  note = f'left and interior padding of {value}'
  inputs = bn.poisoned(bench.inputs, kept, value)
  got, state = bench.run(bench.warm, inputs, n, np.where(real, 4, -1))
  packed = np.zeros_like(bench.inputs)
  count = kept.sum(axis=1)
  for row in range(bench.rows):
    packed[row, :count[row]] = bench.inputs[row, kept[row]]
  want, final = bench.run(bench.warm, packed, count)
  placed = np.zeros_like(want)
  for row in range(bench.rows):
    placed[row, kept[row]] = want[row, :count[row]]
  bench.same_outputs(got, placed, kept, note=note)
  bench.same_state(state, final, note=note)


def packed(bench):
  """L4: packed documents equal separate runs, the last one's state stays.

  Borders everywhere, also after a single token; the first document continues
  the row's. Outputs and states within tolerance. Nothing earlier changes a
  later document: other inputs leave it bit-equal, and for float inputs the
  gradient across the border is exactly 0.
  """
  lengths = np.array([[1, 1, 2, 3, 9, 8], [11, 4, 1, 5, 1, 2],
                      [2, 14, 1, 1, 1, 5]])
  # Ids may return later: only a change is a border.
  ids = np.array([7, 3, 7, 0, 1, 3])
  segments = np.stack([np.repeat(ids, row) for row in lengths])
  note = f'documents of lengths {lengths.tolist()}'
  got, state = bench.run(bench.warm, bench.inputs, segments=segments)
  starts = np.cumsum(lengths, axis=1) - lengths
  final = bench.warm
  for i, (start, count) in enumerate(zip(starts.T, lengths.T)):
    want, final = bench.run(
        bench.fresh() if i else bench.warm,
        bn.gather(bench.inputs, start, count), count)
    bench.same_outputs(bn.gather(got, start, count), want, count, at=start,
                       note=note)
  bench.same_state(state, final, note=note)
  _padded_border(bench)
  _no_leak(bench, segments, starts[:, -1], got, state)


def _padded_border(bench):
  """A border with padding on it, as where documents are aligned."""
  lengths = np.array([5, 3, 9, 7])
  segments = np.tile(np.repeat([2, -1, 5, -1], lengths), (bench.rows, 1))
  inputs = bn.poisoned(bench.inputs, segments >= 0, 1e9)
  got, state = bench.run(bench.warm, inputs, segments=segments)
  note = 'documents of 5 and 9 tokens with padding between'
  for origin, start, count in ((bench.warm, 0, 5), (bench.fresh(), 8, 9)):
    place = slice(start, start + count)
    want, final = bench.run(origin, bench.inputs[:, place])
    bench.same_outputs(got[:, place], want, at=start, note=note)
  bench.same_state(state, final, note=note)


def _no_leak(bench, segments, start, outputs, state):
  """Nothing before `start` [B] reaches what comes after."""
  late = np.arange(bench.steps)[None] >= start[:, None]
  mask = late.reshape(late.shape + (1,) * (bench.inputs.ndim - 2))
  note = 'only earlier documents differ'
  other, new = bench.run(
      bench.warm, np.where(mask, bench.inputs, bench.others),
      segments=segments)
  bench.same_outputs(other, outputs, late, exact=True, note=note)
  bench.same_state(new, state, exact=True, note=note)
  if not bench.floats:
    return
  ones = {path: np.ones(x.shape, x.dtype)
          for path, x in bn.float_leaves(state).items()}
  _, d_leaves, d_inputs = bench.pull(
      bench.warm, _where(late, outputs), ones, segments=segments)
  note = 'gradient of the last document'
  leak = np.any(d_inputs != 0, axis=-1) & ~late
  _no_row(bench, leak, 'no gradient', 'a gradient', note)
  for path, _, _, kind in st.leaves(state):
    # Slots of a store that nothing wrote keep their value, and a gradient.
    if path in d_leaves and path.startswith('layers/') and kind == 'fixed':
      worst = np.max(np.abs(d_leaves[path]), initial=0)
      if worst != 0:
        bench.fail(path, expected=0, got=worst, note=note)


def _where(mask, outputs):
  shape = mask.shape + (1,) * (outputs.ndim - 2)
  return np.where(mask.reshape(shape), np.ones_like(outputs),
                  np.zeros_like(outputs))


def causality(bench):
  """Outputs see the past that `reach` says, all of it, and no future.

  Where a mixer `chooses`, the oldest token need not be among what it sees.

  For float inputs by gradients at every pair of places, for tokens by changing
  one at a time; by both where a mixer `chooses`, as a choice has no gradient.
  Exact.
  """
  if bench.floats:
    _by_gradient(bench)
  if not bench.floats or getattr(bench.subject, 'chooses', False):
    _by_change(bench)


def _by_gradient(bench):
  reach = getattr(bench.subject, 'reach', None) or bench.steps
  outputs, _ = bench.run(bench.warm, bench.inputs)
  for t in range(bench.steps):
    d_outputs = np.zeros_like(outputs)
    d_outputs[:, t] = 1
    _, _, d_inputs = bench.pull(bench.warm, d_outputs)
    seen = np.any(d_inputs != 0, axis=-1)
    oldest = max(0, t - reach + 1)
    note = f'influence on output {t}, which sees inputs {oldest} to {t}'
    hidden = seen.copy()
    hidden[:, oldest:t + 1] = False
    _no_row(bench, hidden, 'no gradient', 'a gradient', note)
    if not getattr(bench.subject, 'chooses', False):
      _no_row(bench, ~seen[:, oldest:oldest + 1], 'a gradient', 'none', note)


def _by_change(bench):
  reach = getattr(bench.subject, 'reach', None) or bench.steps
  outputs, _ = bench.run(bench.warm, bench.inputs)
  for s in range(bench.steps):
    changed = bench.inputs.copy()
    changed[:, s] = bench.others[:, s]
    got, _ = bench.run(bench.warm, changed)
    moved = np.any(got != outputs, axis=tuple(range(2, got.ndim)))
    end = min(bench.steps, s + reach)
    note = f'input {s} changed, which outputs {s} to {end - 1} see'
    hidden = moved.copy()
    hidden[:, s:end] = False
    _no_row(bench, hidden, 'no change', 'a change', note)
    # Coarser arithmetic may round away what a decaying memory keeps of it.
    faint = bench.tolerance >= 1e-4 and reach == bench.steps
    if faint or getattr(bench.subject, 'chooses', False):
      continue
    differs = bench.inputs[:, s] != bench.others[:, s]
    blind = ~moved[:, end - 1:end] & differs.reshape(len(differs), -1).any(
        axis=1, keepdims=True)
    _no_row(bench, blind, 'a change', 'none', note)


def _no_row(bench, wrong, expected, got, note):
  if wrong.any():
    row, step = np.argwhere(wrong)[0]
    bench.fail('output', row=int(row), step=int(step), expected=expected,
               got=got, note=note)
