"""Edits of a state stay with what comes of it, and are told."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import small_store as small

from statejax.artifact import collect, desk, load, manifest, mint, names
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

ALICE = Principal('alice', 'acme')


@pytest.fixture
def shop(tmp_path):
  return small.store(tmp_path)


def test_edits_of_a_parent_stay(shop):
  marks = [(at, f'{at:02x}' * 32) for at in (3, 11)]
  def edited(*edits, **options):
    mark = np.frombuffer(bytes.fromhex(names.witness(small.TOKENS, edits)),
                         '<u4')
    return mint.mint(
        shop, dataclasses.replace(small.state(), witness=jnp.asarray(
            mark, jnp.uint32)[None]), 0, small.host(), small.TERMS,
        edited=mint.Edited(edits), **options).id
  one = edited(*marks)
  found = load.load(shop, one, ALICE, small.host())
  parent = mint.Parent(found.id, found.about)
  for left in ((), marks[:1], marks[1:]):
    with pytest.raises(Refused, match='E_WITNESS: edits: .* the 2 of the pare'):
      edited(*left, parent=parent)
  two = edited(*found.edited.edits, (11, 'cc' * 32), parent=parent)
  alone, both = (desk.examine(shop, id, ALICE, 'inspect') for id in (one, two))
  assert '  edits: 2, after 3, 11 tokens' in desk.describe(alone)
  assert 'edits: the first 2 are the same, then none | 1, after 11 tokens' in (
      desk.difference(alone, both))
  # What nobody can read any more binds nobody.
  file = shop.place(one) / manifest.PLAIN
  data = file.read_bytes()
  file.chmod(0o600)
  file.write_bytes(data[1:])
  assert edited(parent=parent)
  file.write_bytes(data)
  collect.delete(shop, one, 'alice')
  assert edited(parent=parent)
