r"""The command `state`: mint, show, verify, resume, fork, transfer and so on.

  python -m statejax.main state mint chat --workdir=runs/a --prompt='def '
  python -m statejax.main state resume chat --workdir=runs/a --tokens=50
  python -m statejax.main state show chat
  python -m statejax.main state verify chat --workdir=runs/a
  python -m statejax.main state fork chat --ref=other
  python -m statejax.main state migrate chat --workdir=runs/a --cast \
      --set=model.store_dtype=float32 --ref=wide
  python -m statejax.main state diff chat other
  python -m statejax.main state lineage chat
  python -m statejax.main state revoke other
  python -m statejax.main state revoke demo --by=workflow
  python -m statejax.main state delete other
  python -m statejax.main state audit
  python -m statejax.main state account
  python -m statejax.main state fsck --adopt
  python -m statejax.main state gc

A target is a name, an id or its beginning; `show`, `verify` and `diff` also
take a directory or a file that holds one artifact. From store to store, with
the extra [sign] and the organisation's secrets at both ends:

  python -m statejax.main state keygen root
  python -m statejax.main state keygen acme
  python -m statejax.main state trust acme.pub --org=acme \
      --signing_key=root.pem
  python -m statejax.main state transfer chat --org=acme \
      --signing_key=acme.pem --file=chat.tar
  python -m statejax.main state crl acme.crl --signing_key=acme.pem
  # and in the store that shall have it:
  python -m statejax.main state trust acme.pub --org=acme \
      --signing_key=root.pem --store=there
  python -m statejax.main state trust acme.crl --org=acme --root=root.pub \
      --store=there
  python -m statejax.main state transfer chat.tar --org=acme --root=root.pub \
      --store=there --ref=chat

A file may be in a bucket: `--file=gs://bucket/states` writes there, and the
target gs://bucket/states/sj1-... takes it in. `push` copies an artifact to a
bucket as it is, `pull` brings it back to the store that it came from:

  python -m statejax.main state push chat --org=acme --url=gs://bucket/states
  python -m statejax.main state pull gs://bucket/states/sj1-... --org=acme

To somebody of another organisation, by a grant to their key:

  python -m statejax.main state grant chat --org=acme --holder=bob.pub \
      --rights=inspect,resume --signing_key=acme.pem --file=bob.grant
  python -m statejax.main state grant bob.grant
  python -m statejax.main state resume chat --workdir=runs/a --org=globex \
      --principal=bob --grant=bob.grant --holder_key=bob.pem

Loads jax only where a model runs.
"""

import codecs
import json
import pathlib
import sys
from typing import Any

from absl import flags

from statejax import asking, exchange

STORE = flags.DEFINE_string('store', 'states', 'state: directory of artifacts')
SECRETS = flags.DEFINE_string(
    'secrets', '~/.config/statejax', 'state: directory of secrets')
PRINCIPAL = flags.DEFINE_string('principal', 'local', 'state: who acts')
ORG = flags.DEFINE_string('org', '', "state: the principal's organisation")
REF = flags.DEFINE_string('ref', None, 'state fork, migrate: name of the child')
ACL = flags.DEFINE_multi_string(
    'acl', [], 'state mint: who may what, e.g. bob:resume,fork')
SENSITIVITY = flags.DEFINE_enum(
    'sensitivity', 'internal',
    ['public', 'internal', 'confidential', 'restricted'], 'state mint: class')
WORKFLOW = flags.DEFINE_string('workflow', '', 'state mint: for the accounts')
SCOPE = flags.DEFINE_enum(
    'scope', 'self', ['self', 'descendants'],
    'state mint: what a revocation of it revokes')
TRANSCRIPT = flags.DEFINE_enum(
    'transcript', 'none', ['none', 'keep'],
    'state mint: whether its tokens are kept, to absorb them again')
GRACE = flags.DEFINE_integer(
    'grace', 3600, 'state gc: seconds for which everything stays')

EXPORT = flags.DEFINE_enum(
    'export', 'never', ['never', 'listed', 'org', 'any'],
    'state mint: to whom it may be transferred; what may is kept sealed')
SIGNING_KEY = flags.DEFINE_string(
    'signing_key', None, 'state: file of a private key')
ROOT = flags.DEFINE_string(
    'root', None, 'state: file of the public key that decides on trust')
CAST = flags.DEFINE_bool(
    'cast', False, 'state migrate: dtypes may change, which rounds')
FILE = flags.DEFINE_string(
    'file', None, 'state transfer, grant: what to write; transfer: or a bucket')
GRANT = flags.DEFINE_string('grant', None, 'state: file of a grant to show')
HOLDER_KEY = flags.DEFINE_string(
    'holder_key', None, 'state: file of the private key that --grant is for')

OWN = {'store', 'secrets', 'principal', 'org', 'root'}
SAMPLING = {'workdir', 'tokens', 'capacity', 'temperature', 'top_k', 'top_p'}
SHOWN = {'grant', 'holder_key'}
# What each verb reads beside `OWN`.
USES = {
    'mint': SAMPLING | {'prompt', 'seed', 'resume', 'row', 'acl', 'sensitivity',
                        'workflow', 'scope', 'transcript', 'export', 'horizon',
                        'replace'},
    'resume': SAMPLING | asking.USED | {'set'} | SHOWN,
    'show': {'workdir', 'set'}, 'verify': {'workdir', 'set'} | SHOWN,
    'fork': {'ref'} | SHOWN, 'migrate': {'workdir', 'set', 'cast', 'ref'},
    'diff': set(), 'lineage': set(),
    'transfer': {'signing_key', 'file', 'ref', 'workdir'} | SHOWN,
    'push': {'url'}, 'pull': {'ref'},
    'grant': {'signing_key', 'file', 'holder', 'rights', 'seconds',
              'max_uses'},
    'revoke': {'by', 'since', 'signing_key'}, 'delete': set(),
    'audit': set(), 'account': set(), 'fsck': {'adopt'}, 'gc': {'grace'},
    'keygen': set(),
    'trust': {'signing_key', 'retire', 'min_epoch', 'classes'},
    'crl': {'signing_key'}}
# Which of them take no target, and which two.
WHOLE, PAIRS = ('audit', 'account', 'fsck', 'gc'), ('diff',)
ALL = OWN.union(*USES.values())


def usage() -> str:
  """One line that says how the command is called."""
  return (f'state takes one of {", ".join(USES)} and, but for '
          f'{", ".join(WHOLE)}, a target; {", ".join(PAIRS)} takes two')


def run(verb: str, *target: str):
  """Runs one verb; raises ValueError with one line for a user's mistake."""
  if verb not in USES or len(target) != (
      0 if verb in WHOLE else 2 if verb in PAIRS else 1):
    raise ValueError(f'usage: {usage()}.')
  given = {name for name in ALL if flags.FLAGS[name].present}
  for name in sorted(given - USES[verb] - OWN):
    raise ValueError(f'--{name}: state {verb} does not use it.')
  VERBS[verb](*target)


def _flag(name) -> Any:
  """The value of a flag that `statejax.main` defines."""
  return flags.FLAGS[name].value


def _shop():
  from statejax.artifact import bucket, objects
  if bucket.is_url(STORE.value):
    raise ValueError(f'--store={STORE.value}: expected a directory, got a URL; '
                     'a store is a directory, and push and pull use buckets.')
  root = pathlib.Path(ROOT.value).read_text() if ROOT.value else ''
  return objects.Store(STORE.value, objects.Secrets(
      pathlib.Path(SECRETS.value).expanduser()), root=root)


def _signer():
  from statejax.artifact import keys
  if SIGNING_KEY.value is None:
    raise ValueError('--signing_key: name the file of a private key; make one '
                     'with state keygen.')
  return keys.Signer(pathlib.Path(SIGNING_KEY.value).read_bytes())


def _principal():
  from statejax.artifact.access import Principal
  return Principal(PRINCIPAL.value, ORG.value)


def _granted():
  """(grant, private key) that --grant and --holder_key name, None for none."""
  data, private = GRANT.value, HOLDER_KEY.value
  if data is not None and private is not None:
    return pathlib.Path(data).read_bytes(), pathlib.Path(private).read_bytes()
  if data is private:
    return None
  raise ValueError('--grant, --holder_key: expected both: a grant, and the '
                   'private key of whom it is for.')


def _asking(shop, key):
  """Who asks for an artifact, with what a grant that they show gives."""
  who, granted = _principal(), _granted()
  if granted is None:
    return who
  from secrets import token_hex

  from statejax.artifact import grant, verify
  from statejax.artifact.outcome import Refused
  (data, private), nonce = granted, token_hex(16)
  try:
    id = shop.find(key)
    about = verify.head(shop.place(id), name=id)[2]
  except Refused:
    return who  # what is wrong is told, and written down, by what is asked
  return grant.present(shop, data, about, id, who, nonce,
                       grant.prove(private, nonce, data))


def _model():
  """Returns (model, params as a step takes them, digest of the parameters)."""
  from statejax.artifact import digest
  from statejax.tasks import text
  from statejax.train import restore
  workdir = _flag('workdir')
  if workdir is None:
    raise ValueError('--workdir: name the directory of the run.')
  model, params = restore.from_workdir(workdir)
  if model.config.vocab != text.VOCAB:
    raise ValueError(f'{workdir}: expected a text model of {text.VOCAB} tokens,'
                     f' got {model.config.vocab}.')
  return model, model.unstack(params), digest.tree_digest(params)


def _set(model):
  """The model with what --set says of it; its parameters must stay the same."""
  from statejax import config as cfg
  from statejax.model import LanguageModel
  config = model.config
  for assignment in _flag('set'):
    if not assignment.startswith('model.'):
      raise ValueError(f'--set={assignment}: expected a setting of the model, '
                       'e.g. model.store_dtype=float32.')
    config = cfg.override(config, assignment.removeprefix('model.'))
  return model if config is model.config else LanguageModel(config)


def _host(model, digest, capacity):
  from statejax import account
  from statejax.artifact import identity
  from statejax.tasks import text
  return identity.Host(
      model.config, model.state_schema, digest,
      program=identity.Program(capacity=capacity),
      tokenizer={'bytes': b'%d ids' % text.VOCAB}, special={'end': text.END},
      active_horizon=asking.horizon(),
      work=lambda tokens: account.mflop(model.config, tokens))


def _room(tokens):
  """Capacity for so many tokens, in steps: equal ones are equal programs."""
  return _flag('capacity') or -(-tokens // 256) * 256


def _sampling():
  from statejax import generate as gen
  return gen.Sampling(*(_flag(name) for name in (
      'temperature', 'top_k', 'top_p')))


def _emit(model, params, state, steps):
  """Generates and prints; returns the emitted tokens and the state."""
  from statejax import generate as gen
  from statejax.tasks import text
  decoder, out = codecs.getincrementaldecoder('utf-8')('replace'), []
  def show(tokens):
    out.extend(token for token in tokens.tolist() if token >= 0)
    sys.stdout.write(decoder.decode(bytes(
        token for token in tokens.tolist() if 0 <= token < text.END)))
    sys.stdout.flush()
  _, state = gen.generate(model, params, state, steps, sampling=_sampling(),
                          stop=(text.END,), callback=show)
  print(decoder.decode(b'', final=True))
  # A token that ends a row is emitted and not absorbed.
  return [token for token in out if token != text.END], state


def mint(name):
  """Makes an artifact of a saved state, or of a prompt and what follows it."""
  import jax

  from statejax import generate as gen
  from statejax.artifact import mint as minting
  from statejax.artifact import objects, serving
  from statejax.meter import Meter
  from statejax.tasks import text
  saved, prompt = _flag('resume'), _flag('prompt')
  if (saved is None) == (prompt is None):
    raise ValueError('--resume, --prompt: expected one of them: a saved state, '
                     'or text to begin with.')
  objects.check_ref(name)
  acl = tuple((who, tuple(may.split(','))) for who, _, may in (
      entry.partition(':') for entry in ACL.value))
  terms = minting.Terms(
      PRINCIPAL.value, ORG.value, SENSITIVITY.value, acl, EXPORT.value,
      workflow=WORKFLOW.value, revoke_scope=SCOPE.value)
  shop, transcript, row = _shop(), None, 0
  version = asking.taken(shop, name, _principal())
  model, params, digest = _model()
  took, meter = (), Meter()
  if saved is not None:
    if TRANSCRIPT.value == 'keep':
      raise ValueError('--transcript=keep: a saved state does not have its '
                       'tokens; mint it from a --prompt.')
    state, row = serving.load_state(saved, model, params), _flag('row')
  else:
    ids = text.encode(prompt)
    steps = _flag('tokens')
    state = model.init_state(1, _room(len(ids) + steps), key=jax.random.key(
        _flag('seed')))
    sys.stdout.write(prompt)
    with meter.running():
      state = jax.block_until_ready(gen.prefill(
          model, params, state, ids[None], sampling=_sampling()))
      emitted, state = _emit(model, params, state, steps)
    took = len(ids), len(emitted)
    transcript = minting.Transcript((*ids.tolist(), *emitted),
                                    keep=TRANSCRIPT.value == 'keep')
  host = _host(model, digest, state.capacity or 0)
  # What a saved state took is not known.
  spent = meter.spent(host.work, {}, *took) if took else {}
  kept = minting.mint(
      shop, state, row, host, terms, transcript=transcript, ref=name,
      expect=version, **spent)
  _say(kept)


def resume(key):
  """Goes on from an artifact, and mints what came of it under its name."""
  import jax

  from statejax.artifact import access, load
  from statejax.artifact import mint as minting
  from statejax.artifact.outcome import Refused
  from statejax.meter import Meter
  shop, steps = _shop(), _flag('tokens')
  model, params, digest = _model()
  model, ref = _set(model), shop.catalog.ref(key)
  host = _host(model, digest, _room(_length(shop, key) + steps))
  who = _asking(shop, key)
  found = load.load(shop, key, who, host, asking.ask())
  decision = found.decision
  print(f'{decision} promise={decision.promise} '
        f'{" ".join(decision.warnings)} {decision.detail}'.rstrip(),
        file=sys.stderr)
  if decision.outcome == 'refused':
    raise Refused(decision.code, decision.detail)
  resumed, meter = decision.outcome == 'resumed', Meter()
  with meter.running():
    state = found.state if resumed else jax.block_until_ready(
        _absorb_again(model, params, found))
    emitted, state = _emit(model, params, state, steps)
  transcript = None
  if found.tokens is not None:
    length = found.about['state']['length']
    transcript = minting.Transcript((*found.tokens[:length], *emitted),
                                    keep=True)
  before = found.about['account'] if resumed else {}
  spent = meter.spent(host.work, before, 0 if resumed else decision.n,
                      len(emitted))
  kept = minting.mint(
      shop, state, 0, found.host, minting.Terms.of(found.about),
      principal=who, transcript=transcript, **spent,
      stands=found.stands and found.stands.after(emitted),
      parent=minting.Parent(found.id, found.about), ref=key if ref else '',
      # A name that is not theirs stays: what they made is named after it.
      expect=ref[1] if ref and access.owns(found.about, who) else 0)
  _say(kept, decision.mark)


def _length(shop, key):
  """Tokens an artifact says it has; 0 where the load will refuse it."""
  from statejax.artifact import verify
  from statejax.artifact.outcome import Refused
  try:
    return verify.head(shop.place(shop.find(key)))[2]['state']['length']
  except Refused:
    return 0


def _absorb_again(model, params, found):
  """The state after the kept tokens, the last of them pending as it was."""
  import dataclasses

  import jax.numpy as jnp
  import numpy as np

  from statejax import generate as gen
  length = found.about['state']['length']
  tokens = np.array(found.tokens, np.int32)
  state = model.init_state(1, _room(length + _flag('tokens')))
  state = gen.prefill(model, params, state, tokens[None, :length],
                      sampling=_sampling())
  if len(tokens) == length:
    return state
  return dataclasses.replace(state, pending=jnp.asarray(tokens[length:],
                                                        jnp.int32))


def show(key):
  """Prints what an artifact is, whose, and whether it would load here."""
  from statejax.artifact import desk, verify
  if pathlib.Path(key).exists():
    with desk.opened(key) as folder:
      found, may = verify.verify(folder), _may_resume(folder)
  else:
    found = _examined(key)
    may = _may_resume(_shop().place(found.id))
  print('\n'.join([
      *desk.describe(found),
      f'  may {PRINCIPAL.value} of {ORG.value or "no organisation"} resume it '
      f'here: {may}',
      f'  would it load here: {_would_load(found.about)}']))


def _may_resume(folder):
  """Whether the store would let the principal, in words."""
  from statejax.artifact import desk
  if not (pathlib.Path(STORE.value) / 'STORE.json').exists():
    return (f'not asked, there is no store at {STORE.value}; name one with '
            '--store')
  fault = desk.obstacle(_shop(), folder, _principal())
  return 'yes' if fault is None else f'no, {fault}'


def _examined(key):
  """What a target is, verified but for its arrays."""
  from statejax.artifact import desk, verify
  if pathlib.Path(key).exists():
    with desk.opened(key) as folder:
      return verify.verify(folder)
  return desk.examine(_shop(), key, _principal(), 'inspect')


def diff(left, right):
  """Prints what two artifacts do not have in common, without their arrays."""
  from statejax.artifact import desk
  one, two = _examined(left), _examined(right)
  print('\n'.join([f'{one.id} | {two.id}', *desk.difference(one, two)]))


def lineage(key):
  """Prints what an artifact comes from and what came of it."""
  from statejax.artifact import desk
  print('\n'.join(desk.lineage(_shop(), key, _principal())))


def _would_load(about):
  if _flag('workdir') is None:
    return 'name the run with --workdir to know'
  from statejax.artifact import compat, identity
  from statejax.artifact.outcome import CODES
  model, _, digest = _model()
  here = _host(_set(model), digest, _room(about['state']['length'])).groups(
      identity.Carried.by(about))
  verdict = compat.compare(about, here)
  if verdict.action == 'go':
    return ' '.join(('yes, promise', verdict.promise, *verdict.warnings))
  return f'no, {verdict.code}: {verdict.detail}; {CODES[verdict.code]}'


def verify(key):
  """Verifies every byte; with a run also that the arrays load there."""
  from statejax.artifact import desk, verify
  if pathlib.Path(key).exists():
    with desk.opened(key) as folder:
      found = verify.verify(folder)
      result = {**verify.said(''), 'resume': _may_resume(folder)}
      if _flag('workdir') is not None:
        result |= _arrays(folder, found.about)
  else:
    shop = _shop()
    who = _asking(shop, key)
    found = desk.examine(shop, key, who, 'inspect')
    result = verify.said(found.vouched)
    if _flag('workdir') is not None:
      from statejax.artifact import load
      model, _, digest = _model()
      host = _host(_set(model), digest, _room(
          found.about['state']['length']))
      decision = load.load(shop, key, who, host).decision
      result |= {'load': str(decision), 'promise': decision.promise,
                 'why': decision.detail}
  print(json.dumps({'verified': True, 'id': found.id, **result}))


def _arrays(folder, about):
  """Whether the arrays of an artifact that is in no store load in a run."""
  from statejax.artifact import compat, identity, load, sealing, verify
  from statejax.artifact.outcome import Refused
  model, _, digest = _model()
  room = _room(about['state']['length'])
  host = _host(model, digest, room)
  verdict = compat.compare(about, host.groups(identity.Carried.by(about)))
  try:
    if verdict.action != 'go':
      raise Refused(verdict.code, verdict.detail)
    with sealing.opened(_shop(), folder, about) as clear:
      load.restore(clear, about, verify.unsealed(clear, about)[0], host, room)
  except Refused as error:
    return {'load': f'refused({error.code})', 'promise': 'none',
            'why': error.detail}
  return {'load': f'resumed({about["state"]["length"]})',
          'promise': verdict.promise, 'why': ''}


def fork(key):
  """Makes a second child of an artifact under a name of its own."""
  from statejax.artifact import desk, objects
  from statejax.artifact import mint as minting
  if REF.value is None:
    raise ValueError('--ref: name the child.')
  objects.check_ref(REF.value)
  shop = _shop()
  who = _asking(shop, key)
  found = desk.examine(shop, key, who, 'fork')
  _say(minting.fork(shop, minting.Parent(found.id, found.about), who,
                    ref=REF.value))


def migrate(key):
  """Makes a new artifact for the run's model with other settings, of --set."""
  from statejax.artifact import migrate, objects
  if REF.value is None:
    raise ValueError('--ref: name the child.')
  objects.check_ref(REF.value)
  shop = _shop()
  model, _, digest = _model()
  sides = (_host(one, digest, _room(_length(shop, key)))
           for one in (model, _set(model)))
  _say(migrate.migrate(shop, key, _principal(), *sides, cast=CAST.value,
                       ref=REF.value))


def transfer(target):
  """Writes an artifact as one file or to a bucket, or takes one in."""
  from statejax.artifact import bucket, transfer
  shop, who = _shop(), _principal()
  if bucket.is_url(target) or pathlib.Path(target).is_file():
    host = None
    if _flag('workdir') is not None:
      model, _, digest = _model()
      host = _host(model, digest, 0)
    _say(transfer.receive(shop, target, who, host=host, ref=REF.value or '',
                          granted=_granted()))
    return
  if FILE.value is None:
    raise ValueError(f'{target}: expected a file to take in, or with --file a '
                     'name or id to write as one.')
  print(json.dumps({'id': transfer.export(
      shop, target, who, _signer(), FILE.value), 'file': FILE.value}))


def audit():
  """Prints the audit log; fails if it, or what is stored, is not whole."""
  from statejax.artifact import collect
  shop = _shop()
  wrong = collect.check(shop)
  if not any('audit' in text for text in wrong):
    for row in shop.catalog.rows():
      print(json.dumps(row))
  head = shop.catalog.head()
  print(json.dumps({'rows': head.seq, 'head': head.head, 'wrong': wrong}))
  if wrong:
    raise ValueError(f'{STORE.value}: {len(wrong)} faults, e.g. {wrong[0]}')


def account():
  """Prints bytes times seconds, tokens and resumes of each principal."""
  from statejax.artifact import collect
  for row in collect.account(_shop()):
    print(json.dumps(row))


def gc():
  """Deletes what no name and no reader needs."""
  from statejax.artifact import collect
  found = collect.collect(_shop(), grace=GRACE.value)
  print(json.dumps({'objects': found.objects, 'orphans': found.orphans,
                    'leftovers': found.leftovers}))


def _say(kept, mark=''):
  marked = {'mark': mark} if mark else {}
  print(json.dumps({'id': kept.id, 'ref': kept.ref, 'conflict': kept.conflict,
                    'seq': kept.receipt.seq, 'head': kept.receipt.head,
                    **marked}), file=sys.stderr)


VERBS = {
    'mint': mint, 'resume': resume, 'show': show, 'verify': verify,
    'fork': fork, 'migrate': migrate, 'diff': diff, 'lineage': lineage,
    'transfer': transfer,
    'push': lambda key: exchange.push(_shop(), _principal(), key),
    'pull': lambda url: _say(exchange.pull(_shop(), _principal(), url)),
    'grant': lambda key: exchange.grant(_shop(), _principal(), key, _signer),
    'keygen': exchange.keygen,
    'trust': lambda path: exchange.trust(_shop(), path, _signer),
    'crl': lambda path: exchange.crl(_shop(), path, _signer),
    'fsck': lambda: exchange.fsck(_shop(), _principal()),
    'revoke': lambda what: exchange.revoke(
        _shop(), _principal(), what, SIGNING_KEY.value and _signer()),
    'delete': lambda key: exchange.delete(_shop(), _principal(), key),
    'audit': audit, 'account': account, 'gc': gc}
