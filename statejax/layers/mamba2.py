"""Mamba-2: state space duality as a delta rule that never erases."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from statejax.config import Mamba2Config
from statejax.layers import delta, weights
from statejax.layers.common import Proj
from statejax.ops import norm


class Mamba2(nn.Module):
  """`y = out(norm((S^T C + D x) * silu(gate)))`, `S = a S + dt B x^T`.

  With `dt = clip(softplus(t x + bias))`, `a = exp(-exp(A) dt)`: C is the query,
  B the key, x the value, dt the write gate. The matrix is [N, P], transposed
  against the literature's, and C is not scaled. The one convolution over
  [x | B | C] is depthwise, hence the same as three; every tail keeps taps-1
  inputs. The gate comes before the norm (arXiv 2405.21060).
  """

  config: Mamba2Config

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns the `DeltaState` of `Spec`; its size ignores `capacity`."""
    del capacity
    return delta.state_specs(rows, config.groups, config.heads, config.key,
                             config.value, config.conv, dtype)

  @nn.compact
  def __call__(self, x, state, context):
    c = self.config
    keys, values = (c.groups, c.key), (c.heads, c.value)
    gate = Proj(values, ('embed', 'heads', 'value'), name='gate')(x)
    rate = Proj((c.heads,), ('embed', 'heads'), name='rate')(x)
    a = weights.weight(self, 'a_log', ('heads',), (c.heads,),
                       delta.rate_init(1.0, 16.0))
    bias = weights.weight(self, 'dt_bias', ('heads',), (c.heads,),
                          delta.step_init())
    skip = weights.weight(self, 'skip', ('heads',), (c.heads,), weights.ones)
    step = jax.nn.softplus(rate.astype(jnp.float32) + bias[None, None])
    step = jnp.clip(step, c.dt_min, c.dt_max)
    q, k, v, tails = delta.query_key_value(
        x, state, context, query=keys, key=keys, value=values, taps=c.conv,
        key_axes=('key_heads', 'key'), bias=True)
    y, new = delta.carry(
        state, q, k, v, -jnp.exp(a)[None, None] * step, 0, step,
        context.n_valid, context.document, scale=1.0, chunk_size=c.chunk)
    y = (y + skip[None, None, :, None] * v).astype(x.dtype)
    y = delta.output(self, y, gate, x.shape[-1], eps=c.eps, groups=c.groups,
                     order=norm.norm_of_gated)
    return y, dataclasses.replace(state, **new, **tails)
