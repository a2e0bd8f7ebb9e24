"""Migrations: a state of one layout becomes a new artifact of another one.

Nothing is converted on the way into a slot: a load refuses another layout or
other dtypes, and says so. What can be told exactly is done here, on request,
and makes a new artifact beside the old one, whose lineage says `migrated`. A
migration is a pure function of one row's arrays, registered for the two layouts
between which it goes; what is not registered is refused.
"""

import dataclasses
from collections.abc import Callable
from secrets import token_hex

import jax.numpy as jnp
import numpy as np

from statejax import config as cfg
from statejax import state as st
from statejax.artifact import (
  compat,
  desk,
  grant,
  identity,
  load,
  mint,
  sealing,
  verify,
)
from statejax.artifact.access import Principal
from statejax.artifact.objects import Kept
from statejax.artifact.outcome import Refused

# Of the table of compatibility, what a migration can cure.
CURED = ('E_SCHEMA', 'E_DTYPE', 'E_POSITION')


@dataclasses.dataclass(frozen=True)
class Migration:
  """A change of layout that keeps what a state means.

  Attributes:
    name: for errors.
    settings: of the model's config, dotted, that may differ between both
      sides; any other one that does is refused.
    convert: ({path: array}, {path: dtype name}) -> {path: array}; of the
      leaves below `layers/` of one row, live prefixes in logical order, and
      what dtypes they shall have. The others stay as they are.
  """

  name: str
  settings: tuple[str, ...]
  convert: Callable[[dict, dict], dict]


def _rounded(leaves, dtypes):
  """Every leaf in the dtype of its own path, rounded to the nearest number."""
  return {path: x.astype(dtypes[path]) if path in dtypes else x
          for path, x in leaves.items()}


CAST = Migration('cast', ('store_dtype',), _rounded)
# (schema digest, schema digest) -> what leads from the first to the second. No
# released layout has changed yet.
REGISTERED: dict[tuple[str, str], Migration] = {}


def migrate(shop, key: str, principal: Principal, source: identity.Host,
            target: identity.Host, *, cast: bool = False,
            registered=REGISTERED, ref: str = '', vouch=None) -> Kept:
  """Makes a new artifact of another layout; the old one stays as it is.

  Governance and transcript are the old one's. A load of it promises a
  tolerance, and warns W_MIGRATED.

  Args:
    shop: `objects.Store`.
    key: id, beginning of one, or name.
    principal: needs the right to fork it; by a grant it is a use of that.
    source: what the artifact is of, and would load in.
    target: what it shall load in: of the same parameters, tokenizer, policies
      and tools.
    cast: whether dtypes may change, which rounds.
    registered: {(schema digest, schema digest): `Migration`}.
    ref, vouch: see `mint.mint`.

  Raises:
    Refused: E_SCHEMA, E_DTYPE, E_POSITION: nothing leads from one to the other,
      or a cast was not asked for; E_NONFINITE, E_BOUNDS: a narrower dtype does
      not hold it; the code of whatever else differs.
    ValueError: both sides are the same already.
  """
  found = desk.examine(shop, key, principal, 'fork')
  about = found.about
  assert found.plain is not None  # only an inspection is redacted
  parent = mint.Parent(found.id, about)
  with shop.catalog.refusals(str(principal), 'migrate', found.id):
    mint.may_fork(shop, parent, principal)
    with shop.catalog.lease(found.id, token_hex(8)):
      state, salts = _state(shop, found, source)
    migration = _choose(about, source, load.compared(
        shop, found.id, about, target), cast, registered)
    state = _converted(state, migration, target)
    grant.use(shop, principal, found.id)
  terms = mint.Terms.of(about, kind=about['kind'], how='migrated')
  length, transcript = about['state']['length'], None
  edits = tuple((at, mark) for at, mark in found.plain['edits'])
  if found.tokens is not None:
    transcript = mint.Transcript(tuple(found.tokens[:length]), edits, keep=True)
  return mint.mint(shop, state, 0, target, terms, principal=principal,
                   transcript=transcript, edited=mint.Edited(edits, salts),
                   parent=parent, ref=ref, vouch=vouch,
                   account=about['account'])


def _state(shop, found, source):
  """(state, salts) of an artifact, as its own model loads it."""
  about = found.about
  here = load.compared(shop, found.id, about, source).groups(
      identity.Carried.by(about))
  verdict = compat.compare(about, here)
  if verdict.action != 'go':
    raise Refused(verdict.code, f'source: {verdict.detail}')
  with sealing.opened(shop, shop.place(found.id), about) as clear:
    return (load.restore(clear, about, found.plain, source,
                         about['state']['length']), verify.salts(clear, about))


def _choose(about, source, target, cast, registered) -> Migration:
  """What leads from an artifact to the target; raises where nothing does."""
  here = target.groups(identity.Carried.by(about))
  refused = [f for f in compat.compare(about, here).findings
             if f.action == 'refuse']
  if not refused:
    raise ValueError('migrate: the artifact loads in the target as it is; '
                     'there is nothing to migrate.')
  for finding in refused:
    if finding.code not in CURED:
      raise Refused(finding.code, finding.detail)
  pair = about['state']['schema_digest'], here['state']['schema_digest']
  migration = registered.get(pair)
  if migration is None:
    # The first that differs says why: a layout, or dtypes alone.
    if refused[0].code != 'E_DTYPE' or not cast:
      more = ('; ask for a cast, which rounds' if refused[0].code == 'E_DTYPE'
              else '; no migration between these two is registered')
      raise Refused(refused[0].code, refused[0].detail + more)
    migration = CAST
  for name, old, new in _differences(cfg.to_dict(source.config),
                                     cfg.to_dict(target.config)):
    if name not in (*migration.settings, 'remat'):
      raise Refused('E_POSITION', f'{name}: expected {old!r} at both ends of '
                    f'{migration.name}, got {new!r} in the target')
  return migration


def _differences(old, new, prefix=''):
  """Yields (dotted name, old, new) of all settings that differ."""
  if isinstance(old, list | tuple) and isinstance(new, list | tuple) and (
      len(old) == len(new)):
    old, new = (dict(enumerate(side)) for side in (old, new))
  if isinstance(old, dict) and isinstance(new, dict):
    for name in old.keys() | new.keys():
      yield from _differences(old.get(name), new.get(name), f'{prefix}{name}.')
  elif old != new:
    yield prefix.rstrip('.'), old, new


def _converted(state, migration, target):
  """The state of the target that a migration makes of one of the source."""
  length = int(state.length[0])
  empty = st.allocate(target.schema_of(1, length, identity.Carried.of(state)))
  old = {path: x for path, x, _, _ in st.leaves(st.live(state, 0))}
  kept = {path: x for path, x in old.items() if not path.startswith('layers/')}
  dtypes = {path: x.dtype.name for path, x, _, _ in st.leaves(empty)}
  made = migration.convert(
      {path: x for path, x in old.items() if path not in kept}, dtypes)
  for path in kept.keys() & made.keys():
    raise Refused('E_SCHEMA', f'{migration.name}: leaf {path}: expected it to '
                  'stay as it is, got a new one')
  made = made | kept
  def one(path, axes, kind, x):
    new = np.array(x)
    row = np.squeeze(new, axes.index('batch'))
    if path not in made or made[path].dtype != x.dtype or (
        made[path].ndim != row.ndim):
      raise Refused('E_SCHEMA', f'{migration.name}: leaf {path}: expected '
                    f'{x.dtype} of {row.ndim} axes, got {_show(made, path)}')
    part = made[path]
    # A growing leaf fills its prefix, which is all of what is alive.
    if kind == 'fixed' and part.shape != row.shape or any(
        n > most for n, most in zip(part.shape, row.shape)):
      raise Refused('E_SCHEMA', f'{migration.name}: leaf {path}: expected '
                    f'{row.shape}, got {part.shape}')
    row[tuple(map(slice, part.shape))] = part
    return jnp.asarray(new)
  result = st.map_leaves(one, empty)
  alive = {path: x for path, x, _, _ in st.leaves(st.live(result, 0))}
  for path in sorted(alive.keys() | made.keys()):
    if path not in alive or alive[path].shape != made[path].shape or (
        alive[path].tobytes() != made[path].tobytes()):
      raise Refused('E_SCHEMA', f'{migration.name}: leaf {path}: expected a '
                    f'live leaf of the target, got {_show(made, path)}')
  return result


def _show(leaves, path):
  x = leaves.get(path)
  return 'none' if x is None else f'{x.dtype} {list(x.shape)}'

