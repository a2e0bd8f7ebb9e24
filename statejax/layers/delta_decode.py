"""How a delta-rule layer carries its matrix: written per step, or deferred.

Deferred layers run XLA's parallel form on every backend. A model rejects draft
tokens by a snapshot (`statejax.state.restore_fixed`), whatever its layers;
cutting them off the tail is for callers of the op.
"""

import dataclasses

import jax

from statejax.layers import delta
from statejax.ops.delta_deferred import delta_rule_deferred
from statejax.ops.delta_grid import Deferred, shapes
from statejax.state import Array, Spec, leaf

# With 8 a step needs the fewest bytes where K = V = 128, three quarters of the
# ordinary, but XLA's CPU programs are not faster: 'step' remains the default;
# see experiments/bench_decode.py.
CHUNK = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeferredState(delta.DeltaState):
  """Carried state of a layer with `decode='deferred'`.

  The matrix is that of the last chunk end in the row's document; entries past
  `count` are zero. See `statejax.ops.delta_deferred`.

  Attributes:
    count: tokens since the matrix was written, fewer than C, [B] int32.
    past_k: their keys, [B, HK, C, K] float32.
    past_u: their residuals, [B, HV, C, V] float32.
    past_decay: their log decays, [B, HV, C, 1 or K] float32.
  """

  count: Array = leaf('batch')
  past_k: Array = leaf('batch key_heads entries key')
  past_u: Array = leaf('batch heads entries value')
  past_decay: Array = leaf('batch heads entries channels')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BitwiseState(DeferredState):
  """Carried state of a layer with `decode='bitwise'`.

  `past_u` holds write * v, not residuals.

  Attributes:
    past_erase: the erase gates, [B, HV, C, 1 or K] float32.
  """

  past_erase: Array = leaf('batch heads entries channels')


def state_specs(config, specs, *, decay='head', erase='head'):
  """Returns the state of `Spec` that `config.decode` needs.

  Args:
    config: of a mixer, with `decode` and `chunk`.
    specs: its `DeltaState` of `Spec`.
    decay: 'head' or 'channel', the kind of its log decay.
    erase: 'head' or 'channel', the kind of its erase gate.
  """
  if config.decode == 'step':
    return specs
  bitwise = config.decode == 'bitwise'
  rows, heads, key, value = specs.matrix.shape
  found = shapes(
      rows, specs.tail_k.shape[2], heads, key, value,
      chunk_size=config.chunk or CHUNK, decay=decay,
      erase=erase if bitwise else None)
  past = {f'past_{name}': Spec(found[field], 'float32')
          for name, field in (('k', 'k'), ('u', 'u'), ('decay', 'log_decay'))}
  if bitwise:
    past['past_erase'] = Spec(found['erase'], 'float32')
  kept = {f.name: getattr(specs, f.name) for f in dataclasses.fields(specs)}
  return (BitwiseState if bitwise else DeferredState)(
      **kept, count=Spec((rows,), 'int32'), **past)


def recall(config, q, k, v, log_decay, erase, write, state, context, tails):
  """Runs the delta rule as `config.decode` says.

  Args:
    config: of a mixer, with `decode` and `chunk`.
    q, k, v, log_decay, erase, write: as of `delta_rule`.
    state: of the layer.
    context: `statejax.layers.common.Context`.
    tails: dict of the new convolution tails.

  Returns:
    y [B, T, HV, V] and the layer's new state.
  """
  if config.decode == 'step':
    y, new = delta.carry(
        state, q, k, v, log_decay, erase, write, context.n_valid,
        context.document, chunk_size=config.chunk)
    return y, dataclasses.replace(state, **new, **tails)
  y, new = delta_rule_deferred(
      q, k, v, log_decay, erase, write,
      Deferred(state.matrix, state.count, state.past_k, state.past_u,
               state.past_decay, getattr(state, 'past_erase', None)),
      context.n_valid, context.document, chunk_size=config.chunk or CHUNK,
      parity='bitwise' if config.decode == 'bitwise' else None)
  past = dict(past_k=new.k, past_u=new.u, past_decay=new.log_decay)
  past['shadow'] = delta.faded(
      state, k, log_decay, erase, context.n_valid, context.document)
  if new.erase is not None:
    past['past_erase'] = new.erase
  return y, dataclasses.replace(
      state, matrix=new.matrix, count=new.count, **past, **tails)
