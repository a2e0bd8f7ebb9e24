"""Residual wiring of one layer, and the registry of mixers."""

import flax.linen as nn
import jax.numpy as jnp

from statejax import config as cfg
from statejax.layers.attention import Attention
from statejax.layers.common import RMSNorm
from statejax.layers.compressed import Compressed
from statejax.layers.delta_net import DeltaNet
from statejax.layers.delta_product import DeltaProduct
from statejax.layers.dsa import DSA
from statejax.layers.gated_delta_net import GatedDeltaNet
from statejax.layers.gated_delta_net2 import GatedDeltaNet2
from statejax.layers.gla import GLA
from statejax.layers.kda import KDA
from statejax.layers.lightning import Lightning
from statejax.layers.mamba2 import Mamba2
from statejax.layers.mla import MLA
from statejax.layers.mlp import SwiGLU
from statejax.layers.retnet import RetNet

# A new mixer is one file and one line here. It is a Linen module with a
# `config` field, `state(config, rows, capacity, dtype)` that returns its state
# class filled with `Spec`, and `(x, state, context) -> (y, state)`. A config
# whose mixer does not see all of the past says how far in a field or property
# `window` or `reach` (the query counts). A new logical axis also wants a line
# in `statejax.sharding.RULES` and, where it is a side of matrices, a place in
# `statejax.train.optimizer`: what is no matrix gets no weight decay.
MIXERS = {
    cfg.AttentionConfig: Attention,
    cfg.CompressedConfig: Compressed,
    cfg.DSAConfig: DSA,
    cfg.DeltaNetConfig: DeltaNet,
    cfg.DeltaProductConfig: DeltaProduct,
    cfg.GLAConfig: GLA,
    cfg.GatedDeltaNetConfig: GatedDeltaNet,
    cfg.GatedDeltaNet2Config: GatedDeltaNet2,
    cfg.KDAConfig: KDA,
    cfg.LightningConfig: Lightning,
    cfg.MLAConfig: MLA,
    cfg.Mamba2Config: Mamba2,
    cfg.RetNetConfig: RetNet,
}
MLPS = {cfg.SwiGLUConfig: SwiGLU}


def lookup(table, config, what):
  """Returns the module class registered for a config's type."""
  if type(config) not in table:
    known = ', '.join(sorted(t.__name__ for t in table))
    raise ValueError(f'{what}: no module for {type(config).__name__}; '
                     f'registered are {known} (statejax.layers.block).')
  return table[type(config)]


class Block(nn.Module):
  """`x += mixer(norm x); x += mlp(norm x)`, or with the norms behind."""

  layer: cfg.LayerConfig
  norm: cfg.NormConfig

  @nn.compact
  def __call__(self, x, state, context):
    # Padding may hold anything; from here on it is finite.
    x = jnp.where(context.valid[..., None], x, jnp.zeros((), x.dtype))
    mixer = lookup(MIXERS, self.layer.mixer, 'mixer')(
        self.layer.mixer, name='mixer')
    mlp = lookup(MLPS, self.layer.mlp, 'mlp')(self.layer.mlp, name='mlp')
    norm_mixer, norm_mlp = (
        RMSNorm(self.norm.eps, self.norm.offset, name=name)
        for name in ('norm_mixer', 'norm_mlp'))
    if self.layer.norm == 'pre':
      y, state = mixer(norm_mixer(x), state, context)
      x = x + y
      return x + mlp(norm_mlp(x)), state
    if self.layer.norm == 'post':
      y, state = mixer(x, state, context)
      x = x + norm_mixer(y)
      return x + norm_mlp(mlp(x)), state
    raise ValueError(f"layer {self.layer.name!r}: norm is {self.layer.norm!r}, "
                     "expected 'pre' or 'post'.")
