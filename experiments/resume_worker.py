"""What both processes of `experiments.resume_million` share, and the second.

  python -m experiments.resume_worker

reads lines `FAMILY DIRECTORY`; for each it reads DIRECTORY/jobs.json, loads the
saved states and artifacts, generates on, writes DIRECTORY/answers.json and then
a line. It is started by `experiments.resume_million`.
"""

import dataclasses
import functools
import json
import pathlib
import sys

from statejax import config as c

VOCAB, WIDTH, ROWS, PROMPT, STEPS = 32, 16, 64, 8, 100
CAPACITY = PROMPT + STEPS
HEADS = c.AttentionConfig(heads=2, kv_heads=1, key=8, value=8)
DELTA = dict(heads=2, key=8, value=8, chunk=8)
MLA = c.MLAConfig(heads=2, nope=6, rope_width=4, value=5, rank=8, q_rank=7)
CSA = c.CompressedConfig(
    heads=4, width=16, q_rank=12, window=5, out_groups=2, out_rank=6, ratio=3,
    index=c.IndexConfig(k=3, heads=5, width=12))
SEGMENT = dict(heads=2, kv_heads=1, key=8, value=8, segment=4)
RULES = c.SlotRules(slots=4, key=6, value=5, span=3, key_span=2, aliases=2)
# One for each registered mixer, and what its windows and blocks make of it.
MIXERS = {
    'attention': HEADS,
    'attention_window': dataclasses.replace(HEADS, window=5, sink=True),
    'block_max': c.BlockMaxConfig(HEADS, block=4, k=2, index_width=8),
    'compressed': CSA,
    'compressive': c.CompressiveConfig(WIDTH, **SEGMENT, memory=6, relative=6,
                                       compressed=3, rate=2),
    'delta_net': c.DeltaNetConfig(**DELTA),
    'delta_product': c.DeltaProductConfig(heads=1, value_heads=2, key=8,
                                          value=8, writes=2, chunk=8),
    'dsa': c.DSAConfig(mla=MLA, k=4, index_heads=4, index_width=8),
    'dst': c.DSTConfig(WIDTH, **SEGMENT, vectors=3),
    'gated_conv': c.GatedConvConfig(width=24, taps=4),
    'gated_delta_net': c.GatedDeltaNetConfig(**DELTA, value_heads=2),
    'gated_delta_net2': c.GatedDeltaNet2Config(
        heads=1, value_heads=2, key=8, value=8, rank=4, chunk=8),
    'gla': c.GLAConfig(**DELTA, rank=4),
    'hysparse': c.HySparseConfig(HEADS, block=4, k=2),
    'infini': c.InfiniConfig(**SEGMENT),
    'kda': c.KDAConfig(**DELTA, rank=8),
    'ksa': c.KSAConfig(heads=4, kv_heads=2, key=6, value=5,
                       summary=c.SummaryConfig(chunk=5, count=2), chunks=2),
    'lightning': c.LightningConfig.of_layer(1, 4, **DELTA),
    'loza': c.LoZAConfig(MLA, block=7, sink_blocks=2, recent_blocks=2),
    'mamba2': c.Mamba2Config(heads=4, groups=2, key=8, value=6, chunk=8),
    'mla': MLA,
    'moba': c.MoBAConfig(HEADS, block=4, k=2),
    'nsa': c.NSAConfig(
        heads=4, kv_heads=2, key=6, value=5, compress_block=6, stride=2,
        compress_hidden=7, select_block=4, select_count=3, initial=1, local=1,
        window=3),
    'pooled_dsa': c.PooledDSAConfig(MLA, block=3, k=2, index_heads=4,
                                    index_width=8),
    'qsa': c.QSAConfig(HEADS, block=4, k=2, index_heads=4, index_width=8),
    'retnet': c.RetNetConfig(**DELTA),
    'slots': c.SlotsConfig(RULES, segment=4, events=2, statement=6,
                           confidence=-0.5),
    'titans': c.TitansConfig(heads=2, key=8, value=6, segment=4),
    'transformer_xl': c.TransformerXLConfig(WIDTH, **SEGMENT, memory=6,
                                            relative=6),
}
FAMILIES = (*MIXERS, 'hybrid')


def config(family) -> c.ModelConfig:
  """One layer of a family; the hybrid has three of KDA and one of attention."""
  names = ('kda', 'kda', 'kda', 'attention') if family == 'hybrid' else (
      family,)
  layers = tuple(c.LayerConfig(name, MIXERS[name], c.SwiGLUConfig(8))
                 for name in dict.fromkeys(names))
  return c.ModelConfig(
      vocab=VOCAB, width=WIDTH, layers=layers, groups=(c.GroupConfig(names),),
      summary=getattr(MIXERS.get(family), 'summary', None))


@functools.cache
def loaded(family):
  """Returns the model and its parameters, as a step takes them."""
  import jax

  from statejax.model import LanguageModel
  model = LanguageModel(config(family))
  return model, model.unstack(model.init(jax.random.key(0)))


@functools.cache
def host(family, rows):
  """What the artifacts of a family are bound to."""
  from statejax.artifact import digest, identity
  model, params = loaded(family)
  return identity.Host(
      model.config, model.state_schema,
      digest.tree_digest(model.stack(params)),
      program=identity.Program(PROMPT, rows, CAPACITY))


def shop(folder):
  """Returns the store of artifacts below a directory."""
  from statejax.artifact import objects
  return objects.Store(f'{folder}/store', objects.Secrets(f'{folder}/secrets'))


def go_on(family, state, steps):
  """Returns the tokens of `steps` more steps, [B, n], and the state."""
  from statejax import generate as gen
  model, params = loaded(family)
  return gen.generate(model, params, state, steps,
                      sampling=gen.Sampling(temperature=0.8))


def digests(state, rows) -> list[str]:
  """Returns the digest of each of some rows, whatever its leaves."""
  from statejax import state as st
  from statejax.artifact import digest
  return [digest.tree_digest(st.live(state, row)) for row in rows]


def saved(family, job):
  """The state of a directory of `save_state`, and all of its rows."""
  from statejax.artifact import serving
  model, params = loaded(family)
  state = serving.load_state(job['path'], model, params)
  return state, list(range(job['rows']))


def minted(family, job, folder):
  """Artifacts in an otherwise empty batch, from its last slot downwards."""
  from statejax import state as st
  from statejax.artifact import access, load, standing
  model, _ = loaded(family)
  state, rows = model.init_state(job['rows'], CAPACITY), []
  store, who = shop(folder), access.Principal('bench')
  for i, id in enumerate(job['ids']):
    found = load.load(store, id, who, host(family, job['rows']))
    if found.decision.outcome != 'resumed' or found.decision.promise != 'bit':
      raise ValueError(f'{family}: {id}: {found.decision} '
                       f'{found.decision.promise} {found.decision.detail}')
    rows.append(job['rows'] - 1 - i)
    state = st.put(state, rows[-1], found.state)
    standing.check(state, {rows[-1]: found.stands})
  return state, rows


def answer(family, folder):
  """Does all jobs of a directory."""
  answers = []
  for job in json.loads((folder / 'jobs.json').read_text()):
    state, rows = (saved(family, job) if 'path' in job else
                   minted(family, job, folder))
    tokens, state = go_on(family, state, job['steps'])
    answers.append({'tokens': tokens[rows].tolist(),
                    'digests': digests(state, rows)})
  (folder / 'answers.json').write_text(json.dumps(answers))


def forget():
  """Lets go of a family's programs: a process may map only so many."""
  import jax
  loaded.cache_clear()
  host.cache_clear()
  jax.clear_caches()


def main():
  """Does what is asked line by line."""
  for line in sys.stdin:
    family, folder = line.split()
    answer(family, pathlib.Path(folder))
    forget()
    print('done', flush=True)


if __name__ == '__main__':
  main()
