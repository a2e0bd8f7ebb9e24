import hashlib
import os
import subprocess
import sys
import sysconfig

import grain
import numpy as np
import pytest

from statejax.tasks import mqar, pipeline, text


class Documents:
  """Documents of chosen lengths; every token is unique, so rows tell all."""

  kind = 'documents'

  def __init__(self, lengths):
    self.lengths = np.asarray(lengths)
    self._starts = np.cumsum([0, *lengths])

  def __len__(self):
    return len(self.lengths)

  def __getitem__(self, index):
    return np.arange(*self._starts[index:index + 2], dtype=np.int32)

  def __repr__(self):
    return f'Documents({self.lengths.tolist()})'

  def transitions(self):
    return {(t, t + 1) for i in range(len(self)) for t in self[i][:-1]}


def ragged(count=40):
  return Documents(np.random.default_rng(0).integers(1, 60, count).tolist())


def items(size=200, **kwargs):
  defaults = dict(vocab=64, pairs=8, length=64, seed=3)
  return mqar.MQARSource(size, **{**defaults, **kwargs})


def assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert sorted(a) == sorted(b) == ['segments', 'targets', 'tokens']
    for name in a:
      assert a[name].dtype == b[name].dtype == np.int32
      np.testing.assert_array_equal(a[name], b[name])


def asked(batch):
  """Returns the list of (token, target) of a batch where a loss is asked."""
  where = batch['targets'] >= 0
  return list(zip(batch['tokens'][where].tolist(),
                  batch['targets'][where].tolist()))


# Text.


def test_text_encodes_and_decodes():
  words = 'def f(): return "é漢"\n'
  assert text.encode(words).dtype == np.int32
  assert text.decode(text.encode(words)) == words
  assert text.decode([104, 105, text.END, 0xff]) == 'hi\ufffd'
  assert text.VOCAB == text.END + 1


def test_text_source_is_the_library():
  root = sysconfig.get_paths()['stdlib']
  names = []
  for split in ('train', 'eval'):
    source = text.TextSource(split)
    documents = [source[i] for i in range(len(source))]
    assert [len(d) for d in documents] == source.lengths.tolist()
    assert all(d[-1] == text.END and d[:-1].max(initial=0) < text.END
               for d in documents)
    names += [(split, d[:-1].astype(np.uint8).tobytes()) for d in documents]
  with open(os.path.join(root, 'json', '__init__.py'), 'rb') as file:
    content = file.read()
  number = int(hashlib.sha256(b'json/__init__.py').hexdigest(), 16)
  assert ('train' if number % 20 else 'eval', content) in names
  share = len(text.TextSource('eval')) / len(names)
  assert len(names) > 300 and 0.02 < share < 0.09


def test_text_source_is_told_by_its_content(tmp_path, monkeypatch):
  before = repr(text.TextSource())
  assert before == repr(text.TextSource()) != repr(text.TextSource('eval'))
  monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'stdlib': tmp_path})
  with pytest.raises(ValueError, match='library, got none'):
    text.TextSource()
  (tmp_path / 'a.py').write_text('x = 1')
  (tmp_path / 'test').mkdir()
  (tmp_path / 'test' / 'b.py').write_text('no')
  (tmp_path / 'large.py').write_text('#' * 200_001)
  source = text.TextSource()
  assert text.decode(source[0]) == 'x = 1' and len(source) == 1
  with pytest.raises(ValueError, match="'train' or 'eval', got 'test'"):
    text.TextSource('test')


def test_text_source_is_quick_and_light():
  code = ('import sys, time\nstart = time.time()\n'
          'from statejax.tasks import mqar, pipeline, text\n'
          'text.TextSource(), text.TextSource("eval")\n'
          'assert not {"jax", "grain"} & set(sys.modules)\n'
          'print(time.time() - start)')
  seconds = float(subprocess.check_output([sys.executable, '-c', code]))
  assert seconds < 5  # 0.2 alone; the machine may be busy


# Multi-query associative recall.


@pytest.mark.parametrize('power', [0.01, 1.0])
def test_mqar_targets_by_a_dictionary(power):
  source = items(vocab=40, pairs=7, length=61, power=power)
  for index in range(len(source)):
    item = source[index]
    tokens, targets = item['tokens'].tolist(), item['targets'].tolist()
    memory = dict(zip(tokens[:14:2], tokens[1:14:2]))
    assert len(memory) == 7 and len(tokens) == 61
    assert all(0 < k < 20 for k in memory)
    assert all(20 <= v < 40 for v in memory.values())
    queried = [t for t in range(14, 61) if tokens[t] in memory]
    assert sorted(tokens[t] for t in queried) == sorted(memory)
    for t in range(61):
      expected = memory[tokens[t]] if t in queried else -1
      assert targets[t] == expected
      if expected >= 0:
        assert tokens[t + 1] == expected
      elif t >= 14 and t - 1 not in queried:
        assert tokens[t] == mqar.FILLER


def test_mqar_is_a_function_of_seed_and_index():
  np.testing.assert_array_equal(items()[5]['tokens'], items()[5]['tokens'])
  train = {item['tokens'].tobytes() for item in map(items().__getitem__,
                                                    range(200))}
  held = items(seed=3 + 1_000_003)
  other = {held[i]['tokens'].tobytes() for i in range(200)}
  assert len(train | other) == 400
  assert repr(items()) == repr(items()) != repr(held)


def test_mqar_cannot_be_guessed():
  """Neither key nor order nor place of a query tells its value."""
  source = items(4000, vocab=16, pairs=4, length=32)
  by_key, first = np.zeros((8, 8)), np.zeros(4)
  for index in range(len(source)):
    item = source[index]
    at = np.flatnonzero(item['targets'] >= 0)
    by_key[item['tokens'][at], item['targets'][at] - 8] += 1
    first[item['tokens'][:8:2].tolist().index(item['tokens'][at[0]])] += 1
  chance = by_key[1:] / by_key[1:].sum(1, keepdims=True)
  assert by_key[0].sum() == 0 and abs(chance - 1 / 8).max() < 0.04
  assert abs(first / 4000 - 1 / 4).max() < 0.04


def test_mqar_power_law_asks_early():
  early, uniform = (
      np.mean([np.flatnonzero(source[i]['targets'] >= 0).mean()
               for i in range(100)])
      for source in (items(power=0.01), items(power=1.0)))
  assert early < uniform - 3 and abs(uniform - 39) < 2


@pytest.mark.parametrize('wrong, message', [
    (dict(pairs=32), 'pairs: expected 1 to 31'),
    (dict(length=31), 'length: expected at least'),
    (dict(seed=-1), '0 <= seed'),
])
def test_mqar_refuses(wrong, message):
  with pytest.raises(ValueError, match=message):
    items(**wrong)


# The pipeline.


@pytest.mark.parametrize('length', [1, 7, 16, 100])
def test_every_transition_once_per_epoch(length):
  source = ragged()
  rows = len(pipeline._PackedRows(source, length + 1))
  found = asked(next(pipeline.batches(
      source, rows=rows, length=length, seed=0)))
  assert len(found) == len(set(found))
  assert set(found) == source.transitions()


def test_segments_and_padding():
  source = ragged()
  batch = next(pipeline.batches(source, rows=64, length=31, seed=0))
  document = np.repeat(np.arange(40), source.lengths)
  for tokens, targets, segments in zip(*(
      batch[name] for name in ('tokens', 'targets', 'segments'))):
    real = segments >= 0
    assert (np.diff(real.astype(int)) <= 0).all()  # padding is last
    assert (targets[~real] == -1).all() and (tokens[~real] == 0).all()
    numbers = segments[real]
    assert numbers[0] == 0 and set(np.diff(numbers)) <= {0, 1}
    same = np.diff(document[tokens[real]]) == 0
    assert (same == (np.diff(numbers) == 0)).all()
    # Within a document the target is the next token, at its end there is none.
    assert (targets[:-1][real[1:]] == np.where(
        same, tokens[1:][real[1:]], -1)).all()


def test_packing_wastes_little():
  packed = pipeline._PackedRows(text.TextSource(), 1025)
  used = sum(packed._size)
  assert used / (len(packed) * 1025) > 0.995


def tasks():
  return [(ragged(), dict(rows=4, length=16)),
          (items(), dict(rows=4, length=64)),
          (text.TextSource(), dict(rows=16, length=256))]


@pytest.mark.parametrize('task, shape', tasks(), ids=lambda x: type(x).__name__)
def test_restored_batches_are_the_same(task, shape):
  whole = pipeline.batches(task, **shape, seed=1)
  expected = [next(whole) for _ in range(20)]
  first = pipeline.batches(task, **shape, seed=1)
  got = [next(first) for _ in range(7)]
  saved = pipeline.state_to_json(first)
  next(first)
  second = pipeline.batches(task, **shape, seed=1)
  pipeline.restore(second, saved)
  got += [next(second) for _ in range(13)]
  assert_equal(got, expected)
  pipeline.restore(first, saved)
  assert_equal([next(first) for _ in range(13)], expected[7:])
  other = pipeline.batches(task, **shape, seed=2)
  assert (next(other)['tokens'] != expected[0]['tokens']).any()


def test_epochs_differ_in_order():
  source = Documents([17] * 8)
  stream = pipeline.batches(source, rows=8, length=16, seed=0)
  one, two = asked(next(stream)), asked(next(stream))
  assert one != two and sorted(one) == sorted(two)


@pytest.mark.parametrize('shards', [2, 3])
def test_shards_are_disjoint_and_cover(shards):
  source = ragged()
  whole = len(pipeline._PackedRows(source, 17))
  for epoch in range(2):
    found = []
    for shard in range(shards):
      rows = len(range(shard, whole, shards))
      stream = pipeline.batches(source, rows=rows, length=16, seed=5,
                                shard=shard, shards=shards)
      batch = [next(stream) for _ in range(epoch + 1)][-1]
      found += asked(batch)
    assert len(found) == len(set(found))
    assert set(found) == source.transitions()


def test_positions_of_other_data_are_refused():
  saved = pipeline.state_to_json(
      pipeline.batches(ragged(), rows=4, length=16, seed=1))
  for change, name in [(dict(rows=5), 'rows=5, got 4'),
                       (dict(seed=2), 'seed=2, got 1'),
                       (dict(shards=2), 'shards=2, got 1')]:
    stream = pipeline.batches(
        ragged(), **{**dict(rows=4, length=16, seed=1), **change})
    with pytest.raises(ValueError, match=name):
      pipeline.restore(stream, saved)
  stream = pipeline.batches(ragged(39), rows=4, length=16, seed=1)
  with pytest.raises(ValueError, match='version of Python'):
    pipeline.restore(stream, saved)


def test_examples_pass_through():
  source = items()
  batch = next(pipeline.batches(source, rows=200, length=64, seed=0))
  assert not batch['segments'].any()
  got = {row.tobytes() for row in batch['tokens']}
  assert got == {source[i]['tokens'].tobytes() for i in range(200)}
  with pytest.raises(ValueError, match='make the task with this length'):
    pipeline.batches(source, rows=1, length=32, seed=0)


@pytest.mark.parametrize('task, shape', [
    (text.TextSource('eval'), dict(rows=16, length=256)),
    (items(), dict(rows=50, length=64))], ids=['text', 'mqar'])
def test_evaluation_is_fixed_and_finite(task, shape):
  one = pipeline.evaluation(task, **shape, batches=3)
  assert len(one) == 3
  assert_equal(one, pipeline.evaluation(task, **shape, batches=3))
  rows = np.concatenate([batch['tokens'] for batch in one])
  assert len(np.unique(rows, axis=0)) == len(rows)
  more = pipeline.evaluation(task, **shape, batches=10**6)
  assert_equal(more[:3], one)
  assert len(more) < 10**6


@pytest.mark.parametrize('call', [
    lambda: pipeline.batches(ragged(), rows=0, length=8, seed=0),
    lambda: pipeline.batches(ragged(), rows=2, length=0, seed=0),
    lambda: pipeline.batches(
        ragged(), rows=2, length=8, seed=0, shard=2, shards=2),
    lambda: pipeline.batches(
        Documents([5]), rows=2, length=8, seed=0, shards=2),
    lambda: pipeline.batches(Documents([1, 1]), rows=2, length=8, seed=0),
    lambda: pipeline.evaluation(Documents([5]), rows=2, length=8),
])
def test_pipeline_refuses(call):
  with pytest.raises(ValueError, match='expected'):
    call()


def test_grain_agrees_about_checkpoints():
  data = pipeline._shuffled(ragged(), 4, 16, 0).batch(4).to_iter_dataset()
  grain.experimental.assert_equal_output_after_checkpoint(data)
