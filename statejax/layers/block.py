"""Residual wiring of one layer, and the registry of mixers."""

import flax.linen as nn
import jax.numpy as jnp

from statejax import config as cfg
from statejax.layers import hyper
from statejax.layers.attention import Attention
from statejax.layers.block_max import BlockMax
from statejax.layers.common import RMSNorm
from statejax.layers.compressed import Compressed
from statejax.layers.compressive import Compressive
from statejax.layers.delta_net import DeltaNet
from statejax.layers.delta_product import DeltaProduct
from statejax.layers.dsa import DSA
from statejax.layers.dst import DST
from statejax.layers.gated_conv import GatedConv
from statejax.layers.gated_delta_net import GatedDeltaNet
from statejax.layers.gated_delta_net2 import GatedDeltaNet2
from statejax.layers.gla import GLA
from statejax.layers.hysparse import HySparse
from statejax.layers.infini import Infini
from statejax.layers.kda import KDA
from statejax.layers.ksa import KSA
from statejax.layers.lightning import Lightning
from statejax.layers.loza import LoZA
from statejax.layers.mamba2 import Mamba2
from statejax.layers.mla import MLA
from statejax.layers.mlp import SwiGLU
from statejax.layers.moba import MoBA
from statejax.layers.nsa import NSA
from statejax.layers.pooled_dsa import PooledDSA
from statejax.layers.qsa import QSA
from statejax.layers.retnet import RetNet
from statejax.layers.slots import Slots
from statejax.layers.titans import Titans
from statejax.layers.transformer_xl import TransformerXL

# A new mixer is one file and one line here. It is a Linen module with a
# `config` field, `state(config, rows, capacity, dtype)` that returns its state
# class filled with `Spec`, and `(x, state, context) -> (y, state)`. A config
# whose mixer does not see all of the past says how far in a field or property
# `window` or `reach` (the query counts). A new logical axis also wants a line
# in `statejax.sharding.RULES` and, where it is a side of matrices, a place in
# `statejax.train.optimizer`: what is no matrix gets no weight decay.
MIXERS = {
    cfg.AttentionConfig: Attention,
    cfg.BlockMaxConfig: BlockMax,
    cfg.CompressedConfig: Compressed,
    cfg.CompressiveConfig: Compressive,
    cfg.DSAConfig: DSA,
    cfg.DSTConfig: DST,
    cfg.DeltaNetConfig: DeltaNet,
    cfg.DeltaProductConfig: DeltaProduct,
    cfg.GLAConfig: GLA,
    cfg.GatedConvConfig: GatedConv,
    cfg.GatedDeltaNetConfig: GatedDeltaNet,
    cfg.GatedDeltaNet2Config: GatedDeltaNet2,
    cfg.HySparseConfig: HySparse,
    cfg.InfiniConfig: Infini,
    cfg.KDAConfig: KDA,
    cfg.KSAConfig: KSA,
    cfg.LightningConfig: Lightning,
    cfg.LoZAConfig: LoZA,
    cfg.MLAConfig: MLA,
    cfg.Mamba2Config: Mamba2,
    cfg.MoBAConfig: MoBA,
    cfg.NSAConfig: NSA,
    cfg.PooledDSAConfig: PooledDSA,
    cfg.QSAConfig: QSA,
    cfg.RetNetConfig: RetNet,
    cfg.SlotsConfig: Slots,
    cfg.TitansConfig: Titans,
    cfg.TransformerXLConfig: TransformerXL,
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
  """`x += mixer(norm x); x += mlp(norm x)`, or with the norms behind.

  With `streams` the sums are those of `statejax.layers.hyper`.
  """

  layer: cfg.LayerConfig
  norm: cfg.NormConfig
  streams: cfg.HyperConfig | None = None

  @nn.compact
  def __call__(self, x, state, context):
    # Padding may hold anything; from here on it is finite.
    real = jnp.expand_dims(context.real, tuple(range(2, x.ndim)))
    x = jnp.where(real, x, jnp.zeros((), x.dtype))
    mixer = lookup(MIXERS, self.layer.mixer, 'mixer')(
        self.layer.mixer, name='mixer')
    mlp = lookup(MLPS, self.layer.mlp, 'mlp')(self.layer.mlp, name='mlp')
    norm_mixer, norm_mlp = (
        RMSNorm(self.norm.eps, self.norm.offset, name=name)
        for name in ('norm_mixer', 'norm_mlp'))
    if self.layer.norm == 'pre':
      x, state = self._residual(
          'mixer', x, lambda x: mixer(norm_mixer(x), state, context))
      x, _ = self._residual('mlp', x, lambda x: (mlp(norm_mlp(x)), None))
      return x, state
    if self.layer.norm == 'post':
      def mix(x):
        y, new = mixer(x, state, context)
        return norm_mixer(y), new
      x, state = self._residual('mixer', x, mix)
      x, _ = self._residual('mlp', x, lambda x: (norm_mlp(mlp(x)), None))
      return x, state
    raise ValueError(f"layer {self.layer.name!r}: norm is {self.layer.norm!r}, "
                     "expected 'pre' or 'post'.")

  def _residual(self, name, x, f):
    """Returns `x + y` where `y, more = f(x)`, or the same of streams; and more.

    Args:
      name: of the part, for its parameters.
      x: [B, T, D], or with streams [B, T, S, D].
      f: function of [B, T, D].
    """
    if self.streams is None:
      y, more = f(x)
      return x + y, more
    pre, post, comb = hyper.Mappings(
        self.streams, self.norm.eps, name=f'streams_{name}')(x)
    y, more = f(hyper.collapse(x, pre))
    return hyper.mix(x, y, post, comb), more
