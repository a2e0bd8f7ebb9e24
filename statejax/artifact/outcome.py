"""How a load ends, and why: the codes, and what to do about each."""

import dataclasses

# Code -> what is wrong; what to do.
CODES = {
    'E_LAYOUT': 'it is not laid out as an artifact is, or was cut short; '
                'fetch it again',
    'E_LIMIT': 'larger than what is accepted here; raise the quota if you '
               'trust it',
    'E_MANIFEST': 'the manifest is not one that this version writes; '
                  'use another copy',
    'E_VERSION': 'made by a newer version; upgrade statejax',
    'E_ID': 'the content is not what the name says; use another copy',
    'E_UNSIGNED': 'nobody vouches for it here; ask its producer to sign it',
    'E_SIG': 'the signature or code does not fit the content; use another copy',
    'E_TRUST': 'its key may not do this here; see the trust document',
    'E_CLOCK': 'the clock runs behind the audit log; set the clock',
    'E_CRL_STALE': 'the revocation list is too old; fetch a fresh one',
    'E_REVOKED': 'it was revoked; absorb the tokens again',
    'E_EXPIRED': 'its time is over; absorb the tokens again',
    'E_ACL': 'this principal may not do that, or there is no such artifact; '
             'ask its owner',
    'E_GRANT': 'the grant does not cover this; ask for another one',
    'E_WEIGHTS': 'made by other parameters; load those, or absorb again',
    'E_ADAPTERS': 'made with other adapters; load those, or absorb again',
    'E_SCHEMA': 'the state has another layout; load the model it is of',
    'E_DTYPE': 'the state has other dtypes; load with its own store dtype',
    'E_TOKENIZER': 'another tokenizer: its ids mean other text here',
    'E_CHAT': 'another chat template or other special tokens; use its own',
    'E_POSITION': 'another configuration of positions, windows or rates; '
                  'load it with its own config',
    'E_HORIZON': 'longer than this model goes; compact it first',
    'E_POLICY': 'made under another policy; absorb again under the new one',
    'E_EPOCH': 'its policy is too old; absorb again under the new one',
    'E_TOOLS': 'made with other tools; offer the same ones',
    'E_KEYED': 'a keyed field cannot be compared without its key; '
               'get the key from the owner',
    'E_FILES': 'a file is missing, surplus or damaged; use another copy',
    'E_SEALED': 'it is sealed and the key is not here, or destroyed',
    'E_PLAIN': 'plain.json contradicts the manifest; use another copy',
    'E_PAYLOAD': 'the payload cannot be read; use another copy',
    'E_DIGEST': 'the arrays are not what was stored; use another copy',
    'E_NONFINITE': 'the state holds NaN or infinity; go back to an earlier one',
    'E_BOUNDS': 'a value is larger than any sound state has; '
                'go back to an earlier one',
    'E_WITNESS': 'the state does not stand where its tokens say; '
                 'throw it away and absorb again',
    'E_NOSPACE': 'no room on the disk; free some and try again',
    'E_IO': 'reading or writing failed; see to what it names, and try again',
    'W_CHUNK': 'another chunk grid: equal within tolerance',
    'W_NUMERICS': 'another program or machine: equal within tolerance',
    'W_TOOLS': 'more tools than it was made with',
    'W_CHAT': 'another chat template: raw continuation only',
    'W_ENV': 'facts about the environment are stale: verify them again',
    'W_SAMPLER': 'another sampler: reseeded',
    'W_WEIGHTS': 'made by other parameters or adapters: nothing that follows '
                 'is of one model, and all of it is marked',
    'W_CODE': 'made by another version of statejax',
    'W_CRL': 'the revocation list is old',
    'W_MIGRATED': 'its layout was changed after it was computed: equal within '
                  'tolerance',
}

# The action of a load that is only to see whether it would: the accounts count
# nothing of it.
LOOK = 'verify'

OUTCOMES = ('resumed', 'reprefilled', 'refused')
# From the strongest to none.
PROMISES = ('bit', 'tolerance', 'none')


class Refused(ValueError):
  """A check has failed.

  Attributes:
    code: of `CODES`.
    detail: what was expected and what was found.
  """

  def __init__(self, code: str, detail: str):
    self.code, self.detail = code, detail
    super().__init__(f'{code}: {detail}; {CODES[code]}.')


@dataclasses.dataclass(frozen=True)
class Receipt:
  """The head of the audit log right after this decision was written down.

  Whoever keeps one can tell later whether the log was cut short.
  """

  seq: int
  head: str


@dataclasses.dataclass(frozen=True)
class Decision:
  """How a load has ended.

  Attributes:
    outcome: 'resumed', 'reprefilled' or 'refused'.
    n: tokens that need not be absorbed again, or that were.
    code: why refused or reprefilled, '' where resumed.
    promise: 'bit', 'tolerance' or 'none', of what follows from here.
    warnings: codes `W_...`.
    detail: the same in words.
    receipt: where this stands in the audit log; None without one.
  """

  outcome: str
  n: int = 0
  code: str = ''
  promise: str = 'none'
  warnings: tuple[str, ...] = ()
  detail: str = ''
  receipt: Receipt | None = None

  @property
  def mark(self) -> str:
    """Code which all that comes of it must bear, '' for none."""
    return 'W_WEIGHTS' if 'W_WEIGHTS' in self.warnings else ''

  def __str__(self):
    if self.outcome == 'resumed':
      return f'resumed({self.n})'
    if self.outcome == 'reprefilled':
      return f'reprefilled({self.n}, {self.code})'
    return f'refused({self.code})'


def absent(key: str) -> Refused:
  """Returns what is told of an artifact that is not there, or not to be seen.

  Args:
    key: what it was asked by.
  """
  short = ' (12 characters or more of an id)' if (
      key.startswith('sj1-') and len(key) < 12) else ''
  return Refused('E_ACL', 'expected an artifact or name of this store'
                 f'{short}, got {key[:80]!r}')


def refusal(error: Refused) -> Decision:
  """Returns the decision that a failed check makes."""
  return Decision('refused', code=error.code, detail=error.detail)
