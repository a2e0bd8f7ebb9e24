"""Attention modules of transformers with random weights, and what they give.

    python tests/layers/published_sparse.py

writes tests/golden/{minimax_m3,qsa,kpool}.npz: weights under their published
names (p/...), inputs x [2, 30, 24] and outputs y, float32, eager attention.
Needs the `peers` extra.
"""

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
LENGTH, WIDTH = 30, 24
NAMES = ('minimax_m3', 'qsa', 'kpool')


def make(name):
  """Returns {array name: array} of one golden file."""
  import torch
  torch.manual_seed(0)
  module, call = {'minimax_m3': _minimax, 'qsa': _qsa, 'kpool': _kpool}[name]()
  module.eval()
  generator = np.random.default_rng(0)
  with torch.no_grad():
    for p in module.parameters():
      scale = 0.3 if p.ndim == 1 else p.shape[-1] ** -0.5
      p.copy_(torch.from_numpy(scale * generator.normal(size=p.shape)))
  x = generator.normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
  with torch.no_grad():
    y = call(torch.from_numpy(x)).numpy()
  weights = {f'p/{k}': v.numpy() for k, v in module.state_dict().items()}
  return weights | {'x': x, 'y': y}


def _mask():
  import torch
  return torch.full((LENGTH, LENGTH), float('-inf')).triu(1)[None, None].expand(
      2, 1, LENGTH, LENGTH)


def _attention(**fields):
  return {'hidden_size': WIDTH, 'num_attention_heads': 4,
          'num_key_value_heads': 2, 'head_dim': 12, 'num_hidden_layers': 1,
          'attn_implementation': 'eager', **fields}


def _minimax():
  import torch
  from transformers.models.minimax_m3_vl import (
    configuration_minimax_m3_vl as configs,
  )
  from transformers.models.minimax_m3_vl import (
    modeling_minimax_m3_vl as modeling,
  )
  config = configs.MiniMaxM3VLTextConfig(**_attention(
      layer_types=['minimax_m3_sparse'], index_n_heads=2, index_head_dim=8,
      index_block_size=4, index_topk_blocks=3, index_local_blocks=1,
      rope_parameters={'rope_type': 'default', 'rope_theta': 1e4,
                       'partial_rotary_factor': 0.5}))
  module = modeling.MiniMaxM3VLAttention(config, 0)
  rotary = modeling.MiniMaxM3VLRotaryEmbedding(config)
  def call(x):
    at = torch.arange(LENGTH)[None]
    return module(x, position_embeddings=rotary(x, at), attention_mask=_mask(),
                  position_ids=at)[0]
  return module, call


def _qsa():
  import torch
  from transformers.models.qwen4_exp import configuration_qwen4_exp as configs
  from transformers.models.qwen4_exp import modeling_qwen4_exp as modeling
  config = configs.Qwen4ExpTextConfig(**_attention(
      layer_types=['full_attention'], indexer_n_heads=8, indexer_kv_heads=1,
      indexer_head_dim=12, indexer_budget=8, indexer_compress_ratio=4,
      rope_parameters={'rope_type': 'default', 'rope_theta': 1e4,
                       'partial_rotary_factor': 0.5}))
  module = modeling.Qwen4ExpTextAttention(config, 0)
  rotary = modeling.Qwen4ExpTextRotaryEmbedding(config)
  def call(x):
    at = torch.arange(LENGTH)[None].expand(2, -1)
    return module(x, position_embeddings=rotary(x, at),
                  attention_mask=_mask())[0]
  return module, call


def _kpool():
  import torch
  from transformers.models.glm5_next import configuration_glm5_next as configs
  from transformers.models.glm5_next import modeling_glm5_next as modeling
  config = configs.Glm5NextTextConfig(
      hidden_size=WIDTH, num_attention_heads=3, num_key_value_heads=3,
      num_hidden_layers=1, q_lora_rank=20, kv_lora_rank=16,
      qk_nope_head_dim=10, qk_rope_head_dim=0, v_head_dim=12,
      index_n_heads=8, index_head_dim=12, index_topk=8, index_kpool=4,
      layer_types=['full_attention'], indexer_types=['full'],
      attn_implementation='eager')
  module = modeling.Glm5NextTextAttention(config, 0)
  def call(x):
    return module(x, attention_mask=torch.ones(2, LENGTH, dtype=torch.bool))[0]
  return module, call


if __name__ == '__main__':
  for each in NAMES:
    np.savez_compressed(GOLDEN / f'{each}.npz', **make(each))
