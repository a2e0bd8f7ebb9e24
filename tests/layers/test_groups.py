"""What layers lend each other in one step, and the losses of their own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as cfg
from statejax import model as lm
from statejax.layers import block, common
from statejax.layers.common import Proj
from statejax.state import Array, Spec, leaf


@dataclasses.dataclass(frozen=True)
class OwnerConfig:
  """Lends a projection of its input; its loss is their sum."""


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
  """Returns what the layer `owner` lent."""

  owner: str = 'owner'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LastState:
  last: Array = leaf('batch embed')


class Owner(nn.Module):
  config: OwnerConfig

  @staticmethod
  def state(config, rows, capacity, dtype):
    del config, capacity
    return LastState(Spec((rows, 4), dtype))

  @nn.compact
  def __call__(self, x, state, context):
    said = Proj((4,), ('embed', 'embed'), name='say')(x)
    common.lend(self, said=said)
    valid = context.valid[..., None]
    common.add_loss(self, 'size', jnp.sum(jnp.where(valid, said, 0.0)))
    return jnp.zeros_like(x), state


class Reader(nn.Module):
  config: ReaderConfig

  state = staticmethod(Owner.state)

  @nn.compact
  def __call__(self, x, state, context):
    return context.borrow(self.config.owner, 'said'), state


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setitem(block.MIXERS, OwnerConfig, Owner)
  monkeypatch.setitem(block.MIXERS, ReaderConfig, Reader)


def _model(*groups, remat=False):
  mlp = cfg.SwiGLUConfig(4)
  return lm.LanguageModel(cfg.ModelConfig(
      vocab=8, width=4, remat=remat,
      layers=(cfg.LayerConfig('owner', OwnerConfig(), mlp),
              cfg.LayerConfig('reader', ReaderConfig(), mlp)),
      groups=tuple(cfg.GroupConfig(*g) for g in groups)))


PAIR = ('owner', 'reader')
CASES = {'one pattern': [(PAIR, 2)],
         'later group': [(('owner',), 1), (('reader',), 2)],
         'nearest': [(('owner', *PAIR, 'reader'), 1)]}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_scan_loop_and_remat_agree(registered, case):
  model = _model(*CASES[case])
  params = model.init(jax.random.key(0))
  tokens = jnp.arange(6).reshape(2, 3)
  n_valid = jnp.array([3, 2])
  def run(model, params):
    state = model.init_state(2, 0)
    logits, _, losses = lm.forward(model, params, state, tokens, n_valid)
    total = losses['owner']['size']
    return jnp.sum(logits ** 2) + total, (logits, total)
  grad = lambda model, params: jax.value_and_grad(run, argnums=1,
                                                  has_aux=True)(model, params)
  (_, (want, total)), d_params = grad(model, params)
  (_, (looped, same)), d_loop = grad(model, model.unstack(params))
  np.testing.assert_allclose(want, looped, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(total, same, rtol=1e-6, atol=1e-7)
  again = _model(*CASES[case], remat=True)
  (_, (kept, once)), d_again = grad(again, params)
  np.testing.assert_allclose(want, kept, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(total, once, rtol=1e-6, atol=1e-7)
  for other in (model.stack(d_loop), d_again):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=3e-5), d_params, other)
  assert any(np.any(x) for x in jax.tree.leaves(d_params['group_0']))
  # Padding is in no loss: two more columns of it change nothing.
  wide = jnp.pad(tokens, ((0, 0), (0, 2)))
  *_, losses = lm.forward(model, params, model.init_state(2, 0), wide, n_valid)
  np.testing.assert_allclose(losses['owner']['size'], total, rtol=1e-6)


def test_reader_without_owner(registered):
  with pytest.raises(ValueError, match="'said' of an earlier layer 'owner'"):
    _model((('reader', 'owner'), 2)).init(jax.random.key(0))
  # Of several repeats none lends to what comes after.
  with pytest.raises(ValueError, match='an earlier group of one repeat'):
    _model((('owner',), 2), (('reader',), 1)).init(jax.random.key(0))
