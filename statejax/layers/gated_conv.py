"""Gated short convolution: a token and the few before it (arXiv 2511.23404)."""

import dataclasses

import flax.linen as nn
import jax

from statejax.config import GatedConvConfig
from statejax.layers import weights
from statejax.layers.common import Proj
from statejax.ops import conv
from statejax.state import Array, Spec, leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedConvState:
  """Carried state of a gated short convolution.

  Attributes:
    tail: last taps-1 inputs of the convolution, [B, taps-1, D].
  """

  tail: Array = leaf('batch taps hidden')


class GatedConv(nn.Module):
  """`y_t = out(c_t * sum_w weight[w] (b * u)_{t+w-taps+1})`, b, c, u of x.

  The operator of LFM2: linear in each of its three inputs, no activation. A tap
  reaches back only inside its own document.

  Laws: split (L1), padding (L3), packed (L4), tail travels (L15).
  """

  config: GatedConvConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    """Returns a `GatedConvState` of `Spec`; its size ignores `capacity`."""
    del capacity
    return GatedConvState(Spec((rows, config.taps - 1, config.width), dtype))

  @nn.compact
  def __call__(self, x, state, context):
    c, axes = self.config, ('embed', 'hidden')
    before, after, u = (Proj((c.width,), axes, name=name)(x)
                        for name in ('before', 'after', 'input'))
    weight = weights.weight(self, 'weight', ('taps', 'hidden'),
                            (c.taps, c.width), weights.symmetric(c.taps ** -.5))
    y, tail = conv.short_conv(
        before * u, state.tail, weight, context.n_valid,
        document=context.document,
        start=None if context.document is None else context.start,
        activation=lambda total: total)
    y = Proj((x.shape[-1],), ('hidden', 'embed'), name='out')(after * y)
    return y, GatedConvState(tail)
