"""Flags of `state mint` and `resume`: what to do where something is in the way.

A state that does not fit, or a name that is taken.
"""

from absl import flags

MISMATCH = flags.DEFINE_enum(
    'on_mismatch', 'refuse', ['refuse', 'reprefill'],
    'state resume: what to do where another model would load it')
UPGRADE = flags.DEFINE_enum(
    'policy_upgrade', 'refuse', ['refuse', 'replay'],
    'state resume: what to do where it was made under another policy')
CHAT = flags.DEFINE_bool(
    'chat', False, 'state resume: it goes on as a chat, so that template and '
    'special tokens must be its own')
CROSS = flags.DEFINE_bool(
    'unsafe_cross_weights', False, 'state resume: go on under other parameters '
    'than made it; all that comes of it is marked')
HORIZON = flags.DEFINE_integer(
    'horizon', None, 'state mint, resume: most tokens that a state may have to '
    'go on from; without it there is no limit', lower_bound=1)
REPLACE = flags.DEFINE_bool(
    'replace', False, 'state mint: the name may be one of your own artifacts, '
    'which then goes without')

USED = {flag.name for flag in (MISMATCH, UPGRADE, CHAT, CROSS, HORIZON)}


def ask():
  """Returns the `compat.Ask` that the flags say."""
  from statejax.artifact.compat import Ask
  return Ask(chat=CHAT.value, on_mismatch=MISMATCH.value,
             policy_upgrade=UPGRADE.value, unsafe_cross_weights=CROSS.value)


def taken(shop, name, who) -> int:
  """Returns the version of a name that a mint moves; 0 of a free one.

  Raises:
    ValueError: somebody else's, or one's own without --replace: what loses its
      name is collected.
  """
  from statejax.artifact import access, verify
  found = shop.catalog.ref(name)
  if found is None:
    return 0
  about = verify.head(shop.place(found[0]))[2]
  if REPLACE.value and access.owns(about, who):
    return found[1]
  raise ValueError(f'{name}: expected a free name, got one that is taken; '
                   'choose another one' + (
                       f', or say --replace to take it from {found[0]}.'
                       if access.owns(about, who) else '.'))


def horizon() -> int:
  """Returns the most tokens of a state to go on from."""
  from statejax.artifact import manifest
  return manifest.MAX_LENGTH if HORIZON.value is None else HORIZON.value
