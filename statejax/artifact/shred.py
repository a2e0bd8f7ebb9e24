"""Keys that go with their artifact: destroyed when it is revoked or deleted.

A manifest never changes, and copies of an artifact may lie anywhere. What can
be destroyed is the secret that opens it; which ones there are `sealing` says.
They are first written down as condemned, together with what condemns them, and
then destroyed, so that a kill in between only delays it: whoever opens the
store next ends it, before anything else.

Out of reach are: copies of a key made by others, such as a backup of the
secrets or a grant that a holder has opened in a store elsewhere; what was never
sealed or was copied in clear; what is wrapped by the organisation's own key,
that is exports and artifacts made by earlier releases; what a drive keeps of
blocks written over. Imports no jax.
"""

from statejax.artifact import layout, manifest, sealing, verify
from statejax.artifact.outcome import Refused


def condemn(shop, chosen):
  """Condemns the secrets of the sealed artifacts that are chosen.

  One whose manifest is not whole is passed over; its key goes when it is
  deleted.

  Args:
    shop: `objects.Store`.
    chosen: (id, manifest) -> whether its keys shall go.
  """
  there = _kept(shop)
  for id in shop.catalog.objects() if there else ():
    try:
      about = verify.head(shop.place(id), name=id)[2]
    except (Refused, OSError):
      continue
    names = {*_names(shop, id, about), sealing.pushed_name(id)} & there
    if names and chosen(id, about):
      shop.catalog.condemn(sorted(names))


def condemn_one(shop, folder):
  """Condemns the secrets of an artifact that is being deleted.

  What was pushed to a bucket can be pulled again: that key stays until the
  artifact is revoked.
  """
  try:
    data = layout.read(folder, manifest.NAME)
    about = manifest.parse(data)
  except (Refused, OSError):
    return  # `sweep` ends it
  names = _names(shop, manifest.artifact_id(data), about) & _kept(shop)
  if names:
    shop.catalog.condemn(sorted(names))


def sweep(shop):
  """Destroys keys of artifacts that are not there, as of mints cut short.

  Nothing is destroyed while anything is being minted, or where a manifest
  cannot be read: then it is not known whose keys are needed.
  """
  # In this order: a mint makes the key within its directory in tmp, and moves
  # that directory to its place.
  there = shop.secrets.names(sealing.own_name(shop, ''))
  if not there or any((shop.path / 'tmp').iterdir()):
    return
  try:
    needed = {sealing.own_name(shop, manifest.parse(layout.read(
        folder, manifest.NAME))['nonce'])
        for folder in (shop.path / 'objects').glob('??/' + '?' * 64)}
  except (Refused, OSError):
    return
  if there - needed:
    shop.catalog.condemn(sorted(there - needed))
    shop.shred()


def _names(shop, id, about):
  """The secrets that open one artifact of the store and nothing else."""
  own = sealing.own_name(shop, about['nonce'])
  names = {sealing.data_name(id)}
  # Whatever else a manifest may name is not its own.
  if about['sealed'] != 'none' and about['seal']['kek'] == own:
    names.add(own)
  return names


def _kept(shop):
  return {name for beginning in (sealing.own_name(shop, ''), 'data-', 'pushed-')
          for name in shop.secrets.names(beginning)}
