"""Loading: an artifact becomes a state, its tokens, or a refusal; in order.

Every check comes before what it protects: nothing of the payload is opened
before its bytes are the listed ones, and no array leaves before its digest and
the state's witness are right. Every end is written into the audit log. Where
it is refused, the caller gets no state, so that no slot is touched.
"""

import dataclasses
import os
import re
from concurrent import futures
from secrets import token_hex
from typing import Any

import jax
import numpy as np

from statejax import sharding
from statejax import state as st
from statejax.artifact import (
  access,
  compat,
  desk,
  digest,
  foreign,
  grant,
  identity,
  layout,
  manifest,
  mint,
  names,
  revoked,
  sealing,
  standing,
  store,
  trust,
  verify,
)
from statejax.artifact.access import Principal
from statejax.artifact.compat import ASK, Ask
from statejax.artifact.outcome import LOOK, Decision, Refused, absent, refusal

# As the library of the payload tells of a failed call of the system.
_SYSTEM = re.compile(r"os_error_code='(?!2')|OS error (?!2:)")
# Bytes that memory must begin at for jax to take it as it is.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Loaded:
  """How a load ended, and what came of it.

  Attributes:
    decision: see `Decision`.
    id: of the artifact, '' where none was found.
    about: its manifest; empty where refused.
    state: `ServingState` of one row, where resumed.
    tokens: absorbed tokens then pending ones, where kept: to absorb again if
      the decision says so.
    stands: where the state does, to the bit; None where there is no state. See
      `standing.check` of the slot that it was put into.
    host: `identity.Host` to mint with what comes of it: whoever asked, but of
      the epoch of what is resumed, and where the weights are not those that
      made it of none; see `identity.crossed`. None where it is refused.
    edited: `mint.Edited` of the state, to mint with what comes of it.
  """

  decision: Decision
  id: str = ''
  about: dict = dataclasses.field(default_factory=dict)
  state: Any = None
  tokens: tuple[int, ...] | None = None
  stands: standing.Standing | None = None
  host: Any = None
  edited: mint.Edited = mint.UNEDITED


def load(shop, key: str, principal: Principal, host: identity.Host,
         ask: Ask = ASK, *, capacity: int | None = None, mesh=None,
         charged: bool = True) -> Loaded:
  """Ends in `resumed(n)`, `reprefilled(n, reason)` or `refused(code)`.

  Args:
    shop: `objects.Store`.
    key: id, beginning of one, or name.
    principal: who asks.
    host: what this process is.
    ask: what is wanted.
    capacity: tokens that the growing leaves shall hold; None is what the host's
      program has. `statejax.state.put` puts the row into a slot.
    mesh: onto whose devices the state is restored, of `sharding.make_mesh`; see
      `sharding.row_shardings`. None is the first device. If it is not that of
      the host's program, the promise is `tolerance` at most.
    charged: whether the accounts count what it saved, and a grant its use; not
      where the load is only to see whether it would, which stands as such in
      the log.

  Returns:
    `Loaded`. Never raises what an artifact can cause: that is the decision.
    Who may not see the artifact is told that there is none; the log tells why.

  Raises:
    ValueError: the mesh does not divide the leaves of the host's model; a key
      that is no text.
  """
  if not isinstance(key, str):
    raise ValueError(f'key: expected text, an id or name, got {key!r}.')
  id = ''
  if mesh is not None:  # with all leaves there can be, before anything is read
    sharding.row_shardings(host.schema_of(1, 0, identity.Carried(True)), mesh)
  try:
    id = shop.find(key)
    with shop.catalog.lease(id, token_hex(8)):
      loaded = _load(shop, id, principal, host, ask, capacity, mesh)
  except Refused as error:
    loaded = Loaded(refusal(error), id)
  except OSError as error:
    loaded = Loaded(refusal(Refused('E_IO', str(error))), id)
  with shop.catalog.transaction():
    if charged and loaded.decision.outcome != 'refused':
      try:
        grant.use(shop, principal, id)
      except Refused as error:  # somebody else was faster with the last use
        loaded = Loaded(refusal(error), id)
    decision = loaded.decision
    saved = _avoided(loaded.about, host, decision.n) if (
        decision.outcome == 'resumed') else {}
    receipt = shop.catalog.audit(
        str(principal), ask.right if charged else LOOK, id or key[:80],
        str(decision), code=decision.code or decision.mark,
        promise=decision.promise)
    if charged and decision.outcome == 'resumed':
      shop.catalog.charge(str(principal), id, **saved, resumes=1,
                          tokens_skipped=decision.n)
    elif charged and decision.outcome == 'reprefilled':
      shop.catalog.charge(str(principal), id, tokens_reprefilled=decision.n)
  if decision.outcome == 'refused' and desk.unseen(shop, id, principal):
    loaded = Loaded(refusal(absent(key)))
    decision = loaded.decision
  return dataclasses.replace(loaded, decision=dataclasses.replace(
      decision, receipt=receipt))


def _avoided(about, host, tokens):
  """Units of the ledger: what it took to absorb what is not absorbed again.

  Times are those measured when it was minted. What is not known is left out.
  """
  found = {'device_us_avoided': about['account']['device_us'],
           'mflop_avoided': host.work(tokens) if host.work else 0}
  return {unit: delta for unit, delta in found.items() if delta}


def _load(shop, id, principal, host, ask, capacity, mesh):
  folder = shop.place(id)
  # V1 to V4.
  found, data, about, _ = verify.head(folder, name=id, max_bytes=ask.max_bytes)
  vouched = trust.vouch(shop, folder, found, data, about)
  # V5 to V7.
  stems = foreign.above(shop, about)
  warnings = revoked.valid(shop, id, about, vouched, stems)
  access.require(about, principal, ask.right, now=shop.catalog.clock())
  # V8.
  here = compared(shop, id, about, host).groups(identity.Carried.by(about))
  if vouched != 'mac' or stems:  # nobody else's state, to the wrong weights
    ask = dataclasses.replace(ask, unsafe_cross_weights=False)
  verdict = compat.compare(about, here, ask,
                           retokenizes=host.retokenize is not None)
  warnings += verdict.warnings
  if verdict.action == 'refuse':
    raise Refused(verdict.code, verdict.detail)
  if verdict.action == 'replay' and about['state']['transcript'] == 'none':
    raise Refused(verdict.code, f'{verdict.detail}, and the transcript, from '
                  'which it could be absorbed again, is not kept')
  # V9 to V11.
  layout.check(folder, found, about)
  with sealing.opened(shop, folder, about) as clear:
    return _opened(clear, id, about, host, capacity, mesh, verdict, warnings)


def compared(shop, id: str, about: dict, host: identity.Host) -> identity.Host:
  """Returns the host as an artifact names its texts.

  That is under the exchange key of an export, of which it is one or stems from
  one, where that can be opened here; else as it is.

  Args:
    shop: `objects.Store`.
    id: of the artifact.
    about: its manifest.
    host: what this process is.
  """
  # A persona is compared with none, and a child's is under its parent's key.
  wanted = identity.key_ids(about | {'governance': {'persona': ''}})
  if not host.texts.secret or wanted <= {names.key_id(host.texts.secret)}:
    return host
  for one in (id, *shop.catalog.ancestors(id)):
    try:
      source = about if one == id else manifest.parse(
          layout.read(shop.place(one), manifest.NAME))
      secret = b'' if source['sealed'] == 'none' else sealing.exchange_key(
          sealing.data_key(shop, one, source))
    except (Refused, OSError):
      continue
    if secret and names.key_id(secret) in wanted:
      return dataclasses.replace(host, texts=dataclasses.replace(
          host.texts, secret=secret))
  return host


def _opened(folder, id, about, host, capacity, mesh, verdict, warnings):
  plain, tokens = verify.unsealed(folder, about)
  tokens = None if tokens is None else tuple(tokens)
  length = about['state']['length']
  if verdict.action == 'replay':
    if plain['edits']:
      raise Refused(verdict.code, f'{verdict.detail}, and the state was edited '
                    f'{len(plain["edits"])} times, which absorbing its tokens '
                    'again would undo')
    if any(f.code == 'E_TOKENIZER' for f in verdict.findings):
      _same_ids(host, about, tokens)
    return Loaded(Decision('reprefilled', length, verdict.code, 'none',
                           warnings, verdict.detail), id, about, None, tokens,
                  host=host)
  # V12 to V15.
  promise, own = verdict.promise, host.program.capacity
  capacity = own if capacity is None else capacity
  state = restore(folder, about, plain, host, capacity, mesh)
  if st.capacity(state) not in (None, own) or (
      mesh is not None and sharding.mesh_name(mesh) != host.program.mesh):
    # Not the program of which the numerics speak.
    promise, warnings = 'tolerance', warnings + ('W_NUMERICS',)
  stands = standing.Standing(length, plain['witness'],
                             plain['tree'].removeprefix('sha256:'))
  if 'W_SAMPLER' in warnings:  # its key is not the stored one
    stands = standing.at_rest(state, 0)
  host = identity.of_epoch(host, about)
  if 'W_WEIGHTS' in warnings:
    host = identity.crossed(host, about)
  return Loaded(Decision('resumed', length, '', promise, tuple(
      dict.fromkeys(warnings))), id, about, state, tokens, stands, host,
                mint.Edited(tuple((at, mark) for at, mark in plain['edits']),
                            verify.salts(folder, about)))


def _same_ids(host, about, tokens):
  """Raises unless the kept ids mean the same text to the host's tokenizer."""
  digest_of = about['tokenizer']['digest']
  here = host.retokenize(digest_of, tokens)
  if here is None:
    raise Refused('E_TOKENIZER', 'expected a tokenizer that the host knows, '
                  f'got {digest_of}')
  here = tuple(map(int, here))
  if here != tuple(tokens) or max(here, default=0) >= host.config.vocab:
    at = next((i for i, (a, b) in enumerate(zip(tokens, here)) if a != b),
              min(len(tokens), len(here)))
    raise Refused('E_TOKENIZER', 'expected the kept ids of the same text, '
                  f'below {host.config.vocab}; the first that differs is {at} '
                  f'of {len(tokens)}')


def restore(folder, about: dict, plain: dict, host: identity.Host,
            capacity: int, mesh=None):
  """V12 to V15: returns the `ServingState` of one row.

  Args:
    folder: the artifact in clear, its files checked.
    about: its manifest.
    plain: its `plain.json`.
    host: what this process is.
    capacity: tokens that the growing leaves shall hold.
    mesh: see `load`.

  Raises:
    Refused: E_SCHEMA, E_LIMIT, E_PAYLOAD, E_DIGEST, E_NONFINITE, E_BOUNDS,
      E_WITNESS.
  """
  length, carried = about['state']['length'], identity.Carried.by(about)
  schema = host.schema_of(1, length, carried)
  sampler = _other_sampler(about, schema)
  target = _target(about, schema, length, sampler)
  stored = _open(folder, target)
  if _has_stores(schema) and not length <= capacity <= manifest.MAX_LENGTH:
    raise Refused('E_LIMIT', f'expected a capacity of at least {length}, the '
                  f'tokens absorbed, and at most {manifest.MAX_LENGTH}, got '
                  f'{capacity}')
  wide = host.schema_of(1, capacity, carried)
  try:
    state, live = _room(wide, target)
  except MemoryError as error:
    raise Refused('E_LIMIT', f'expected memory for a capacity of {capacity} '
                  f'tokens, got none: {error}') from None
  try:
    store.fill(stored, {path: x for path, x in live.items() if x.size})
  except Exception as error:  # of any type: the library promises none
    raise _unreadable('payload', error) from error
  row = st.map_leaves(lambda path, *_: live[path], schema)
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    # Beside each other; what they found is asked for in the order of checks.
    sound = pool.submit(mint.check, row)
    digests = {path: digest.leaf_digest(
        path, _typed(x, target[path][0]), pool.map) for path, x in live.items()}
  for path, got in digests.items():
    if got != plain['leaves'][path]:
      raise Refused('E_DIGEST', f'leaf {path}: expected '
                    f'{plain["leaves"][path]}, got {got}')
  sound.result()
  _meets(row, about, plain)
  if sampler is not None:  # from its content: equal at every load
    state = st.rekey(state, jax.random.key(int(plain['tree'][-8:], 16)))
  # Nobody else has this memory, so that the state may live in it.
  where = None if mesh is None else sharding.row_shardings(wide, mesh)
  return jax.device_put(state, where, may_alias=True)


def _other_sampler(about, schema):
  """The sampler's key where it has another form than ours, else None.

  The names of all axes must be ours, which only the digest knows.
  """
  state = about['state']
  leaf = next(x for x in state['leaves'] if x['role'] == 'sampler')
  if (leaf['dtype'], tuple(leaf['shape'])) == (
      np.dtype(schema.key.dtype).name, tuple(schema.key.shape[1:])):
    return None
  expected = identity.layout(schema, leaf)['schema_digest']
  if expected != state['schema_digest']:
    raise Refused('E_SCHEMA', f'schema: expected {expected} with its sampler, '
                  f'got {state["schema_digest"]}')
  return leaf


def _typed(x, dtype):
  """An array as its digest names it: a key in a file is its words."""
  return x if not dtype.startswith('key:') else jax.random.wrap_key_data(
      x, impl=dtype.removeprefix('key:'))


def _target(about, schema, length, sampler):
  """{path: (dtype, shape)} of what our own schema expects of such a row.

  A sampler's key of another form is expected as it is.
  """
  strides = dict(schema.strides)
  target = {}
  for path, leaf, axes, kind in st.leaves(schema):
    shape = [n for a, n in zip(axes, leaf.shape) if a != 'batch']
    if kind == 'growing':
      kept = [a for a in axes if a != 'batch']
      shape[kept.index('capacity')] = length // strides.get(path, 1)
    target[path] = leaf.dtype.name, tuple(map(int, shape))
  if sampler is not None:
    target[sampler['path']] = sampler['dtype'], tuple(sampler['shape'])
  stored = {leaf['path']: (leaf['dtype'], tuple(leaf['shape']))
            for leaf in about['state']['leaves']}
  _same('manifest', target, stored)
  return target


def _open(folder, target):
  """V12: what is stored must be what is expected; returns it, opened."""
  try:
    opened = store.open_payload(folder / manifest.PAYLOAD)
    stored = store.describe_payload(opened)
  except Exception as error:  # of any type: the library promises none
    raise _unreadable('metadata', error) from error
  _same('payload', {store.stored_name(path): (_words(dtype), shape) for path, (
      dtype, shape) in target.items() if 0 not in shape}, stored)
  return opened


def _words(dtype):
  """The dtype of a leaf as a file has it: of a key, that of its words."""
  return 'uint32' if dtype.startswith('key:') else dtype


def _unreadable(what, error):
  """What it means that a payload could not be read: damage, or the disk."""
  failed = isinstance(error, OSError) or _SYSTEM.search(str(error))
  return Refused('E_IO' if failed else 'E_PAYLOAD', f'expected readable {what}'
                 f', got {type(error).__name__}: {error}')


def _same(what, expected, got):
  for path in sorted(expected.keys() | got.keys()):
    if expected.get(path) != got.get(path):
      raise Refused('E_SCHEMA', f'{what}: leaf {path}: expected '
                    f'{expected.get(path, "none")}, got '
                    f'{got.get(path, "none")}')


def _meets(live, about, plain):
  """V15: the parts of a state must stand at the same place."""
  state = about['state']
  for what, expected, got in (
      ('length', state['length'], int(live.length)),
      ('pending', state['n_pending'], int(live.pending >= 0)),
      ('witness', plain['witness'], names.lanes(live.witness))):
    if expected != got:
      raise Refused('E_WITNESS', f'{what}: expected {expected}, got {got} in '
                    'the arrays')


def _has_stores(schema):
  return any(kind == 'growing' for _, _, _, kind in st.leaves(schema))


def _room(schema, target):
  """An empty state of a schema, and {path: its part that a row fills}."""
  live = {}
  def one(path, axes, kind, leaf):
    x, (dtype, shape) = _aligned(leaf), target[path]
    row = np.squeeze(x, axes.index('batch'))
    if kind == 'fixed' and (dtype, shape) != (row.dtype.name, row.shape):
      live[path] = np.zeros(shape, _words(dtype))  # is not to stay
    else:
      live[path] = row[(*map(slice, shape), ...)]
    return x
  return st.map_leaves(one, schema), live


def _aligned(leaf):
  """Zeros of a leaf, where jax can use them without a copy."""
  raw = np.zeros(leaf.nbytes + _ALIGNMENT, np.uint8)
  begin = -raw.ctypes.data % _ALIGNMENT
  return raw[begin:begin + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
