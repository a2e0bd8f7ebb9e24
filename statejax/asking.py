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

USED = {flag.name for flag in (MISMATCH, UPGRADE, CHAT, CROSS)}


def ask():
  """Returns the `compat.Ask` that the flags say."""
  from statejax.artifact.compat import Ask
  return Ask(chat=CHAT.value, on_mismatch=MISMATCH.value,
             policy_upgrade=UPGRADE.value, unsafe_cross_weights=CROSS.value)
