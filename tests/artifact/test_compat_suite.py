"""Every row of the table of compatibility, in every way it can differ.

Each case says what must come of it; how often that did not is counted.
"""

import collections
import copy

import example
import pytest

from statejax.artifact import compat, names, revoke, revoked
from statejax.artifact.compat import Ask
from statejax.artifact.outcome import Refused

H1, H2 = ('sha256:' + digit * 64 for digit in '12')
REPLAY = Ask(on_mismatch='reprefill')
UPGRADE = Ask(policy_upgrade='replay')
CHAT = Ask(chat=True)
CROSS = Ask(unsafe_cross_weights=True)


def keyed(text, secret=example.SECRET):
  return names.keyed(secret, 'text', text)


KIND, CRUEL, FOREIGN = keyed('kind'), keyed('cruel'), keyed('kind', bytes(32))
A, B, C = sorted(keyed(name) for name in 'abc')
SCHEMAS = {items: keyed(f'schema {items}') for items in (
    (A,), (B,), (A, B), (A, B, C))}


def field(group, **fields):
  return {group: fields}


def leaf(number, digest=H1, **fields):
  """The layout with one leaf changed."""
  leaves = copy.deepcopy(example.LEAVES)
  leaves[number] |= fields
  return field('state', schema_digest=digest, leaves=leaves)


def less(number):
  leaves = copy.deepcopy(example.LEAVES)
  del leaves[number]
  return field('state', schema_digest=H1, leaves=leaves)


def tools(*items, schema=None):
  return field('tools', items=sorted(items), schema=schema or SCHEMAS.get(
      tuple(sorted(items)), ''))


def env(**values):
  return {'env': {'assumptions': [
      {'name': name, 'value': value} for name, value in values.items()]}}


GO, SAME = 'go', {}
KEY, STORE, MATRIX = 0, 1, 2  # numbers of leaves


def refuse(code):
  return f'refuse {code}'


def replay(code):
  return f'replay {code}'


def warn(code, promise='bit'):
  return f'go {code} {promise}'


# Row, way: what the artifact has, what is here, what is asked, what must come.
# 'older' and 'newer' are said of the artifact.
CASES = [
    # Parameters and adapters.
    ('params', 'equal', field('model', params=H1), field('model', params=H1),
     Ask(), GO),
    ('params', 'differ', SAME, field('model', params=H1), Ask(),
     refuse('E_WEIGHTS')),
    ('params', 'differ, replay', SAME, field('model', params=H1), REPLAY,
     replay('E_WEIGHTS')),
    ('params', 'differ, upgrade', SAME, field('model', params=H1), UPGRADE,
     refuse('E_WEIGHTS')),
    ('params', 'differ, crossed', SAME, field('model', params=H1), CROSS,
     warn('W_WEIGHTS', 'none')),
    ('params', 'equal, crossed', SAME, SAME, CROSS, GO),
    ('adapters', 'equal', field('model', adapters=[H1, H2]),
     field('model', adapters=[H1, H2]), Ask(), GO),
    ('adapters', 'differ', field('model', adapters=[H1]),
     field('model', adapters=[H2]), Ask(), refuse('E_ADAPTERS')),
    ('adapters', 'in another order', field('model', adapters=[H1, H2]),
     field('model', adapters=[H2, H1]), Ask(), refuse('E_ADAPTERS')),
    ('adapters', 'older: fewer', field('model', adapters=[H1]),
     field('model', adapters=[H1, H2]), Ask(), refuse('E_ADAPTERS')),
    ('adapters', 'newer: more', field('model', adapters=[H1]), SAME, Ask(),
     refuse('E_ADAPTERS')),
    ('adapters', 'differ, replay', field('model', adapters=[H1]), SAME, REPLAY,
     replay('E_ADAPTERS')),
    ('adapters', 'differ, crossed', field('model', adapters=[H1]), SAME, CROSS,
     warn('W_WEIGHTS', 'none')),
    # Layout and dtypes.
    ('schema', 'equal', leaf(MATRIX), leaf(MATRIX), Ask(), GO),
    ('schema', 'differ: shape', SAME, leaf(MATRIX, shape=[1, 2, 5, 4]), Ask(),
     refuse('E_SCHEMA')),
    ('schema', 'differ: path', SAME, leaf(MATRIX, path='layers/z'), Ask(),
     refuse('E_SCHEMA')),
    ('schema', 'differ: role', SAME, leaf(MATRIX, role='conv'), Ask(),
     refuse('E_SCHEMA')),
    ('schema', 'differ: kind', SAME, leaf(STORE, kind='fixed'), Ask(),
     refuse('E_SCHEMA')),
    ('schema', 'differ: axes alone', SAME, leaf(MATRIX), Ask(),
     refuse('E_SCHEMA')),
    ('schema', 'a leaf more', SAME, less(MATRIX), Ask(), refuse('E_SCHEMA')),
    ('schema', 'a leaf less', less(MATRIX), SAME, Ask(), refuse('E_SCHEMA')),
    ('schema', 'older', field('state', schema='statejax.serving.v0'), SAME,
     Ask(), refuse('E_SCHEMA')),
    ('schema', 'newer', field('state', schema='statejax.serving.v2'), SAME,
     Ask(), refuse('E_SCHEMA')),
    ('schema', 'newer, replay', field('state', schema='statejax.serving.v2'),
     SAME, REPLAY, replay('E_SCHEMA')),
    ('schema', 'differ, crossed', SAME, leaf(MATRIX, role='conv'), CROSS,
     refuse('E_SCHEMA')),
    ('dtype', 'equal', leaf(MATRIX, dtype='bfloat16'),
     leaf(MATRIX, dtype='bfloat16'), Ask(), GO),
    ('dtype', 'differ: narrower here', SAME, leaf(MATRIX, dtype='bfloat16'),
     Ask(), refuse('E_DTYPE')),
    ('dtype', 'differ: wider here', SAME, leaf(STORE, dtype='float32'), Ask(),
     refuse('E_DTYPE')),
    ('dtype', 'differ, replay', SAME, leaf(MATRIX, dtype='float16'), REPLAY,
     replay('E_DTYPE')),
    # Tokenizer, special tokens, template.
    ('tokenizer', 'equal', field('tokenizer', digest=H1),
     field('tokenizer', digest=H1), Ask(), GO),
    ('tokenizer', 'differ', SAME, field('tokenizer', digest=H1), Ask(),
     refuse('E_TOKENIZER')),
    ('tokenizer', 'none here', SAME, field('tokenizer', digest=''), Ask(),
     refuse('E_TOKENIZER')),
    ('tokenizer', 'older: fewer ids', field('tokenizer', vocab=63), SAME, Ask(),
     refuse('E_TOKENIZER')),
    ('tokenizer', 'newer: more ids', field('tokenizer', vocab=65), SAME, Ask(),
     refuse('E_TOKENIZER')),
    ('tokenizer', 'differ, replay', SAME, field('tokenizer', digest=H1), REPLAY,
     refuse('E_TOKENIZER')),
    ('tokenizer', 'differ, upgrade', SAME, field('tokenizer', digest=H1),
     UPGRADE, refuse('E_TOKENIZER')),
    ('tokenizer', 'differ, known', SAME, field('tokenizer', digest=H1), Ask(),
     refuse('E_TOKENIZER')),
    ('tokenizer', 'differ, known, replay', SAME,
     field('tokenizer', digest=H1), REPLAY, replay('E_TOKENIZER')),
    *[(name, way, *sides, ask, expected)
      for name in ('special', 'chat_template')
      for way, sides, ask, expected in (
          ('equal', [field('tokenizer', **{name: H1})] * 2, CHAT, GO),
          ('differ, raw', (SAME, field('tokenizer', **{name: H1})), Ask(),
           warn('W_CHAT')),
          ('differ', (SAME, field('tokenizer', **{name: H1})), CHAT,
           refuse('E_CHAT')),
          ('none here', (field('tokenizer', **{name: H1}), SAME), CHAT,
           refuse('E_CHAT')),
          ('differ, replay', (SAME, field('tokenizer', **{name: H1})), Ask(
              chat=True, on_mismatch='reprefill'), replay('E_CHAT')))],
    # Positions and lengths; the artifact has 3 tokens.
    ('position', 'equal', field('model', position=H1),
     field('model', position=H1), Ask(), GO),
    ('position', 'differ', SAME, field('model', position=H1), Ask(),
     refuse('E_POSITION')),
    ('position', 'differ, replay', SAME, field('model', position=H1), REPLAY,
     replay('E_POSITION')),
    *[(f'horizon: {name}', way, theirs, field('horizon', **{name: most}), ask,
       expected) for name in ('max_pos', 'active_horizon')
      for way, theirs, most, ask, expected in (
          ('equal', SAME, 3, Ask(), GO), ('longer here', SAME, 4, Ask(), GO),
          ('differ', SAME, 2, Ask(), refuse('E_HORIZON')),
          ('differ, replay', SAME, 2, REPLAY, refuse('E_HORIZON')),
          ('of an empty one', field('state', length=0), 0, Ask(), GO),
          # What it was minted with does not bind who loads it.
          ('older: shorter', field('horizon', **{name: 2}), 3, Ask(), GO))],
    # Programs.
    ('chunk', 'equal', field('model', chunk=64), field('model', chunk=64),
     Ask(), GO),
    ('chunk', 'differ: smaller', field('model', chunk=64), SAME, Ask(),
     warn('W_CHUNK', 'tolerance')),
    ('chunk', 'differ: larger', field('model', chunk=512), SAME, Ask(),
     warn('W_CHUNK', 'tolerance')),
    ('numerics', 'equal', field('numerics', id=H1), field('numerics', id=H1),
     Ask(), GO),
    ('numerics', 'differ', SAME, field('numerics', id=H1), Ask(),
     warn('W_NUMERICS', 'tolerance')),
    ('numerics', 'older', field('numerics', id=H1, jax='0'), SAME, Ask(),
     warn('W_NUMERICS', 'tolerance')),
    ('numerics', 'newer', field('numerics', id=H1, jax='2'), SAME, Ask(),
     warn('W_NUMERICS', 'tolerance')),
    ('numerics', 'another mesh', field('numerics', id=H1, mesh='data=2'), SAME,
     Ask(), warn('W_NUMERICS', 'tolerance')),
    ('numerics', 'equal, told otherwise', field('numerics', device='gpu'), SAME,
     Ask(), GO),
    # Policies.
    *[(name, way, field('policy', **{name: theirs}),
       field('policy', **{name: ours}), ask, expected)
      for name in ('system', 'safety')
      for way, theirs, ours, ask, expected in (
          ('equal', KIND, KIND, Ask(), GO),
          ('differ', KIND, CRUEL, Ask(), refuse('E_POLICY')),
          ('older: had none', '', KIND, Ask(), refuse('E_POLICY')),
          ('newer: none here', KIND, '', Ask(), refuse('E_POLICY')),
          ('differ, replay', KIND, CRUEL, REPLAY, refuse('E_POLICY')),
          ('differ, upgrade', KIND, CRUEL, UPGRADE, replay('E_POLICY')),
          ('had none, upgrade', '', KIND, UPGRADE, replay('E_POLICY')),
          ('another key', KIND, FOREIGN, Ask(), refuse('E_KEYED')),
          ('another key, upgrade', KIND, FOREIGN, UPGRADE, refuse('E_KEYED')),
          ('another key, replay', KIND, FOREIGN, REPLAY, refuse('E_KEYED')))],
    # That of the trust document counts; see below.
    ('epoch', 'equal', field('policy', epoch=2), field('policy', epoch=2),
     Ask(), GO),
    ('epoch', 'older', SAME, field('policy', epoch=9), Ask(), GO),
    ('epoch', 'newer', field('policy', epoch=9), SAME, Ask(), GO),
    ('epoch', 'older, upgrade', SAME, field('policy', epoch=9), UPGRADE, GO),
    # Tools.
    ('tools', 'equal', tools(A, B), tools(B, A), Ask(), GO),
    ('tools', 'older: fewer', tools(A), tools(A, B), Ask(), warn('W_TOOLS')),
    ('tools', 'older: had none', tools(), tools(A), Ask(), warn('W_TOOLS')),
    ('tools', 'newer: more', tools(A, B, C), tools(A, B), Ask(),
     refuse('E_TOOLS')),
    ('tools', 'newer: none here', tools(A), tools(), Ask(), refuse('E_TOOLS')),
    ('tools', 'differ', tools(A), tools(B), Ask(), refuse('E_TOOLS')),
    ('tools', 'one of two', tools(A, C, schema=KIND), tools(A, B), Ask(),
     refuse('E_TOOLS')),
    ('tools', 'items equal, schema not', tools(A, schema=KIND), tools(A), Ask(),
     refuse('E_TOOLS')),
    ('tools', 'differ, replay', tools(A), tools(B), REPLAY, replay('E_TOOLS')),
    ('tools', 'another key', tools(A), tools(FOREIGN, schema=FOREIGN), Ask(),
     refuse('E_KEYED')),
    ('tools', 'another key, replay', tools(A), tools(FOREIGN, schema=FOREIGN),
     REPLAY, refuse('E_KEYED')),
    # Environment.
    ('environment', 'equal', env(day=A), env(day=A), Ask(), GO),
    ('environment', 'differ', env(day=A), env(day=B), Ask(), warn('W_ENV')),
    ('environment', 'older: said nothing', SAME, env(day=A), Ask(),
     warn('W_ENV')),
    ('environment', 'newer: nothing here', env(day=A), SAME, Ask(),
     warn('W_ENV')),
    ('environment', 'another key', env(day=A), env(day=FOREIGN), Ask(),
     warn('W_ENV')),
    # Sampler and version.
    ('sampler', 'equal', leaf(KEY), leaf(KEY), Ask(), GO),
    ('sampler', 'differ', leaf(KEY, shape=[4]), SAME, Ask(),
     warn('W_SAMPLER', 'none')),
    ('sampler', 'newer: named', leaf(KEY, dtype='key:threefry2x32'), SAME,
     Ask(), warn('W_SAMPLER', 'none')),
    ('sampler', 'another one', leaf(KEY, dtype='key:rbg', shape=[4]), SAME,
     Ask(), warn('W_SAMPLER', 'none')),
    ('sampler', 'differ, replay', leaf(KEY, shape=[4]), SAME, REPLAY,
     warn('W_SAMPLER', 'none')),
    ('sampler', 'differ, and a leaf', leaf(KEY, shape=[4]),
     leaf(MATRIX, digest=H2, shape=[1, 2, 5, 4]), Ask(), refuse('E_SCHEMA')),
    ('sampler', 'differ, and a dtype', leaf(KEY, shape=[4]),
     leaf(MATRIX, digest=H2, dtype='float16'), Ask(), refuse('E_SCHEMA')),
    ('sampler', 'of another path', leaf(KEY, path='keys'), SAME, Ask(),
     refuse('E_SCHEMA')),
    ('sampler', 'of another rank', leaf(KEY, shape=[1, 2]), SAME, Ask(),
     refuse('E_SCHEMA')),
    ('version', 'equal', field('numerics', code='9'),
     field('numerics', code='9'), Ask(), GO),
    ('version', 'older', field('numerics', code='0.0.1'), SAME, Ask(),
     warn('W_CODE')),
    ('version', 'newer', field('numerics', code='9'), SAME, Ask(),
     warn('W_CODE')),
    ('migrated', 'equal', field('provenance', how='migrated'), SAME, Ask(),
     warn('W_MIGRATED', 'tolerance')),
    # The strongest wins, wherever it stands; of warnings, the lowest promise.
    ('several', 'replay and refuse', SAME,
     field('model', params=H1) | field('policy', safety=CRUEL), REPLAY,
     refuse('E_POLICY')),
    ('several', 'crossed and refuse', SAME,
     field('model', params=H1, position=H1), CROSS, refuse('E_POSITION')),
    ('several', 'warn and refuse', SAME, field('model', params=H1, chunk=1),
     Ask(), refuse('E_WEIGHTS')),
    ('several', 'warn and replay', SAME, field('model', params=H1, chunk=1),
     REPLAY, replay('E_WEIGHTS')),
    ('several', 'upgrade and weights', SAME,
     field('model', params=H1) | field('policy', system=CRUEL), UPGRADE,
     refuse('E_WEIGHTS')),
    ('several', 'upgrade and replay', SAME,
     field('model', params=H1) | field('policy', system=CRUEL),
     Ask(on_mismatch='reprefill', policy_upgrade='replay'),
     replay('E_WEIGHTS')),
    ('several', 'version and program', SAME,
     field('numerics', id=H1, code='9'), Ask(),
     'go W_NUMERICS W_CODE tolerance'),
    ('several', 'chunk and crossed', SAME, field('model', params=H1, chunk=1),
     CROSS, 'go W_WEIGHTS W_CHUNK none'),
]

ROWS = {'params', 'adapters', 'schema', 'dtype', 'tokenizer', 'special',
        'chat_template', 'position', 'horizon: max_pos',
        'horizon: active_horizon', 'chunk', 'numerics', 'system', 'safety',
        'epoch', 'tools', 'environment', 'sampler', 'version'}
ORDER = ('go', 'replay', 'refuse')


def said(verdict):
  """A verdict in the words of the cases."""
  if verdict.action != 'go':
    return f'{verdict.action} {verdict.code}'
  if not verdict.warnings and verdict.promise == 'bit':
    return 'go'
  return ' '.join(('go', *verdict.warnings, verdict.promise))


def test_every_row():
  counts, wrong = collections.Counter(), []
  for row, way, theirs, ours, ask, expected in CASES:
    verdict = compat.compare(example.make(**theirs), example.make(**ours), ask,
                             retokenizes='known' in way)
    got = said(verdict)
    counts['tried'] += 1
    level = ORDER.index(verdict.action) - ORDER.index(expected.split()[0])
    counts['accepted wrongly'] += level < 0
    counts['refused wrongly'] += level > 0
    counts['otherwise wrong'] += level == 0 and got != expected
    if got != expected:
      wrong.append(f'{row}, {way}: expected {expected}, got {got}')
    if verdict.action != 'go' and not verdict.detail:
      wrong.append(f'{row}, {way}: says nothing')
  print('compatibility:', ', '.join(f'{k} {n}' for k, n in counts.items()))
  assert not wrong, '\n'.join(wrong)


def test_the_oldest_epoch():
  tried = wrong = 0
  for epoch, oldest in ((2, 2), (0, 2), (9, 2), (0, 0), (1, 2)):
    about = example.make(policy={'epoch': epoch})
    try:
      revoked.holds(about, 'x', revoke.ALONE, oldest=oldest, lists=(), now=0)
      got = ''
    except Refused as error:
      got = error.code
    tried += 1
    wrong += got != ('E_EPOCH' if epoch < oldest else '')
  print(f'epochs: tried {tried}, decided wrongly {wrong}')
  assert not wrong


def test_no_row_is_left_out():
  ways = collections.defaultdict(set)
  for row, way, *_ in CASES:
    ways[row] |= {way.split(':')[0].split(',')[0]}
  assert ROWS <= ways.keys()
  for row in ROWS:
    assert 'equal' in ways[row], row
    assert ways[row] & {'differ', 'older', 'newer'}, row
  assert len({case[:2] for case in CASES}) == len(CASES) >= 100


def test_the_ask_is_checked():
  for wrong in (dict(right='delete'), dict(on_mismatch='guess'),
                dict(policy_upgrade='maybe')):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))}: expected'):
      Ask(**wrong)
  for other in (dict(on_mismatch='reprefill'), dict(policy_upgrade='replay')):
    with pytest.raises(ValueError, match='unsafe_cross_weights: expected it'):
      Ask(unsafe_cross_weights=True, **other)
