"""One crash-safe way to publish a directory, used by all that is stored.

A directory is filled under a temporary name, listed with sizes and SHA-256 in
`files.json`, synced to the disk and renamed. So it is there whole or not at
all, and nothing published is ever written again. Its writer holds a lock on the
temporary directory, which the system drops when the writer dies: that is proof
also across restarts and containers, where a process id proves nothing. Imports
no jax.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import time

LISTING = 'files.json'
_TEMPORARY = re.compile(r'\..+\.tmp-\d+-\d+-[0-9a-f]{8}')
_ADVICE = 'use another copy, or an earlier one'


class AlreadyPublished(ValueError, FileExistsError):
  """The path is taken; what is published is never overwritten."""


@contextlib.contextmanager
def publish(path):
  """Yields a fresh directory to fill; on success it becomes `path`, for good.

  Args:
    path: where to publish. Must not exist; its parent must.

  Yields:
    an absolute `pathlib.Path`, empty, beside `path`.

  Raises:
    AlreadyPublished: something exists at `path`, before or after filling.
    ValueError: the directory holds a link, a special file, an empty directory
      or a `files.json` of its own.
  """
  path = pathlib.Path(os.path.abspath(path))
  _refuse_existing(path)
  with stage(path) as folder:
    yield folder
    _write_listing(folder)
    place(folder, path)


@contextlib.contextmanager
def stage(path):
  """Yields a fresh, locked directory beside `path`, gone at the end.

  What is filled must be moved away by `place` before that. After a kill it
  stays until `sweep`.
  """
  folder, lock = _locked_directory(pathlib.Path(os.path.abspath(path)))
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def place(folder, path):
  """Syncs all of a directory and renames it, whole, to a path not yet taken.

  Raises:
    AlreadyPublished: something exists at `path`.
  """
  _sync_tree(folder)
  _refuse_existing(path)
  _rename(folder, path)
  sync(path.parent)
  if folder.parent != path.parent:
    sync(folder.parent)


def check(path):
  """Verifies a published directory against its listing, byte for byte.

  Args:
    path: a directory which `publish` has made.

  Raises:
    ValueError: nothing is there, or a file is missing, surplus, no regular
      file, of another size or of other content; names it.
  """
  path = pathlib.Path(path)
  found = dict(_walk(path))
  listed = _read_listing(path)
  found.pop(LISTING, None)
  for name in sorted(listed.keys() | found.keys()):
    if name not in found:
      raise ValueError(f'{path / name}: expected a file, as listed in '
                       f'{LISTING}, got none; {_ADVICE}.')
    if name not in listed:
      raise ValueError(f'{path / name}: expected only files listed in '
                       f'{LISTING}, got one more; remove it if you know where '
                       'it is from.')
    size, digest = listed[name]
    if found[name] != size:
      raise ValueError(f'{path / name}: expected {size} bytes, got '
                       f'{found[name]}; the file is damaged, {_ADVICE}.')
    got = _sha256(path / name)
    if got != digest:
      raise ValueError(f'{path / name}: expected sha256 {digest}, got {got}; '
                       f'the file is damaged, {_ADVICE}.')


def sweep(parent, name='*'):
  """Removes what killed writers left; returns the removed paths.

  Args:
    parent: the directory in which things are published. Directories of living
      writers, of this or another process, are left alone.
    name: under which they would have been published; '*' is any.
  """
  removed = []
  for folder in sorted(pathlib.Path(parent).glob(f'.{name}.tmp-*')):
    if not _TEMPORARY.fullmatch(folder.name):
      continue
    try:
      lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # just published or swept, or no directory
      continue
    try:
      # Still there while we hold the lock: its writer is dead.
      if _lock(lock) and folder.exists():
        shutil.rmtree(folder)
        removed.append(folder)
    finally:
      os.close(lock)
  return removed


def living(folder) -> bool:
  """Whether the writer of a staged directory, moved or not, is still at it.

  Where the file system has no locks nobody can tell, and this says no.
  """
  try:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  except FileNotFoundError:
    return False
  try:
    return _lock(lock) is False
  finally:
    os.close(lock)


def _locked_directory(path):
  while True:
    folder = path.parent / (f'.{path.name}.tmp-{os.getpid()}-'
                            f'{time.time_ns()}-{secrets.token_hex(4)}')
    folder.mkdir()
    try:
      lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
      continue  # a sweep came before the lock, and took it for abandoned
    try:
      if _lock(lock) is not False and folder.exists():
        return folder, lock
    except BaseException:  # what nobody holds is swept
      os.close(lock)
      raise
    os.close(lock)


def _lock(descriptor):
  """Returns whether we hold the lock now; None if there are no locks here."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except BlockingIOError:
    return False
  except OSError:  # some network file systems: then nothing is ever swept
    return None


def _refuse_existing(path):
  if os.path.lexists(path):
    raise AlreadyPublished(f'{path}: expected a path not yet taken, got an '
                           'existing one; nothing published is overwritten: '
                           'choose another name, or remove it first.')


def _rename(folder, path):
  try:
    os.rename(folder, path)
  except OSError as error:
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
      _refuse_existing(path)  # another writer was faster
    raise


def _walk(folder, prefix=''):
  """Yields (name, size) of every file below; refuses what is no plain file."""
  here = folder / prefix
  try:
    if not stat.S_ISDIR(os.lstat(here).st_mode):
      raise ValueError(f'{here}: expected a directory, got a file or a link; '
                       'give the path of the directory itself.')
    names = os.listdir(here)
  except FileNotFoundError:
    raise ValueError(f'{here}: expected a directory, got nothing; check the '
                     'path.') from None
  if prefix and not names:
    raise ValueError(f'{here}: expected files, got an empty directory; '
                     'remove it.')
  for name in names:
    about = os.lstat(here / name)
    if stat.S_ISDIR(about.st_mode):
      yield from _walk(folder, f'{prefix}{name}/')
    elif stat.S_ISREG(about.st_mode):
      yield prefix + name, about.st_size
    else:
      raise ValueError(f'{here / name}: expected regular files and directories'
                       ', got a link or special file; replace it by its '
                       'content.')


def _write_listing(folder):
  files = dict(_walk(folder))
  if LISTING in files:
    raise ValueError(f'{folder / LISTING}: expected this name to be free for '
                     'the listing, got a file; rename it.')
  listing = {name: (size, _sha256(folder / name))
             for name, size in files.items()}
  (folder / LISTING).write_bytes(_dump(listing))


def _read_listing(path):
  try:
    raw = (path / LISTING).read_bytes()
    listing = {name: (size, digest) for name, size, digest in json.loads(raw)}
    if raw == _dump(listing):  # else not written by us: duplicates, other order
      return listing
  except FileNotFoundError:
    raise ValueError(f'{path / LISTING}: expected a listing, got none; the '
                     f'directory was not published, {_ADVICE}.') from None
  except (ValueError, TypeError, RecursionError):
    pass
  raise ValueError(f'{path / LISTING}: expected a sorted [path, size, sha256] '
                   f'of every file, got something else; {_ADVICE}.')


def _dump(listing):
  rows = [json.dumps([name, *listing[name]]) for name in sorted(listing)]
  return ('[\n' + ',\n'.join(rows) + '\n]\n').encode()


def _sha256(path):
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _sync_tree(folder):
  # What cannot be listed cannot be synced.
  for here, _, names in os.walk(folder, topdown=False, onerror=failed):
    for name in names:
      sync(os.path.join(here, name))
    sync(here)


def failed(error):
  """Raises an error: for `os.walk`, which is silent otherwise."""
  raise error


def sync(path):
  """Returns once a file or a directory's entries are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some file systems cannot sync a directory; a failed write is no such case.
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
      raise
  finally:
    os.close(descriptor)
