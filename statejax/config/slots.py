"""Configuration of a slot bank, and of the layer that writes and reads it."""

import dataclasses

from statejax.config import checks

MODES = ('content', 'hashed', 'router')
POLICIES = ('lru', 'oldest', 'low_salience', 'reject')


@dataclasses.dataclass(frozen=True)
class SlotRules:
  """Sizes of a bank and the rules of its events; static.

  Attributes:
    slots: M.
    key: width K of a key.
    value: width V of a value.
    ring: R, earlier values kept.
    span: tokens of a value.
    key_span: tokens of a key.
    aliases: A.
    mode: which slot an event means. 'content': that of the nearest key, if its
      cosine is above `threshold`; 'hashed': that of the same key tokens, in a
      set of `ways` slots chosen by their hash; 'router': the slot it names,
      whatever that holds.
    threshold: of cosines.
    ways: slots of a set, for 'hashed'.
    policy: which open slot a new object takes when none is free. 'lru': the one
      not written or read for longest; 'oldest': not written for longest;
      'low_salience'; 'reject': none.
  """

  slots: int = 32
  key: int = 64
  value: int = 128
  ring: int = 1
  span: int = 16
  key_span: int = 8
  aliases: int = 8
  mode: str = 'content'
  threshold: float = 0.9
  ways: int = 1
  policy: str = 'lru'

  def __post_init__(self):
    checks.positive(self, 'slots', 'key', 'value', 'span', 'key_span',
                    'aliases', 'ways')
    checks.no_less(self, 0, 'ring')
    checks.divides(self, 'slots', 'ways')
    checks.one_of(self, 'mode', MODES)
    checks.one_of(self, 'policy', POLICIES)
    if not -1 <= self.threshold <= 1:
      raise ValueError('SlotRules.threshold: expected a cosine, got '
                       f'{self.threshold}.')


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """All that a document has said, by address: see `statejax.layers.slot_log`.

  Attributes:
    block: tokens of a block.
    k: blocks that a token looks into, its own among them if it is good enough.
    kappa: inverse temperature, as it begins.
  """

  block: int = 64
  k: int = 16
  kappa: float = 20.0

  def __post_init__(self):
    checks.positive(self, 'block', 'k')
    if not self.kappa > 0:
      raise ValueError(f'LogConfig.kappa: expected > 0, got {self.kappa}.')


@dataclasses.dataclass(frozen=True)
class SlotsConfig:
  """Memory slots that a model writes and reads: see `statejax.layers.slots`.

  Attributes:
    rules: of the bank.
    segment: tokens after which events are committed, counted from the
      document's first.
    events: E, events of a segment that are kept, the strongest.
    statement: tokens back, its own included, where an event finds the tokens of
      its key and value; 2 or more.
    top: slots per read.
    kappa: inverse temperature of reads, as it begins.
    confidence: least cosine of a read; below it nothing is read.
    vocab: of the model: the tokens of keys and values are then spelled into
      them. 0 leaves them to what the hidden state makes of them.
    fallback: what is read in place of slots that know nothing; None has none.
    asks: whether a token says that it asks; the fallback answers no other. A
      step in which nobody asks costs the fallback its stores alone.
  """

  rules: SlotRules = SlotRules()
  segment: int = 256
  events: int = 4
  statement: int = 32
  top: int = 1
  kappa: float = 20.0
  confidence: float = 0.7
  vocab: int = 0
  fallback: LogConfig | None = None
  asks: bool = False

  def __post_init__(self):
    checks.positive(self, 'segment', 'events', 'top')
    checks.no_less(self, 2, 'statement')
    checks.no_less(self, 0, 'vocab')
    if self.top > self.rules.slots:
      raise ValueError(f'SlotsConfig: expected top <= rules.slots, got top='
                       f'{self.top}, slots={self.rules.slots}.')
    if self.rules.mode == 'router':
      raise ValueError("SlotsConfig.rules.mode: expected 'content' or 'hashed' "
                       "in a layer, got 'router'.")
    if not self.kappa > 0 or not -1 <= self.confidence <= 1:
      raise ValueError(
          'SlotsConfig: expected kappa > 0 and confidence a cosine, got '
          f'kappa={self.kappa}, confidence={self.confidence}.')

    if self.asks and self.fallback is None:
      raise ValueError('SlotsConfig: expected a fallback with asks=True, got '
                       'None: there is nobody to ask; take asks=False.')

  @property
  def chooses(self):
    """See `statejax.laws`."""
    return True

  @property
  def straight_through(self):
    """See `statejax.laws`: hard events and reads learn as soft ones."""
    return True
