"""Words, names and sentence frames of `statejax.tasks.lifecycle_text`.

A frame is an opening, a cue and a close. Splits share the cues, which carry the
meaning, and differ in which openings meet which closes; and in which adjectives
meet which nouns in a key, which callsigns meet which numbers in a tag.
"""

SPLITS = ('train', 'dev', 'test')
_LISTS = lambda text: tuple(line.strip() for line in text.strip().split('\n'))

OPENINGS = _LISTS('''
    noted that
    word is
    desk note
    night shift says
    page entry
    as filed
    north office says
    ledger shows
    short memo
    one more
    courier reports
    late sheet''')
CLOSES = _LISTS('''
    agreed
    for now
    says clerk
    per ledger
    this week
    promptly
    in ink
    at noon
    until further
    blue form
    with stamps
    on file''')
CUES = {
    'update': ('is set to', 'now holds', 'takes figure'),
    'audit': ('once held', 'was seen with', 'used to show'),
    'reject': ('may not take', 'was refused', 'did not accept'),
    'lock': ('is locked now', 'is sealed', 'must stay'),
    'unlock': ('is open again', 'is unlocked', 'may change again'),
    'delete': ('is struck out', 'is deleted', 'is erased'),
    'alias': ('also goes by', 'is known as', 'bears the tag')}
ASKS = _LISTS('''
    the log is closed so please tell us
    that was all and one thing is asked
    here ends the log and someone asks us
    no more lines follow and we are asked
    after these lines the office wants to know
    now that it is shut please say this
    with the last page turned please tell us
    as nothing follows here is what is asked
    the sheet ends here and a caller asks
    so far the log and now tell us
    the bell has rung and we must know
    before the book goes back please tell us''')
QUESTIONS = {
    'now': ('what does {} hold now', 'what is {} set to today',
            'which figure stands for {} at present'),
    'before': ('what did {} hold just before', 'which figure did {} '
               'show just before', 'what was {} set to until then')}
ADJECTIVES = tuple('''
    amber ancient arctic bitter blank brave brisk broad calm clear clever
    coarse crimson curious damp dark deep distant dusty eager early empty
    faint fancy fierce flat fresh frozen gentle giant golden grand green
    hollow humble icy idle jolly keen large lean light lively lone loud
    lucky mellow misty
'''.split())
NOUNS = tuple('''
    anchor apple arrow badge barrel basin beacon bottle bridge bucket button
    candle canyon carpet castle cedar cellar chapel chisel comet copper
    corner cradle crater engine falcon feather fiddle forest fountain garden
    glacier hammer harbor helmet island jacket kettle ladder lantern marble
    meadow mirror needle orchard paddle pebble pillow
'''.split())
CALLSIGNS = tuple('''
    alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima
    mike november oscar papa quebec romeo sierra tango uniform victor
    whiskey xray yankee zulu
'''.split())
FILLER = tuple('''
    rain fell on the yard while cups were washed and old maps lay near lamps
    some visitors walked around under trees talking about trains bread music
    nobody counted chairs because windows stayed open all evening long ago
'''.split())
DIGITS = tuple('0123456789')
PAD, STOP, ASK, COLON, NONE, TICKET = '<pad>', '.', '?', ':', 'none', 'ticket'


def _vocabulary():
  texts = [*OPENINGS, *CLOSES, *ASKS, *sum(CUES.values(), ()),
           *sum(QUESTIONS.values(), ()), *FILLER]
  words = sorted({w for t in texts for w in t.split()} - {'{}'})
  names = [*ADJECTIVES, *NOUNS, *CALLSIGNS]
  return (PAD, STOP, ASK, COLON, NONE, TICKET, *DIGITS, *names,
          *(w for w in words if w not in names))


WORDS = _vocabulary()
_IDS = {word: i for i, word in enumerate(WORDS)}


def encode(text):
  """Returns the tokens of words with blanks between, a list.

  Raises:
    ValueError: a word that this task does not have.
  """
  try:
    return [_IDS[w] for w in text.split()]
  except KeyError as e:
    raise ValueError(f'expected words of `WORDS`, got {e.args[0]!r}.') from None


def decode(ids):
  """Returns the words of tokens.

  >>> decode(encode('amber falcon 1 2 is set to 4 0 7 7 1 .'))
  'amber falcon 1 2 is set to 4 0 7 7 1 .'
  """
  return ' '.join(WORDS[i] for i in ids)


def frame(draw, split, kind, middle, first=OPENINGS, last=CLOSES):
  """One line: an opening and a close that meet in this split alone."""
  # 4 of 6 classes of pairs are for training, so that each split has 24 or more.
  classes = {'train': (0, 1, 2, 3), 'dev': (4,), 'test': (5,)}[split]
  i = draw.below(len(first))
  fits = [j for j in range(len(last)) if (i + j) % 6 in classes]
  return f'{first[i]} {middle} {last[draw.one(fits)]}'


def key(draw, split):
  """A key of this split: (adjective, noun, number) as indices."""
  while True:
    found = (draw.below(len(ADJECTIVES)), draw.below(len(NOUNS)),
             draw.below(100))
    if _split_of(7 * found[0] + 11 * found[1]) == split:
      return found


def near(draw, split, of):
  """A key of this split that differs from another in one word or digit."""
  while True:
    adjective, noun, number = of
    where = draw.below(4)
    if where == 0:
      adjective = draw.below(len(ADJECTIVES))
    elif where == 1:
      noun = draw.below(len(NOUNS))
    elif where == 2:
      number = number % 10 + 10 * draw.below(10)
    else:
      number = number // 10 * 10 + draw.below(10)
    found = (adjective, noun, number)
    if found != of and _split_of(7 * adjective + 11 * noun) == split:
      return found


def tag(draw, split):
  """Another name, of this split: (callsign, number) as indices."""
  while True:
    found = draw.below(len(CALLSIGNS)), draw.below(100)
    if _split_of(found[0] + 3 * found[1]) == split:
      return found


def _split_of(number):
  return {8: 'dev', 9: 'test'}.get(number % 10, 'train')


def name(found):
  """The words of a key or tag."""
  *words, number = found
  lists = (ADJECTIVES, NOUNS) if len(words) == 2 else (CALLSIGNS,)
  first = [words_of[i] for words_of, i in zip(lists, words)]
  return ' '.join([*first, *f'{number:02d}'])


def value(number):
  """The words of a value, 0 to 99999."""
  return ' '.join(f'{number:05d}')
