"""A system of which one call fails: the k-th, with an error of choice.

Or from then on all calls of its kind do, or all calls.

Counted are the calls of `os` that a store makes, opening, reading, writing and
closing of files, locks, and statements of the catalog. A write that fails has
written a half. What C code calls by itself is not seen.
"""

import builtins
import contextlib
import errno
import fcntl
import io
import os
import sqlite3
import threading

ERRORS = ('ENOSPC', 'EIO', 'EMFILE', 'EINTR')
# What else a disk, its quota, a server or a lack of rights may answer.
MORE_ERRORS = (*ERRORS, 'EDQUOT', 'EROFS', 'ENOMEM', 'ENFILE', 'EACCES',
               'ESTALE', 'ETIMEDOUT', 'EBUSY')
FULL = ('ENOSPC', 'EDQUOT')
LASTS = ('once', 'such calls', 'all calls')
_CALLS = ('open', 'fsync', 'rename', 'replace', 'link', 'mkdir', 'unlink',
          'remove', 'rmdir', 'listdir', 'scandir', 'stat', 'lstat', 'chmod',
          'truncate', 'statvfs')
# What SQLite calls them.
_NAMES = {'ENOSPC': 'SQLITE_FULL', 'EIO': 'SQLITE_IOERR',
          'EMFILE': 'SQLITE_CANTOPEN', 'EINTR': 'SQLITE_BUSY',
          'EDQUOT': 'SQLITE_FULL', 'EROFS': 'SQLITE_READONLY',
          'ENOMEM': 'SQLITE_NOMEM', 'ENFILE': 'SQLITE_CANTOPEN',
          'EACCES': 'SQLITE_PERM', 'ESTALE': 'SQLITE_IOERR',
          'ETIMEDOUT': 'SQLITE_IOERR', 'EBUSY': 'SQLITE_BUSY'}


class System:
  """Counts calls.

  Attributes:
    count: calls so far.
    failed: the first call that was made to fail, '' for none.
    fell: all of them.
  """

  def __init__(self, number=-1, error='EIO', lasts='once'):
    self.count, self.failed, self.fell = 0, '', set()
    self._number, self._error, self._lasts = number, error, lasts
    self._lock, self._on = threading.Lock(), False

  def due(self, call):
    """Whether this call shall fail."""
    with self._lock:
      if not self._on:
        return False
      self.count += 1
      if self.count - 1 == self._number:
        self.failed = call
      elif not self.failed or not (self._lasts == 'all calls' or (
          self._lasts == 'such calls' and call == self.failed)):
        return False
      self.fell.add(call)
      return True

  def meet(self, call):
    if self.due(call):
      self.fail()

  def fail(self):
    number = getattr(errno, self._error)
    raise OSError(number, os.strerror(number))

  def fail_catalog(self):
    error = sqlite3.OperationalError('made to fail')
    error.sqlite_errorname = _NAMES[self._error]
    raise error

  @contextlib.contextmanager
  def running(self):
    """The calls inside count."""
    kept = [(os, name, getattr(os, name)) for name in _CALLS]
    kept += [(fcntl, 'flock', fcntl.flock), (io, 'open', io.open),
             (builtins, 'open', builtins.open),
             (sqlite3, 'connect', sqlite3.connect)]

    def wrapped(name, original):
      def call(*args, **named):
        self.meet(name)
        return original(*args, **named)
      return call

    def opened(*args, **named):
      self.meet('open')
      return _File(original_open(*args, **named), self)

    original_open, connect = io.open, sqlite3.connect
    def connected(*args, **named):
      if self.due('connect'):
        self.fail_catalog()
      return _Base(connect(*args, **named), self)

    try:
      for owner, name, original in kept:
        setattr(owner, name, wrapped(name, original))
      # Those who ask which calls know a descriptor mean these.
      os.supports_dir_fd.update({os.open, os.stat, os.unlink, os.rmdir})
      io.open = builtins.open = opened
      sqlite3.connect = connected
      self._on = True
      yield self
    finally:
      self._on = False
      os.supports_dir_fd.difference_update(
          {os.open, os.stat, os.unlink, os.rmdir})
      for owner, name, original in kept:
        setattr(owner, name, original)

  @contextlib.contextmanager
  def catalog(self, catalog):
    """The statements of an open catalog count too."""
    base = catalog._base
    catalog._base = _Base(base, self)
    try:
      yield
    finally:
      catalog._base = base


class _Base:
  """A connection to SQLite."""

  def __init__(self, base, system):
    self._base, self._system = base, system

  def __getattr__(self, name):
    return getattr(self._base, name)

  def execute(self, text, values=()):
    if self._system.due(f'catalog: {text.split()[0]}'):
      if text.lower().startswith('rollback'):
        # Whatever it says, SQLite leaves no transaction open.
        self._base.execute(text)
      self._system.fail_catalog()
    return self._base.execute(text, values)

  def executescript(self, text):
    if self._system.due('catalog: script'):
      self._system.fail_catalog()
    return self._base.executescript(text)


class _File:
  """An open file."""

  def __init__(self, file, system):
    self._file, self._system = file, system

  def __getattr__(self, name):
    return getattr(self._file, name)

  def __iter__(self):
    return iter(self._file)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    self._file.close()
    if self._file.writable and 'r' not in str(self._file.mode):
      self._system.meet('close')

  def read(self, *args):
    self._system.meet('read')
    return self._file.read(*args)

  def readinto(self, room):
    self._system.meet('read')
    return self._file.readinto(room)

  def write(self, data):
    if self._system.due('write'):
      self._file.write(data[:len(data) // 2])
      self._system.fail()
    return self._file.write(data)
