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
  """

  key_heads: int
  heads: int
  width: int
  values: int
  decay: str
  batch: int = 1
  length: int = 4096
  dtype: str = 'bfloat16'

  def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Arguments of the op by name: erase and write are gates per head."""
    tokens = self.batch, self.length
    keys = (*tokens, self.key_heads, self.width)
    gate = (*tokens, self.heads)
    decay = gate if self.decay == 'head' else (*gate, self.width)
    shapes = dict(q=keys, k=keys, v=(*gate, self.values), log_decay=decay,
                  erase=gate, write=gate,
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
    # What an interpreter finishes in a second.
    'tiny_gdn': DeltaRule(2, 4, 16, 24, 'head', 2, 40, 'float32'),
    'tiny_kda': DeltaRule(4, 4, 16, 24, 'channel', 2, 40, 'float32'),
    'tiny_gdn_decode': DeltaRule(2, 4, 16, 24, 'head', 3, 1, 'float32'),
    'tiny_kda_decode': DeltaRule(4, 4, 16, 24, 'channel', 3, 1, 'float32'),
}
