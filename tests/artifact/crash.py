"""What a disk may hold after the power has failed, at any moment of a run.

The model. A run is cut before one of its calls: an fsync, rename, link, mkdir,
removal, opening of a file for writing, or statement of the catalog. Then

- of a file which was synced, the content at that time is there; if it was
  written to since, or was never synced, it holds the old content, the new one,
  the beginning of the new one, or the new one with zeros in part;
- of a directory which was synced, the entries at that time are there; each
  entry made, replaced or removed since is so or is not, by itself. So a rename
  may have come through in both of its directories, in one or in none;
- the catalog holds what was committed, and SQLite is taken at its word that it
  has synced that: its files are copied as they are.

Who has written a file does not matter: all changes are found by looking at the
tree before each call. Hence what Orbax writes counts as lost until our own sync
of the tree.
"""

import contextlib
import dataclasses
import io
import os
import stat

_CALLS = ('rename', 'replace', 'link', 'mkdir', 'unlink', 'remove', 'rmdir')
_CATALOG = ('index.db', 'index.db-wal', 'index.db-shm')


@dataclasses.dataclass(frozen=True)
class Point:
  """The tree before a call: what is seen and what is on the disk for sure.

  Attributes:
    call: its name.
    entries: {directory: {name: file or directory}}, by inode.
    data: {file: content}.
    synced_entries, synced_data: the same, as they were last synced.
    catalog: {name: content} of the catalog's files.
    acknowledged: what the run had acknowledged.
  """

  call: str
  entries: dict
  data: dict
  synced_entries: dict
  synced_data: dict
  catalog: dict
  acknowledged: tuple


class Recorder:
  """Looks at the tree below a directory before every call that changes it.

  Attributes:
    points: a `Point` for each.
    acknowledged: to be appended to by the run.
  """

  def __init__(self, root):
    self.root, self.points, self.acknowledged = str(root), [], []
    self._synced_entries, self._synced_data, self._open = {}, {}, {}

  @contextlib.contextmanager
  def recording(self):
    """All calls inside are recorded."""
    originals = {name: getattr(os, name) for name in (*_CALLS, 'fsync')}
    opening = io.open

    def wrapped(name):
      def call(*args, **named):
        self.look(name)
        return originals[name](*args, **named)
      return call

    def fsync(descriptor):
      self.look('fsync')
      originals['fsync'](descriptor)
      self._sync(os.fstat(descriptor))

    def open_(file, mode='r', *args, **named):
      if set(mode) & set('wxa+'):
        self.look('open')
      return opening(file, mode, *args, **named)

    try:
      for name in _CALLS:
        setattr(os, name, wrapped(name))
      os.fsync, io.open = fsync, open_
      yield self
      self.look('end')
    finally:
      io.open = opening
      for name, original in originals.items():
        setattr(os, name, original)
      for descriptor in self._open.values():
        os.close(descriptor)
      self._open.clear()

  def look(self, call):
    """Adds a point."""
    entries, data, catalog = {}, {}, {}
    self._walk(self.root, entries, data, catalog)
    self.points.append(Point(
        call, entries, data, dict(self._synced_entries),
        dict(self._synced_data), catalog, tuple(self.acknowledged)))

  def _walk(self, path, entries, data, catalog):
    here = entries[self._hold(path)] = {}
    for name in os.listdir(path):
      inner = f'{path}/{name}'
      if name in _CATALOG:
        catalog[name] = _content(inner)
        continue
      number = here[name] = self._hold(inner)
      if stat.S_ISDIR(os.lstat(inner).st_mode):
        self._walk(inner, entries, data, catalog)
      else:
        data[number] = _content(inner)

  def _hold(self, path):
    """Number of a file or directory, kept open so that no other one gets it."""
    number = os.stat(path).st_ino
    if number not in self._open:
      self._open[number] = os.open(path, os.O_RDONLY)
    return number

  def _sync(self, about):
    now = Recorder(self.root)
    now._open = self._open
    now.look('')
    number, (point,) = about.st_ino, now.points
    if stat.S_ISDIR(about.st_mode):
      self._synced_entries[number] = point.entries.get(number, {})
    else:
      self._synced_data[number] = point.data.get(number, b'')


def _content(path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    return b''.join(iter(lambda: os.read(descriptor, 1 << 20), b''))
  finally:
    os.close(descriptor)


def image(point, root, target, rng, *, kill=False):
  """Writes a tree as the disk may hold it into an empty directory.

  Args:
    point: of a `Recorder`.
    root: its directory.
    target: where to write.
    rng: `random.Random`.
    kill: whether only the process has died: then all of it is as was seen.
  """
  # Some images lose nearly all, some nearly nothing.
  lost = 0 if kill else rng.choice((0.05, 0.5, 0.95, 1))

  def directory(number, path):
    old = point.synced_entries.get(number, {})
    new = point.entries.get(number, {})
    for name in sorted(old.keys() | new.keys()):
      inner = (old if rng.random() < lost else new).get(name)
      if inner is None:
        continue
      if inner in point.entries or inner in point.synced_entries:
        os.mkdir(path / name, 0o700)
        directory(inner, path / name)
      else:
        (path / name).write_bytes(content(inner))
    if point.entries.get(number) is not None and number == store:
      for name, data in point.catalog.items():
        if not name.endswith('-shm'):
          (path / name).write_bytes(data)

  def content(number):
    old = point.synced_data.get(number, b'')
    new = point.data.get(number, old)
    if old == new or rng.random() >= lost:
      return new
    at = rng.randrange(len(new) + 1)
    torn = new[:at], new[:at] + bytes(len(new) - at), (
        bytes(at) + new[at:])
    return rng.choice((old, *torn))

  top = os.stat(root).st_ino
  # The root itself is there, whoever has made it.
  store = {**point.synced_entries.get(top, {}), **point.entries[top]}.get(
      'store')
  directory(top, target)
