"""An artifact as one file: a plain tar archive, of which only one form is read.

The files stand in order, the manifest first, each header with the same owner,
mode and time. A reader makes every header anew from its name and size and
compares all bytes, so that there is nothing in an archive which it does not
understand. Any `tar` opens it. Imports no jax.
"""

import os
import pathlib
import re
import tarfile

from statejax.artifact import commit, layout, manifest
from statejax.artifact.outcome import Refused

_BLOCK = 512
_END = bytes(2 * _BLOCK)


def pack(folder, path):
  """Writes the artifact in a directory to a new file.

  Args:
    folder: the artifact; its files are taken as they are.
    path: must not exist.

  Raises:
    FileExistsError: it does.
    OSError: it could not be written; then nothing is there.
  """
  folder, path = pathlib.Path(folder), pathlib.Path(os.path.abspath(path))
  found = layout.walk(folder)
  out = open(path, 'xb')
  try:
    with out:
      for name in sorted(found.files, key=_order):
        data = layout.read(folder, name)
        out.write(header_of(name, len(data)) + data)
        out.write(bytes(-len(data) % _BLOCK))
      out.write(_END)
      out.flush()
      os.fsync(out.fileno())
    commit.sync(path.parent)
  except BaseException:
    path.unlink()
    raise


def unpack(path, folder, *, max_bytes: int = 1 << 40):
  """Writes the files of an archive into an empty directory.

  Nothing is verified but the form of the archive: verify the directory next.

  Args:
    path: the file.
    folder: exists and is empty.
    max_bytes: of all files together.

  Raises:
    Refused: E_LAYOUT: not an archive of `pack`; E_LIMIT: too many, too large.
  """
  folder, total, last = pathlib.Path(folder), 0, ('', '')
  with open(path, 'rb') as file:
    for _ in range(layout.MAX_FILES + 1):
      header = file.read(_BLOCK)
      if header == bytes(_BLOCK):
        break
      name, size = parse_header(header)
      total += size
      if total > max_bytes or size > layout.MAX_SMALL.get(name, max_bytes):
        raise Refused('E_LIMIT', f'{name}: expected at most {max_bytes} bytes '
                      f'in all, got {total} or more')
      if _order(name) <= last:
        raise Refused('E_LAYOUT', f'{name}: expected names in order, each once')
      last = _order(name)
      _copy(file, folder, name, size)
    else:
      raise Refused('E_LIMIT', f'expected at most {layout.MAX_FILES} files')
    if file.read(_BLOCK + 1) != bytes(_BLOCK):
      raise Refused('E_LAYOUT', 'expected the end of the archive')


def _copy(file, folder, name, size):
  target = folder / name
  try:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(target, 'xb') as out:
      left = size
      while left:
        data = file.read(min(left, 1 << 20))
        if not data:
          raise Refused('E_LAYOUT', f'{name}: expected {left} bytes more, got '
                        'the end of the file')
        out.write(data)
        left -= len(data)
  except (FileExistsError, NotADirectoryError):
    # The name of a file is the beginning of another's path.
    raise Refused('E_LAYOUT', f'{name}: expected a name of its own') from None
  if file.read(-size % _BLOCK) != bytes(-size % _BLOCK):
    raise Refused('E_LAYOUT', f'{name}: expected zeros up to the next block')


def _order(name):
  return ('' if name.startswith('manifest.') else 'z', name)


def header_of(name: str, size: int) -> bytes:
  """Returns the one header that a file of this name and size can have.

  Raises:
    Refused: E_LAYOUT: no header can hold it.
  """
  info = tarfile.TarInfo(name)
  info.size, info.mode = size, 0o400
  try:
    return info.tobuf(tarfile.USTAR_FORMAT, 'ascii', 'strict')
  except ValueError as error:
    raise Refused('E_LAYOUT', f'{name}: expected a name that fits a tar '
                  f'header: {error}') from None


def parse_header(header: bytes) -> tuple[str, int]:
  """Returns (name, size) of a file, of its header of 512 bytes.

  Raises:
    Refused: E_LAYOUT: anything but `header_of` those.
  """
  try:
    info = tarfile.TarInfo.frombuf(header, 'ascii', 'strict')
    name, size = info.name, info.size
  except (tarfile.HeaderError, ValueError) as error:
    raise Refused('E_LAYOUT', f'expected the header of a file, got {error}'
                  ) from None
  if not re.fullmatch(manifest.FILE.pattern, name) or size < 0 or (
      header_of(name, size) != header):
    raise Refused('E_LAYOUT', f'{name[:80]!r}: expected a plain file with the '
                  'one header that it can have')
  return name, size
