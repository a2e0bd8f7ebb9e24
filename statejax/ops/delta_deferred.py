"""The delta rule with a deferred write: a matrix, and what came after it.

Decoding with `delta_rule` reads and writes the whole matrix for every token.
Here a row keeps the matrix at its last chunk end and a tail of m < C entries
(key k_j, residual r_j, log decay g_j). With G_j,t the sum of g over j+1..t,
never formed from a difference, and S0 the matrix:

  p_j = exp(G_j,t)
  r_t = u_t - S0^T (e_t * p_0) - sum_{j<t} (e_t . (k_j * p_j)) r_j
  y_t = S0^T (q_t * p_0) + sum_{j<=t} (q_t . (k_j * p_j)) r_j

A step reads the matrix once and appends one entry; at m = C the entries are
folded into the matrix. Draft tokens that are rejected are entries cut off.

Chunks begin at the first token of a document, so what a row carries depends on
its document and on C, not on how the tokens arrived.

Reference: arXiv 2406.06484 (chunk form), 2412.06464, 2510.26692 (gates).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from statejax.ops import delta_check as check
from statejax.ops import delta_grid as grid
from statejax.ops.delta_grid import Deferred, Tokens

PARITY = (None, 'bitwise')


def delta_rule_deferred(
    q, k, v, log_decay, erase, write, state, n_valid=None, segment_ids=None, *,
    scale=None, chunk_size, parity=None, drafted=False,
):
  """`delta_rule` whose matrix is written at chunk ends only.

  With `parity=None` a step computes one row, and longer calls are chunked as
  `delta_rule` does. With `parity='bitwise'` every call runs one program on one
  grid of chunks, so that outputs and states are bit-equal however a document
  was split into calls, packed or padded: training forward, prefill and decode
  agree. What this costs: a step computes a chunk.

  Laws: split (L1; exact with parity), padding (L3), packed documents (L4),
  rejected drafts leave no trace (L6), no overflow (L10), initial gradient
  (L16).

  Args:
    q: queries, [B, T, HK, K], any float dtype.
    k: keys of unit length, [B, T, HK, K].
    v: values, [B, T, HV, V], HV a multiple of HK.
    log_decay: log gate <= 0, [B, T, HV] or [B, T, HV, K].
    erase: gate in [0, 2], [B, T, HV] or [B, T, HV, K].
    write: gate in [0, 2], [B, T, HV] or [B, T, HV, V].
    state: `Deferred`, see `empty`.
    n_valid: number of real tokens per row, [B], int32; None means T. Tokens
      past it may hold anything, NaN included.
    segment_ids: document of each token, [B, T], int32. Memory is emptied where
      it changes; the incoming state belongs to the first document.
    scale: static factor on q; None means K**-0.5.
    chunk_size: static power of two C; the same in every call.
    parity: static, None or 'bitwise'; the same in every call.
    drafted: static; True keeps all tokens of this call in the tail, so that
      `truncate` can take them back. It has to come before the next call.

  Returns:
    y: [B, T, HV, V] in v.dtype, zero past n_valid.
    state: `Deferred` after n_valid tokens; where n_valid is 0, bit-equal to
      the input.

  Raises:
    ValueError: a shape disagrees, or the tail has no room for a draft.
  """
  gates = (log_decay, erase, write)
  chunk_size = _check(q, k, v, gates, state, n_valid, segment_ids, chunk_size,
                      parity, drafted)
  batch, length, _, width = q.shape
  if length == 0:
    return jnp.zeros_like(v), state
  scale = check.scale(scale, width)
  x = _tokens(q, k, v, gates, state, scale)
  n_valid = (jnp.full((batch,), length, jnp.int32) if n_valid is None else
             jnp.clip(n_valid, 0, length))
  resets = None
  if segment_ids is not None:
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    resets = jnp.pad(changes, [(0, 0), (1, 0)])
    resets &= jnp.arange(length)[None] < n_valid[:, None]
  if drafted:
    run = functools.partial(
        _draft_exact if parity else _draft, chunk_size)
    y, state = run(state, x, n_valid)
  elif parity or length == 1:
    y, state = _serve(chunk_size, parity, state, x, n_valid, resets)
  else:
    y, state = grid.parallel(chunk_size, state, x, n_valid, resets)
  return y.astype(v.dtype), state


def empty(
    rows, key_heads, heads, key, value, *, chunk_size, draft=0, decay='head',
    erase='head', parity=None, dtype=jnp.float32,
):
  """Returns the `Deferred` of rows that have seen nothing.

  Args:
    rows: B.
    key_heads: HK.
    heads: HV.
    key: K.
    value: V.
    chunk_size: C.
    draft: most tokens of a call with `drafted`.
    decay: 'head' or 'channel', the kind of `log_decay`.
    erase: 'head' or 'channel', the kind of `erase`, or None for erase=0; only
      parity keeps it.
    parity: None or 'bitwise'.
    dtype: float32, or float64.
  """
  kinds = ('head', 'channel')
  if decay not in kinds or erase not in (*kinds, None):
    raise ValueError(f'decay, erase: expected one of {kinds}, got {decay!r} '
                     f'and {erase!r}; erase=None is for calls with erase=0.')
  shapes = grid.shapes(
      rows, key_heads, heads, key, value, chunk_size=chunk_size, draft=draft,
      decay=decay, erase=erase if parity else None)
  return Deferred(**{
      name: jnp.zeros(shape, jnp.int32 if name == 'count' else dtype)
      for name, shape in shapes.items()})


def truncate(state, count, *, chunk_size):
  """Keeps the first `count` entries of each tail: rejects draft tokens.

  Bit-equal to never having drafted what is cut off. What is kept is final:
  full chunks are folded into the matrix.

  Args:
    state: `Deferred`, after a call with `drafted`.
    count: [B] int32 or an int, between the count before that call and the
      present one.
    chunk_size: as in that call.

  Returns:
    `Deferred` for any next call.
  """
  count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), state.count.shape)
  keep = jnp.arange(state.k.shape[2])[None] < count[:, None]
  cut = grid.map_tail(
      lambda x: jnp.where(keep[:, None, :, None], x, jnp.zeros((), x.dtype)),
      state)
  cut = dataclasses.replace(cut, count=count)

  def settle(cut):
    # The tail, absorbed anew: its full chunks become matrix. A row without
    # one stays as it is.
    x = grid.entries(cut)
    whole = cut.count // chunk_size * chunk_size
    start = dataclasses.replace(
        grid.map_tail(jnp.zeros_like, cut), count=jnp.zeros_like(cut.count))
    _, _, settled = grid.walk(
        chunk_size, start, x, jnp.where(whole > 0, cut.count, 0), None)
    return grid.where(whole > 0, settled, cut)

  return lax.cond(jnp.any(count >= chunk_size), settle, lambda cut: cut, cut)


# From the public arguments to float32 tokens, [B, T, H, D].


def _tokens(q, k, v, gates, state, scale):
  log_decay, erase, write = gates
  dtype = state.matrix.dtype
  shape = v.shape[:3]

  def gate(x):
    if isinstance(x, (int, float)):
      return jnp.full((*shape, 1), x, dtype)
    return (x if x.ndim == 4 else x[..., None]).astype(dtype)

  one = isinstance(write, (int, float)) and write == 1
  none = isinstance(erase, (int, float)) and erase == 0
  v = v.astype(dtype)
  return Tokens(
      q=q.astype(dtype) * jnp.asarray(scale, dtype), k=k.astype(dtype),
      u=v if one else gate(write) * v, log_decay=gate(log_decay),
      erase=None if none else gate(erase))


# What serving runs, forward; backward is that of the parallel form.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _serve(size, parity, state, x, n_valid, resets):
  if parity:
    y, _, state = grid.walk(size, state, x, n_valid, resets)
    return y, state
  return _step(size, state, x, n_valid)


def _serve_forward(size, parity, state, x, n_valid, resets):
  out = _serve(size, parity, state, x, n_valid, resets)
  return out, (state, x, n_valid, resets)


def _serve_backward(size, parity, residuals, cotangents):
  state, x, n_valid, resets = residuals
  parallel = lambda state, x: grid.parallel(size, state, x, n_valid, resets)
  _, pull = jax.vjp(parallel, state, x)
  return *pull(cotangents), None, None


_serve.defvjp(_serve_forward, _serve_backward)


def _step(size, state, x, n_valid):
  """One token: one read of the matrix, one entry appended."""
  rows, slots = state.k.shape[0], state.k.shape[2]
  heads, groups = state.k.shape[1], state.u.shape[1] // state.k.shape[1]
  count, lost = grid.checked(state.count, size)
  valid = n_valid > 0
  by_head = lambda x: jnp.swapaxes(x, 1, 2)  # [B, H, 1, D]
  x = jax.tree.map(by_head, x)
  split = lambda x: x.reshape(rows, heads, groups, *x.shape[2:])

  # Written before it is read, so that the tail is not copied; the residual of
  # the new slot is still zero.
  at = jnp.where(valid, count, slots)  # past the end is dropped
  k, log_decay = (grid.append_one(old, new, at) for old, new in (
      (state.k, x.k), (state.log_decay, x.log_decay)))
  later, total = _suffix(log_decay)
  q, new_k = x.q[:, :, None], x.k[:, :, None]
  reads = jnp.broadcast_to(q, (rows, heads, groups, *q.shape[-2:]))
  if x.erase is not None:
    reads = jnp.concatenate([reads, split(x.erase) * new_k], axis=3)
  recalled = grid.dot('bhrzk,bhrkv->bhrzv', reads * split(total),
                      split(state.matrix))
  if later.shape[-1] == 1:
    pairs = grid.dot('bhrzk,bhnk->bhrzn', reads, k)
    pairs = pairs * jnp.swapaxes(split(later), 3, 4)
  else:
    pairs = grid.dot('bhrzk,bhrnk->bhrzn', reads, k[:, :, None] * split(later))
  recalled = recalled + grid.dot('bhrzn,bhrnv->bhrzv', pairs, split(state.u))
  residual = split(x.u)
  if x.erase is not None:
    residual = residual - recalled[:, :, :, 1:]
  y = recalled[:, :, :, :1] + jnp.sum(q * new_k, -1, keepdims=True) * residual
  y = by_head(y.reshape(rows, heads * groups, 1, -1))
  y = jnp.where(lost[:, None, None, None], jnp.nan, y)
  y = jnp.where(valid[:, None, None, None], y, 0.0)
  u = grid.append_one(
      state.u, residual.reshape(rows, heads * groups, 1, -1), at)
  state = dataclasses.replace(
      state, k=k, u=u, log_decay=log_decay,
      count=jnp.where(valid, count + 1, state.count))
  return y, grid.fold_full(state, size, valid & (count + 1 == size))


def _suffix(log_decay):
  """Decay from each slot to the last one, and from before the first."""
  slots = log_decay.shape[2]
  sums = jnp.pad(log_decay, [(0, 0), (0, 0), (0, 1), (0, 0)])
  b = 1
  while b < slots:  # sums over slots j .. j + 2b - 1, same-sign terms only
    sums += jnp.pad(sums[:, :, b:], [(0, 0), (0, 0), (0, b), (0, 0)])
    b *= 2
  decay = jnp.exp(sums)
  return decay[:, :, 1:], decay[:, :, :1]


# Drafts: the matrix is read, and nothing is folded.


def _draft(size, state, x, n_valid):
  """The whole tail and the draft as one chunk, whatever its length."""
  y, residual = grid.block(size, state, x, n_valid)
  return y, grid.append(state, x._replace(u=residual), n_valid)


def _draft_exact(size, state, x, n_valid):
  y, _, _ = grid.walk(size, state, x, n_valid, None)
  return y, grid.append(state, x, n_valid)


def _check(q, k, v, gates, state, n_valid, segment_ids, chunk_size, parity,
           drafted):
  """Raises ValueError unless all agree; returns the chunk size as an int."""
  log_decay, erase, write = gates
  dtype = check.tokens(q, k, v, log_decay, erase, write, n_valid, segment_ids)
  if not isinstance(state, Deferred):
    raise ValueError(f'state: expected a Deferred, got {type(state).__name__}; '
                     'make one with statejax.ops.delta_deferred.empty.')
  check.matrix(q, v, state.matrix, dtype)
  chunk_size = check.chunk_size(chunk_size)
  if parity not in PARITY:
    raise ValueError(f'parity: expected one of {PARITY}, got {parity!r}.')
  heads, slots = state.k.shape[1:3]
  if heads != q.shape[2]:
    raise ValueError(f'state: expected {q.shape[2]} key heads, got {heads}; '
                     'see empty.')
  if slots < chunk_size:
    raise ValueError(
        f'state: expected room for chunk_size={chunk_size} entries, got '
        f'{slots}; make the state with the same chunk_size.')
  gated = parity == 'bitwise' and not (
      isinstance(erase, (int, float)) and erase == 0)
  if (state.erase is not None) != gated:
    raise ValueError(
        f'state: expected {"" if gated else "no "}erase gates in the tail with '
        f'parity={parity!r}; make the state with the same parity.')
  for name, gate, held in (('decay', log_decay, state.log_decay),
                           ('erase', erase, state.erase)):
    width = gate.shape[3] if getattr(gate, 'ndim', 3) == 4 else 1
    if held is not None and held.shape[-1] != width:
      kinds = ['head' if n == 1 else 'channel'
               for n in (held.shape[-1], width)]
      raise ValueError(
          f'state: expected {name}={kinds[1]!r} as the gate has it, got '
          f'{name}={kinds[0]!r}; see empty.')
  if drafted and (segment_ids is not None
                  or q.shape[1] > slots - chunk_size + 1):
    raise ValueError(
        f'drafted: expected at most {slots - chunk_size + 1} tokens of one '
        f'document, got {q.shape[1]}; make the state with a longer draft.')
  return chunk_size
