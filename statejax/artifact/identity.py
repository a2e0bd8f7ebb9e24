"""What a process is: the model, program and rules under which states live.

A `Host` says it once; `Host.groups` puts it in the words of a manifest. What a
process mints and what it accepts are told from the same words, so that they
cannot drift apart.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from statejax import __version__
from statejax import config as cfg
from statejax import state as st
from statejax.artifact import digest, manifest, names, tree

SCHEMA = 'statejax.serving.v1'
# Whose text decides what a program computes.
_SOURCES = ('statejax/ops', 'statejax/layers', 'statejax/model.py',
            'statejax/generate.py', 'statejax/state.py', 'pallas_kernels')
# Settings of jax, and of what it stands on, under which equal programs may
# give other numbers, random ones too.
_SETTINGS = (
    'jax_threefry_partitionable', 'jax_threefry_gpu_kernel_lowering',
    'jax_default_prng_impl', 'jax_random_seed_offset',
    'jax_high_dynamic_range_gumbel', 'jax_disable_jit',
    'jax_allow_f16_reductions', 'jax_use_shardy_partitioner',
    'jax_optimization_level', 'jax_exec_time_optimization_effort',
    'jax_memory_fitting_level', 'jax_memory_fitting_effort',
    'jax_compiler_enable_remat_pass')
_VARIABLES = ('LIBTPU_INIT_ARGS', 'NVIDIA_TF32_OVERRIDE')


@dataclasses.dataclass(frozen=True)
class Program:
  """Static shapes of the programs that advance a state.

  Attributes:
    chunk: tokens of a prefill step.
    batch_slots: rows.
    capacity: tokens of the growing leaves, 0 where there are none: another
      capacity is another program.
    mesh: of the devices, e.g. 'data=2,model=4'; '' is one device.
  """

  chunk: int = 256
  batch_slots: int = 1
  capacity: int = 0
  mesh: str = ''


@dataclasses.dataclass(frozen=True)
class Texts:
  """Texts that a state has absorbed the meaning of; only keyed digests leave.

  Attributes:
    secret: of the organisation, at least 16 bytes; needed where any is given.
    system: system prompt or policy.
    safety: safety policy.
    epoch: of the policies.
    persona: who the model plays.
    tools: {name: text of the tool's schema}.
    assumptions: {name: value}, facts about the environment; None says nothing.
  """

  secret: bytes = b''
  system: str = ''
  safety: str = ''
  epoch: int = 0
  persona: str = ''
  tools: dict[str, str] = dataclasses.field(default_factory=dict)
  assumptions: dict[str, str] | None = None

  def keyed(self, field, text):
    """Returns the keyed digest of a text; '' of ''."""
    return names.keyed(self.secret, field, text) if text else ''

  def groups(self) -> dict:
    """Returns the groups of a manifest that have their digests."""
    groups: dict = {
        'policy': {'system': self.keyed('policy.system', self.system),
                   'safety': self.keyed('policy.safety', self.safety),
                   'epoch': self.epoch},
        'tools': {
            'schema': self.keyed('tools.schema', ''.join(
                f'{name}\0{self.tools[name]}\0'
                for name in sorted(self.tools))),
            'items': sorted(self.keyed('tools.items', f'{name}\0{text}')
                            for name, text in self.tools.items())}}
    if self.assumptions is not None:
      groups['env'] = {'assumptions': [
          {'name': name, 'value': self.keyed(f'env.{name}', value)}
          for name, value in sorted(self.assumptions.items())]}
    return groups

  def digests(self) -> list[str]:
    """Returns all of its digests, in an order that depends on no key."""
    tools = [self.keyed('tools.items', f'{name}\0{text}')
             for name, text in sorted(self.tools.items())]
    groups = self.groups()
    return [groups['policy']['system'], groups['policy']['safety'],
            groups['tools']['schema'], *tools,
            *(item['value'] for item in groups.get('env', {}).get(
                'assumptions', ())),
            self.keyed('governance.persona', self.persona)]


def exchanged(about: dict, texts: Texts, secret: bytes) -> dict:
  """Returns a manifest with digests of texts under another secret.

  Of those texts that are given; what is none of them stays as it is.

  Args:
    about: the manifest.
    texts: those of here, under the secret of the manifest's digests.
    secret: the other one.
  """
  new = {old: one for old, one in zip(texts.digests(), dataclasses.replace(
      texts, secret=secret).digests()) if old}
  def renewed(value):
    if isinstance(value, dict):
      return {name: renewed(item) for name, item in value.items()}
    if isinstance(value, list):
      return [renewed(item) for item in value]
    return new.get(value, value)
  found = {name: renewed(about[name]) for name in (
      'policy', 'tools', 'env', 'governance') if name in about}
  found['tools']['items'].sort()
  return about | found


def key_ids(about: dict) -> set[str]:
  """Returns the ids of the keys under which a manifest names texts."""
  env = about.get('env', {'assumptions': []})['assumptions']
  return {text.split(':')[1] for text in (
      about['policy']['system'], about['policy']['safety'],
      about['tools']['schema'], *about['tools']['items'],
      about['governance']['persona'], *(item['value'] for item in env)) if text}


@dataclasses.dataclass(frozen=True)
class Carried:
  """What a state may carry or not.

  Attributes:
    logits: whether it has the next-token logits.
    spans: how many spans of a row it can follow.
  """

  logits: bool = False
  spans: int = 0

  @classmethod
  def of(cls, state):
    """Returns what a state carries."""
    return cls(state.logits is not None, st.spans(state))

  @classmethod
  def by(cls, about: dict):
    """Returns what the state of a manifest carries."""
    rows = [leaf['shape'][0] for leaf in about['state']['leaves']
            if leaf['path'] == 'spans' and leaf['shape']]
    return cls(about['state']['has_logits'], sum(rows))


@dataclasses.dataclass(frozen=True)
class Host:
  """What this process mints with, and what it accepts.

  Attributes:
    config: `ModelConfig`.
    schema: (rows, capacity, *, logits) -> schema, `model.state_schema`.
    params: tree digest of the effective parameters, 64 hex; see
      `card.params_digest`.
    adapters: the same of each adapter, in order applied.
    program: see `Program`.
    tokenizer: {file name: content}, of its assets.
    chat_template: text; '' has none.
    special: {name: id} of special tokens.
    texts: see `Texts`.
    max_pos: most tokens that the model's positions allow.
    active_horizon: most tokens that this process lets it go on from.
    retokenize: (digest of a tokenizer, its ids) -> the ids that the tokenizer
      of here gives for the same text, None where it does not know that one.
      Without it states of another tokenizer are never absorbed again.
    work: tokens -> millions of operations that absorbing them takes, for the
      accounts; None says nothing.
    mark: code that every artifact of its mints bears in the audit log, ''
      for none; see `crossed`.
  """

  config: Any
  schema: Callable
  params: str
  adapters: tuple[str, ...] = ()
  program: Program = Program()
  tokenizer: dict[str, bytes] = dataclasses.field(default_factory=dict)
  chat_template: str = ''
  special: dict[str, int] = dataclasses.field(default_factory=dict)
  texts: Texts = Texts()
  max_pos: int = manifest.MAX_LENGTH
  active_horizon: int = manifest.MAX_LENGTH
  retokenize: Callable[[str, Sequence[int]], Sequence[int] | None] | None = None
  work: Callable[[int], int] | None = None
  mark: str = ''

  def schema_of(self, rows: int, capacity: int, carried: Carried):
    """Returns the schema of a state of this model."""
    more = {'spans': carried.spans} if carried.spans else {}
    return self.schema(rows, capacity, logits=carried.logits, **more)

  def groups(self, carried: Carried) -> dict:
    """Returns the groups of a manifest that do not depend on a row."""
    c, texts = self.config, self.texts
    digest_of = lambda value: names.document(value) if value else ''
    groups = {
        'state': layout(self.schema_of(1, 0, carried)),
        'model': {
            'family': family(c),
            'params': f'sha256:{self.params}',
            'adapters': [f'sha256:{one}' for one in self.adapters],
            'position': position(c), 'chunk': self.program.chunk},
        'tokenizer': {
            'digest': (names.tokenizer(self.tokenizer) if self.tokenizer
                       else ''), 'vocab': c.vocab,
            'special': digest_of(self.special),
            'chat_template': digest_of(self.chat_template)},
        'numerics': numerics(self.program),
        'horizon': {
            'max_pos': self.max_pos, 'active_horizon': self.active_horizon,
            'window': _window(c), 'compactions': 0, 'retention': ''}}
    return groups | texts.groups()


def of_epoch(host: Host, about: dict) -> Host:
  """Returns the host to mint with what goes on from a state.

  What it has read stays of the epoch in which it was read, whatever holds now.

  Args:
    host: of this process.
    about: manifest of the state.
  """
  return dataclasses.replace(host, texts=dataclasses.replace(
      host.texts, epoch=about['policy']['epoch']))


def crossed(host: Host, about: dict) -> Host:
  """Returns the host to mint with what goes on under other weights.

  Its parameters are those of no model, so that only who asks for crossed
  weights again resumes what it mints, and that is marked as well.

  Args:
    host: under which the state goes on.
    about: manifest of what it goes on from.
  """
  mine = host.groups(Carried())['model']
  pair = [[model['params'], *model['adapters']]
          for model in (about['model'], mine)]
  return dataclasses.replace(
      host, mark='W_WEIGHTS',
      params=names.document({'crossed': pair}).removeprefix('sha256:'))


def layout(schema, sampler: dict | None = None) -> dict:
  """Returns {schema, schema_digest, leaves} of a schema of one row.

  Args:
    schema: see `Host.schema_of`.
    sampler: a manifest's leaf, whose form the sampler's key shall have; None
      leaves it as it is.
  """
  rows = []
  for path, leaf, axes, kind in st.leaves(schema):
    kept = [(a, 0 if a == 'capacity' else int(n))
            for a, n in zip(axes, leaf.shape) if a != 'batch']
    rows.append({
        'path': path, 'axes': [a for a, _ in kept], 'kind': kind,
        'shape': [n for _, n in kept], 'dtype': np.dtype(leaf.dtype).name,
        'role': role(path, axes)})
    if sampler is not None and rows[-1]['role'] == 'sampler':
      rows[-1] |= {'dtype': sampler['dtype'], 'shape': sampler['shape']}
  rows.sort(key=lambda row: row['path'])
  return {'schema': SCHEMA, 'schema_digest': names.schema(SCHEMA, rows),
          'leaves': [{k: v for k, v in row.items() if k != 'axes'}
                     for row in rows]}


def describe_row(live) -> list[dict]:
  """Returns the manifest's leaves of one row, as `statejax.state.live` has it.
  """
  found = []
  for path, x, axes, kind in st.leaves(live):
    dtype, shape = digest.describe(x)
    found.append({
        'path': path, 'dtype': dtype, 'shape': list(shape), 'kind': kind,
        'tile': list(tree.tile_shape(shape, tree.ITEM_BYTES[dtype])),
        'role': role(path, axes)})
  return sorted(found, key=lambda leaf: leaf['path'])


def role(path: str, axes) -> str:
  """Returns what a leaf is for, told from the names of its axes.

  >>> role('layers/kda/tail_k', ('layers', 'batch', 'taps', 'heads', 'key'))
  'conv'
  """
  if '/' not in path:
    return {'key': 'sampler', 'spans': 'slot'}.get(path, path)
  for axis, name in (
      ('taps', 'conv'), ('slots', 'slot'), ('aliases', 'slot'),
      ('events', 'slot'), ('latent', 'latent'), ('rope', 'latent'),
      ('index', 'index'), ('capacity', 'kv'), ('window', 'kv')):
    if axis in axes:
      return name
  return 'compressor' if 'heads' not in axes and 'channels' in axes else (
      'recurrent')


def family(config) -> str:
  """Returns what a model is called: the names of its layers."""
  return '+'.join(sorted(set(config.names)))[:64]


def position(config) -> str:
  """Digest of all of a config that changes what is computed.

  More than rotary parameters, windows and rates: with equal parameters and an
  equal layout a state still means another thing under another epsilon.
  Fields at their defaults are left out, so that new ones change no digest.
  """
  facts = cfg.essence(config)
  facts.pop('remat', None)  # changes only when activations are computed
  return names.document(facts)


def numerics(program: Program) -> dict:
  """Returns the group `numerics`: within one id, equal inputs give equal bits.
  """
  device = jax.devices()[0]
  facts = {
      'jax': jax.__version__, 'jaxlib': metadata.version('jaxlib'),
      'runtime': _ascii(device.client.platform_version),
      'device': _ascii(_device(device)),
      'mesh': f'{program.mesh or "one device"}; capacity {program.capacity}',
      'precision': _ascii(
          _setting('jax_default_matmul_precision') or 'default'),
  }
  hidden = {
      'flags': sorted(os.environ.get('XLA_FLAGS', '').split()),
      'unoptimized': bool(_setting('jax_disable_most_optimizations')),
      'x64': bool(_setting('jax_enable_x64')), 'kernels': kernels(),
      'settings': {name: str(_setting(name)) for name in _SETTINGS
                   if name in jax.config.values},  # not each jax has all
      'variables': {name: os.environ.get(name, '') for name in _VARIABLES}}
  shapes = {'batch_slots': program.batch_slots, 'chunks': [program.chunk]}
  return {'id': names.document({**facts, **hidden, **shapes}), **facts,
          'code': __version__, **shapes}


@functools.cache
def kernels() -> str:
  """Digest of the sources that decide what a program computes."""
  root = pathlib.Path(__file__).parent.parent.parent
  files = sorted(path for source in _SOURCES for path in (
      [root / source] if source.endswith('.py')
      else (root / source).rglob('*.py')))
  mark = hashlib.sha256()
  for path in files:
    data = path.read_bytes()
    name = str(path.relative_to(root)).encode()
    mark.update(b'%d %s %d ' % (len(name), name, len(data)) + data)
  return mark.hexdigest()


def _setting(name):
  # Those that can be set for a while are attributes, the others are not.
  if hasattr(jax.config, name):
    return getattr(jax.config, name)
  return jax.config.read(name)


def _device(device):
  if device.platform != 'cpu':
    return device.device_kind
  # The code that XLA emits, and how it splits a sum, follow from these.
  model = ''
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    found = re.search(r'^model name\s*:\s*(.*)$', info.read_text(), re.M)
    model = found[1] if found else ''
  return f'cpu {platform.machine()} {model} x{_cpus()}'


def _cpus():
  # Those that this process may use: as many threads share the work.
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _window(config):
  found = [getattr(config.layer(name).mixer, 'window', None) or 0
           for name in config.names]
  return max(found, default=0)


def _ascii(text):
  return re.sub(r'[^ -~]+', ' ', str(text)).strip()[:128]
