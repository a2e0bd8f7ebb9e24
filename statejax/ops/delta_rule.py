"""The gated delta rule: recurrence, single step, and the public op."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from statejax.ops import delta_check as check
from statejax.ops import delta_chunk, delta_wide, dispatch

# Bytes of states from which on one launch of the GPU's decode kernel was faster
# than XLA's recorded launches: experiments/results/gpu_check.json.
_WORTHWHILE = 24 << 20


def delta_rule(
    q,
    k,
    v,
    log_decay,
    erase,
    write,
    state,
    n_valid=None,
    segment_ids=None,
    *,
    scale=None,
    chunk_size=None,
    implementation=None,
):
  """Fades the memory, removes what each key recalls, writes, then reads.

  Per row and value head, in float32:
    D_t = diag(exp(log_decay_t)) S_{t-1}
    S_t = D_t + k_t (write_t * v_t - D_t^T (erase_t * k_t))^T
    y_t = scale * S_t^T q_t

  Value head h uses key head h // (HV / HK). A gate may be a Python scalar:
  `log_decay=0` saves the decays, `erase=0` the inverse, `write=1` a product.

  Laws: split (L1), padding (L3), packed documents (L4), no overflow (L10),
  exact residual (L11), initial gradient (L16).

  Gradients are reverse mode; for forward mode ask for 'reference'. Real tokens
  are finite: one that is not may reach later documents of its row. An erase of
  2 on keys that repeat is a reflection: float32 errors add up instead of fading
  (1e-5 of the state after 64 equal keys).

  >>> import jax
  >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
  >>> k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
  >>> log_decay, beta = jnp.full((2, 5, 4), -0.1), jnp.full((2, 5, 4), 0.5)
  >>> y, state = delta_rule(
  ...     q, k, v, log_decay, beta, beta, jnp.zeros((2, 4, 8, 8)))
  >>> y.shape, state.shape
  ((2, 5, 4, 8), (2, 4, 8, 8))

  Args:
    q: queries, [B, T, HK, K], any float dtype.
    k: keys of unit length, [B, T, HK, K].
    v: values, [B, T, HV, V], HV a multiple of HK.
    log_decay: log gate <= 0, [B, T, HV] or [B, T, HV, K]; -inf forgets all.
    erase: gate in [0, 2], [B, T, HV] or [B, T, HV, K].
    write: gate in [0, 2], [B, T, HV] or [B, T, HV, V].
    state: S_0, before the first token, [B, HV, K, V], float32 (float64 if an
      input is float64).
    n_valid: number of real tokens per row, [B], int32; None means T. Tokens
      past it may hold anything, NaN included.
    segment_ids: document of each token, [B, T], int32. Memory is emptied where
      it changes; the incoming state belongs to the first document.
    scale: static factor on q; None means K**-0.5.
    chunk_size: static power of two, tokens per chunk of 'xla' and of
      'pallas_tpu', which takes 16 to 128; None chooses.
    implementation: see `statejax.ops.dispatch`: 'pallas_tpu' (the first choice
      on a single TPU), 'pallas_gpu' (of one token; the first choice on a single
      Hopper GPU where there are many states), 'xla' or 'reference'.

  Returns:
    y: [B, T, HV, V] in v.dtype, zero past n_valid.
    state: [B, HV, K, V] after n_valid tokens; where n_valid is 0, bit-equal to
      the input.

  Raises:
    ValueError: a shape or dtype disagrees; names the argument.
    ExceptionGroup: no implementation accepts; one reason each.

  Reference: arXiv 2406.06484 (no decay); arXiv 2412.06464 (decay per head);
    arXiv 2510.26692 (decay per channel).
  """
  dtype = check.tokens(q, k, v, log_decay, erase, write, n_valid, segment_ids)
  check.matrix(q, v, state, dtype)
  gates = (log_decay, erase, write)
  if chunk_size is not None:
    chunk_size = check.chunk_size(chunk_size)
  fast = (_step if q.shape[1] == 1 else
          _Bound(_chunked, chunk_size))
  run = dispatch.choose('delta_rule', implementation, {
      'pallas_tpu': _on_tpu(q, k, v, gates, state, chunk_size,
                            implementation),
      'pallas_gpu': _on_gpu(q, k, v, gates, state, implementation),
      'xla': fast, 'reference': _recurrent,
  })
  return _run(run, q, k, v, gates, state, n_valid, segment_ids, scale)


def delta_rule_recurrent(
    q, k, v, log_decay, erase, write, state, n_valid=None, segment_ids=None, *,
    scale=None,
):
  """`delta_rule` token by token: the oracle, plain autodiff, any precision."""
  return delta_rule(
      q, k, v, log_decay, erase, write, state, n_valid, segment_ids,
      scale=scale, implementation='reference',
  )


def delta_rule_step(
    q, k, v, log_decay, erase, write, state, n_valid=None, *, scale=None
):
  """`delta_rule` for T = 1: one read of the state serves both products.

    D = diag(exp(log_decay)) S;  [p, o] = D^T [erase * k, q]
    r = write * v - p;  S' = D + k r^T;  y = scale * (o + (q . k) r)
  """
  dtype = check.tokens(q, k, v, log_decay, erase, write, n_valid, None)
  check.matrix(q, v, state, dtype)
  if q.shape[1] != 1:
    raise ValueError(
        f'q: expected [B, T=1, HK, K], got {q.shape}; use delta_rule for T > 1.'
    )
  gates = (log_decay, erase, write)
  return _run(_step, q, k, v, gates, state, n_valid, None, scale)


def _run(run, q, k, v, gates, state, n_valid, segment_ids, scale):
  """Fills in the defaults, then calls `run(inputs, state, n_valid, ...)`."""
  batch, length = q.shape[:2]
  if length == 0:
    return jnp.zeros_like(v), jnp.asarray(state)
  log_decay, erase, write = gates
  shape = (batch, length, v.shape[2])
  forgets = not _is(log_decay, 0) or segment_ids is not None
  inputs = delta_chunk.Inputs(
      q, k, v,
      _gate(log_decay, shape, state.dtype) if forgets else None,
      None if _is(erase, 0) else _gate(erase, shape, state.dtype),
      None if _is(write, 1) else _gate(write, shape, state.dtype),
  )
  resets = None
  if segment_ids is not None:
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    resets = jnp.pad(changes, [(0, 0), (1, 0)])
  scale = check.scale(scale, q.shape[-1])
  return _compiled(run, inputs, state, n_valid, resets, scale)


# A notebook's call by itself is compiled once, not at every call.
@functools.partial(jax.jit, static_argnums=(0, 5))
def _compiled(run, inputs, state, n_valid, resets, scale):
  return run(inputs, state, n_valid, resets, scale)


@dataclasses.dataclass(frozen=True)
class _Bound:
  """A form with its chunk size; equal ones share compiled programs."""

  form: Callable
  chunk_size: int | None

  def __call__(self, *args):
    return self.form(*args, chunk_size=self.chunk_size)


def _is(gate, value):
  return isinstance(gate, (int, float)) and gate == value


def _gate(gate, shape, dtype):
  if isinstance(gate, (int, float)):
    return jnp.full(shape, gate, dtype)
  return gate


# The token recurrence.


def _recurrent(inputs, state, n_valid, resets, scale):
  """Scans `_token` over time."""
  x, log_decay, valid = _by_token(inputs, state, n_valid, resets)

  def body(state, token):
    x, log_decay, valid = token
    after, y = _token(x, log_decay, state, scale)
    if valid is None:
      return after, y
    y = jnp.where(valid[:, None, None], y, jnp.zeros((), y.dtype))
    return jnp.where(valid[:, None, None, None], after, state), y

  state, y = lax.scan(body, state, (x, log_decay, valid))
  return jnp.moveaxis(y, 0, 1).astype(inputs.v.dtype), state


def _by_token(inputs, state, n_valid, resets):
  """Time first, accumulation precision, every head its own q and k."""
  length = inputs.q.shape[1]
  valid = None
  if n_valid is not None:
    valid = jnp.arange(length)[None, :] < n_valid[:, None]
  groups = state.shape[1] // inputs.q.shape[2]
  zero = jnp.zeros((), state.dtype)

  def prepare(x):
    x = x[..., None] if x.ndim == 3 else x
    x = x.astype(state.dtype)
    if valid is not None:
      x = jnp.where(valid[:, :, None, None], x, zero)
    return x

  x = jax.tree.map(prepare, inputs)
  x = x._replace(
      q=jnp.repeat(x.q, groups, axis=2), k=jnp.repeat(x.k, groups, axis=2)
  )
  log_decay = x.log_decay
  if resets is not None:
    if valid is not None:
      resets = resets & valid
    infinity = jnp.asarray(-jnp.inf, state.dtype)
    log_decay = jnp.where(resets[:, :, None, None], infinity, log_decay)
  return jax.tree.map(
      lambda x: jnp.moveaxis(x, 1, 0), (x, log_decay, valid)
  )


def _token(x, log_decay, state, scale):
  """One token, all of [B, HV, D]; the equations of `delta_rule`."""
  recall = lambda a, s: jnp.einsum(
      'bhk,bhkv->bhv', a, s, precision=lax.Precision.HIGHEST,
      preferred_element_type=s.dtype,
  )
  decayed = state
  if log_decay is not None:
    decayed = jnp.exp(log_decay)[..., None] * state
  residual = x.v if x.write is None else x.write * x.v
  if x.erase is not None:
    residual -= recall(x.erase * x.k, decayed)
  after = decayed + x.k[..., :, None] * residual[..., None, :]
  return after, recall(scale * x.q, after)


# The fast forms.


def _step(inputs, state, n_valid, resets, scale):
  """The single token, see `delta_rule_step`; a first token never resets."""
  del resets
  x, log_decay, valid = _by_token(inputs, state, n_valid, None)
  x, log_decay = jax.tree.map(lambda x: x[0], (x, log_decay))
  decay = jnp.ones((1, 1, 1), state.dtype)
  if log_decay is not None:
    decay = jnp.exp(log_decay)
  reads = [scale * x.q] if x.erase is None else [scale * x.q, x.erase * x.k]
  recalled = jnp.einsum(
      'bhzk,bhkv->bhzv', jnp.stack(reads, axis=2) * decay[:, :, None], state,
      precision=lax.Precision.HIGHEST, preferred_element_type=state.dtype,
  )
  residual = x.v if x.write is None else x.write * x.v
  if x.erase is not None:
    residual -= recalled[:, :, 1]
  attention = scale * jnp.sum(x.q * x.k, axis=-1, keepdims=True)
  y = recalled[:, :, 0] + attention * residual
  after = decay[..., None] * state + x.k[..., None] * residual[..., None, :]
  if valid is not None:
    y = jnp.where(valid[0][:, None, None], y, jnp.zeros((), y.dtype))
    after = jnp.where(valid[0][:, None, None, None], after, state)
  return y[:, None].astype(inputs.v.dtype), after


def _chunked(inputs, state, n_valid, resets, scale, chunk_size):
  """Chunks as wide as the backend likes, or as the tokens need."""
  if chunk_size is None:
    chunk_size = 32 if jax.default_backend() == 'cpu' else 64
  needed = 1 << (inputs.q.shape[1] - 1).bit_length()
  form = delta_wide if jax.default_backend() == 'gpu' else delta_chunk
  return form.chunked(
      inputs, state, n_valid, resets, scale=scale,
      chunk_size=min(chunk_size, needed),
  )


def _on_tpu(q, k, v, gates, state, chunk_size, implementation):
  """The TPU kernel, or the reason why it declines."""
  run = dispatch.kernel('delta_rule', 'pallas_tpu')
  if isinstance(run, str):
    return run
  if chunk_size not in (None, 16, 32, 64, 128):
    return f'its chunks have 16, 32, 64 or 128 tokens, not {chunk_size}'
  why = _unsuited(q, k, v, state, implementation) or dispatch.declines(
      'delta_rule', 'pallas_tpu', q, k, v, *gates, chunk_size=chunk_size)
  return why or _Bound(run, chunk_size)


def _on_gpu(q, k, v, gates, state, implementation):
  """The GPU kernel of a single token, or the reason why it declines."""
  run = dispatch.kernel('delta_rule', 'pallas_gpu')
  if isinstance(run, str):
    return run
  why = dispatch.declines('delta_rule', 'pallas_gpu', q, k, v, *gates)
  why = why or _unsuited(q, k, v, state, implementation)
  if why:
    return why
  capability = getattr(jax.devices()[0], 'compute_capability', 'unknown')
  if not capability[0].isdigit() or float(capability) < 9:
    return ('it needs an NVIDIA GPU of compute capability 9.0 or more, this '
            f'one is {capability}')
  if implementation is None and float(capability) >= 10:
    return f'it was never run at compute capability {capability}; ask by name'
  if implementation is None and 4 * state.size < _WORTHWHILE:
    return (f'launching it costs more than it saves below {_WORTHWHILE >> 20} '
            f'MiB of states, these are {4 * state.size >> 20} MiB')
  return run


def _unsuited(q, k, v, state, implementation):
  """What no kernel takes, or None."""
  names = {x.dtype.name for x in (q, k, v)} - {'float32', 'bfloat16'}
  if names or state.dtype != jnp.float32:
    return ('it takes float32 and bfloat16 and a float32 state, got '
            f'{", ".join(sorted({*names, state.dtype.name}))}')
  if implementation is None and jax.device_count() > 1:
    return ('XLA cannot partition it over several devices by itself; inside '
            'jax.shard_map ask for it by name')
  return None
