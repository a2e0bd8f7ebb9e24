"""The laws notice: each deliberate fault is caught by the law it breaks.

A mutant replaces one function of an op, a layer or the state by a wrong one.
What shipped elsewhere with such faults is listed in the law suite's sources.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from statejax import config as c
from statejax import laws
from statejax import state as st
from statejax.layers import attention, common, delta
from statejax.ops import attend, conv, norm, store, window, witness

MLP = c.SwiGLUConfig(8)
SUBJECTS = {
    'delta': c.LayerConfig('delta', c.GatedDeltaNetConfig(
        heads=1, value_heads=2, key=8, value=8, chunk=4), MLP),
    'full': c.LayerConfig('full', c.AttentionConfig(
        heads=2, kv_heads=1, key=8, value=8), MLP),
    'ring': c.LayerConfig('ring', c.AttentionConfig(
        heads=2, kv_heads=1, key=8, value=8, window=5, sink=True), MLP),
    'model': c.ModelConfig(
        vocab=16, width=16, groups=(c.GroupConfig(('full',)),),
        layers=(c.LayerConfig('full', c.AttentionConfig(
            heads=2, kv_heads=1, key=8, value=8), MLP),)),
}
MUTANTS = []
# A law that another mutant shows to fail as well.
SLOW = pytest.mark.slow


def mutant(subject, law, target, name, marks=()):
  """Registers `wrong(original, *args)` in place of `target.name`."""
  def register(wrong):
    MUTANTS.append(pytest.param(
        subject, law, target, name, wrong, id=wrong.__name__, marks=marks))
    return wrong
  return register


@pytest.fixture(autouse=True)
def compiled_quickly():
  """Faults show in unoptimised programs as well, three times sooner."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@functools.cache
def sound(subject, law):
  """The subject as it is passes; once for all mutants of it."""
  laws.check(SUBJECTS[subject], laws=law)


@pytest.mark.parametrize('subject, law, target, name, wrong', MUTANTS)
def test_caught(monkeypatch, subject, law, target, name, wrong):
  sound(subject, law)
  original = getattr(target, name)
  if isinstance(original, property):
    changed = property(functools.partial(wrong, original.fget))
  else:
    @functools.wraps(original)
    def changed(*args, **kwargs):
      return wrong(original, *args, **kwargs)
  monkeypatch.setattr(target, name, changed)
  with pytest.raises(laws.LawError) as caught:
    laws.check(SUBJECTS[subject], laws=law)
  assert caught.value.law == law
  assert caught.value.leaf


# Convolution.


@mutant('delta', 'split', conv, 'short_conv', SLOW)
def conv_tail_dropped(right, x, tail, *args, **kwargs):
  y, _ = right(x, tail, *args, **kwargs)
  return y, jnp.zeros_like(tail)


@mutant('delta', 'padding', conv, 'short_conv', SLOW)
def conv_tail_of_the_padding(right, x, tail, weight, n_valid, **kwargs):
  y, _ = right(x, tail, weight, n_valid, **kwargs)
  return y, jnp.concatenate([tail, x], axis=1)[:, x.shape[1]:]


@mutant('delta', 'packed', conv, 'short_conv', SLOW)
def conv_reads_across_documents(right, *args, document, start, **kwargs):
  del document, start
  return right(*args, **kwargs)


# Recurrence.


@mutant('delta', 'padding', delta, 'delta_rule', SLOW)
def decay_at_padding(right, q, k, v, log_decay, *args, **kwargs):
  y, matrix = right(q, k, v, log_decay, *args, **kwargs)
  n_valid = args[3]
  late = jnp.arange(q.shape[1])[None] >= n_valid[:, None]
  fade = jnp.sum(jnp.where(late[..., None], log_decay, 0.0), axis=1)
  return y, matrix * jnp.exp(fade)[..., None, None]


@mutant('delta', 'padding', delta, 'delta_rule')
def padding_is_written(right, q, k, v, log_decay, erase, write, state, n_valid,
                       document, **kwargs):
  del n_valid
  return right(q, k, v, log_decay, erase, write, state, None, document,
               **kwargs)


@mutant('delta', 'packed', delta, 'delta_rule', SLOW)
def memory_survives_a_border(right, *args, **kwargs):
  *args, document = args
  del document
  return right(*args, None, **kwargs)


@mutant('delta', 'dtype', delta, 'delta_rule')
def state_rounded_to_bfloat16(right, *args, **kwargs):
  y, matrix = right(*args, **kwargs)
  return y, matrix.astype(jnp.bfloat16).astype(jnp.float32)


@mutant('delta', 'initial_gradient', delta, 'delta_rule', SLOW)
def gradient_stops_at_the_state(right, *args, **kwargs):
  *first, state, n_valid, document = args
  return right(*first, jax.lax.stop_gradient(state), n_valid, document,
               **kwargs)


@mutant('delta', 'extreme', delta, 'delta_rule', SLOW)
def inverse_of_the_decay(right, q, k, v, log_decay, *args, **kwargs):
  total = jnp.cumsum(log_decay, axis=1)[..., None]
  v = v * jnp.exp(-total) * jnp.exp(total)
  return right(q, k, v, log_decay, *args, **kwargs)


# Attention.


@mutant('ring', 'split', attention, 'recent')
def ring_written_before_read(right, state, k, v, context):
  (past, chunk), new = right(state, k, v, context)
  return [attend.Segment(new.k, new.v, past.visible), chunk], new


@mutant('ring', 'causality', common.Context, 'visible_band', SLOW)
def window_too_long(right, self, window):
  seen = right(self, window)
  older = jnp.eye(window, 2 * window, dtype=bool)[None, None]
  return seen.at[:, 1:].set(seen[:, 1:] | older)


@mutant('ring', 'causality', common.Context, 'visible_band', SLOW)
def window_too_short(right, self, window):
  return right(self, window) & ~jnp.eye(
      window, 2 * window, 1, dtype=bool)[None, None]


@mutant('ring', 'decode', common.Context, 'visible_past', SLOW)
def window_of_the_past_too_short(right, self, positions, window=None):
  return right(self, positions, window - 1)


@mutant('ring', 'split', window, 'positions')
def ring_one_slot_late(right, length, window):
  return right(length + 1, window)


@mutant('ring', 'packed', window, 'write', SLOW)
def ring_keeps_the_last_document(right, ring, new, base, first, count):
  written = right(ring, new, base, first, count)
  reached = jnp.any(written != 0, axis=(1, 3), keepdims=True)
  return jnp.where(reached, written, ring)


@mutant('ring', 'decode', attend, 'attend')
def sink_left_out_of_decode(right, q, segments, *, scale, sink):
  return right(q, segments, scale=scale,
               sink=None if q.shape[1] == 1 else sink)


@mutant('full', 'causality', common.Context, 'visible_chunk', SLOW)
def next_token_visible(right, self, window=None):
  seen = right(self, window)
  return seen | jnp.eye(seen.shape[1], k=1, dtype=bool)[None]


@mutant('full', 'packed', common.Context, 'visible_chunk')
def attention_across_documents(right, self, window=None):
  return right(dataclasses.replace(self, document=None), window)


@mutant('full', 'packed', common, 'context')
def rope_counts_on_over_a_border(right, length, n_valid, document, steps):
  context = right(length, n_valid, document, steps)
  index = jnp.arange(steps, dtype=jnp.int32)[None]
  return dataclasses.replace(context, positions=length[:, None] + index)


@mutant('full', 'decode', common, 'context', SLOW)
def rope_off_by_one_in_decode(right, length, n_valid, document, steps):
  context = right(length, n_valid, document, steps)
  if steps > 1:
    return context
  return dataclasses.replace(context, positions=context.positions + 1)


@mutant('full', 'neighbours', store, 'append')
def append_clamps_at_the_end(right, store, new, slot, first, count):
  room = store.data.shape[-2]
  return right(store, new, jnp.minimum(slot, room - (count - first)), first,
               count)


# Rows and states.


@mutant('full', 'fixed_point', common.Context, 'new_length')
@mutant('full', 'no_recompile', common.Context, 'new_length', SLOW)
@mutant('full', 'donation', common.Context, 'new_length')
def length_changes_its_type(right, self):
  other = {jnp.dtype('int32'): 'int16', jnp.dtype('int16'): 'int32'}
  return right(self).astype(other[self.length.dtype])


@mutant('full', 'padding', common.Context, 'valid')
def padding_taken_for_real(right, self):
  return jnp.ones_like(right(self))


@mutant('full', 'split', common.Context, 'new_length')
def one_row_does_not_advance(right, self):
  return right(self).at[0].set(self.length[0])


@mutant('full', 'ragged', norm, 'rms_norm')
def norm_over_the_batch(right, x, *args, **kwargs):
  return right(x, *args, **kwargs) / (1 + jnp.mean(x))


@mutant('full', 'ragged', norm, 'rms_norm')
def row_depends_on_its_index(right, x, *args, **kwargs):
  return right(x, *args, **kwargs).at[0].multiply(1.001)


@mutant('delta', 'true_start', st, 'clear', SLOW)
def cleared_by_scaling(right, state, index):
  def one(path, axes, kind, cleared, x):
    return cleared if x.dtype.kind != 'f' else cleared + 0 * x
  return st.map_leaves(one, right(state, index), state)


@mutant('delta', 'true_start', st, 'clear')
def stale_row_after_clear(right, state, index):
  return st.map_leaves(
      lambda path, axes, kind, cleared, x: x if 'tail' in path else cleared,
      right(state, index), state)


@mutant('full', 'fork', st, 'fork')
def fork_without_its_store(right, state, row, copies):
  return st.map_leaves(
      lambda path, axes, kind, x, old: old if kind == 'growing' else x,
      right(state, row, copies), state)


@mutant('delta', 'rewind', st, 'restore_fixed')
def rewound_by_length_alone(right, state, snapshot):
  del right
  return dataclasses.replace(state, length=snapshot.length)


@mutant('full', 'save', st, 'grow')
def grown_at_the_front(right, state, new):
  grown = right(state, new)
  return st.map_leaves(
      lambda path, axes, kind, x, old: x if kind == 'fixed' else jnp.roll(
          x, x.shape[-2] - old.shape[-2], axis=-2), grown, state)


@mutant('delta', 'schema', st, 'nbytes')
def bytes_of_one_layer_forgotten(right, state):
  return {'fixed': right(state)['fixed'] - 4, 'growing': 0}


@mutant('model', 'witness', witness, 'absorb', SLOW)
def witness_of_a_set(right, old, tokens, count, start=None):
  return right(old, jnp.sort(tokens, axis=1), count, start)


@mutant('model', 'witness', witness, 'absorb')
def witness_runs_over_a_border(right, old, tokens, count, start=None):
  del start
  return right(old, tokens, count)
