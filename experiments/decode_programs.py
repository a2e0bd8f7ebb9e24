"""Decode steps of one-layer models at published widths, compiled for TPUs."""

import dataclasses
import sys
import warnings
from unittest import mock

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from statejax import config as cfg
from statejax import model as lm
from statejax import state as st

_MLA = cfg.MLAConfig(
    heads=128, nope=128, rope_width=64, value=128, rank=512, q_rank=1536,
    rope=cfg.RopeConfig(layout='interleaved', scaling=cfg.YarnConfig(
        factor=40.0, original=4096, mscale=1.0, mscale_all_dim=1.0)))
_M3 = cfg.AttentionConfig(
    heads=64, kv_heads=4, key=128, value=128, qk_norm=True)
_V4 = dict(
    heads=64, width=512, q_rank=1024, window=128, out_groups=8, out_rank=1024,
    rope=cfg.RopeConfig(theta=160_000.0, fraction=0.125, layout='interleaved',
                        side='trailing'))

_KSA = cfg.KSAConfig(heads=32, kv_heads=8, key=128, value=128)

ROWS, CAPACITY = 8, 131_072
# Temporary bytes of a step: no store is copied, no score of every head held.
LIMIT = 64e6
# Width D of the model, and its mixer, or those of two layers.
MIXERS = {
    # Qwen3-32B.
    'GQA': (5120, cfg.AttentionConfig(
        heads=64, kv_heads=8, key=128, value=128, qk_norm=True)),
    # DeepSeek-V3 and V3.2.
    'MLA': (7168, _MLA),
    'DSA': (7168, cfg.DSAConfig(
        mla=_MLA, k=2048, index_heads=64, index_width=128)),
    # DeepSeek-V4-Flash.
    'CSA': (4096, cfg.CompressedConfig(
        **_V4, ratio=4, index=cfg.IndexConfig(k=512, heads=64, width=128))),
    'HCA': (4096, cfg.CompressedConfig.heavily(**_V4)),
    # MiniMax-M3; the others at its widths, kpool at those of DeepSeek-V3.2.
    'M3': (6144, cfg.BlockMaxConfig(_M3, index_width=128)),
    'MoBA': (6144, cfg.MoBAConfig(_M3)),
    'QSA': (6144, cfg.QSAConfig(_M3, block=16, k=128, index_heads=16,
                                index_width=128)),
    'NSA': (6144, cfg.NSAConfig(heads=64, kv_heads=4, key=128, value=128)),
    'kpool': (7168, cfg.PooledDSAConfig(
        dataclasses.replace(_MLA, rope_width=0, rope=None), block=4,
        k=512, index_heads=64, index_width=128)),
    # An owner alone would choose for nobody, and the compiler leave it out.
    'HySparse': (6144, (
        cfg.HySparseConfig(_M3),
        cfg.HySparseConfig(_M3, owner='layer_0', window=128))),
    # KSA-4B.
    'KSA': (2560, (_KSA, dataclasses.replace(_KSA, chunks=None))),
}


def measure(mixers, chips) -> list[dict]:
  """Compiles the step of every mixer for every chip."""
  found = []
  for mixer in mixers:
    size = state_bytes(mixer, ROWS, CAPACITY)
    jobs = [aot.Job(chip, 'experiments.decode_programs:step', {
        'mixer': mixer, 'rows': ROWS, 'capacity': CAPACITY}) for chip in chips]
    for chip, figures in zip(chips, aot.compile_all(jobs), strict=True):
      found.append({
          'mixer': mixer, 'chip': chip, 'state': size,
          'alias': figures['alias'], 'temporary': figures['temp'],
          'ok': figures['temp'] < LIMIT and figures['alias'] >= size})
      print(*found[-1].values(), file=sys.stderr, flush=True)
  return found


def model(mixer):
  """A language model of one or two layers, in bfloat16, with few words."""
  width, configs = MIXERS[mixer]
  configs = configs if isinstance(configs, tuple) else (configs,)
  names = tuple(f'layer_{i}' for i in range(len(configs)))
  return lm.LanguageModel(cfg.ModelConfig(
      vocab=1024, width=width, dtype='bfloat16',
      layers=tuple(cfg.LayerConfig(name, config, cfg.SwiGLUConfig(width))
                   for name, config in zip(names, configs)),
      groups=(cfg.GroupConfig(names),),
      summary=getattr(configs[0], 'summary', None)))


def state_bytes(mixer, rows, capacity) -> int:
  """Bytes of the whole serving state, as its schema has them."""
  return sum(st.nbytes(model(mixer).state_schema(rows, capacity)).values())


def step(mixer, rows, capacity) -> aot.Program:
  """One token of every row; the state is donated, weights are bfloat16."""
  decoder = model(mixer)
  state = st.abstract(decoder.state_schema(rows, capacity))
  params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
      jax.eval_shape(decoder.init, jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((rows, 1), 'int32')

  def function(state, params, tokens):
    # Ops choose as they would there; the compiler itself is told elsewhere.
    # A kernel that declines warns.
    with warnings.catch_warnings(), mock.patch.object(
        jax, 'default_backend', lambda: 'tpu'):
      warnings.simplefilter('error')
      return lm.apply(decoder, params, state, tokens, keep='last')

  return aot.Program(function, (state, params, tokens), donate=(0,),
                     printed=False)
