"""A manifest of no particular state, for tests that need no arrays."""

import copy

from statejax.artifact import names, tree

H = 'sha256:' + '0' * 64
SECRET = bytes(range(32))
K = names.keyed(SECRET, 'policy.system', 'be kind')
OTHER = 'sj1-' + 'f' * 64


def leaf(path, dtype, shape, kind, role):
  return {'path': path, 'dtype': dtype, 'shape': shape, 'kind': kind,
          'tile': list(tree.tile_shape(shape, tree.ITEM_BYTES[dtype])),
          'role': role}


LEAVES = [
    leaf('key', 'uint32', [2], 'fixed', 'sampler'),
    leaf('layers/full/k', 'bfloat16', [1, 2, 3, 8], 'growing', 'kv'),
    leaf('layers/kda/matrix', 'float32', [1, 2, 4, 4], 'fixed', 'recurrent'),
    leaf('length', 'int32', [], 'fixed', 'length'),
    leaf('pending', 'int32', [], 'fixed', 'pending'),
    leaf('witness', 'uint32', [4], 'fixed', 'witness')]

MANIFEST = {
    'format': 'statejax-artifact', 'version': 1, 'created': 1700000000,
    'nonce': '0' * 32, 'kind': 'live', 'sealed': 'none',
    'state': {
        'schema': 'statejax.serving.v1', 'schema_digest': H, 'length': 3,
        'n_pending': 1, 'logical_bytes': 8 + 96 + 128 + 4 + 4 + 16,
        'has_logits': False, 'transcript': 'keep', 'leaves': LEAVES},
    'model': {'family': 'full+kda', 'params': H, 'adapters': [], 'position': H,
              'chunk': 256},
    'tokenizer': {'digest': H, 'vocab': 64, 'special': '', 'chat_template': ''},
    'numerics': {'id': H, 'jax': '1', 'jaxlib': '1', 'runtime': 'cpu',
                 'device': 'cpu', 'mesh': '', 'precision': 'default',
                 'code': '0.1.0', 'batch_slots': 1, 'chunks': [256]},
    'horizon': {'max_pos': 2 ** 31 - 1, 'active_horizon': 2 ** 31 - 1,
                'window': 0, 'compactions': 0, 'retention': ''},
    'policy': {'system': K, 'safety': '', 'epoch': 1},
    'tools': {'schema': '', 'items': []},
    'provenance': {'root': 'self', 'parents': [], 'depth': 0,
                   'producer': 'local', 'how': 'absorbed'},
    'governance': {
        'org': 'acme', 'owner': 'alice', 'class': 'internal', 'persona': '',
        'workflow': 'support', 'acl': [{'who': 'bob', 'may': ['resume']}],
        'export': 'never', 'not_after': 0, 'revoke_scope': 'self'},
    'account': {'tokens_absorbed': 3, 'prefill_tokens': 3, 'decode_tokens': 0,
                'device_us': 0, 'mflop': 0},
    'files': [['plain.json', 10, '1' * 64], ['state/state/a', 9, '2' * 64],
              ['tokens.u32', 16, '3' * 64]],
}


def make(**changes):
  """The manifest, with groups' fields changed: make(state={'length': 9})."""
  about = copy.deepcopy(MANIFEST)
  for name, value in changes.items():
    if isinstance(value, dict) and name in about:
      about[name] |= value
    else:
      about[name] = value
  return about
