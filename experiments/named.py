"""Addresses of names alone: what a line says beside them cannot move one.

A memory layer reads [what a line says | its name], and behind these, where
lines give other names, such a name. Its addresses are one matrix of the names:
the same name is the same address whatever is said of it, and whether it is
written, asked for or given as another name. So a test can ask for a cosine of
nearly 1, which no other name reaches.
"""

import jax
import jax.numpy as jnp


def drawn(key, name, address):
  """The matrix [name, address] that makes addresses of names."""
  return jax.random.normal(key, (name, address)) * name ** -0.5


def joined(says, names):
  """What the layer reads, [B, T, S + n N], of says [B, T, S] and n names
  [B, T, n, N]; n is 1 or 2."""
  return jnp.concatenate(
      [says, names.reshape(*names.shape[:2], -1)], axis=-1)


def addressed(params, says):
  """Parameters of a model of one layer of slots that reads what is `joined`.

  Args:
    params: with 'address', see `drawn`. Weights of the slots' own addresses,
      and those by which the norm before them scales names, are not used.
    says: width of what a line says.
  """
  layer, address = params['group_0']['layer_0'], params['address']
  mixer, scale = layer['mixer'], layer['norm_mixer']['weight']
  name, width = address.shape[0], scale.shape[1]
  kernel = jnp.zeros_like(mixer['key']['kernel'])
  here = kernel.at[0, says:says + name].set(address)
  other = (kernel if width == says + name else
           kernel.at[0, says + name:].set(address))
  mixer = mixer | {'key': {'kernel': here}, 'query': {'kernel': here},
                   'name': {'kernel': other}}
  layer = layer | {'mixer': mixer, 'norm_mixer': {
      'weight': scale.at[:, says:].set(1.)}}
  return params | {'group_0': {'layer_0': layer}}
