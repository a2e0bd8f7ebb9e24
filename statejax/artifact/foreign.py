"""What came from elsewhere, and what was made of it here.

Of an artifact that a key has signed this store knows no more than that key's
word, and neither of what stems from it, at any depth: a fork, what was resumed,
migrated or edited. The store vouches for these, as it made them; but they count
only as long as what they stem from would. So it remembers of every signed one
who made it, for whom and when, what it was exported from, and when it came,
also after it is deleted. Imports no jax.
"""

import dataclasses

from statejax.artifact import layout, manifest
from statejax.artifact.outcome import Refused

# Of a manifest: what a trust document and a revocation list ask for.
FIELDS = ('created', 'model', 'policy', 'provenance', 'governance')


@dataclasses.dataclass(frozen=True)
class Foreign:
  """What is remembered of an artifact that a key has signed.

  Attributes:
    id: of the artifact, which need not be here any more.
    seen: unix seconds when the store first had it.
    about: `FIELDS` of its manifest.
  """

  id: str
  seen: int
  about: dict

  def __str__(self):
    org = self.about['governance']['org'] or 'no organisation'
    signer = self.about['provenance']['producer']
    return f'{self.id} of {org}, signed by {signer}'


def facts(about: dict) -> dict | None:
  """Returns what is to be remembered of a manifest that a key has signed; None
  of one for which its store vouches.
  """
  signed = about['provenance']['producer'] != 'local'
  return {name: about[name] for name in FIELDS} if signed else None


def remember(shop, id: str, about: dict, seen: int | None = None):
  """Remembers an artifact that enters a store, if a key has signed it.

  Args:
    shop: `objects.Store`.
    id: of the artifact.
    about: its manifest.
    seen: unix seconds when it came; None is now.
  """
  if (said := facts(about)) is not None:
    shop.catalog.remember(id, said, seen)


def recall(shop):
  """Remembers what an earlier release has taken in, once for every store."""
  if shop.catalog.remembers():
    return
  with shop.catalog.transaction():
    for id, (_, _, _, created) in shop.catalog.objects().items():
      try:
        if (shop.place(id) / layout.SIG).exists():
          remember(shop, id, manifest.parse(layout.read(
              shop.place(id), manifest.NAME)), created)
      except (Refused, OSError):
        continue  # what is damaged nothing is made of
    shop.catalog.remembering()


def above(shop, about: dict) -> tuple[Foreign, ...]:
  """Returns what an artifact stems from that a key has signed, without itself,
  as far as this store knows.

  Args:
    shop: `objects.Store`.
    about: its manifest.
  """
  source = about['provenance']
  found = shop.catalog.foreign({source['root']} | {
      parent['id'] for parent in source['parents']})
  return tuple(Foreign(id, seen, facts) for id, (seen, facts) in found.items())
