"""Gated DeltaNet-2: erase and write apart, per channel (arXiv 2605.22791)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import GatedDeltaNet2Config
from statejax.layers import delta
from statejax.layers.common import Proj


class GatedDeltaNet2(nn.Module):
  """`y = out(norm(delta(conv q, conv k, conv v)) * sigmoid(g_b g_a x))`.

  With q, k of unit length, `erase = max_erase sigmoid(b x)` per key channel,
  `write = sigmoid(w x)` per value channel, and the decay of `KDA`. Decay and
  erase belong to a key head, and its value heads share them.
  """

  config: GatedDeltaNet2Config

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns the `DeltaState` of `Spec`; its size ignores `capacity`."""
    del capacity
    return delta.state_specs(rows, config.heads, config.value_heads,
                             config.key, config.value, config.conv, dtype)

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    keys, values = (c.heads, c.key), (c.value_heads, c.value)
    key_axes, value_axes = ('key_heads', 'key'), ('heads', 'value')
    rate = delta.low_rank(self, x, 'decay', c.rank, keys, key_axes)
    log_decay = delta.decay_gate(self, rate, key_axes,
                                 lower_bound=c.lower_bound)
    gate = delta.low_rank(self, x, 'gate', c.rank, values, value_axes,
                          bias=True)
    erase = Proj(keys, ('embed', *key_axes), name='erase')(x)
    erase = c.max_erase * jax.nn.sigmoid(erase.astype(jnp.float32))
    write = Proj(values, ('embed', *value_axes), name='write')(x)
    write = jax.nn.sigmoid(write.astype(jnp.float32))
    q, k, v, tails = delta.query_key_value(
        x, state, context, query=keys, key=keys, value=values, taps=c.conv,
        key_axes=key_axes)
    share = lambda g: jnp.repeat(g, c.value_heads // c.heads, axis=2)
    y, matrix = delta.delta_rule(
        delta.unit(q), delta.unit(k), v, share(log_decay), share(erase), write,
        state.matrix, context.n_valid, context.document, chunk_size=c.chunk)
    y = delta.output(self, y, gate, x.shape[-1], eps=c.eps,
                     activation=jax.nn.sigmoid)
    return y, delta.DeltaState(matrix, **tails)
