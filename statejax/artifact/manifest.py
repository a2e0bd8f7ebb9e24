"""The manifest of an artifact: its grammar, its parser and its name.

An artifact is a directory whose manifest says what it is, to whom it belongs
and what it may be used for, and lists every other file with its digest. The
SHA-256 of the manifest is the artifact's name, so that all of it is bound to
the name. See `GRAMMAR`: all fields are required, '' or [] or 0 where empty;
unknown ones are refused, as are floats. Imports no jax.
"""

import hashlib
import math

from statejax.artifact import canonical, tree
from statejax.artifact.grammar import (
  Int,
  Items,
  OneOf,
  Record,
  Row,
  Table,
  Text,
)
from statejax.artifact.outcome import Refused

FORMAT, VERSION = 'statejax-artifact', 1
NAME = 'manifest.json'
PLAIN, TOKENS, SLOTS = 'plain.json', 'tokens.u32', 'slots.json'
PAYLOAD = 'state'
MAX_LENGTH = 2 ** 31 - 1
MAX_EDITS = 1024

KINDS = ('live', 'prefix', 'tuned', 'compacted')
ROLES = ('recurrent', 'conv', 'kv', 'latent', 'index', 'compressor', 'slot',
         'logits', 'sampler', 'pending', 'length', 'witness')
HOW = ('absorbed', 'trained', 'compacted', 'migrated', 'exported')
CLASSES = ('public', 'internal', 'confidential', 'restricted')
EXPORT = ('never', 'listed', 'org', 'any')
RIGHTS = ('inspect', 'resume', 'fork', 'export')

U = Int()
HEX = Text(64, '[0-9a-f]{64}', empty=False, name='64 hex digits')
HASH = Text(71, 'sha256:[0-9a-f]{64}', empty=False, name='sha256:+64 hex')
MAYBE_HASH = Text(71, HASH.pattern, name='sha256:+64 hex, or "",')
KEYED = Text(78, 'hmac:[0-9a-f]{8}:[0-9a-f]{64}', name='hmac:+8 hex:64 hex')
ID = Text(68, 'sj1-[0-9a-f]{64}', empty=False, name='sj1-+64 hex')
X16 = Text(32, '[0-9a-f]{32}', empty=False, name='32 hex digits')


def text(limit):
  """Printable ASCII of up to `limit` letters."""
  return Text(limit)


def word(limit):
  """As `text`, but not empty."""
  return Text(limit, empty=False)


_COMPONENT = r'[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}'
FILE = Text(512, rf'{_COMPONENT}(/{_COMPONENT}){{0,5}}', empty=False,
            name='a plain relative path of at most 6 components,')
_PATH = Text(256, r'[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*', empty=False)

_LEAF = Record({
    'path': _PATH, 'dtype': OneOf(tuple(tree.ITEM_BYTES)),
    'shape': Items(Int(0, 2 ** 40), 8), 'tile': Items(Int(0, 2 ** 40), 8),
    'kind': OneOf(('growing', 'fixed')), 'role': OneOf(ROLES)})

GRAMMAR = Record({
    'format': OneOf((FORMAT,)), 'version': OneOf((VERSION,)), 'created': U,
    'nonce': X16, 'kind': OneOf(KINDS), 'sealed': OneOf(('none', 'aes256gcm1')),
    'state': Record({
        'schema': word(64), 'schema_digest': HASH, 'length': Int(0, MAX_LENGTH),
        'n_pending': Int(0, 4095), 'logical_bytes': U,
        'has_logits': OneOf((True, False)),
        'transcript': OneOf(('keep', 'none')),
        'leaves': Items(_LEAF, 2048, 1, lambda leaf: leaf['path'])}),
    'model': Record({
        'family': text(64), 'params': HASH, 'adapters': Items(HASH, 16),
        'position': HASH, 'chunk': U}),
    'tokenizer': Record({
        'digest': MAYBE_HASH, 'vocab': U, 'special': MAYBE_HASH,
        'chat_template': MAYBE_HASH}),
    'numerics': Record({
        'id': HASH, **{name: text(128) for name in (
            'jax', 'jaxlib', 'runtime', 'device', 'mesh', 'precision', 'code')},
        'batch_slots': U, 'chunks': Items(U, 16)}),
    'horizon': Record({
        'max_pos': U, 'active_horizon': U, 'window': U, 'compactions': U,
        'retention': text(64)}),
    'policy': Record({'system': KEYED, 'safety': KEYED, 'epoch': U}),
    'tools': Record({
        'schema': KEYED, 'items': Items(KEYED, 256, 0, lambda item: item)}),
    'provenance': Record({
        'root': Text(68, 'self|sj1-[0-9a-f]{64}', empty=False),
        'parents': Items(Record({
            'id': ID, 'role': OneOf(('state', 'slots', *HOW))}), 8),
        'depth': Int(0, 65535),
        'producer': Text(68, 'local|key:[0-9a-f]{64}', empty=False),
        'how': OneOf(HOW)}),
    'governance': Record({
        'org': text(128), 'owner': word(128), 'class': OneOf(CLASSES),
        'persona': KEYED, 'workflow': Text(64, '[a-z0-9._-]*'),
        'acl': Items(Record({
            'who': word(128), 'may': Items(OneOf(RIGHTS), 4, 1)}), 64),
        'export': OneOf(EXPORT), 'not_after': U,
        'revoke_scope': OneOf(('self', 'descendants'))}),
    'account': Record({name: U for name in (
        'tokens_absorbed', 'prefill_tokens', 'decode_tokens', 'device_us',
        'mflop')}),
    'files': Items(Row((FILE, U, HEX)), 4096, 1, lambda row: row[0]),
}, optional={
    'env': Record({'assumptions': Items(Record({
        'name': word(64), 'value': KEYED}), 64)}),
    'seal': Record({
        'kek': word(64), 'wrapped': Text(1024, '[A-Za-z0-9+/]+=*', empty=False),
        'chunk': OneOf((1 << 20,))}),
}, extra=(r'x-[a-z0-9-]{1,60}', text(1024), 16))

# An edit: after how many tokens, and its digest.
EDIT = Row((Int(0, MAX_LENGTH), HEX))
# What lets its reader confirm guessed prompts, hence beside the manifest.
PLAIN_GRAMMAR = Record({
    'tree': HASH, 'witness': X16, 'token_chain': MAYBE_HASH,
    'leaves': Table(_PATH, HEX, 2048),
    'edits': Items(EDIT, MAX_EDITS)})
# The salt of each object that an edit was of, named by its layer and number.
SLOTS_GRAMMAR = Table(_PATH, X16, 4096)


def artifact_id(data: bytes) -> str:
  """Returns the name of the artifact whose manifest has these bytes."""
  return 'sj1-' + hashlib.sha256(data).hexdigest()


def must_seal(about: dict) -> bool:
  """Whether an artifact of these rules may only be stored sealed."""
  rules = about['governance']
  return rules['export'] != 'never' or (
      rules['class'] in ('confidential', 'restricted'))


def nbytes(leaf) -> int:
  """Bytes of a manifest's leaf, in Python integers of any size."""
  return math.prod(leaf['shape']) * tree.ITEM_BYTES[leaf['dtype']]


def parse(data: bytes) -> dict:
  """Returns the manifest of these bytes.

  Raises:
    Refused: E_VERSION of a newer one; E_MANIFEST of whatever else is not
      exactly a manifest, naming the field.
  """
  try:
    value = canonical.loads(data)
    _refuse_newer(value)
    check(value)
  except (ValueError, RecursionError) as error:
    if isinstance(error, Refused):
      raise
    raise Refused('E_MANIFEST', f'{NAME}: {error}') from None
  return value


def dumps(value: dict) -> bytes:
  """Returns the bytes of a manifest, checked as `parse` does.

  Raises:
    Refused: E_MANIFEST.
  """
  data = canonical.dumps(value)
  parse(data)
  return data


def parse_plain(data: bytes, about: dict) -> dict:
  """Returns what `plain.json` says, checked against its manifest.

  Raises:
    Refused: E_PLAIN.
  """
  try:
    value = canonical.loads(data)
    PLAIN_GRAMMAR(value, '')
  except (ValueError, RecursionError) as error:
    raise Refused('E_PLAIN', f'{PLAIN}: {error}') from None
  paths = [leaf['path'] for leaf in about['state']['leaves']]
  if sorted(value['leaves']) != paths:
    odd = sorted({*value['leaves']} ^ {*paths})
    raise Refused('E_PLAIN', f'{PLAIN}: expected a digest of every leaf of the '
                  f'manifest, got another set, e.g. {odd[0]}')
  found = 'sha256:' + tree.combine(value['leaves'])
  if found != value['tree']:
    raise Refused('E_PLAIN', f'{PLAIN}: expected tree {found} of these leaves, '
                  f'got {value["tree"]}')
  at = [length for length, _ in value['edits']]
  if at != sorted(at) or (at and at[-1] > about['state']['length']):
    raise Refused('E_PLAIN', f'{PLAIN}: expected edits in order, none past '
                  f'length {about["state"]["length"]}, got {at[:8]}')
  return value


def parse_slots(data: bytes) -> dict[str, str]:
  """Returns what `slots.json` says.

  Raises:
    Refused: E_PLAIN.
  """
  try:
    value = canonical.loads(data)
    SLOTS_GRAMMAR(value, '')
  except (ValueError, RecursionError) as error:
    raise Refused('E_PLAIN', f'{SLOTS}: {error}') from None
  return value


def _refuse_newer(value):
  version = value.get('version') if isinstance(value, dict) else None
  if (isinstance(version, int) and value.get('format') == FORMAT
      and version > VERSION):
    raise Refused('E_VERSION', f'{NAME}: expected version {VERSION}, got '
                  f'{version}')


def check(value: dict):
  """Raises ValueError unless `value` is a manifest that agrees with itself."""
  GRAMMAR(value, '')
  state, files = value['state'], {row[0]: row[1] for row in value['files']}
  # The sum first: it bounds how often a leaf is halved for its tile.
  _agree('state.logical_bytes', sum(map(nbytes, state['leaves'])),
         state['logical_bytes'])
  for leaf in state['leaves']:
    tile = list(tree.tile_shape(leaf['shape'], tree.ITEM_BYTES[leaf['dtype']]))
    _agree(f'state.leaves {leaf["path"]}: tile', tile, leaf['tile'])
  roles = [leaf['role'] for leaf in state['leaves']]
  for role in ('length', 'pending', 'witness', 'sampler'):
    _agree(f'state.leaves of role {role}', 1, roles.count(role))
  _agree('state.has_logits', roles.count('logits'), int(state['has_logits']))
  sealed = value['sealed'] != 'none'
  _agree('presence of seal', sealed, 'seal' in value)
  if must_seal(value) and not sealed:
    raise ValueError('sealed: expected aes256gcm1 of what may be exported, or '
                     'is confidential, got none')
  _agree('presence of files plain.json', True, PLAIN in files)
  _agree('presence of files tokens.u32', state['transcript'] == 'keep',
         TOKENS in files)
  if TOKENS in files and not sealed:
    _agree('size of tokens.u32', 4 * (state['length'] + state['n_pending']),
           files[TOKENS])
  for name in files:
    first = name.split('/')[0]
    if first != PAYLOAD and name not in (PLAIN, TOKENS, SLOTS):
      raise ValueError(f'files: expected {PLAIN}, {TOKENS}, {SLOTS} and files '
                       f'below {PAYLOAD}/, got {name}')
  if len({name.lower() for name in files}) < len(files):
    raise ValueError('files: expected names that differ by more than the case '
                     'of letters, got two that are one on some file systems')
  source = value['provenance']
  _agree('provenance.root is self', not source['parents'],
         source['root'] == 'self')
  _agree('provenance.depth is 0', not source['parents'], source['depth'] == 0)


def _agree(what, expected, got):
  if expected != got:
    raise ValueError(f'{what}: expected {expected}, as the rest of the '
                     f'manifest has it, got {got}')
