"""Laws of rows: neighbours, copies, going back, and what is saved."""

import jax.numpy as jnp
import numpy as np

from statejax import state as st
from statejax.laws import bench as bn
from statejax.ops import witness as wt

# Tokens after which a state is saved, and one more.
_PHASES = 13


def ragged(bench):
  """L12: a row depends on itself alone, not on its index, company or number.

  Rows at their own lengths. Permuted rows and rows among neighbours full of
  NaN are bit-equal; a batch of one equals its row within tolerance.
  """
  n = np.array([bench.steps, 5, 11])
  want, final = bench.run(bench.warm, bench.inputs, n)
  order = np.array([2, 0, 1])
  got, state = bench.run(
      st.take(bench.warm, order), bench.inputs[order], n[order])
  note = f'rows in the order {order.tolist()}'
  bench.same_outputs(got, want[order], n[order], exact=True, note=note)
  bench.same_bits(state, st.take(final, order), note=note)

  for row in range(bench.rows):
    alone = np.arange(bench.rows)[:, None] == np.full((1, bench.steps), row)
    company = bench.warm
    for other in set(range(bench.rows)) - {row}:
      company = bn.fill(company, other, np.nan)
    got, state = bench.run(
        company, bn.poisoned(bench.inputs, alone, np.nan), n)
    note = f'all rows but {row} hold NaN'
    bench.same_outputs(got, want, n, exact=True, rows=[row], note=note)
    bench.same_bits(state, final, rows=[row], note=note)

  row = 2
  got, state = bench.run(
      st.take(bench.warm, row), bench.inputs[[row]], n[[row]])
  note = f'row {row} in a batch of one'
  bench.same_outputs(got, want[[row]], n[[row]], note=note)
  bench.same_state(state, st.take(final, row), note=note)


def fork(bench):
  """L14: copies of a row diverge independently, each as if it were alone.

  Against separate runs of the row with the same continuation, in which its
  neighbours differ. Exact.
  """
  row = 2
  copies = st.fork(bench.warm, row, bench.rows)
  bench.same_bits(copies, st.take(bench.warm, [row] * bench.rows),
                  note=f'forks of row {row}')
  got, state = bench.run(copies, bench.inputs)
  for i in range(bench.rows):
    inputs = np.array(bench.others)
    inputs[row] = bench.inputs[i]
    want, final = bench.run(bench.warm, inputs)
    note = f'copy {i} of row {row}'
    bench.same_outputs(got[[i]], want[[row]], exact=True, note=note)
    bench.same_state(st.take(state, i), st.take(final, row), exact=True,
                     note=note)


def rewind(bench):
  """L6: rejected draft tokens leave no trace.

  After 0, 1, .. rejected tokens, across every phase, a state restored by
  assignment equals one that never drafted, now and later. Exact.
  """
  for accepted in (0, 1, 4):
    _, origin = bench.run(bench.warm, bench.inputs, accepted)
    kept = st.snapshot(origin)
    want, final = bench.run(origin, bench.others)
    for drafted in sorted({0, 1, 3, *_around(bench)}):
      note = f'{drafted} tokens drafted after {accepted} and rejected'
      _, ahead = bench.run(origin, bench.before, drafted)
      if drafted % 2:
        _, ahead = bench.run(ahead, bench.before[:, :1])
      back = st.restore_fixed(ahead, kept)
      bench.same_state(back, origin, exact=True, note=note)
      got, state = bench.run(back, bench.others)
      bench.same_outputs(got, want, exact=True, note=note)
      bench.same_state(state, final, exact=True, note=note)


def _around(bench):
  phases = getattr(bench.subject, 'phases', ())
  return [p for phase in phases for p in (phase - 1, phase, phase + 1)
          if p <= 10]


def save(bench):
  """L8: a state written to bytes and read back continues as if never saved.

  At every phase of rings and blocks of up to 13 tokens. Exact; in stores of a
  larger capacity within tolerance.
  """
  for phase in range(_PHASES):
    n = (phase + np.array([0, 5, 9])) % _PHASES
    _, state = bench.run(bench.warm, bench.inputs, n)
    want, final = bench.run(state, bench.others, 7)
    loaded = reload(state)
    bench.same_bits(loaded, state, note='bytes and back')
    got, again = bench.run(loaded, bench.others, 7)
    note = f'saved after {n.tolist()} more tokens'
    bench.same_outputs(got, want, 7, exact=True, note=note)
    bench.same_bits(again, final, note=note)
    if st.capacity(state) is None or phase % 6:
      continue
    larger = st.grow(loaded, bench.capacity + 9)
    bench.same_state(larger, state, exact=True, note='grown')
    got, again = bench.run(larger, bench.others, 7)
    bench.same_outputs(got, want, 7, note=f'{note}, larger capacity')
    bench.same_state(again, final, note=f'{note}, larger capacity')


def reload(state):
  """Returns the state after a way through bytes."""
  def one(path, axes, kind, x):
    x = np.asarray(x)
    return jnp.asarray(np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape))
  return st.map_leaves(one, state)


def witness(bench):
  """The state's witness is the hash of the tokens absorbed, in order.

  Under chunking, padding and borders, against the host's arithmetic. Exact.
  Models only: floats are not hashed.
  """
  if bench.floats:
    return False
  logs = [list(map(int, bench.before[row, :n]))
          for row, n in enumerate(bench.warm_lengths)]
  _hashes(bench, bench.warm, logs)
  state = bench.warm
  for lengths, at in (([3, 0, 5], 0), ([1, 7, 2], 5), ([4, 4, 0], 12)):
    chunk = bench.inputs[:, at:]
    _, state = bench.run(state, chunk, np.array(lengths))
    for row, n in enumerate(lengths):
      logs[row] += map(int, chunk[row, :n])
    _hashes(bench, state, logs)
  ids = np.full((bench.rows, bench.steps), 2)
  ids[0, 3:6] = -1
  ids[1, 10:] = 5
  ids[2, 4:6] = ids[2, 8:] = -1
  _, state = bench.run(state, bench.inputs, segments=ids)
  for row, own in enumerate(ids):
    tokens = list(map(int, bench.inputs[row, own == own[-1]]))
    logs[row] = tokens if row == 1 else (
        logs[row] + list(map(int, bench.inputs[row, own >= 0])))
  _hashes(bench, state, logs)
  return True


def _hashes(bench, state, logs):
  for row, tokens in enumerate(logs):
    got, want = wt.text(state.witness[row]), wt.host(tokens)
    if got != want:
      bench.fail('witness', row=row, step=len(tokens), expected=want, got=got)


def neighbours(bench):
  """L14: a row that outgrows its stores harms itself alone, and says so.

  Its stored tokens and the other rows stay bit-equal; a model's logits of that
  row are NaN from the next step on, until it is rewound. States with growing
  leaves only.
  """
  room = st.capacity(bench.warm)
  if room is None:
    return False
  full, n = 2, np.array([0, 0, bench.steps])
  _, state = bench.run(bench.warm, bench.inputs, n)
  kept = st.snapshot(state)
  want, final = bench.run(state, bench.others, 3)
  _, over = bench.run(state, bench.inputs, n)
  if int(over.length[full]) <= room:
    bench.fail('length', row=full, expected=f'more than {room}',
               got=int(over.length[full]))
  note = f'row {full} has outgrown capacity {room}'
  bench.same_bits(over, state, rows=[0, 1], note=note)
  bench.same_state(st.restore_fixed(over, kept), state, exact=True, note=note)
  got, after = bench.run(over, bench.others, 3)
  bench.same_outputs(got, want, 3, exact=True, rows=[0, 1], note=note)
  bench.same_bits(after, final, rows=[0, 1], note=note)
  if not bench.floats and not np.isnan(got[full, :3]).all():
    bench.fail('output', row=full, step=0, expected='NaN', got='an answer',
               note=note)
  got, back = bench.run(st.restore_fixed(after, kept), bench.others, 3)
  bench.same_outputs(got, want, 3, exact=True, note=f'{note}, then rewound')
  bench.same_state(back, final, exact=True, note=f'{note}, then rewound')
  return True
