"""Absorption witness: an order-sensitive rolling hash of the tokens in a row.

Modulo 2^32, lane l with base b_l and seed s_l absorbs t_0..t_{n-1} as

  w_l <- w_l b_l^n + sum_i mix((t_i + 1) ^ s_l) b_l^(n-1-i)

Any chunking gives the same witness, and padding leaves it alone. It proves
that a state stands where its key says; it is a bug detector, not a MAC.
"""

import jax.numpy as jnp
import numpy as np

BASES = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F], np.uint32)
SEEDS = np.array([0x00000000, 0x9E3779B9, 0xBB67AE85, 0xF3BCC908], np.uint32)


def _mix(x):
  x = x ^ (x >> 16)
  x = x * np.uint32(0x7FEB352D)
  x = x ^ (x >> 15)
  x = x * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _powers(count):
  """[count + 1, 4] uint32: b^0 .. b^count."""
  table = np.ones((count + 1, 4), np.uint32)
  for i in range(count):
    table[i + 1] = table[i] * BASES
  return table


def absorb(witness, tokens, count, start=None):
  """Absorbs tokens `start <= i < count` of each row.

  Args:
    witness: [B, 4] uint32; zeros for an empty row.
    tokens: [B, T] int32, 0 <= token < 2^30.
    count: [B] int32, real tokens of the row.
    start: [B] int32 or None; where it is positive the row's document began
      there, and the witness with it.

  Returns:
    [B, 4] uint32; bit-equal to `witness` where `count` is 0.
  """
  length = tokens.shape[1]
  powers = jnp.asarray(_powers(length))
  first = jnp.zeros_like(count) if start is None else start
  old = witness if start is None else jnp.where(
      start[:, None] > 0, jnp.uint32(0), witness)
  place = count[:, None] - 1 - jnp.arange(length, dtype=jnp.int32)[None]
  real = (place >= 0) & (jnp.arange(length)[None] >= first[:, None])
  weight = jnp.where(real[..., None], powers[jnp.clip(place, 0)], jnp.uint32(0))
  terms = _mix((tokens.astype(jnp.uint32) + 1)[..., None]
               ^ jnp.asarray(SEEDS)[None, None])
  grown = jnp.sum(terms * weight, axis=1, dtype=jnp.uint32)
  return old * powers[count - first] + grown


def host(tokens, witness=(0, 0, 0, 0)):
  """The same over a Python list of tokens, in Python integers.

  >>> host([1, 2, 3])
  '7f039eef7742577a1688b6d10a27da3a'
  """
  lanes = np.array(witness, np.uint32)
  with np.errstate(over='ignore'):
    for token in tokens:
      lanes = lanes * BASES + _mix(np.uint32(token + 1) ^ SEEDS)
  return text(lanes)


def text(witness):
  """32 hex digits of one row's witness [4]: four little-endian words."""
  return np.asarray(witness).astype('<u4').tobytes().hex()
