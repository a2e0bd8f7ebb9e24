"""Whether a state may go on here: its manifest against what would load it.

Both sides are manifests, or the groups of one: `here` is what this process
would write itself. One row of the table per field; the strongest wins: refuse,
then reprefill, then warn; the promise is the lowest. Imports no jax.
"""

import dataclasses

from statejax.artifact.outcome import PROMISES

# These a replay of the tokens can cure; nothing else ever softens.
REPLAYABLE = ('E_WEIGHTS', 'E_ADAPTERS', 'E_SCHEMA', 'E_DTYPE', 'E_POSITION',
              'E_CHAT', 'E_TOOLS')


@dataclasses.dataclass(frozen=True)
class Ask:
  """What is wanted of a load.

  Attributes:
    right: 'resume' or 'fork'.
    chat: whether it goes on as a chat, with its template; else as raw text.
    on_mismatch: 'refuse', or 'reprefill': absorb the kept transcript again
      where that cures it.
    policy_upgrade: 'refuse', or 'replay': absorb it again under the policy of
      here.
    unsafe_cross_weights: go on under other parameters than made it; all that
      comes of it is marked. Of a store's own artifacts only.
    max_bytes: of all files.
  """

  right: str = 'resume'
  chat: bool = False
  on_mismatch: str = 'refuse'
  policy_upgrade: str = 'refuse'
  unsafe_cross_weights: bool = False
  max_bytes: int = 1 << 40

  def __post_init__(self):
    for name, known in (('right', ('resume', 'fork')),
                        ('on_mismatch', ('refuse', 'reprefill')),
                        ('policy_upgrade', ('refuse', 'replay'))):
      if getattr(self, name) not in known:
        raise ValueError(f'{name}: expected one of {known}, got '
                         f'{getattr(self, name)!r}.')
    if self.unsafe_cross_weights and (
        self.on_mismatch, self.policy_upgrade) != ('refuse', 'refuse'):
      raise ValueError('unsafe_cross_weights: expected it alone: what is '
                       'absorbed again is of one model; leave out on_mismatch '
                       'and policy_upgrade.')


ASK = Ask()


@dataclasses.dataclass(frozen=True)
class Finding:
  """What one row of the table says: a code, how severe, and why."""

  code: str
  action: str  # 'refuse', 'replay' (its tokens would do), 'warn'
  promise: str
  detail: str


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What all rows say together.

  Attributes:
    action: 'go', 'replay' or 'refuse'.
    code: of the finding that decides, '' for 'go'.
    detail: the same in words.
    promise: of `PROMISES`.
    warnings: codes.
    findings: all that differ, in the order of the table.
  """

  action: str
  code: str
  detail: str
  promise: str
  warnings: tuple[str, ...]
  findings: tuple[Finding, ...]


def compare(about: dict, here: dict, ask: Ask = ASK, *,
            retokenizes: bool = False) -> Verdict:
  """Returns what is to be done with an artifact.

  Args:
    about: its manifest.
    here: the groups state, model, tokenizer, numerics, horizon, policy, tools
      and env (optional) of this process.
    ask: what is wanted.
    retokenizes: whether the caller can tell what the tokenizer of here makes of
      the kept tokens, and refuses E_TOKENIZER unless it is the same ids. Then a
      replay that is asked for cures that row too.
  """
  cures = REPLAYABLE if ask.on_mismatch == 'reprefill' else ()
  if cures and retokenizes:
    cures += ('E_TOKENIZER',)
  found = tuple(_rows(about, here, ask, cures))
  refused = [f for f in found if f.action == 'refuse']
  replayed = [f for f in found if f.action == 'replay']
  decisive = (refused or replayed or [None])[0]
  warnings = tuple(f.code for f in found if f.action == 'warn')
  if decisive is None:
    promise = max((f.promise for f in found), default='bit',
                  key=PROMISES.index)
    return Verdict('go', '', '', promise, warnings, found)
  return Verdict(decisive.action, decisive.code, decisive.detail, 'none',
                 warnings, found)


def _rows(about, here, ask, cures):
  """Yields a `Finding` for every row of the table that differs."""
  def refuse(code, what, got, expected):
    return Finding(code, 'replay' if code in cures else 'refuse', 'none',
                   f'{what}: expected {expected}, as here, got {got}')

  def warn(code, detail, promise='bit'):
    return Finding(code, 'warn', promise, detail)

  state, model, mine = about['state'], about['model'], here['model']
  for code, field in (('E_WEIGHTS', 'params'), ('E_ADAPTERS', 'adapters')):
    if model[field] != mine[field]:
      if ask.unsafe_cross_weights:
        yield warn('W_WEIGHTS', f'model.{field} differs', 'none')
      else:
        yield refuse(code, f'model.{field}', model[field], mine[field])
  if state['schema'] != here['state']['schema']:
    yield refuse('E_SCHEMA', 'state.schema', state['schema'],
                 here['state']['schema'])
  elif state['schema_digest'] != here['state']['schema_digest']:
    if _other_sampler(state, here['state']):
      yield warn('W_SAMPLER', 'the sampler has another key: it is given a new '
                 'one', 'none')
    else:
      yield refuse(*_layout(state, here['state']))
  names, ours = about['tokenizer'], here['tokenizer']
  for field in ('digest', 'vocab'):
    if names[field] != ours[field]:
      yield refuse('E_TOKENIZER', f'tokenizer.{field}', names[field],
                   ours[field])
      break
  for field in ('special', 'chat_template'):
    if names[field] != ours[field]:
      if ask.chat:
        yield refuse('E_CHAT', f'tokenizer.{field}', names[field], ours[field])
      else:
        yield warn('W_CHAT', f'tokenizer.{field} differs')
      break
  if model['position'] != mine['position']:
    yield refuse('E_POSITION', 'model.position', model['position'],
                 mine['position'])
  for field in ('max_pos', 'active_horizon'):
    if here['horizon'][field] < state['length']:
      yield refuse('E_HORIZON', 'state.length', state['length'],
                   f'at most {field}={here["horizon"][field]}')
      break
  if model['chunk'] != mine['chunk']:
    yield warn('W_CHUNK', f'chunk {model["chunk"]}, here {mine["chunk"]}',
               'tolerance')
  if about['numerics']['id'] != here['numerics']['id']:
    yield warn('W_NUMERICS', _numerics(about['numerics'], here['numerics']),
               'tolerance')
  if about['numerics']['code'] != here['numerics']['code']:
    yield warn('W_CODE', f'statejax {about["numerics"]["code"]}, here '
               f'{here["numerics"]["code"]}')
  if about['provenance']['how'] == 'migrated':
    yield warn('W_MIGRATED', 'the state was migrated from another layout',
               'tolerance')
  yield from _texts(about, here, ask, refuse, warn)


def _other_sampler(state, mine):
  """Whether two layouts differ in the form of the sampler's key.

  Only there, as far as leaves say; a load asks for the names of axes too.
  """
  found = []
  for side in (state, mine):
    key = [x for x in side['leaves'] if x['role'] == 'sampler']
    # Of growing leaves the stores' length differs, which a load compares.
    rest = [[x['path'], x['dtype'], x['kind'], x['role'],
             x['kind'] == 'growing' or x['shape']]
            for x in side['leaves'] if x['role'] != 'sampler']
    found.append((rest, [[x['path'], x['kind'], len(x['shape'])] for x in key],
                  [[x['dtype'], x['shape']] for x in key]))
  (rest, key, form), (our_rest, our_key, our_form) = found
  return (rest, key) == (our_rest, our_key) and form != our_form


def _layout(state, mine):
  """Code and words for two layouts that differ."""
  here = {leaf['path']: leaf for leaf in mine['leaves']}
  for leaf in state['leaves']:
    own = here.pop(leaf['path'], None)
    if own is None or any(own[k] != leaf[k] for k in ('kind', 'role')) or (
        leaf['kind'] == 'fixed' and own['shape'] != leaf['shape']):
      return 'E_SCHEMA', f'leaf {leaf["path"]}', _show(leaf), _show(own)
  if here:
    path = sorted(here)[0]
    return 'E_SCHEMA', f'leaf {path}', 'none', _show(here[path])
  here = {leaf['path']: leaf for leaf in mine['leaves']}
  for leaf in state['leaves']:
    own = here[leaf['path']]
    if own['dtype'] != leaf['dtype']:
      return 'E_DTYPE', f'leaf {leaf["path"]}', leaf['dtype'], own['dtype']
  return ('E_SCHEMA', 'schema', state['schema_digest'],
          mine['schema_digest'])


def _show(leaf):
  return 'none' if leaf is None else (
      f'{leaf["dtype"]}{leaf["shape"]} {leaf["kind"]} {leaf["role"]}')


def _numerics(theirs, ours):
  names = [name for name in theirs if name not in ('id', 'code')
           and theirs[name] != ours[name]]
  return ', '.join(f'{n}={theirs[n]}, here {ours[n]}' for n in names) or (
      'flags or kernels differ')


def _texts(about, here, ask, refuse, warn):
  """The rows of keyed texts: policies, tools, environment."""
  for field in ('system', 'safety'):
    theirs, ours = about['policy'][field], here['policy'][field]
    if theirs != ours:
      if not _same_key(theirs, ours):
        yield refuse('E_KEYED', f'policy.{field}', theirs, ours)
      elif ask.policy_upgrade == 'replay':
        yield Finding('E_POLICY', 'replay', 'none', f'policy.{field} differs')
      else:
        yield refuse('E_POLICY', f'policy.{field}', theirs, ours)
  theirs, ours = about['tools'], here['tools']
  if theirs != ours:
    keys = [{_key(item) for item in (side['schema'], *side['items']) if item}
            for side in (theirs, ours)]
    if all(keys) and keys[0] != keys[1]:
      yield refuse('E_KEYED', 'tools', theirs['schema'], ours['schema'])
    elif {*theirs['items']} < {*ours['items']}:
      more = len(ours['items']) - len(theirs['items'])
      yield warn('W_TOOLS', f'{more} tools more')
    else:
      yield refuse('E_TOOLS', 'tools.items', f'{len(theirs["items"])} tools',
                   f'a superset among {len(ours["items"])}')
  if about.get('env') != here.get('env'):
    yield warn('W_ENV', 'assumptions about the environment differ')


def _same_key(left, right):
  """Whether two keyed digests can be compared; '' with anything."""
  return not left or not right or _key(left) == _key(right)


def _key(keyed):
  return keyed.split(':')[1]
