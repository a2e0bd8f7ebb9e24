"""Gated DeltaProduct: several delta writes per token (arXiv 2502.10297)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from statejax.config import DeltaProductConfig
from statejax.layers import delta
from statejax.layers.common import Proj
from statejax.state import Spec


class DeltaProduct(nn.Module):
  """`y = out(norm(delta(q, k_1..k_n, v_1..v_n)) * silu(gate x))`.

  Time is stretched n times: a token decays the state before its first write,
  and reads it after its last. Convolutions run over tokens, so that their
  tails are those of n keys and n values; write i of key head h is channel
  group h n + i.
  """

  config: DeltaProductConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns the `DeltaState` of `Spec`; n times the tails of k and v."""
    del capacity
    c, past = config, config.conv - 1
    specs = delta.state_specs(rows, c.heads, c.value_heads, c.key, c.value,
                              c.conv, dtype)
    return dataclasses.replace(
        specs,
        tail_k=Spec((rows, past, c.heads * c.writes, c.key), dtype),
        tail_v=Spec((rows, past, c.value_heads * c.writes, c.value), dtype))

  @nn.compact
  def __call__(self, x, state, context):
    c, n = self.config, self.config.writes
    values = (c.value_heads, c.value)
    gate = Proj(values, ('embed', 'heads', 'value'), name='gate')(x)
    log_decay = 0
    if c.decay:
      rate = Proj((c.value_heads,), ('embed', 'heads'), name='rate')(x)
      log_decay = at_write(delta.decay_gate(
          self, rate, ('heads',), rate_min=0.0), 0, n)
    beta = stretch(delta.beta(x, c.value_heads * n, c.max_erase), n)
    q, k, v, tails = delta.query_key_value(
        x, state, context, query=(c.heads, c.key), key=(c.heads * n, c.key),
        value=(c.value_heads * n, c.value), taps=c.conv,
        key_axes=('key_heads', 'key'))
    document = context.document
    if document is not None:
      document = jnp.repeat(document, n, axis=1)
    y, new = delta.carry(
        state, at_write(delta.unit(q), n - 1, n), stretch(delta.unit(k), n),
        stretch(v, n), log_decay, beta, beta, n * context.n_valid, document,
        chunk_size=c.chunk)
    y = y[:, n - 1::n]
    y = delta.output(self, y, gate, x.shape[-1], eps=c.eps)
    return y, dataclasses.replace(state, **new, **tails)


def stretch(x, n):
  """[B, T, H n, ...] to [B, T n, H, ...]: the n writes of a token in a row."""
  batch, length, heads = x.shape[:3]
  x = x.reshape(batch, length, heads // n, n, *x.shape[3:])
  return jnp.moveaxis(x, 3, 2).reshape(
      batch, length * n, heads // n, *x.shape[4:])


def at_write(x, place, n):
  """[B, T, H, ...] to [B, T n, H, ...]: x at one write, 0 at the others."""
  out = jnp.zeros((*x.shape[:2], n, *x.shape[2:]), x.dtype)
  return out.at[:, :, place].set(x).reshape(
      x.shape[0], -1, *x.shape[2:])
