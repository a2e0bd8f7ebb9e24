"""Addresses of names alone, and names that are hard to tell apart."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import frozen_sentences as frozen
from experiments import named
from statejax.ops import norm
from statejax.ops import slots as sl

SAYS, NAME, KEY = 6, 4, 3


def address(params, x, which):
  """As a layer of slots makes it, behind its norm."""
  layer = named.addressed(params, SAYS)['group_0']['layer_0']
  x = norm.rms_norm(x, layer['norm_mixer']['weight'][0], eps=1e-6)
  return sl.unit(jnp.dot(x, layer['mixer'][which]['kernel'][0]))


def drawn(names):
  """Parameters of a layer that reads so many names of a line."""
  keys = jax.random.split(jax.random.key(0), 3)
  width = SAYS + names * NAME
  mixer = {which: {'kernel': jax.random.normal(keys[0], (1, width, KEY))}
           for which in ('key', 'query', 'name')}
  return {'address': named.drawn(keys[1], NAME, KEY), 'group_0': {'layer_0': {
      'mixer': mixer, 'norm_mixer': {
          'weight': jax.random.normal(keys[2], (1, width))}}}}


def test_what_is_said_moves_no_address():
  params, random = drawn(2), np.random.default_rng(1)
  a, b = random.normal(size=(2, 1, 1, SAYS)).astype(np.float32)
  name, other = random.normal(size=(2, 1, 1, NAME)).astype(np.float32)
  none = np.zeros_like(name)
  read = lambda says, *names: named.joined(says, np.stack(names, axis=2))
  wanted = address(params, read(a, name, none), 'key')
  for which, x in (('key', read(9 * b, name, other)),
                   ('query', read(b, name, none)),
                   # As another name it is the same that is asked for.
                   ('name', read(b, other, name))):
    np.testing.assert_allclose(address(params, x, which), wanted, atol=1e-5)
  far = address(params, read(a, other, name), 'key')
  assert float(jnp.sum(far * wanted)) < 0.9


def test_lines_without_other_names():
  params = drawn(1)
  x = np.random.default_rng(2).normal(size=(1, 1, SAYS + NAME)).astype('f4')
  assert float(jnp.linalg.norm(address(params, x, 'key'))) > 0.99
  assert not address(params, x, 'name').any()


def test_whitened_names_are_far_apart():
  """Pairs of parts with most in common, of half the pairs statistics."""
  random = np.random.default_rng(3)
  first, second = random.normal(size=(2, 20, 32))
  plain = 8. + first[:, None] + second[None]
  plain = plain.reshape(400, 32) + 1e-4 * random.normal(size=(400, 32))
  mine = frozen.entities('train')
  found = frozen.whitened(plain, mine, 0.01)
  assert found.shape == (400, 32)
  np.testing.assert_allclose(np.cov(found[mine].T), np.eye(32), atol=1e-3)
  def nearest(x):
    x = x[frozen.entities('test')]
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return np.max(x @ x.T - 2 * np.eye(len(x)))
  assert nearest(plain) > 0.98 and nearest(found) < 0.9
