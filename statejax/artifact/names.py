"""Named digests: of a layout, a tokenizer, a text, a namespace, a transcript.

H is SHA-256, CJ canonical JSON, integers are little-endian. Imports no jax.
"""

import hashlib
import hmac
import struct

from statejax.artifact import canonical

BLOCK = 64  # tokens between two keys of a chain
MAX_TOKEN = 2 ** 30  # ids below it are tokens, from it on other elements
_BASES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_SEEDS = (0x00000000, 0x9E3779B9, 0xBB67AE85, 0xF3BCC908)
_U32 = 0xFFFFFFFF


def sha256(*parts: bytes) -> str:
  """Returns 'sha256:' and 64 hex digits of the parts, joined."""
  return 'sha256:' + hashlib.sha256(b''.join(parts)).hexdigest()


def document(value) -> str:
  """H of CJ of a value; a float enters as its exact text, `float.hex`.

  >>> document({'a': 0.1}) == document({'a': '0x1.999999999999ap-4'})
  True
  """
  return sha256(canonical.dumps(exact(value)))


def exact(value):
  """Returns a value without floats, null and tuples that says the same."""
  if isinstance(value, dict):
    return {str(name): exact(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [exact(item) for item in value]
  if isinstance(value, float):
    return value.hex()
  return 'none' if value is None else value


def schema(name: str, leaves) -> str:
  """Digest of a layout: H("statejax.schema.v1\\0" + CJ{name, leaves}).

  Args:
    name: of the schema.
    leaves: dicts of axes, dtype, kind, path, role and shape, one row, the
      growing axis written 0.
  """
  leaves = sorted(leaves, key=lambda leaf: leaf['path'])
  return sha256(b'statejax.schema.v1\0',
                canonical.dumps({'leaves': leaves, 'name': name}))


def tokenizer(assets: dict[str, bytes]) -> str:
  """Digest of a tokenizer's files, {name: content}."""
  parts = [b'statejax.tok.v1\0']
  for name in sorted(assets):
    raw = name.encode()
    parts += [struct.pack('<I', len(raw)), raw,
              struct.pack('<Q', len(assets[name])), assets[name]]
  return sha256(*parts)


def key_id(secret: bytes) -> str:
  """Eight hex digits by which to know a secret, not from which to learn it."""
  return hashlib.sha256(b'statejax.kid.v1\0' + secret).hexdigest()[:8]


def keyed(secret: bytes, field: str, text: str) -> str:
  """Keyed digest of a text that could be guessed: a prompt, a policy, a tool.

    "hmac:" + key id + ":" + HMAC(
        secret, "statejax.kd.v1\\0" + field + 0 + text)

  Equal texts of one organisation are equal to it, and say nothing to others.

  Args:
    secret: at least 16 bytes, of the organisation.
    field: where it stands, e.g. 'policy.system': equal texts in two fields
      differ.
    text: '' stays ''.
  """
  if len(secret) < 16:
    raise ValueError(f'secret: expected at least 16 bytes, got {len(secret)}; '
                     'a short one can be guessed.')
  if not text:
    return ''
  mark = hmac.new(secret, b'statejax.kd.v1\0' + field.encode() + b'\0'
                  + text.encode(), 'sha256').hexdigest()
  return f'hmac:{key_id(secret)}:{mark}'


def namespace(about: dict, salt: str) -> str:
  """Digest of all that makes two states of equal tokens interchangeable.

  Args:
    about: a manifest, or its groups state, model, tokenizer, policy,
      governance.
    salt: of the authenticated principal, never of a request.
  """
  model = about['model']
  return document({
      'schema': about['state']['schema_digest'], 'params': model['params'],
      'adapters': model['adapters'], 'position': model['position'],
      'chunk': model['chunk'], 'tokenizer': about['tokenizer']['digest'],
      'safety': about['policy']['safety'], 'epoch': about['policy']['epoch'],
      'org': about['governance']['org'], 'salt': salt})


def chain(namespace: str, tokens) -> str:
  """Chain key of a transcript: one link per 64 tokens, one for the tail.

    h0 = H("statejax.chain.v1\\0" + namespace); h = H(h + 64 u32 tokens);
    with n < 64 tokens left: H(h + "tail" + u32 n + tokens)
  """
  link = hashlib.sha256(b'statejax.chain.v1\0'
                        + bytes.fromhex(namespace[7:])).digest()
  whole = len(tokens) - len(tokens) % BLOCK
  for begin in range(0, whole, BLOCK):
    link = hashlib.sha256(link + pack(tokens[begin:begin + BLOCK])).digest()
  tail = tokens[whole:]
  if tail:
    link = hashlib.sha256(
        link + b'tail' + struct.pack('<I', len(tail)) + pack(tail)).digest()
  return 'sha256:' + link.hex()


def pack(tokens) -> bytes:
  """Tokens as u32."""
  return struct.pack(f'<{len(tokens)}I', *tokens)


def unpack(data: bytes) -> list[int]:
  """Undoes `pack`; raises ValueError where a token is cut off."""
  if len(data) % 4:
    raise ValueError(f'expected four bytes per token, got {len(data)} in all')
  return list(struct.unpack(f'<{len(data) // 4}I', data))


def witness(tokens, edits=()) -> str:
  """Absorption witness of a transcript, as `statejax.ops.witness` has it.

  Args:
    tokens: absorbed ids.
    edits: (length, 64 hex) of each edit, in order: after how many tokens, and
      H("statejax.ext.v1\\0" + CJ(edit)).

  Returns:
    32 hex digits.

  >>> witness([1, 2, 3])
  '7f039eef7742577a1688b6d10a27da3a'
  """
  elements, begin = [], 0
  for length, mark in edits:
    elements += tokens[begin:length]
    elements.append(MAX_TOKEN + int.from_bytes(
        bytes.fromhex(mark)[:4], 'little') % MAX_TOKEN)
    begin = length
  return _absorbed([*elements, *tokens[begin:]])


def extend(witness: str, tokens) -> str:
  """Returns the witness after further tokens.

  >>> extend(witness([1]), [2, 3]) == witness([1, 2, 3])
  True
  """
  pairs = zip(_BASES, *(struct.unpack('<4I', bytes.fromhex(text)) for text in (
      witness, _absorbed(tokens))))
  return struct.pack('<4I', *(
      (old * pow(base, len(tokens), 1 << 32) + new) & _U32
      for base, old, new in pairs)).hex()


def lanes(witness) -> str:
  """32 hex digits of a row's four words."""
  return struct.pack('<4I', *map(int, witness)).hex()


def _absorbed(elements):
  """The four lanes after all elements, as `witness` returns them.

  All elements at once, each in 64 bits of one long integer, so that no product
  of two 32-bit numbers reaches the next. Their sum is that of both halves, the
  first times the base as often as the second is long; zeros in front make the
  halves equal.
  """
  count = 1 << max(0, len(elements) - 1).bit_length()
  front = 64 * (count - len(elements))
  one = int.from_bytes(b'\1\0\0\0\0\0\0\0' * len(elements), 'little')
  low = one * _U32
  first = int.from_bytes(struct.pack(
      f'<{len(elements)}Q', *((x + 1) & _U32 for x in elements)), 'little')
  lanes = []
  for base, seed in zip(_BASES, _SEEDS):
    x = first ^ one * seed
    x ^= x >> 16 & low
    x = x * 0x7FEB352D & low
    x ^= x >> 15 & low
    x = x * 0x846CA68B & low
    x = (x ^ x >> 16 & low) << front
    half, mask = count // 2, low << front
    while half:
      mask >>= 64 * half
      x = ((x & mask) * pow(base, half, 1 << 32)
           + (x >> 64 * half)) & mask
      half //= 2
    lanes.append(x)
  return struct.pack('<4I', *lanes).hex()
