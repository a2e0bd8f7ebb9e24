"""What an edit leaves in the witness of its row.

A state that was edited is not taken for one that has only read its tokens: the
witness absorbs an element for each edit, as it does for each token.
"""

import dataclasses
import hashlib

import jax
import numpy as np

from statejax import state as st
from statejax.artifact import digest
from statejax.ops import witness


def mark(entry) -> str:
  """Returns what stands for an edit's entry, 64 hex digits.

  A row is known by its witness, not by its place: one that is forked or moved
  and edited there is the same as one that was edited before.
  """
  told = {name: x for name, x in entry.items() if name != 'row'}
  return hashlib.sha256(
      b'statejax.ext.v1\0' + digest.canonical(told)).hexdigest()


def element(entry) -> int:
  """What an edit's entry adds to a witness; no token is that large."""
  first = bytes.fromhex(mark(entry))[:4]
  return 2 ** 30 + int.from_bytes(first, 'little') % 2 ** 30


def marked(state, row, entry):
  """Returns the state whose row's witness has absorbed an edit's entry."""
  count = (np.arange(st.rows(state)) == row).astype(np.int32)
  return dataclasses.replace(state, witness=_absorb(
      state.witness, np.full((st.rows(state), 1), element(entry), np.int32),
      count))


_absorb = jax.jit(witness.absorb)
