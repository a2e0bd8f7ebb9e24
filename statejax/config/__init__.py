"""Configurations: frozen dataclasses of scalars and tuples, typed overrides.

A model is a list of groups; a group is a pattern of layer names, repeated; a
name points to one `LayerConfig`. Layers of equal name share one stacked state,
so the pattern `('kda', 'kda', 'kda', 'full')` repeated six times has exactly
two state entries, `kda` with 18 layers and `full` with 6.
"""

from statejax.config.attention import (
  AttentionConfig,
  Llama3RopeConfig,
  LongRopeConfig,
  RopeConfig,
  YarnConfig,
)
from statejax.config.block_sparse import (
  BlockMaxConfig,
  HySparseConfig,
  MoBAConfig,
  PooledDSAConfig,
  QSAConfig,
)
from statejax.config.compressed import CompressedConfig, IndexConfig
from statejax.config.delta import (
  DeltaNetConfig,
  DeltaProductConfig,
  GatedDeltaNet2Config,
  GatedDeltaNetConfig,
  KDAConfig,
)
from statejax.config.dsa import DSAConfig
from statejax.config.ksa import KSAConfig, SummaryConfig
from statejax.config.linear import (
  GatedConvConfig,
  GLAConfig,
  LightningConfig,
  Mamba2Config,
  RetNetConfig,
)
from statejax.config.loza import LoZAConfig
from statejax.config.mla import MLAConfig
from statejax.config.model import (
  GroupConfig,
  HyperConfig,
  LayerConfig,
  ModelConfig,
  NormConfig,
  SwiGLUConfig,
)
from statejax.config.nsa import NSAConfig
from statejax.config.override import override
from statejax.config.segment import (
  CompressiveConfig,
  DSTConfig,
  InfiniConfig,
  TitansConfig,
  TransformerXLConfig,
)
from statejax.config.slots import LogConfig, SlotRules, SlotsConfig
from statejax.config.train import Config, TaskConfig, TrainConfig
from statejax.config.tree import essence, from_dict, renewed, to_dict

__all__ = [
  'AttentionConfig', 'BlockMaxConfig', 'CompressedConfig', 'CompressiveConfig',
  'Config', 'DSAConfig', 'DSTConfig', 'DeltaNetConfig', 'DeltaProductConfig',
  'GLAConfig', 'GatedConvConfig', 'GatedDeltaNet2Config', 'GatedDeltaNetConfig',
  'GroupConfig',
  'HySparseConfig', 'HyperConfig', 'IndexConfig', 'InfiniConfig', 'KDAConfig',
  'KSAConfig', 'LayerConfig', 'LightningConfig', 'Llama3RopeConfig',
  'LoZAConfig', 'LogConfig', 'LongRopeConfig', 'MLAConfig', 'Mamba2Config',
  'MoBAConfig', 'ModelConfig', 'NSAConfig', 'NormConfig', 'PooledDSAConfig',
  'QSAConfig',
  'RetNetConfig', 'RopeConfig', 'SlotRules', 'SlotsConfig', 'SummaryConfig',
  'SwiGLUConfig', 'TaskConfig', 'TitansConfig', 'TrainConfig',
  'TransformerXLConfig', 'YarnConfig', 'essence', 'from_dict', 'override',
  'renewed', 'to_dict',
]
