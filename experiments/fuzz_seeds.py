"""Documents to begin with: what each parser shall accept, small and full.

  python -m experiments.fuzz_seeds   # writes experiments/fuzz_corpus/*/seed*

Signatures draw a number: what is there stays, so that it is made once. Keys
follow from small numbers; they protect nothing.
"""

import base64
import pathlib

from statejax.artifact import (
  canonical,
  envelope,
  keys,
  manifest,
  names,
  portable,
  sealing,
  tree,
)

CORPUS = pathlib.Path(__file__).parent / 'fuzz_corpus'
H, K = 'sha256:' + '0' * 64, 'hmac:00c0ffee:' + '1' * 64
ID, NOW, DAY = 'sj1-' + 'f' * 64, 1_700_000_000, 86_400
TOKENS = (3, 1, 2 ** 30 - 1)


def _leaf(path, dtype, shape, kind, role):
  return {'path': path, 'dtype': dtype, 'shape': shape, 'kind': kind,
          'tile': list(tree.tile_shape(shape, tree.ITEM_BYTES[dtype])),
          'role': role}


_BARE = [_leaf('key', 'uint32', [2], 'fixed', 'sampler'),
         _leaf('length', 'int32', [], 'fixed', 'length'),
         _leaf('pending', 'int32', [], 'fixed', 'pending'),
         _leaf('witness', 'uint32', [4], 'fixed', 'witness')]
_ALL = _BARE + [
    _leaf('layers/full/k', 'bfloat16', [1, 2, 3, 8], 'growing', 'kv'),
    _leaf('layers/kda/matrix', 'float32', [1, 2, 4, 4], 'fixed', 'recurrent'),
    _leaf('layers/kda/tail_k', 'float32', [1, 3, 2, 4], 'fixed', 'conv'),
    _leaf('layers/x/empty', 'int4', [1, 0, 4], 'growing', 'latent'),
    _leaf('logits', 'float32', [32], 'fixed', 'logits')]


def small() -> dict:
  """A manifest of which everything that can be empty is."""
  return {
      'format': 'statejax-artifact', 'version': 1, 'created': NOW,
      'nonce': '0' * 32, 'kind': 'live', 'sealed': 'none',
      'state': {
          'schema': 'statejax.serving.v1', 'schema_digest': H, 'length': 3,
          'n_pending': 0, 'logical_bytes': sum(map(manifest.nbytes, _BARE)),
          'has_logits': False, 'transcript': 'keep', 'leaves': _BARE},
      'model': {'family': '', 'params': H, 'adapters': [], 'position': H,
                'chunk': 256},
      'tokenizer': {'digest': '', 'vocab': 64, 'special': '',
                    'chat_template': ''},
      'numerics': {'id': H, 'jax': '', 'jaxlib': '', 'runtime': '',
                   'device': '', 'mesh': '', 'precision': '', 'code': '',
                   'batch_slots': 1, 'chunks': []},
      'horizon': {'max_pos': 9, 'active_horizon': 9, 'window': 0,
                  'compactions': 0, 'retention': ''},
      'policy': {'system': '', 'safety': '', 'epoch': 0},
      'tools': {'schema': '', 'items': []},
      'provenance': {'root': 'self', 'parents': [], 'depth': 0,
                     'producer': 'local', 'how': 'absorbed'},
      'governance': {
          'org': '', 'owner': 'a', 'class': 'public', 'persona': '',
          'workflow': '', 'acl': [], 'export': 'never', 'not_after': 0,
          'revoke_scope': 'self'},
      'account': dict.fromkeys(('tokens_absorbed', 'prefill_tokens',
                                'decode_tokens', 'device_us', 'mflop'), 0),
      'files': [['plain.json', 10, '1' * 64], ['tokens.u32', 12, '2' * 64]]}


def full() -> dict:
  """A manifest of which nothing is empty."""
  leaves = sorted(_ALL, key=lambda leaf: leaf['path'])
  about = small()
  about['state'] |= {'leaves': leaves, 'has_logits': True, 'n_pending': 1,
                     'logical_bytes': sum(map(manifest.nbytes, leaves))}
  about['model'] |= {'family': 'full+kda', 'adapters': [H, H]}
  about['tokenizer'] |= {'digest': H, 'special': H, 'chat_template': H}
  about['numerics'] |= {'jax': '1', 'device': 'cpu x', 'chunks': [64, 256]}
  about['governance'] |= {
      'org': 'acme', 'export': 'listed', 'class': 'restricted', 'persona': K,
      'workflow': 'demo', 'not_after': NOW + DAY, 'acl': [
          {'who': 'bob', 'may': ['inspect', 'resume']},
          {'who': 'org:acme', 'may': ['fork']}]}
  about['provenance'] |= {
      'root': ID, 'depth': 2, 'how': 'exported', 'producer': 'key:' + '0' * 64,
      'parents': [{'id': ID, 'role': 'state'}, {'id': ID, 'role': 'slots'}]}
  return about | {
      'sealed': 'aes256gcm1', 'x-note': 'a "b" \\ c', 'x-more': '',
      'seal': {'kek': 'org-0-kek', 'wrapped': sealing_text(), 'chunk': 1 << 20},
      'policy': {'system': K, 'safety': K, 'epoch': 2},
      'tools': {'schema': K, 'items': [K, K[:-1] + '2']},
      'env': {'assumptions': [{'name': 'time', 'value': K}]},
      'files': [['plain.json', 10, '1' * 64], ['slots.json', 2, '4' * 64],
                ['state/state/a', 9, '3' * 64], ['tokens.u32', 32, '2' * 64]]}


def plain() -> dict:
  """What `plain.json` says beside the full manifest."""
  leaves = {leaf['path']: f'{i:064x}' for i, leaf in enumerate(
      full()['state']['leaves'])}
  return {'tree': 'sha256:' + tree.combine(leaves), 'token_chain': H,
          'witness': names.witness(TOKENS), 'leaves': leaves,
          'edits': [[1, 'a' * 64], [3, 'b' * 64]]}


def bare_plain() -> dict:
  """What `plain.json` says beside the small manifest, with its tokens."""
  leaves = {leaf['path']: '5' * 64 for leaf in _BARE}
  return {'tree': 'sha256:' + tree.combine(leaves), 'token_chain': names.chain(
      names.namespace(small(), 'a'), TOKENS), 'leaves': leaves, 'edits': [],
          'witness': names.witness(TOKENS)}


def sealing_text() -> str:
  """A wrapped key, of which a manifest's parser sees the text alone."""
  return base64.b64encode(bytes(60)).decode()


def private(number: int = 7, curve: str = 'SECP256R1') -> bytes:
  """PEM of the private key of a number; not written anywhere."""
  from cryptography.hazmat.primitives import serialization as s
  from cryptography.hazmat.primitives.asymmetric import ec
  return ec.derive_private_key(number, getattr(ec, curve)()).private_bytes(
      s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())


def grant(holder: str) -> dict:
  """What a grant says."""
  key = base64.b64encode(bytes(100)).decode()
  return {'id': '0' * 32, 'target': ID, 'scope': 'id', 'org': 'acme',
          'rights': ['inspect', 'resume'], 'holder': holder,
          'not_before': NOW, 'not_after': NOW + DAY, 'max_uses': 3,
          'key': key, 'exports': key}


def crl() -> dict:
  """What a revocation list says, one entry of each kind."""
  values = {'artifact': ID, 'root': ID, 'key': 'key:' + '0' * 64,
            'org': 'acme', 'params': H, 'persona': K, 'workflow': 'demo',
            'epoch': '2'}
  return {'number': 3, 'this_update': NOW, 'next_update': NOW + 7 * DAY,
          'entries': [{'kind': kind, 'value': value, 'from': NOW}
                      for kind, value in values.items()]}


def trust(pems) -> dict:
  """What a trust document says."""
  return {'number': 2, 'min_epoch': 1, 'classes': ['public', 'internal'],
          'orgs': {org: [{
              'pem': pem, 'status': 'active', 'not_before': 0,
              'not_after': manifest.U.high, 'may': ['mint', 'grant']}]
                   for org, pem in pems.items()}}


def card() -> dict:
  """What a model card says."""
  return {'format': 'statejax-model-card', 'version': 1, 'created': NOW,
          'org': 'acme', 'family': 'full+kda', 'position': H, 'params': H,
          'adapters': [H, H], 'fingerprint': 2 ** 32 - 1, 'leaves': [
              {'path': 'embed/table', 'dtype': 'bfloat16', 'shape': [64, 16]},
              {'path': 'scale', 'dtype': 'float8_e4m3fn', 'shape': []}]}


def archive(files: dict[str, bytes]) -> bytes:
  """An archive of files in the order given; see `portable`."""
  return b''.join(
      portable.header_of(name, len(data)) + data + bytes(-len(data) % 512)
      for name, data in files.items()) + bytes(1024)


def make() -> dict[str, dict[str, bytes]]:
  """{parser: {name: input}}."""
  dumps, signer = canonical.dumps, keys.Signer(private())
  pem = keys.public(private())
  wide = keys.public(private(7, 'SECP521R1'))
  about, data = full(), dumps(full())
  bodies = {'grant': grant(pem), 'crl': crl(),
            'trust': trust({'acme': pem, 'other': wide}),
            'head': {'rows': 1, 'hash': '0' * 64}}
  last = {'origin': '1' * 32, 'rows': 256, 'hash': 'ab' * 32, 'time': 1}
  files = {'manifest.json': dumps(small()), 'manifest.mac': b'0' * 64,
           'plain.json': dumps(bare_plain()), 'state/a/b-c': b'1234',
           'tokens.u32': names.pack(TOKENS)}
  statement = envelope.statement(data, about)
  bundle = envelope.bundle(statement, keys.sign(
      private(), envelope.STATEMENT, statement), keys.hint(pem))
  return {
      'manifest': {'small': dumps(small()), 'full': data},
      'canonical': {'a': dumps({'b': [1, True, -2], 'a': 'x"\\'}),
                    'b': dumps([[[[[['a', 0]]]]], {'': {}}])},
      'plain': {'full': dumps(plain())},
      'slots': {'two': dumps({'layers/memory/0': '1' * 32,
                              'layers/memory/17': 'ab' * 16}),
                'none': dumps({})},
      'tokens': {'three': names.pack(TOKENS)},
      'bundle': {'full': bundle},
      'document': {kind: signer.document(kind, dumps(body))
                   for kind, body in bodies.items()},
      'grant': {'full': dumps(bodies['grant'])},
      'crl': {'full': dumps(bodies['crl']), 'empty': dumps(
          bodies['crl'] | {'entries': []})},
      'head': {'full': dumps(last)},
      'card': {'full': dumps(card()), 'small': dumps(
          card() | {'adapters': [], 'org': '', 'family': ''})},
      'trust': {'full': dumps(bodies['trust'])},
      'signed': {'trust': signer.document('trust', dumps(bodies['trust']))},
      'header': {'manifest': portable.header_of('manifest.json', 3000),
                 'deep': portable.header_of('state/' + 'a' * 90 + '/b', 0)},
      'archive': {'full': archive(files), 'one': archive(
          {'manifest.json': b'{}'})},
      'public_key': {'p256': pem.encode(), 'p521': wide.encode()},
      'signature': {'p256': keys.sign(private(), envelope.STATEMENT, b'x')},
      'sealed_key': {'p256': keys.encrypt(pem, bytes(32))},
      'wrapped': {'key': sealing.wrap(bytes(32), bytes(32), '0' * 32).encode()},
      'sealed': {'file': sealing.seal(bytes(32), '0' * 32, 'a/b', b'abc'),
                 'empty': sealing.seal(bytes(32), '0' * 32, 'a/b', b'')}}


def main():
  """Writes what is not there yet."""
  for parser, inputs in make().items():
    for name, data in inputs.items():
      path = CORPUS / parser / f'seed_{name}'
      path.parent.mkdir(parents=True, exist_ok=True)
      if not path.exists():
        path.write_bytes(data)
        print(path.relative_to(CORPUS), len(data))


if __name__ == '__main__':
  main()
