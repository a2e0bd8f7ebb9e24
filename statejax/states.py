r"""The command `state`: mint, show, verify, resume, fork, transfer and so on.

  python -m statejax.main state mint chat --workdir=runs/a --prompt='def '
  python -m statejax.main state resume chat --workdir=runs/a --tokens=50
  python -m statejax.main state resume chat --workdir=runs/a --prompt='def '
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

A target is a name, an id or 12 characters of it; `show`, `verify` and `diff`
also take a directory or a file that holds one artifact: `./chat`, where `chat`
is also a name. From store to store, with the extra [sign] and the
organisation's secrets at both ends:

  python -m statejax.main state mint mail --workdir=runs/a --prompt='def ' \
      --org=acme --export=org
  python -m statejax.main state keygen root
  python -m statejax.main state keygen acme
  python -m statejax.main state trust acme.pub --org=acme \
      --signing_key=root.pem
  python -m statejax.main state transfer mail --org=acme \
      --signing_key=acme.pem --file=mail.tar
  python -m statejax.main state crl acme.crl --signing_key=acme.pem
  # and in the store that shall have it:
  python -m statejax.main state trust acme.pub --org=acme \
      --signing_key=root.pem --store=there
  python -m statejax.main state trust acme.crl --org=acme --root=root.pub \
      --store=there
  python -m statejax.main state transfer mail.tar --org=acme --root=root.pub \
      --store=there --ref=mail

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

With a key of its own, the store signs the head of its audit log at the end of
every verb, beside the secrets. `audit` then tells a log that was cut short or
put back; a copy of what is signed may be kept elsewhere:

  python -m statejax.main state keygen ~/.config/statejax/head
  python -m statejax.main state audit --signed_head=copy.json

Which parameters these are is a digest of all of them, at every start. A signed
model card says it once; with a trusted signer its word is taken, after a look
at the config, names, shapes and dtypes, and if wanted at a sum over all bits:

  python -m statejax.main state card acme.card --workdir=runs/a --org=acme \
      --signing_key=acme.pem
  python -m statejax.main state resume chat --workdir=runs/a --org=acme \
      --root=root.pub --model_card=acme.card --verify_params=fingerprint

A state goes on under the texts that it was minted under: --system, --safety,
--persona and --epoch say which hold here, to mint, resume, show and verify.

`audit`, `account`, `fsck` and `gc` are for the host of a store, who may write
to its directory anyhow. They ask nobody's rights: the log and the accounts name
all principals and artifacts, and `gc` deletes what nothing names, whosever.

A model is loaded only where one runs.
"""

import codecs
import json
import sys

from absl import flags

from statejax import asking, exchange, looking

REF = flags.DEFINE_string(
    'ref', None, 'state fork, migrate, resume, memory: name of the child')
ACL = flags.DEFINE_multi_string(
    'acl', [], 'state mint: which members of --org may what, e.g. '
    'bob:resume,fork or org:acme:inspect')
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
    'grace', 3600, 'state gc: seconds for which everything stays', 0)
GENERATIONS = flags.DEFINE_integer(
    'generations', 1, 'state gc: how many states that came before it stay with '
    'each named one', 0)
LAST = flags.DEFINE_integer(
    'last', 8, 'state gc: how many names of each who has left some beside '
    "another's, as NAME~xxxxxxxx, stay", 0)
NOT_AFTER = flags.DEFINE_integer(
    'not_after', 0, 'state mint: unix seconds after which nobody may resume '
    'it; 0 for no end', 0)
EXPORT = flags.DEFINE_enum(
    'export', 'never', ['never', 'listed', 'org', 'any'],
    'state mint: to whom it may be transferred; what may is kept sealed')
CAST = flags.DEFINE_bool(
    'cast', False, 'state migrate: dtypes may change, which rounds')
FILE = flags.DEFINE_string(
    'file', None, 'state transfer, grant: what to write; transfer: or a bucket')

OWN = {'store', 'secrets', 'principal', 'org', 'root'}
SAMPLING = {'workdir', 'tokens', 'capacity', 'temperature', 'top_k', 'top_p'}
SHOWN = {'grant', 'holder_key'}
# Of the model and the texts that hold here.
RUN = asking.TEXTS | asking.PARAMS
# What each verb reads beside `OWN`.
USES = {
    'mint': SAMPLING | {'prompt', 'seed', 'resume', 'row', 'acl', 'sensitivity',
                        'workflow', 'scope', 'transcript', 'export', 'horizon',
                        'not_after', 'replace'} | RUN,
    'resume': SAMPLING | asking.USED | RUN | {'set', 'ref', 'prompt'} | SHOWN,
    'show': {'workdir', 'set'} | RUN | SHOWN,
    'verify': {'workdir', 'set'} | RUN | SHOWN,
    'fork': {'ref'} | SHOWN,
    'migrate': {'workdir', 'set', 'cast', 'ref'} | RUN,
    'diff': SHOWN, 'lineage': SHOWN,
    'transfer': {'signing_key', 'file', 'ref', 'workdir'} | RUN | SHOWN,
    'push': {'url'}, 'pull': {'ref'},
    'grant': {'signing_key', 'file', 'holder', 'rights', 'seconds',
              'max_uses', 'family'},
    'revoke': {'by', 'since', 'signing_key', 'epoch'}, 'delete': set(),
    'audit': {'signed_head'}, 'account': set(), 'fsck': {'adopt'},
    'gc': {'grace', 'generations', 'last'},
    'keygen': set(), 'card': {'signing_key', 'workdir'},
    'trust': {'signing_key', 'retire', 'min_epoch', 'classes', 'epoch'},
    'crl': {'signing_key'}}
# Which of them take no target, and which two.
WHOLE, PAIRS = ('audit', 'account', 'fsck', 'gc'), ('diff',)
ALL = OWN.union(*USES.values())


def usage() -> str:
  """One line that says how the command is called."""
  return (f'state takes one of {", ".join(USES)} and, but for '
          f'{", ".join(WHOLE)}, a target; {", ".join(PAIRS)} takes two; those '
          'without a target are for the host of the store, and ask nobody\'s '
          'rights')


def explain(verb: str = '') -> str:
  """What the command takes, or one verb with its flags, for a person."""
  if verb not in USES:
    return f'{__doc__}\n{usage()}; state VERB --help says what a verb takes.'
  return '\n'.join([f'state {verb}: {VERBS[verb].__doc__}', *asking.flag_lines(
      USES[verb] | OWN)])


def run(verb: str, *target: str):
  """Runs one verb; raises ValueError with one line for a user's mistake."""
  if verb not in USES or len(target) != (
      0 if verb in WHOLE else 2 if verb in PAIRS else 1):
    raise ValueError(f'usage: {usage()}; see state --help.')
  given = {name for name in ALL if flags.FLAGS[name].present}
  for name in sorted(given - USES[verb] - OWN):
    raise ValueError(f'--{name}: state {verb} does not use it.')
  try:
    VERBS[verb](*target)
  finally:  # what was refused is written down as well
    asking.close()


def _sampling():
  from statejax import generate as gen
  return gen.Sampling(*(asking.flag(name) for name in (
      'temperature', 'top_k', 'top_p')))


def _steps():
  """Returns --tokens; said before the work, as what else is wrong with it."""
  _sampling()
  if asking.flag('tokens') < 1:
    raise ValueError(f'--tokens={asking.flag("tokens")}: expected at least 1.')
  return asking.flag('tokens')


def _warm(model, params, state, tokens):
  """Runs each program once: the accounts are of their time when compiled."""
  from statejax import generate as gen
  from statejax.tasks import text
  if len(tokens):  # as many as a step of all of them takes
    state = gen.prefill(model, params, _waiting(state)[1], tokens[None, :256],
                        sampling=_sampling())
  gen.generate(model, params, state, 1, sampling=_sampling(), stop=(text.END,))


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


def _waiting(state):
  """The pending token of a row, [] for none; and the state without it."""
  import dataclasses

  import jax.numpy as jnp
  return [int(x) for x in state.pending if x >= 0], dataclasses.replace(
      state, pending=jnp.full_like(state.pending, -1))


def _read(model, params, state, prompt):
  """Absorbs the pending token and a prompt, prints both; tokens and state."""
  import jax
  import numpy as np

  from statejax import generate as gen
  from statejax.tasks import text
  if not len(prompt):
    return [], state
  waiting, state = _waiting(state)
  tokens = [*waiting, *prompt.tolist()]
  sys.stdout.write(text.decode(tokens))
  return tokens, jax.block_until_ready(gen.prefill(
      model, params, state, np.array(tokens)[None], sampling=_sampling()))


def mint(name):
  """Makes an artifact of a saved state, or of a prompt and what follows it."""
  import jax

  from statejax import generate as gen
  from statejax.artifact import mint as minting
  from statejax.artifact import objects, serving
  from statejax.meter import Meter
  from statejax.tasks import text
  saved, prompt = asking.flag('resume'), asking.flag('prompt')
  if (saved is None) == (prompt is None):
    raise ValueError('--resume, --prompt: expected one of them: a saved state, '
                     'or text to begin with.')
  if prompt == '':
    raise ValueError('--prompt: expected some text, got none.')
  objects.check_ref(name)
  terms = minting.Terms(
      asking.PRINCIPAL.value, asking.ORG.value, SENSITIVITY.value,
      asking.acl(ACL.value), EXPORT.value, NOT_AFTER.value,
      workflow=WORKFLOW.value, revoke_scope=SCOPE.value)
  # Before the work, not after it.
  steps, ids = 0, text.encode(prompt or '')
  if saved is None:
    steps = _steps()
    _within_horizon(len(ids) + steps)
  shop, transcript, row = asking.shop(make=True), None, 0
  asking.require(terms, shop)
  version = asking.taken(shop, name, asking.principal())
  model, params, digest = asking.model()
  took, meter, edited = (), Meter(), minting.UNEDITED
  if saved is not None:
    if TRANSCRIPT.value == 'keep':
      raise ValueError('--transcript=keep: a saved state does not have its '
                       'tokens; mint it from a --prompt.')
    state, row = serving.load_state(saved, model, params), asking.flag('row')
    rows = serving.edits(saved)
    edited = minting.Edited(rows[row] if 0 <= row < len(rows) else ())
    _within_horizon(int(state.length[row]))
  else:
    state = model.init_state(
        1, asking.fits(model, asking.room(len(ids) + steps)),
        key=jax.random.key(asking.flag('seed')))
    sys.stdout.write(prompt)
    _warm(model, params, state, ids)
    with meter.running():
      state = jax.block_until_ready(gen.prefill(
          model, params, state, ids[None], sampling=_sampling()))
      emitted, state = _emit(model, params, state, steps)
    took = len(ids), len(emitted)
    transcript = minting.Transcript((*ids.tolist(), *emitted),
                                    keep=TRANSCRIPT.value == 'keep')
  host = asking.host(model, digest, state.capacity or 0)
  # What a saved state took is not known.
  spent = meter.spent(host.work, {}, *took) if took else {}
  kept = minting.mint(
      shop, state, row, host, terms, transcript=transcript, edited=edited,
      ref=name, expect=version, **spent)
  asking.say(kept)


def _within_horizon(tokens):
  if tokens > asking.horizon():
    raise ValueError(f'--horizon={asking.horizon()}: expected at least {tokens}'
                     ', the tokens that the state may have then; nobody under '
                     'this horizon could resume it.')


def resume(key):
  """Goes on from an artifact, and mints what came of it under its name."""
  import jax
  import numpy as np

  from statejax.artifact import load
  from statejax.artifact import mint as minting
  from statejax.meter import Meter
  from statejax.tasks import text
  shop, steps = asking.shop(), _steps()
  prompt = text.encode(asking.flag('prompt') or '')
  asking.current(shop)
  if REF.value is not None:
    asking.vacant(shop, REF.value, asking.principal())
  model, params, digest = asking.model()
  model, ref = asking.changed(model), shop.catalog.ref(key)
  who = asking.who(shop, key)
  length, waiting = asking.size(shop, key, who)
  if not waiting and not len(prompt):
    raise ValueError(f'{key}: expected one that says how it goes on, got one '
                     'whose last token has ended it; give it more to read '
                     'with --prompt.')
  room = asking.room(length + steps + (
      waiting + len(prompt) if len(prompt) else 0))
  host = asking.host(model, digest, asking.fits(model, room))
  found = load.load(shop, who.granted_for or key, who, host, asking.ask())
  decision = found.decision
  asking.told(decision)
  asking.nameless(ref, key)
  resumed, meter = decision.outcome == 'resumed', Meter()
  length = found.about['state']['length']
  begin = found.state if resumed else model.init_state(1, room)
  again = () if resumed else (found.tokens or ())[:length]
  for tokens in [np.array(x, np.int32) for x in (again, prompt)
                 if len(x)] or [prompt]:
    _warm(model, params, begin, tokens)
  with meter.running():
    state = begin if resumed else jax.block_until_ready(
        _absorb_again(model, params, begin, found))
    read, state = _read(model, params, state, prompt)
    emitted, state = _emit(model, params, state, steps)
  emitted = [*read, *emitted]
  transcript = None
  if found.tokens is not None:
    transcript = minting.Transcript((*found.tokens[:length], *emitted),
                                    found.edited.edits, keep=True)
  before = found.about['account'] if resumed else {}
  spent = meter.spent(
      host.work, before, len(read) + (0 if resumed else decision.n),
      len(emitted) - len(read))
  kept = minting.mint(
      shop, state, 0, found.host, minting.Terms.of(found.about),
      principal=who, transcript=transcript, edited=found.edited, **spent,
      stands=found.stands and found.stands.after(emitted),
      parent=minting.Parent(found.id, found.about),
      ref=REF.value or (key if ref else ''),
      # A name that is not theirs stays: what they made is named after it.
      expect=ref[1] if ref and not REF.value else 0)
  asking.say(kept, decision.mark)


def _absorb_again(model, params, state, found):
  """The state after the kept tokens, the last of them pending as it was."""
  import dataclasses

  import jax.numpy as jnp
  import numpy as np

  from statejax import generate as gen
  length = found.about['state']['length']
  tokens = np.array(found.tokens, np.int32)
  state = gen.prefill(model, params, state, tokens[None, :length],
                      sampling=_sampling())
  if len(tokens) == length:
    return state
  return dataclasses.replace(state, pending=jnp.asarray(tokens[length:],
                                                        jnp.int32))


def fork(key):
  """Makes a second child of an artifact under a name of its own."""
  from statejax.artifact import desk
  from statejax.artifact import mint as minting
  if REF.value is None:
    raise ValueError('--ref: name the child.')
  shop = asking.shop()
  asking.vacant(shop, REF.value, asking.principal())
  who = asking.who(shop, key)
  found = desk.examine(shop, who.granted_for or key, who, 'fork')
  asking.say(minting.fork(shop, minting.Parent(found.id, found.about), who,
                          ref=REF.value), shop.catalog.code(found.id))


def migrate(key):
  """Makes a new artifact for the run's model with other settings, of --set."""
  from statejax.artifact import migrate
  if REF.value is None:
    raise ValueError('--ref: name the child.')
  shop = asking.shop()
  asking.vacant(shop, REF.value, asking.principal())
  model, _, digest = asking.model()
  room = asking.room(asking.size(shop, key, asking.principal())[0])
  sides = (asking.host(one, digest, room)
           for one in (model, asking.changed(model)))
  asking.say(migrate.migrate(shop, key, asking.principal(), *sides,
                             cast=CAST.value, ref=REF.value))


def transfer(target):
  """Writes an artifact as one file or to a bucket, or takes one in."""
  from statejax.artifact import bucket, identity, transfer, verify
  if bucket.is_url(target) or asking.elsewhere(target):
    shop, host = asking.shop(make=True), None
    if asking.flag('workdir') is not None:
      model, _, digest = asking.model()
      host = asking.host(model, digest, 0)
    asking.say(transfer.receive(
        shop, target, asking.principal(), host=host, ref=REF.value or '',
        granted=asking.granted()))
    return
  if FILE.value is None:
    raise ValueError(f'{target}: expected a file to take in, or with --file a '
                     'name or id to write as one.')
  shop, texts = asking.shop(), asking.texts()
  who = asking.who(shop, target)
  id = transfer.export(shop, who.granted_for or target, who, asking.signer(),
                       FILE.value, texts=texts)
  print(json.dumps({'id': id, 'file': FILE.value}))
  about = verify.head(shop.place(shop.find(who.granted_for or target)))[2]
  if identity.key_ids(about) & identity.key_ids(
      identity.exchanged(about, texts, bytes(32))):
    print(f'{target}: was minted under texts that were not given here, so that '
          'nobody of another organisation can go on from the file; give those '
          'of its mint, e.g. --system', file=sys.stderr)


def gc():
  """Deletes what no name and no reader needs."""
  from statejax.artifact import collect
  found = collect.collect(asking.shop(), grace=GRACE.value,
                          generations=GENERATIONS.value, last=LAST.value)
  print(json.dumps({'objects': found.objects, 'orphans': found.orphans,
                    'leftovers': found.leftovers}))


VERBS = {
    'mint': mint, 'resume': resume, 'show': looking.show,
    'verify': looking.verify, 'fork': fork, 'migrate': migrate,
    'diff': looking.diff, 'lineage': looking.lineage, 'transfer': transfer,
    'push': exchange.push, 'pull': exchange.pull, 'grant': exchange.grant,
    'keygen': exchange.keygen, 'card': exchange.card,
    'trust': exchange.trust, 'crl': exchange.crl, 'fsck': exchange.fsck,
    'revoke': exchange.revoke, 'delete': exchange.delete,
    'audit': looking.audit, 'account': looking.account, 'gc': gc}
