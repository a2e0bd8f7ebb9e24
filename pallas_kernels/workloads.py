"""Named shapes of the kernels, for tests, tables and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class DeltaRule:
  """Shapes and types of one call of the delta rule.

  Attributes:
    key_heads: HK.
    heads: HV, a multiple of HK.
    width: K.
    values: V.
    decay: 'head' or 'channel'.
    batch: B.
    length: T.
    dtype: of q, k and v; gates and state are float32.
    gates: 'head' or 'channel', of erase and of write.
  """

  key_heads: int
  heads: int
  width: int
  values: int
  decay: str
  batch: int = 1
  length: int = 4096
  dtype: str = 'bfloat16'
  gates: str = 'head'

  def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Arguments of the op by name."""
    tokens = self.batch, self.length
    keys = (*tokens, self.key_heads, self.width)
    gate = (*tokens, self.heads)
    of = lambda kind, width: gate if kind == 'head' else (*gate, width)
    shapes = dict(q=keys, k=keys, v=(*gate, self.values),
                  log_decay=of(self.decay, self.width),
                  erase=of(self.gates, self.width),
                  write=of(self.gates, self.values),
                  state=(self.batch, self.heads, self.width, self.values))
    return {name: jax.ShapeDtypeStruct(
        shape, self.dtype if name in 'qkv' else 'float32')
        for name, shape in shapes.items()}

  def arrays(self, seed=0) -> dict[str, jax.Array]:
    """Random arguments: unit keys, gates as a trained layer has them."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, spec in self.specs().items():
      x = rng.standard_normal(spec.shape, dtype=np.float32)
      if name in 'qk':
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
      elif name == 'log_decay':
        x = -np.log1p(np.exp(x - 3))
      elif name in ('erase', 'write'):
        x = 1 / (1 + np.exp(-x))
      arrays[name] = jnp.asarray(x, spec.dtype)
    return arrays


WORKLOADS = {
    # Real widths: the linear layers of Qwen3.6 and of Kimi Linear.
    'qwen3.6': DeltaRule(16, 32, 128, 128, 'head'),
    'kimi_linear': DeltaRule(32, 32, 128, 128, 'channel'),
    'qwen3.6_decode': DeltaRule(16, 32, 128, 128, 'head', batch=8, length=1),
    'kimi_linear_decode': DeltaRule(
        32, 32, 128, 128, 'channel', batch=8, length=1),
    # The same in float32, and with every gate per channel (Gated DeltaNet-2).
    'qwen3.6_float32': DeltaRule(16, 32, 128, 128, 'head', dtype='float32'),
    'kimi_linear_float32': DeltaRule(
        32, 32, 128, 128, 'channel', dtype='float32'),
    'gated_deltanet_2': DeltaRule(
        32, 32, 128, 128, 'channel', gates='channel'),
    'gated_deltanet_2_float32': DeltaRule(
        32, 32, 128, 128, 'channel', dtype='float32', gates='channel'),
    # Matrices as large as there are, and some beyond.
    'wide_keys': DeltaRule(8, 8, 256, 128, 'channel'),
    'wide_values': DeltaRule(4, 8, 128, 256, 'head'),
    'wide': DeltaRule(8, 8, 256, 256, 'channel'),
    'widest': DeltaRule(4, 4, 512, 512, 'channel', dtype='float32'),
    # Heads that do not fill tiles, keys of more than one.
    'odd_decode': DeltaRule(12, 12, 256, 128, 'channel', batch=2, length=1),
    'odd_groups_decode': DeltaRule(16, 32, 192, 64, 'head', length=1),
    # What an interpreter finishes in a second.
    'tiny_gdn': DeltaRule(2, 4, 16, 24, 'head', 2, 40, 'float32'),
    'tiny_kda': DeltaRule(4, 4, 16, 24, 'channel', 2, 40, 'float32'),
    'tiny_gdn_decode': DeltaRule(2, 4, 16, 24, 'head', 3, 1, 'float32'),
    'tiny_kda_decode': DeltaRule(4, 4, 16, 24, 'channel', 3, 1, 'float32'),
}



@dataclasses.dataclass(frozen=True)
class Attention:
  """Shapes and types of one call of a kernel of sparse attention.

  Attributes:
    heads: H, or HI of an indexer.
    groups: G.
    key: K, or the width of the rope keys, or dI.
    value: V, or the width R of the latents.
    slots: N.
    block: rows per block.
    count: M, ids per query and group.
    batch: B.
    length: T.
    dtype: of all floats but the weights of an indexer's heads.
  """

  heads: int
  groups: int = 1
  key: int = 128
  value: int = 128
  slots: int = 131_072
  block: int = 1
  count: int = 16
  batch: int = 8
  length: int = 1
  dtype: str = 'bfloat16'

  def _spec(self, *shape, dtype=None):
    return jax.ShapeDtypeStruct(shape, dtype or self.dtype)

  def blocks(self) -> tuple:
    """Arguments of `gather_attend`: q, k, v, ids, last; of one group the keys
    are latents, which are the values too, and keys of `key` channels."""
    tokens, store = (self.batch, self.length), (self.batch, self.groups,
                                                self.slots)
    of = lambda *widths: (
        tuple(self._spec(*tokens, self.heads, x) for x in widths),
        tuple(self._spec(*store, x) for x in widths))
    q, k = of(self.value, self.key) if self.groups == 1 else of(self.key)
    v = None if self.groups == 1 else self._spec(*store, self.value)
    return (q, k, v,
            self._spec(*tokens, self.groups, self.count, dtype='int32'),
            self._spec(*tokens, dtype='int32'))

  def rows(self) -> tuple:
    """Arguments of `gather_rows`: q, stores, ids, last."""
    tokens, store = (self.batch, self.length), (self.batch, self.slots)
    return ((self._spec(*tokens, self.heads, self.value),
             self._spec(*tokens, self.heads, self.key)),
            (self._spec(*store, self.value), self._spec(*store, self.key)),
            self._spec(*tokens, self.count, dtype='int32'),
            self._spec(*tokens, dtype='int32'))

  def index(self) -> tuple:
    """Arguments of `index_scores`: q, w, k."""
    tokens = self.batch, self.length
    return (self._spec(*tokens, self.heads, self.key),
            self._spec(*tokens, self.heads, dtype='float32'),
            self._spec(self.batch, self.slots, self.key))


ATTENTION = {
    # Real widths: MiniMax-M3, NSA and DeepSeek-V3.2.
    'minimax_m3': Attention(64, 4, block=128),
    'minimax_m3_prefill': Attention(
        64, 4, block=128, batch=1, length=4096),
    'nsa': Attention(64, 4, key=192, block=64),  # positions along the lanes
    'nsa_float32': Attention(64, 4, block=64, dtype='float32'),
    'blocks_of_16': Attention(32, 8, block=16, count=64),
    'blocks_of_8': Attention(32, 8, block=8, count=64),
    'mla_blocks': Attention(128, key=64, value=512, block=64),
    'dsa': Attention(128, key=64, value=512, count=2048),
    'dsa_prefill': Attention(
        128, key=64, value=512, count=2048, batch=1, length=256),
    'dsa_index': Attention(64),
    'dsa_index_prefill': Attention(64, batch=1, length=256),
}

# Most bundles by head and 64 tokens, from program and chip: what a prototype of
# the same algorithm took for the widths of Kimi Linear.
GOALS = {('forward', 'v5e'): 1058, ('forward', 'v6e'): 800,
         ('backward', 'v5e'): 1735, ('backward', 'v6e'): 1565}
