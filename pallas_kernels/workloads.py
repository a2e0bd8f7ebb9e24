"""Named shapes of the delta rule, for tests, tables and benchmarks."""

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

# Most bundles by head and 64 tokens, from program and chip: what a prototype of
# the same algorithm took for the widths of Kimi Linear.
GOALS = {('forward', 'v5e'): 1058, ('forward', 'v6e'): 800,
         ('backward', 'v5e'): 1735, ('backward', 'v6e'): 1565}
