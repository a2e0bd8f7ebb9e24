"""The files of an artifact: what may lie there, and whether it is all intact.

Nothing is parsed here and no link is followed. Imports no jax.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import stat
from concurrent import futures

from statejax.artifact import canonical, manifest
from statejax.artifact.outcome import Refused

MAC, SIG = 'manifest.mac', 'manifest.sig'
MAX_FILES = 4096 + 2
_SMALL = 1 << 20  # bytes that are read before threads have started
MAX_SMALL = {manifest.NAME: canonical.MAX_BYTES, MAC: 64, SIG: 4 << 20}


@dataclasses.dataclass(frozen=True)
class Walk:
  """What lies in a directory: {relative path: size}, and who vouches for it.

  Attributes:
    files: all of them.
    voucher: 'manifest.mac' or 'manifest.sig'.
  """

  files: dict[str, int]
  voucher: str


def walk(folder, *, max_bytes: int = 1 << 40, foreign: bool = False) -> Walk:
  """Lists a directory, if it can be an artifact at all.

  Args:
    folder: the artifact.
    max_bytes: of all files together.
    foreign: whether it comes from elsewhere; then no file may have a second
      name, by which it could be changed later.

  Raises:
    Refused: E_LAYOUT: a link, special file, empty directory, odd name, two
      vouchers or none; E_LIMIT: too many, too large. Names it.
  """
  folder = pathlib.Path(folder)
  files: dict[str, int] = {}
  for name, about in _entries(folder):
    if foreign and about.st_nlink != 1:
      raise Refused('E_LAYOUT', f'{name}: expected one name of the file, got '
                    f'{about.st_nlink} links')
    if about.st_size > MAX_SMALL.get(name, max_bytes):
      raise Refused('E_LIMIT', f'{name}: expected at most '
                    f'{MAX_SMALL.get(name, max_bytes)} bytes, got '
                    f'{about.st_size}')
    files[name] = about.st_size
    if len(files) > MAX_FILES:
      raise Refused('E_LIMIT', f'{folder.name}: expected at most {MAX_FILES} '
                    'files, got more')
  if sum(files.values()) > max_bytes:
    raise Refused('E_LIMIT', f'{folder.name}: expected at most {max_bytes} '
                  f'bytes, got {sum(files.values())}')
  vouchers = sorted({MAC, SIG} & files.keys())
  if manifest.NAME not in files or len(vouchers) != 1:
    raise Refused('E_LAYOUT', f'{folder.name}: expected {manifest.NAME} and '
                  f'one of {MAC} and {SIG}, got {sorted(files)[:4]}')
  return Walk(files, vouchers[0])


def _entries(folder, prefix='', depth=1):
  where = folder / prefix
  try:
    if not stat.S_ISDIR(os.lstat(where).st_mode):
      raise Refused('E_LAYOUT', f'{prefix or folder}: expected a directory, '
                    'got a file; one that was exported, state show takes')
    names = sorted(os.listdir(where))
  except FileNotFoundError:
    raise Refused('E_LAYOUT', f'{where}: expected a directory, got nothing'
                  ) from None
  if prefix and not names:
    raise Refused('E_LAYOUT', f'{prefix}: expected files, got an empty '
                  'directory')
  for name in names:
    path = prefix + name
    if len(path) > manifest.FILE.limit or depth > 6 or not re.fullmatch(
        manifest.FILE.pattern, path):
      raise Refused('E_LAYOUT', f'{path[:80]!r}: expected plain names (letters,'
                    ' digits, "_", "-", "."), at most 6 deep')
    about = os.lstat(folder / path)
    if stat.S_ISDIR(about.st_mode):
      yield from _entries(folder, path + '/', depth + 1)
    elif stat.S_ISREG(about.st_mode):
      yield path, about
    else:
      raise Refused('E_LAYOUT', f'{path}: expected files and directories, got '
                    'a link or special file')


def read(folder, name) -> bytes:
  """Returns the content of a file; follows no link at its end."""
  with open(pathlib.Path(folder) / name, 'rb', opener=_no_link) as file:
    return file.read()


def _no_link(path, flags):
  return os.open(path, flags | os.O_NOFOLLOW)


def listing(folder) -> list:
  """Returns [path, size, digest] of every file but the manifest's own."""
  found = [(name, about.st_size) for name, about in sorted(
      _entries(pathlib.Path(folder))) if not name.startswith('manifest.')]
  digests = _digests(folder, dict(found))
  return [[name, size, digests[name]] for name, size in found]


def check(folder, found: Walk, about: dict):
  """Raises unless the files are exactly those of the manifest, bit for bit.

  Raises:
    Refused: E_FILES, naming the first.
  """
  listed = {name: (size, digest) for name, size, digest in about['files']}
  there = {name: size for name, size in found.files.items()
           if name not in (manifest.NAME, MAC, SIG)}
  for name in sorted(listed.keys() | there.keys()):
    if name not in there or name not in listed:
      raise Refused('E_FILES', f'{name}: expected '
                    f'{"a file" if name in listed else "no such file"}')
    if there[name] != listed[name][0]:
      raise Refused('E_FILES', f'{name}: expected {listed[name][0]} bytes, got '
                    f'{there[name]}')
  for name, got in _digests(folder, dict(sorted(there.items()))).items():
    if got != listed[name][1]:
      raise Refused('E_FILES', f'{name}: expected sha256 {listed[name][1]}, '
                    f'got {got}')


def _digests(folder, sizes):
  """Returns {name: SHA-256} of {name: size}, of several files at once."""
  def one(name):
    with open(pathlib.Path(folder) / name, 'rb', opener=_no_link) as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  if sum(sizes.values()) < _SMALL:
    return {name: one(name) for name in sizes}
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(sizes, pool.map(one, sizes)))
