"""Who asks, of which store, with which model: what flags of `state` say.

And what to do where something is in the way: a state that does not fit, or a
name that is taken.
"""

import json
import os
import pathlib
import sys
from typing import Any

from absl import flags

STORE = flags.DEFINE_string('store', 'states', 'state: directory of artifacts')
SECRETS = flags.DEFINE_string(
    'secrets', '~/.config/statejax', 'state: directory of secrets')
PRINCIPAL = flags.DEFINE_string('principal', 'local', 'state: who acts')
ORG = flags.DEFINE_string('org', '', "state: the principal's organisation")
SIGNING_KEY = flags.DEFINE_string(
    'signing_key', None, 'state: file of a private key')
ROOT = flags.DEFINE_string(
    'root', None, 'state: file of the public key that decides on trust')
HEAD = flags.DEFINE_string(
    'signed_head', None, 'state audit: file of a signed head, kept elsewhere')
GRANT = flags.DEFINE_string('grant', None, 'state: file of a grant to show')
HOLDER_KEY = flags.DEFINE_string(
    'holder_key', None, 'state: file of the private key that --grant is for')

CARD = flags.DEFINE_string(
    'model_card', None, 'state, memory: file of a signed card, which says the '
    'parameters of the run')
VERIFY = flags.DEFINE_enum(
    'verify_params', 'full', ['full', 'card', 'fingerprint'],
    'state, memory: hash all parameters; or take the word of --model_card, of '
    'whose signer one is sure; or that, and compare a sum over all bits')

MISMATCH = flags.DEFINE_enum(
    'on_mismatch', 'refuse', ['refuse', 'reprefill'],
    'state resume: what to do where another model would load it')
UPGRADE = flags.DEFINE_enum(
    'policy_upgrade', 'refuse', ['refuse', 'replay'],
    'state resume: what to do where it was made under another policy')
CHAT = flags.DEFINE_bool(
    'chat', False, 'state resume: it goes on as a chat, so that template and '
    'special tokens must be its own')
CROSS = flags.DEFINE_bool(
    'unsafe_cross_weights', False, 'state resume: go on under other parameters '
    'than made it; all that comes of it is marked')
HORIZON = flags.DEFINE_integer(
    'horizon', None, 'state mint, resume: most tokens that a state may have to '
    'go on from; without it there is no limit', 1, 2**31 - 1)
REPLACE = flags.DEFINE_bool(
    'replace', False, 'state mint: the name may be one of your own artifacts, '
    'which then goes without')

EPOCH = flags.DEFINE_integer(
    'epoch', 0, 'state: of the policies of here; trust rules: what it must be '
    'at least to meet them', 0, 2**53 - 1)
SYSTEM = flags.DEFINE_string(
    'system', '', 'state: text of the policy that holds here; a keyed digest '
    'of it is kept')
SAFETY = flags.DEFINE_string(
    'safety', '', 'state: text of the safety policy that holds here')
PERSONA = flags.DEFINE_string(
    'persona', '', 'state mint, resume: who the model plays')

TEXTS = {flag.name for flag in (EPOCH, SYSTEM, SAFETY, PERSONA)}
PARAMS = {flag.name for flag in (CARD, VERIFY)}
USED = {flag.name for flag in (MISMATCH, UPGRADE, CHAT, CROSS, HORIZON)}


def ask():
  """Returns the `compat.Ask` that the flags say."""
  from statejax.artifact.compat import Ask
  return Ask(chat=CHAT.value, on_mismatch=MISMATCH.value,
             policy_upgrade=UPGRADE.value, unsafe_cross_weights=CROSS.value)


def taken(shop, name, who) -> int:
  """Returns the version of a name that a mint moves; 0 of any other's.

  Raises:
    ValueError: one's own, without --replace: what loses its name is collected.
  """
  found = shop.catalog.ref(name)
  if found is None:
    return 0
  if not shop.owned(found[0], str(who)):
    return 0  # it gets a name beside it, as whoever comes second
  if REPLACE.value:
    return found[1]
  raise _taken(name, f', or say --replace to take it from {found[0]}')


def vacant(shop, name, who):
  """Says before the work that a name is taken, by an artifact of one's own.

  By somebody else's nothing is said: it gets a name beside it.

  Raises:
    ValueError: it is; or it can be no name.
  """
  from statejax.artifact import objects
  objects.check_ref(name)
  found = shop.catalog.ref(name)
  if found is not None and shop.owned(found[0], str(who)):
    raise _taken(name)


def _taken(name, more=''):
  return ValueError(f'{name}: expected a free name, got one that is taken; '
                    f'choose another one{more}.')


def nameless(ref, key):
  """Says where what comes of an artifact will have no name."""
  if ref is None and flag('ref') is None:
    print(f'{key}: has no name, and what comes of it gets none without --ref: '
          'the next gc may delete it', file=sys.stderr)


def free(path):
  """Says before the work, not after it, that a state cannot be saved there.

  Raises:
    ValueError: there is something, or no directory to put it in.
  """
  if path.exists():
    raise ValueError(f'--save={path}: exists already, and nothing saved is '
                     'overwritten; choose another name.')
  if not path.absolute().parent.is_dir():
    raise ValueError(f'--save={path}: expected {path.parent} to be a directory;'
                     ' make it first.')


def acl(entries) -> tuple[tuple[str, tuple[str, ...]], ...]:
  """Returns (who, rights) of each --acl.

  Raises:
    ValueError: one of another form, or rights that nobody could have.
  """
  from statejax.artifact import access
  found = []
  for entry in entries:
    who, _, may = entry.rpartition(':')
    rights = tuple(may.split(','))
    if not who or not {*rights} <= {*access.GRANTABLE}:
      raise ValueError(f'--acl={entry}: expected WHO:RIGHT,... with rights of '
                       f'{", ".join(access.GRANTABLE)}, and as WHO a name or '
                       'org:NAME, e.g. bob:inspect,resume.')
    if not ORG.value:
      raise ValueError(f'--acl={entry}: expected an --org: only its members '
                       'have rights by a list.')
    found.append((who, rights))
  return tuple(found)


def require(terms, shop):
  """Raises unless what is minted with `mint.Terms` could be resumed.

  Raises:
    ValueError: the terms have another form, or need packages that are missing;
      see `current`.
    Refused: E_EXPIRED.
  """
  from statejax.artifact import manifest, sealing
  from statejax.artifact.outcome import Refused
  try:
    terms.check(shop.catalog.clock())
  except Refused as error:
    if error.code != 'E_MANIFEST':
      raise
    # Of flags, not of a manifest, of which there could be another copy.
    raise ValueError(f'{error.detail}; look at the flags of state mint.'
                     ) from None
  if terms.sealed or manifest.must_seal({'governance': terms.group('')}):
    sealing.require()
  current(shop)


def current(shop) -> int:
  """Returns --epoch.

  Raises:
    ValueError: what is minted under it could not be resumed in this store.
  """
  from statejax.artifact import trust
  oldest = trust.oldest_epoch(shop)
  if EPOCH.value < oldest:
    raise ValueError(f'--epoch={EPOCH.value}: expected at least {oldest}, the '
                     'oldest whose states this store resumes; say of which '
                     'epoch the policies of here are.')
  return EPOCH.value


def texts():
  """Returns the `identity.Texts` that the flags say."""
  from statejax.artifact import identity, objects
  words = {'system': SYSTEM.value, 'safety': SAFETY.value,
           'persona': PERSONA.value}
  secret = objects.Secrets(_secrets()).org(ORG.value) if any(
      words.values()) else b''
  return identity.Texts(secret, epoch=EPOCH.value, **words)


def horizon() -> int:
  """Returns the most tokens of a state to go on from."""
  from statejax.artifact import manifest
  return manifest.MAX_LENGTH if HORIZON.value is None else HORIZON.value


def flag(name) -> Any:
  """Returns the value of a flag that another module defines."""
  return flags.FLAGS[name].value


def read(name: str, path) -> bytes:
  """Returns what is in a file that a flag or target names.

  Raises:
    ValueError: there is none.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'{name}: expected a file, got '
                     f'{"a directory" if path.is_dir() else "nothing"} at '
                     f'{path}; look at the spelling.')
  return path.read_bytes()


def write(path, data: bytes, mode: int = 0o644):
  """Makes a file.

  Raises:
    ValueError: there is one, or no directory for it.
  """
  path = unwritten(path)
  with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode),
            'wb') as out:
    out.write(data)


def unwritten(path) -> pathlib.Path:
  """Says before the work that a file cannot be made; returns its path.

  Raises:
    ValueError: there is one, or no directory for it.
  """
  path = pathlib.Path(path)
  if path.exists():
    raise ValueError(f'{path}: exists already, and nothing is overwritten; '
                     'choose another name, or move it away.')
  if not path.absolute().parent.is_dir():
    raise ValueError(f'{path}: expected {path.parent} to be a directory; make '
                     'it first.')
  return path


def is_store() -> bool:
  """Whether there is a store where the flags say."""
  from statejax.artifact import bucket
  if bucket.is_url(STORE.value):
    raise ValueError(f'--store={STORE.value}: expected a directory, got a URL; '
                     'a store is a directory, and push and pull use buckets.')
  return (pathlib.Path(STORE.value) / 'STORE.json').is_file()


def flag_lines(names) -> list[str]:
  """Returns a line for each flag: its name, what it is for, its default."""
  found = []
  for name in sorted(names):
    flag = flags.FLAGS[name]
    usual = '' if flag.default in (None, '', []) else f' [{flag.default}]'
    found.append(f'  --{name}: {flag.help}{usual}')
  return found


def shop(*, make: bool = False):
  """Returns the `objects.Store` of the flags.

  Args:
    make: whether to make one where there is none: what adds to it does, what
      only looks does not.
  """
  from statejax.artifact import objects
  if not is_store() and not make:
    raise ValueError(f'--store={STORE.value}: expected a store, got none; look '
                     'at the spelling, or make one with state mint.')
  root = read('--root', ROOT.value).decode() if ROOT.value else ''
  return objects.Store(STORE.value, objects.Secrets(_secrets()), root=root,
                       notary=_notary())


def _secrets():
  return pathlib.Path(SECRETS.value).expanduser()


def _notary():
  """The `keys.Signer` of the audit log, None where there is no key for it."""
  from statejax.artifact import keys
  file = _secrets() / 'head.pem'
  return keys.Signer(file.read_bytes()) if file.is_file() else None


def heads(shop) -> list[dict]:
  """Returns the signed heads of the audit log, that of --signed_head last.

  Raises:
    Refused: E_SIG.
    ValueError: --signed_head, and no key to verify it with.
  """
  from statejax.artifact import head, keys
  found = [head.place(shop).read_bytes()] if head.place(shop).exists() else []
  if HEAD.value is not None:
    found.append(read('--signed_head', HEAD.value))
  if not found:
    return []
  public = _secrets() / 'head.pub'
  if shop.notary is None and not public.is_file():
    raise ValueError(f'head: expected the key that has signed it, got no '
                     f'{public}; put its public key there.')
  pem = public.read_text() if shop.notary is None else keys.public(
      shop.notary.private)
  return [head.parse(data, pem) for data in found]


def unasked(shop) -> dict:
  """What of a store was not checked, for a line of output; {} for nothing."""
  from statejax.artifact import collect
  found = collect.unasked(shop)
  return {'signatures not checked': found, 'why': 'name the root key with '
          '--root'} if found else {}


def close():
  """Signs the head of the log as a verb leaves it, where there is a key."""
  if is_store() and (_secrets() / 'head.pem').is_file():
    shop().close()


def elsewhere(key: str) -> bool:
  """Whether a target is a file or directory, and no name of the store.

  What has a name there is what is meant; `./chat` is the file beside it.
  """
  if not pathlib.Path(key).exists():
    return False
  return not is_store() or shop().catalog.ref(key) is None


def signer():
  """Returns the `keys.Signer` of --signing_key."""
  from statejax.artifact import keys
  if SIGNING_KEY.value is None:
    raise ValueError('--signing_key: name the file of a private key; make one '
                     'with state keygen.')
  return keys.Signer(read('--signing_key', SIGNING_KEY.value))


def principal():
  """Returns who acts, by the flags."""
  from statejax.artifact.access import Principal
  return Principal(PRINCIPAL.value, ORG.value)


def granted():
  """(grant, private key) that --grant and --holder_key name, None for none."""
  data, private = GRANT.value, HOLDER_KEY.value
  if data is not None and private is not None:
    return read('--grant', data), read('--holder_key', private)
  if data is private:
    return None
  raise ValueError('--grant, --holder_key: expected both: a grant, and the '
                   'private key of whom it is for.')


def who(shop, key):
  """Who asks for an artifact, with what a grant that they show gives."""
  asks, shown = principal(), granted()
  if shown is None:
    return asks
  from statejax.artifact import grant, verify
  from statejax.artifact.outcome import Refused
  data, private = shown
  try:
    id = shop.find(key)
    about = verify.head(shop.place(id), name=id)[2]
  except Refused:
    return asks  # what is wrong is told, and written down, by what is asked
  nonce = grant.challenge(shop)
  return grant.present(shop, data, about, id, asks, nonce,
                       grant.prove(private, nonce, data))


def model():
  """Returns (model, params as a step takes them, digest of the parameters).

  The digest is that of all of them, or what --model_card says of them; see
  `card.params_digest`.
  """
  from statejax.artifact import card
  said = None
  if CARD.value is not None:
    said = card.read(shop(), read('--model_card', CARD.value), ORG.value)
  elif VERIFY.value != 'full':
    raise ValueError(f'--verify_params={VERIFY.value}: expected a --model_card,'
                     ' of which to take it; write one with state card.')
  model, params = trained()
  digest = card.params_digest(said, params, model.config, VERIFY.value)
  return model, model.unstack(params), digest


def trained():
  """Returns (model, its parameters, stacked) of --workdir."""
  from statejax.tasks import text
  from statejax.train import restore
  workdir = flag('workdir')
  if workdir is None:
    raise ValueError('--workdir: name the directory of the run.')
  model, params = restore.from_workdir(workdir)
  if model.config.vocab != text.VOCAB:
    raise ValueError(f'{workdir}: expected a text model of {text.VOCAB} tokens,'
                     f' got {model.config.vocab}; train one, e.g. of '
                     'configs/text_kda.py.')
  return model, params


def changed(model):
  """The model with what --set says of it; its parameters must stay the same."""
  from statejax import config as cfg
  from statejax.model import LanguageModel
  config = model.config
  for assignment in flag('set'):
    if not assignment.startswith('model.'):
      raise ValueError(f'--set={assignment}: expected a setting of the model, '
                       'e.g. model.store_dtype=float32.')
    config = cfg.override(config, assignment.removeprefix('model.'))
  return model if config is model.config else LanguageModel(config)


def host(model, digest, capacity):
  """Returns this process as the loader of an artifact sees it."""
  from statejax import account
  from statejax import state as st
  from statejax.artifact import identity
  from statejax.tasks import text
  return identity.Host(
      model.config, model.state_schema, digest,
      # Where nothing grows a capacity is of no program.
      program=identity.Program(capacity=capacity if st.capacity(
          model.state_schema(1, capacity)) is not None else 0),
      tokenizer={'bytes': b'%d ids' % text.VOCAB}, special={'end': text.END},
      active_horizon=horizon(), texts=texts(),
      work=lambda tokens: account.mflop(model.config, tokens))


def room(tokens):
  """Capacity for so many tokens, in steps: equal ones are equal programs.

  Raises:
    ValueError: --capacity is less, or more than any state can have.
  """
  from statejax.artifact import manifest
  given = flag('capacity')
  if given is None:
    return -(-tokens // 256) * 256
  if not max(1, tokens) <= given <= manifest.MAX_LENGTH:
    raise ValueError(f'--capacity={given}: expected at least {max(1, tokens)}, '
                     'the tokens that the state may have then, and at most '
                     f'{manifest.MAX_LENGTH}.')
  return given


def fits(model, capacity) -> int:
  """Returns a capacity, of which a state fits the machine.

  Raises:
    ValueError: it has less memory than the leaves of one row take.
  """
  import jax

  from statejax import state as st
  need = sum(leaf.nbytes for _, leaf, _, _ in st.leaves(
      model.state_schema(1, capacity)))
  of_device = jax.local_devices()[0].memory_stats() or {}
  have = of_device.get('bytes_limit') or (
      os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
  if need > have:
    raise ValueError(f'--capacity={capacity}: expected one of which a state '
                     f'fits the {have:,} bytes of memory here, got one of '
                     f'{need:,} bytes; ask for as many tokens as it may have.')
  return capacity


def size(shop, key, who) -> tuple[int, int]:
  """Returns tokens that an artifact says it has absorbed, and that wait.

  (0, 1) where the load will refuse it.
  """
  from statejax.artifact import access, verify
  from statejax.artifact.outcome import Refused
  try:
    about = verify.head(shop.place(shop.find(key)))[2]
  except Refused:
    return 0, 1
  facts = about['state']
  return (facts['length'], facts['n_pending']) if access.sees(
      about, who, shop.catalog.clock()) else (0, 1)


def say(kept, mark=''):
  """Prints what was kept."""
  marked = {'mark': mark} if mark else {}
  print(json.dumps({'id': kept.id, 'ref': kept.ref, 'conflict': kept.conflict,
                    'seq': kept.receipt.seq, 'head': kept.receipt.head,
                    **marked}), file=sys.stderr)


def told(decision):
  """Prints how a load has ended.

  Raises:
    Refused: it was refused.
  """
  from statejax.artifact.outcome import Refused
  print(f'{decision} promise={decision.promise} '
        f'{" ".join(decision.warnings)} {decision.detail}'.rstrip(),
        file=sys.stderr)
  if decision.outcome == 'refused':
    raise Refused(decision.code, decision.detail)
