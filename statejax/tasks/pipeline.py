"""Batches of a task: shuffled, sharded by host, packed, restorable.

Documents are cut into pieces of T + 1 tokens which share one token with the
next, so that each transition is learned once per epoch. What is left at the
ends of documents is packed into common rows. Rows are planned ahead: then any
row can be had at once, Grain shuffles rows instead of long documents, and the
position is a single number. (Grain's own `ConcatThenSplitIterDataset` in place
of the plan keeps tuples in its state, which JSON turns into other positions,
and reads ahead until the left-overs fill a row.)
"""

import bisect
import json

import numpy as np

EVALUATION_SEED = 0


class Batches:
  """An endless iterator of batches; see `batches`.

  Its state is JSON: the position, and what it is a position in.
  """

  def __init__(self, dataset, about):
    import grain

    # Items are in memory: threads would cost more than they bring.
    self._iterator = iter(dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    self._about = about

  def __iter__(self):
    return self

  def __next__(self):
    return next(self._iterator)

  def get_state(self):
    """Returns the position, of JSON types."""
    return {**self._about, 'position': self._iterator.get_state()}

  def set_state(self, state):
    """Goes to a position which an iterator of the same data has returned.

    Raises:
      ValueError: it is a position in other data; names what differs.
    """
    for name, expected in self._about.items():
      got = state.get(name) if isinstance(state, dict) else None
      if got != expected:
        raise ValueError(
            f'data: expected a position with {name}={expected}, got {got}; go '
            'on with the settings (and the version of Python, whose library is '
            'the text) that it was saved with, or start anew.')
    self._iterator.set_state(state['position'])


def batches(task, *, rows, length, seed, shard=0, shards=1):
  """Returns an endless iterator of training batches.

  Args:
    task: a source with `__len__`, `__getitem__`, a `__repr__` that tells its
      content, and `kind`. 'documents': items are tokens, int32 [any], with
      `lengths` [N]. 'examples': items are {tokens, targets}, int32 [T].
    rows: B, rows of a batch.
    length: T, tokens of a row.
    seed: of the order, which is another one in every epoch.
    shard: which part of every epoch is read here, 0 <= shard < shards.
    shards: number of disjoint parts.

  Returns:
    a `Batches` of {tokens, targets, segments}, each int32 [B, T]. Targets are
    -1 where no loss is asked. Segments number the documents of a row from 0;
    padding has -1.

  Raises:
    ValueError: an argument is out of range, or there are too few items.
  """
  if not 0 <= shard < shards:
    raise ValueError(f'shard: expected 0 <= shard < shards={shards}, got '
                     f'{shard}.')
  data = _shuffled(task, rows, length, seed)
  if len(data) < shards:
    raise ValueError(f'{task!r}: expected a row for each of {shards} shards, '
                     f'got {len(data)} rows; shorten the rows.')
  data = data[shard::shards].repeat().batch(rows, drop_remainder=True)
  about = {'task': repr(task), 'rows': rows, 'length': length, 'seed': seed,
           'shard': shard, 'shards': shards}
  return Batches(data.map(_finish), about)


def evaluation(task, *, rows, length, batches=8):
  """Returns a list of at most `batches` batches, always the same ones.

  Args:
    task: as for `batches`; its held-out part.
    rows: B, rows of a batch.
    length: T, tokens of a row.
    batches: how many at most. No row occurs twice.

  Raises:
    ValueError: an argument is out of range, or one batch cannot be filled.
  """
  data = _shuffled(task, rows, length, EVALUATION_SEED)
  if len(data) < rows:
    raise ValueError(f'{task!r}: expected at least rows={rows} rows of length='
                     f'{length}, got {len(data)}; make rows fewer or shorter.')
  data = data.batch(rows, drop_remainder=True).map(_finish)
  return [data[i] for i in range(min(batches, len(data)))]


def state_to_json(iterator):
  """Returns the position of a `Batches` as text."""
  return json.dumps(iterator.get_state())


def restore(iterator, text):
  """Moves a fresh `Batches` to a position from `state_to_json`."""
  iterator.set_state(json.loads(text))


def _shuffled(task, rows, length, seed):
  import grain

  if rows < 1 or length < 1:
    raise ValueError(f'expected rows and length above 0, got rows={rows}, '
                     f'length={length}.')
  if task.kind == 'documents':
    task = _PackedRows(task, length + 1)
  elif task.length != length:
    raise ValueError(f'{task!r}: expected items of length={length}, got '
                     f'{task.length}; make the task with this length.')
  return grain.MapDataset.source(task).seed(seed).shuffle()


def _finish(batch):
  """Returns {tokens, targets, segments} of stacked items."""
  if 'targets' in batch:
    return {**batch, 'segments': np.zeros_like(batch['tokens'])}
  tokens, segments = batch['tokens'], batch['segments']
  inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
  return {'tokens': np.ascontiguousarray(tokens[:, :-1]),
          'targets': np.where(inside, tokens[:, 1:], np.int32(-1)),
          'segments': np.ascontiguousarray(segments[:, :-1])}


class _PackedRows:
  """Documents as rows of one width, each a piece or several last pieces."""

  def __init__(self, source, width):
    self._source, self._width = source, width
    document, start, size = _cut(np.asarray(source.lengths), width)
    row = _pack(size, width)
    order = np.argsort(row, kind='stable')
    self._document, self._start = document[order], start[order]
    self._size = size[order]
    # Row r holds the pieces first[r] to first[r + 1].
    self._first = np.searchsorted(
        row[order], np.arange(row.max(initial=-1) + 2))

  def __len__(self):
    return len(self._first) - 1

  def __getitem__(self, index):
    tokens = np.zeros(self._width, np.int32)
    segments = np.full(self._width, -1, np.int32)
    at = 0
    pieces = range(self._first[index], self._first[index + 1])
    for number, piece in enumerate(pieces):
      start, size = self._start[piece], self._size[piece]
      document = self._source[self._document[piece]]
      tokens[at:at + size] = document[start:start + size]
      segments[at:at + size] = number
      at += size
    return {'tokens': tokens, 'segments': segments}

  def __repr__(self):
    return f'_PackedRows({self._source!r}, {self._width})'


def _cut(lengths, width):
  """Returns (document, start, size) of all pieces, each [N]."""
  # Of one token nothing is learned, so that it makes no piece.
  counts = -(-(lengths - 1) // (width - 1))
  document = np.repeat(np.arange(len(lengths)), counts)
  before = np.repeat(np.cumsum(counts) - counts, counts)
  start = (np.arange(len(document)) - before) * (width - 1)
  return document, start, np.minimum(lengths[document] - start, width)


def _pack(sizes, width):
  """Returns the row of every piece, [N]; the longest first, best fit."""
  full = sizes == width
  row = np.empty(len(sizes), np.int64)
  count = int(full.sum())
  row[full] = np.arange(count)
  spaces = []  # sorted (free tokens, row)
  rest = np.flatnonzero(~full)
  for piece in rest[np.argsort(-sizes[rest], kind='stable')]:
    size = int(sizes[piece])
    best = bisect.bisect_left(spaces, (size, -1))
    if best < len(spaces):
      free, where = spaces.pop(best)
    else:
      free, where = width, count
      count += 1
    row[piece] = where
    bisect.insort(spaces, (free - size, where))
  return row
