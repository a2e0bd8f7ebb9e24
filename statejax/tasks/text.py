"""Bytes of the Python standard library: real text that every machine has."""

import functools
import hashlib
import os
import sysconfig

import numpy as np

END = 256  # follows the last byte of a document
VOCAB = 257

_SKIPPED = frozenset({
    '__pycache__', 'dist-packages', 'idlelib', 'lib2to3', 'site-packages',
    'test', 'tests'})
_LARGEST = 200_000


def encode(text):
  """Returns the tokens of a string, its UTF-8 bytes, int32 [T].

  >>> encode('ab').tolist()
  [97, 98]
  """
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(ids):
  """Returns the string of some tokens; what is no byte is dropped.

  >>> decode([97, 98, END])
  'ab'
  """
  ids = np.asarray(ids).reshape(-1)
  ids = ids[(ids >= 0) & (ids < END)]
  return ids.astype(np.uint8).tobytes().decode(errors='replace')


class TextSource:
  """The `.py` files of the standard library, one document each.

  A file is held out for evaluation if the SHA-256 of its path is divisible by
  20, so that the split is the same on every machine. The text itself differs
  between versions of Python: `repr` tells by a digest.

  Attributes:
    kind: 'documents', see `pipeline.batches`.
    split: 'train' or 'eval'.
    lengths: tokens of each document, with its end, int64 [N].
  """

  kind = 'documents'

  def __init__(self, split='train'):
    if split not in ('train', 'eval'):
      raise ValueError(f"split: expected 'train' or 'eval', got {split!r}.")
    self.split = split
    root = sysconfig.get_paths()['stdlib']
    self._data, self._starts, self._digest = _read(root, split)
    self.lengths = np.diff(self._starts) + 1

  def __len__(self):
    return len(self.lengths)

  def __getitem__(self, index):
    """Returns the tokens of one document, int32 [T], the last one END."""
    start, stop = self._starts[index], self._starts[index + 1]
    tokens = np.empty(stop - start + 1, np.int32)
    tokens[:-1] = self._data[start:stop]
    tokens[-1] = END
    return tokens

  def __repr__(self):
    return (f'TextSource(split={self.split!r}, documents={len(self)}, '
            f'tokens={self.lengths.sum()}, digest={self._digest!r})')


@functools.cache
def _read(root, split):
  """Returns (bytes of all documents, where each starts, digest)."""
  documents, digest = [], hashlib.sha256()
  for name in _names(root):
    if (split == 'eval') != _held_out(name):
      continue
    with open(os.path.join(root, name), 'rb') as file:
      document = file.read()
    documents.append(document)
    digest.update(f'{name}\0{len(document)}\0'.encode() + document)
  if not documents:
    raise ValueError(f'{root}: expected the .py files of the Python standard '
                     'library, got none; use a Python that has its sources.')
  starts = np.cumsum([0, *map(len, documents)])
  data = np.frombuffer(b''.join(documents), np.uint8)
  return data, starts, digest.hexdigest()[:16]


def _names(root):
  names = []
  for here, folders, files in os.walk(root):
    folders[:] = [f for f in folders
                  if f not in _SKIPPED and not f.startswith('config-')]
    for file in files:
      path = os.path.join(here, file)
      # `_sysconfigdata*` and `config-*` describe the machine.
      if (file.endswith('.py') and not file.startswith('_sysconfigdata')
          and os.path.getsize(path) <= _LARGEST):
        names.append(os.path.relpath(path, root).replace(os.sep, '/'))
  return sorted(names)


def _held_out(name):
  return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
