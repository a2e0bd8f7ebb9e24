"""Where a row must stand: what the host knows of it beside the state itself.

A step moves a row's length and witness with the rows and counts of its data; a
host moves a `Standing` with the tokens that it meant. Whoever holds states in
slots compares both wherever a row enters or leaves one: a chunk absorbed twice,
a token lost, a neighbour's row, the previous occupant of a slot all differ.

What only copies a row must not change a bit of it: `at_rest` knows its digest
too, until it absorbs more.
"""

import dataclasses
from collections.abc import Mapping

from statejax import state as st
from statejax.artifact import digest, names
from statejax.artifact.outcome import Refused


@dataclasses.dataclass(frozen=True)
class Standing:
  """What a row has absorbed; a new one has absorbed nothing.

    >>> Standing().after([1, 2]).after([3]) == Standing().after([1, 2, 3])
    True

  Attributes:
    length: number of tokens.
    witness: of them, 32 hex digits.
    digest: tree digest of the row, '' where only the tokens are known.
  """

  length: int = 0
  witness: str = '0' * 32
  digest: str = ''

  def after(self, tokens) -> 'Standing':
    """Returns where a row stands that absorbs further tokens."""
    tokens = list(map(int, tokens))
    return Standing(self.length + len(tokens),
                    names.extend(self.witness, tokens))

  def require(self, live, where: str = 'row'):
    """Raises unless a row stands here.

    Args:
      live: of `statejax.state.live`.
      where: what to call it.

    Raises:
      Refused: E_WITNESS: it absorbed other tokens; E_DIGEST: the same ones, but
        it is not bit for bit what was at rest.
    """
    for what, expected, got in (
        ('length', self.length, int(live.length)),
        ('witness', self.witness, names.lanes(live.witness))):
      if got != expected:
        raise Refused('E_WITNESS', f'{where}: {what}: expected {expected}, as '
                      f'the host knows it, got {got} in the state')
    if self.digest and (got := digest.tree_digest(live)) != self.digest:
      raise Refused('E_DIGEST', f'{where}: expected {self.digest}, as it was '
                    f'at rest, got {got}')


def at_rest(state, row: int) -> Standing:
  """Returns where a row stands, to the bit.

  Args:
    state: `ServingState`.
    row: of it.
  """
  live = st.live(state, row)
  return Standing(int(live.length), names.lanes(live.witness),
                  digest.tree_digest(live))


def check(state, expected: Mapping[int, Standing | None]):
  """Raises unless rows of a state stand where they must.

  Args:
    state: `ServingState`, or a snapshot of one (then without digests).
    expected: of each row asked about; None, as a load that was refused has it,
      stands nowhere.

  Raises:
    Refused: E_WITNESS, E_DIGEST; names the row.
  """
  for row, one in expected.items():
    if one is None:
      raise Refused('E_WITNESS', f'row {row}: expected a row that was loaded, '
                    'got whatever the slot held before')
    one.require(st.live(state, row), f'row {row}')
