"""Flags of `state resume`: what may be done where a state does not fit."""

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

USED = {flag.name for flag in (MISMATCH, UPGRADE, CHAT, CROSS, HORIZON)}


def ask():
  """Returns the `compat.Ask` that the flags say."""
  from statejax.artifact.compat import Ask
  return Ask(chat=CHAT.value, on_mismatch=MISMATCH.value,
             policy_upgrade=UPGRADE.value, unsafe_cross_weights=CROSS.value)


def horizon() -> int:
  """Returns the most tokens of a state to go on from."""
  from statejax.artifact import manifest
  return manifest.MAX_LENGTH if HORIZON.value is None else HORIZON.value
