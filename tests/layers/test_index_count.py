"""What an indexer says of the length of its keys.

A kernel reads only the slots that some query sees, and leaves anything at all
for those behind; off the TPU nothing would notice a wrong count.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from statejax import config as c
from statejax.ops import gather
from tests.layers import single

MLA = c.MLAConfig(heads=2, nope=6, rope_width=4, value=5, rank=8, q_rank=7)
HEADS = c.AttentionConfig(heads=4, kv_heads=2, key=8, value=6)
MIXERS = {
    'dsa': c.DSAConfig(MLA, k=4, index_heads=4, index_width=8),
    'csa': c.CompressedConfig(
        heads=4, width=16, q_rank=12, window=5, out_groups=2, out_rank=6,
        ratio=3, index=c.IndexConfig(k=2, heads=4, width=8)),
    'kpool': c.PooledDSAConfig(MLA, block=3, k=2, index_heads=4, index_width=8),
    'qsa': c.QSAConfig(HEADS, block=3, k=2)}


@pytest.mark.parametrize('name', [
    'csa', 'kpool', *(pytest.param(n, marks=pytest.mark.slow)
                      for n in ('dsa', 'qsa'))])
def test_slots_that_nobody_sees_may_score_anything(name, monkeypatch):
  config, true, few = MIXERS[name], gather.index_scores, []
  params, x = single.draw(config, 16)
  _, state = single.run(config, params, x[:, :14], capacity=20)
  length = jnp.full((2,), 14, jnp.int32)
  last = lambda: single.step(config, params, x[:, 14:15], state, length)[0]
  want = last()

  def poisoned(value):
    def scores(q, w, k, *, count, **rest):
      found = true(q, w, k, count=count, **rest)
      slot = jnp.arange(found.shape[-1], dtype=jnp.int32)
      hidden = slot[None, None] >= count[:, None, None]
      few.append(found.shape)
      return jnp.where(hidden, jnp.float32(value), found)
    return scores

  for value in (-1e9, 1e9):
    single.step.clear_cache()
    monkeypatch.setattr(gather, 'index_scores', poisoned(value))
    np.testing.assert_allclose(last(), want, atol=2e-6, err_msg=str(value))
  single.step.clear_cache()
  assert few
