"""Artifacts in a bucket: the objects of a store, without its catalog.

    URL/objects/ab/<64 hex>/manifest.json and what it lists

URL is gs://bucket/path, s3://bucket/path, file:///path and whatever else
TensorStore, which Orbax brings, opens. Nothing there is overwritten: every
object is made only where there is none, by the service itself. The manifest
comes last, so that an artifact is there whole or, after a death, not at all.
"""

import hashlib
import pathlib
import re

from statejax.artifact import canonical, layout, manifest
from statejax.artifact.outcome import Refused

_SCHEME = re.compile('[a-z0-9+.-]+://')
_NAMED = re.compile(r'(.+?)/?(sj1-[0-9a-f]{64})')
# How TensorStore calls the generation of what is not there.
_ABSENT = b'\2'


def is_url(text) -> bool:
  """Whether a text is a URL and not a path."""
  return bool(_SCHEME.match(str(text)))


def split(target: str) -> tuple[str, str]:
  """Returns (URL, id) of `URL/sj1-...`.

  Raises:
    ValueError: it is not of that form.
  """
  found = _NAMED.fullmatch(target)
  if not is_url(target) or found is None:
    raise ValueError(f'{target}: expected a URL, "/" and the id of an artifact,'
                     ' e.g. gs://bucket/states/sj1-...')
  return found[1], found[2]


def push(folder, url: str) -> str:
  """Copies the artifact in a directory to a bucket; returns its id.

  Repeated after a failure it goes on where that one stopped; what is there
  already stays as it is.

  Args:
    folder: the artifact, whole.
    url: of the bucket and the path in it.

  Raises:
    Refused: E_FILES: other content lies there under this name; E_IO.
    ValueError: no such URL.
  """
  found = layout.walk(folder)
  id = manifest.artifact_id(layout.read(folder, manifest.NAME))
  bucket = opened(url)
  for name in sorted(found.files, key=lambda name: name == manifest.NAME):
    _create(bucket, _place(id, name), layout.read(folder, name))
  return id


def pull(url: str, id: str, folder, *, max_bytes: int = 1 << 40):
  """Copies an artifact from a bucket into an empty directory.

  The files that its manifest lists, and who vouches for it; nothing is verified
  but that they are no more than that: verify the directory next.

  Args:
    url: of the bucket and the path in it.
    id: of the artifact.
    folder: exists and is empty.
    max_bytes: of all files together.

  Raises:
    Refused: E_LAYOUT: it is not there, or not whole; E_MANIFEST, E_VERSION,
      E_ID, E_FILES, E_LIMIT, E_IO.
    ValueError: no such URL.
  """
  bucket, folder = opened(url), pathlib.Path(folder)
  data = _read(bucket, _place(id, manifest.NAME))
  if data is None:
    raise Refused('E_LAYOUT', f'{url}: expected {id}, got none that is whole')
  about = manifest.parse(data[:canonical.MAX_BYTES + 1])
  if manifest.artifact_id(data) != id:
    raise Refused('E_ID', f'{url}: expected {id}, got '
                  f'{manifest.artifact_id(data)}')
  total = sum(size for _, size, _ in about['files'])
  if total > max_bytes:
    raise Refused('E_LIMIT', f'{id}: expected at most {max_bytes} bytes, got '
                  f'{total}')
  (folder / manifest.NAME).write_bytes(data)
  for name, size, mark in about['files']:
    data = _read(bucket, _place(id, name))
    if data is None or len(data) != size or (
        hashlib.sha256(data).hexdigest() != mark):
      raise Refused('E_FILES', f'{name}: expected {size} bytes of sha256 '
                    f'{mark}, got {"nothing" if data is None else "others"}')
    (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  for name in (layout.MAC, layout.SIG):
    data = _read(bucket, _place(id, name))
    if data is not None:
      (folder / name).write_bytes(data)


def opened(url: str):
  """Returns the TensorStore key-value store of a URL.

  Raises:
    ValueError: no URL, or of a scheme that it does not know.
  """
  import tensorstore
  if not is_url(url):
    raise ValueError(f'{url}: expected a URL such as gs://bucket/path, got '
                     'something else.')
  try:
    return tensorstore.KvStore.open(url.rstrip('/') + '/').result()
  except ValueError as error:
    raise ValueError(f'{url}: expected a URL that the installed package '
                     'tensorstore opens (gs://, s3://, file://, http://), got '
                     f'{error}.') from None


def _place(id, name):
  return f'objects/{id[4:6]}/{id[4:]}/{name}'


def _create(bucket, key, data):
  """Makes an object, unless it is there with just this content."""
  try:
    made = bucket.write(key, data, if_equal=_ABSENT).result()
  except (OSError, ValueError) as error:
    raise Refused('E_IO', f'{key}: {error}') from error
  if not made.generation and _read(bucket, key) != data:
    raise Refused('E_FILES', f'{key}: expected nothing there or the same, got '
                  'other content; nothing is overwritten')


def _read(bucket, key):
  """Returns the content of an object, None where there is none."""
  try:
    found = bucket.read(key).result()
  except (OSError, ValueError) as error:
    raise Refused('E_IO', f'{key}: {error}') from error
  return bytes(found.value) if found.state == 'value' else None
