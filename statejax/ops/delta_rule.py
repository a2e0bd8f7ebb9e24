"""The gated delta rule: recurrence, single step, and the public op."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from statejax.ops import delta_chunk, dispatch


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
    chunk_size: static power of two, tokens per chunk of 'xla'; None chooses.
    implementation: see `statejax.ops.dispatch`: 'pallas_tpu' (the first choice
      on a single TPU), 'xla' or 'reference'.

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
  _check(q, k, v, log_decay, erase, write, state, n_valid, segment_ids)
  _check_chunk_size(chunk_size)
  fast = (_step if q.shape[1] == 1 else
          functools.partial(_chunked, chunk_size=chunk_size))
  run = dispatch.choose('delta_rule', implementation, {
      'pallas_tpu': _on_tpu(q, k, v, state, chunk_size, implementation),
      'xla': fast, 'reference': _recurrent,
  })
  gates = (log_decay, erase, write)
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
  _check(q, k, v, log_decay, erase, write, state, n_valid, None)
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
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  return run(inputs, state, n_valid, resets, scale)


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
  return delta_chunk.chunked(
      inputs, state, n_valid, resets, scale=scale,
      chunk_size=min(chunk_size, needed),
  )


def _on_tpu(q, k, v, state, chunk_size, implementation):
  """The TPU kernel, or the reason why it declines."""
  declines = None
  names = {x.dtype.name for x in (q, k, v)} - {'float32', 'bfloat16'}
  if jax.default_backend() != 'tpu':
    declines = f'it needs a TPU, the backend is {jax.default_backend()}'
  elif names or state.dtype != jnp.float32:
    declines = (
        'it takes float32 and bfloat16 and a float32 state, got '
        f'{", ".join(sorted({*names, state.dtype.name}))}'
    )
  elif chunk_size not in (None, 16, 32, 64, 128):
    declines = f'its chunks have 16, 32, 64 or 128 tokens, not {chunk_size}'
  elif implementation is None and jax.device_count() > 1:
    declines = (
        'XLA cannot partition it over several devices by itself; inside '
        'jax.shard_map ask for it by name'
    )
  run = dispatch.kernel('delta_rule', 'pallas_tpu', declines)
  if isinstance(run, str):
    return run
  return functools.partial(run, chunk_size=chunk_size)


# Errors of the caller.


def _check(q, k, v, log_decay, erase, write, state, n_valid, segment_ids):
  """Raises ValueError unless shapes and dtypes agree."""
  arrays = dict(q=q, k=k, v=v, state=state)
  if n_valid is not None:
    arrays['n_valid'] = n_valid
  if segment_ids is not None:
    arrays['segment_ids'] = segment_ids
  for name, x in arrays.items():
    _expect_array(name, x)
  if q.ndim != 4 or v.ndim != 4:
    raise ValueError(
        f'q, v: expected [B, T, HK, K] and [B, T, HV, V], got {q.shape} and '
        f'{v.shape}; heads and width are separate axes.'
    )
  _expect('q', q, q.shape)
  batch, length, key_heads, width = q.shape
  heads, values = v.shape[2:]
  if not key_heads or heads % key_heads:
    raise ValueError(
        f'v: expected HV a multiple of HK={key_heads}, got HV={heads}; every '
        'key head serves the same number of value heads.'
    )
  per_head = (batch, length, heads)
  _expect('k', k, (batch, length, key_heads, width))
  _expect('v', v, (batch, length, heads, values))
  _expect('state', state, (batch, heads, width, values))
  _expect_gate('log_decay', log_decay, per_head, width)
  if isinstance(log_decay, (int, float)) and log_decay > 0:
    raise ValueError(
        f'log_decay: expected at most 0, got {log_decay}; it is the logarithm '
        'of the factor: 0 keeps everything.'
    )
  _expect_gate('erase', erase, per_head, width)
  _expect_gate('write', write, per_head, values)
  if n_valid is not None:
    _expect('n_valid', n_valid, (batch,), jnp.integer)
  if segment_ids is not None:
    _expect('segment_ids', segment_ids, (batch, length), jnp.integer)
  gates = [x for x in (log_decay, erase, write) if hasattr(x, 'dtype')]
  dtype = jnp.result_type(jnp.float32, *[x.dtype for x in (q, k, v, *gates)])
  if state.dtype != dtype:
    raise ValueError(
        f'state: expected {dtype.name}, got {state.dtype.name}; carried state '
        'is never rounded: allocate it in this type.'
    )


def _expect(name, x, shape, kind=jnp.floating):
  if x.shape != shape or not jnp.issubdtype(x.dtype, kind):
    raise ValueError(
        f'{name}: expected {list(shape)} {kind.__name__}, got {list(x.shape)} '
        f'{x.dtype}; see the shapes in the docstring of delta_rule.'
    )


def _expect_array(name, x):
  if not hasattr(x, 'shape'):
    raise ValueError(
        f'{name}: expected an array, got {type(x).__name__}; only log_decay, '
        'erase and write may be Python scalars.'
    )


def _expect_gate(name, x, per_head, width):
  if isinstance(x, (int, float)):
    return
  _expect_array(name, x)
  if not x.ndim:
    raise ValueError(
        f'{name}: expected {list(per_head)}, one more axis, or a Python scalar,'
        ' got an array without axes; jit makes one of a scalar argument: bind '
        'it by functools.partial before.'
    )
  shape = per_head if x.ndim == 3 else (*per_head, width)
  _expect(name, x, shape)


def _check_chunk_size(chunk_size):
  if chunk_size is not None and (
      not isinstance(chunk_size, int)
      or chunk_size < 2 or chunk_size & (chunk_size - 1)
  ):
    raise ValueError(
        f'chunk_size: expected a power of two >= 2, got {chunk_size!r}; leave '
        'it None to let the backend decide.'
    )
