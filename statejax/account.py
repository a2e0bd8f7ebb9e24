"""What the state of a model costs, layer kind by layer kind, and saves."""

import dataclasses
import fractions
import functools
import math

import jax
import numpy as np

from statejax import state as st
from statejax.config import AttentionConfig, MLAConfig, ModelConfig
from statejax.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Account:
  """Bytes of one row's state.

  Attributes:
    layers: layers of this kind.
    per_token: bytes that a token adds to growing leaves; exact, not rounded to
      whole entries.
    fixed: bytes that do not depend on the context.
    total: bytes of all leaves with room for `tokens`, as they are allocated.
    tokens: of the context.
  """

  layers: int
  per_token: fractions.Fraction
  fixed: int
  total: int
  tokens: int

  def __add__(self, other):
    return Account(
        self.layers + other.layers, self.per_token + other.per_token,
        self.fixed + other.fixed, self.total + other.total, self.tokens)


def account(config: ModelConfig, tokens: int) -> dict[str, Account]:
  """Returns the `Account` of each layer kind by its name; nothing is allocated.

  Their sum is all of the state but a few bytes per row (length, pending token,
  sampler key, witness).

  Args:
    config: of the model.
    tokens: of the context, >= 1.

  >>> from configs import tiny_kda
  >>> found = account(tiny_kda.get_config().model, 1000)
  >>> [(name, int(a.per_token)) for name, a in found.items()]
  [('full', 384), ('kda', 0)]
  """
  if not isinstance(tokens, int) or tokens < 1:
    raise ValueError(f'account: expected a whole number of tokens >= 1, got '
                     f'{tokens!r}.')
  layers = LanguageModel(config).state_schema(1, tokens).layers
  return {name: _account(layers[name], config.names.count(name), tokens)
          for name in layers}


def total(accounts: dict[str, Account]) -> Account:
  """The sum over all layer kinds."""
  first, *rest = accounts.values()
  return sum(rest, start=first)


def mflop(config: ModelConfig, tokens: int) -> int:
  """Returns the millions of operations that absorbing tokens takes.

    (2 N T + sum over attention layers of T^2 (key + value) heads) / 10^6

  rounded down, where a token is multiplied with N parameters. A window counts
  what it lets see. Layers that choose what they see count with their parameters
  alone: never more than it takes.

  Args:
    config: of the model.
    tokens: T, >= 0, absorbed from the beginning.

  >>> from configs import tiny_kda
  >>> [mflop(tiny_kda.get_config().model, n) for n in (0, 1000)]
  [0, 142]
  """
  if tokens < 0:
    raise ValueError(f'mflop: expected tokens >= 0, got {tokens}.')
  seen = sum(_seen(config.layer(name).mixer, tokens) for name in config.names)
  return (2 * _active(config) * tokens + seen) // 10 ** 6


def _seen(mixer, tokens):
  """Operations of a layer's queries on what they see."""
  if isinstance(mixer, MLAConfig):
    widths, window = mixer.nope + mixer.rope_width + mixer.value, tokens
  elif isinstance(mixer, AttentionConfig):
    widths, window = mixer.key + mixer.value, mixer.window or tokens
  else:
    return 0
  window = min(window, tokens)
  return window * (2 * tokens - window) * widths * mixer.heads


@functools.cache
def _active(config):
  """Parameters that a token is multiplied with."""
  params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
  if not config.tied:  # a table that is looked up in
    params.pop('embed')
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def _account(schema, layers, tokens):
  per_token, fixed, whole = fractions.Fraction(0), 0, 0
  for _, leaf, _, kind in st.leaves(schema):
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    whole += size
    if kind == 'fixed':
      fixed += size
    else:
      slots = leaf.shape[leaf.axes.index('capacity')]
      per_token += fractions.Fraction(size // slots, leaf.stride)
  return Account(layers, per_token, fixed, whole, tokens)
