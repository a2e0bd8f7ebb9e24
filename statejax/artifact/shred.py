"""Keys that go with their artifact: destroyed when it is revoked or deleted.

A manifest never changes, and copies of an artifact may lie anywhere. What can
be destroyed is the secret that opens it; which ones there are `sealing` says.
They are first written down as condemned, together with what condemns them, and
then destroyed, so that a kill in between only delays it: whoever opens the
store next ends it, before anything else.

No key is destroyed because its artifact is not to be seen: the disk may not be
there, or this may be an older copy of the store. The catalog must say that the
artifact was revoked or deleted, or that its mint never came to its end. And a
copy of a store destroys nothing that the store needs; see `home`.

Out of reach are: copies of a key made by others, such as a backup of the
secrets or a grant that a holder has opened in a store elsewhere; what was never
sealed or was copied in clear; what is wrapped by the organisation's own key,
that is exports and artifacts made by earlier releases; keys that an earlier
release has kept for several stores, or left of a mint that was killed; what a
drive keeps of blocks written over. Imports no jax.
"""

from statejax.artifact import home, layout, manifest, sealing, verify
from statejax.artifact.outcome import Refused


def condemn(shop, chosen) -> str:
  """Condemns the secrets of the sealed artifacts that are chosen.

  Also of what was pushed to a bucket and then deleted here. One whose manifest
  is not whole is passed over; its key goes when it is deleted.

  Args:
    shop: `objects.Store`.
    chosen: (id, manifest) -> whether its keys shall go.

  Returns:
    why they stay, in words, where this is a copy or the secrets are not those
    of the store; '' else.
  """
  kept, gone = _known(shop), set()
  there = shop.catalog.objects() if kept else {}
  for id in there:
    try:
      about = verify.head(shop.place(id), name=id)[2]
    except (Refused, OSError):
      continue
    names = {*_names(shop, id, about), sealing.pushed_name(shop, id),
             *sealing.shared_names(id)} & kept
    if names and chosen(id, about):
      gone |= names
  for name, (id, _, text) in shop.catalog.expected().items() if kept else ():
    if text and id not in there and name in kept and (
        chosen(id, manifest.parse(text.encode()))):
      gone.add(name)
  return _condemn(shop, gone)


def condemn_one(shop, folder) -> str:
  """Condemns the secrets of an artifact that is being deleted.

  What was pushed to a bucket can be pulled again: that key stays until the
  artifact is revoked. So does all that the catalog knows nothing of.

  Returns:
    see `condemn`.
  """
  try:
    data = layout.read(folder, manifest.NAME)
    about = manifest.parse(data)
  except (Refused, OSError):
    return ''  # `sweep` ends it
  id = manifest.artifact_id(data)
  names = _names(shop, id, about) & _known(shop)
  if not shop.catalog.knows(id):
    names &= shop.catalog.expected().keys()
  return _condemn(shop, names)


def sweep(shop, grace: int):
  """Destroys what was made for artifacts which the catalog says are not here:
  they were deleted, or did not come.

  Nothing while anything is being minted, nor where an artifact is missing that
  should be here: then it is not known whose keys are needed.

  Args:
    shop: `objects.Store`.
    grace: seconds for which a key stays in any case.
  """
  if not shop.catalog.expected() or home.elsewhere(shop):
    return
  # In this order: a mint has its directory in tmp, then writes down its key,
  # and then moves that directory to its place.
  expected = shop.catalog.expected()
  if any((shop.path / 'tmp').iterdir()):
    return
  there, now = shop.catalog.objects(), shop.catalog.clock()
  left = {name for name, (id, made, about) in expected.items()
          if id not in there and not about and made + grace <= now}
  if not left or not all(shop.place(id).exists() for id in there):
    return
  try:
    for folder in (shop.path / 'objects').glob('??/' + '?' * 64):
      if (id := f'sj1-{folder.name}') not in there:  # it may be adopted
        left -= _names(shop, id, manifest.parse(layout.read(
            folder, manifest.NAME)))
  except (Refused, OSError):
    return
  if left:
    shop.catalog.condemn(sorted(left))
    shop.shred()


def _condemn(shop, names):
  if names and not home.have(shop):
    shop.catalog.condemn(sorted(names))
    return (f'{len(names)} keys stay until it is opened with its own secrets '
            f'(--secrets): {shop.secrets.path} has none of them')
  store = home.elsewhere(shop) if names else ''
  if not store:
    shop.catalog.condemn(sorted(names))
    return ''
  return (f'{len(names)} keys stay: this is a copy of {store}, which opens by '
          'them what it has; revoke or delete it there too')


def _names(shop, id, about):
  """The secrets that open one artifact of the store and nothing else."""
  own = sealing.own_name(shop, about['nonce'])
  names = {sealing.data_name(shop, id)}
  # Whatever else a manifest may name is not its own.
  if about['sealed'] != 'none' and about['seal']['kek'] == own:
    names.add(own)
  return names


def _known(shop):
  """The secrets that are here, and those that are where the store's own are."""
  return shop.catalog.expected().keys() | {
      name for beginning in (sealing.own_name(shop, ''), 'data-', 'pushed-')
      for name in shop.secrets.names(beginning)}
