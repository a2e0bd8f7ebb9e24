"""Equal scores: single tokens, pieces and one pass choose the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import single

from statejax import config as c

HEADS = c.AttentionConfig(heads=4, kv_heads=2, key=8, value=8, qk_norm=True)
MLA = c.MLAConfig(heads=2, nope=6, rope_width=4, value=6, rank=10, q_rank=8)
INDEX = dict(index_heads=8, index_width=8)
MIXERS = {
    'dsa': c.DSAConfig(MLA, k=5, index_rope=None, **INDEX),
    'kpool': c.PooledDSAConfig(MLA, block=3, k=3, **INDEX),
    'qsa': c.QSAConfig(HEADS, block=3, k=3, index_rope=None, **INDEX),
    'block_max': c.BlockMaxConfig(HEADS, block=3, k=3, index_width=8,
                                  index_rope=None),
    'moba': c.MoBAConfig(dataclasses.replace(HEADS, rope=None), block=3, k=3),
    'nsa': c.NSAConfig(heads=4, kv_heads=2, key=8, value=8, compress_block=4,
                       stride=2, compress_hidden=8, select_block=4,
                       select_count=3, initial=0, window=3),
    'csa': c.CompressedConfig(
        heads=4, width=16, q_rank=12, window=3, out_groups=2, out_rank=6,
        ratio=3, index=c.IndexConfig(3, 8, 12)),
}
# What of each mixer makes all scores equal when it is zero.
SILENT = {'dsa': 'index_w', 'kpool': 'index_w', 'qsa': 'index_q',
          'block_max': 'index_q', 'moba': 'q', 'csa': 'index_w', 'nsa': 'q'}
# Of 60 tokens; every length is a program.
CUTS = {'ones': range(1, 60), 'eights': range(4, 60, 8),
        'mixed': (8, 16, 24, 25, 26, 27, 28, 36, 44, 52)}


def draw(name):
  """Parameters, and text that repeats.

  MoBA has no rope, so that its scores tie, and would give the same whichever of
  two equal blocks it takes: what no key is made of tells its values apart.
  """
  params, x = single.draw(MIXERS[name], 24)
  x = jnp.tile(x[:, :6], (1, 10, 1))
  if name != 'moba':
    return params, x
  for part in ('q', 'k', 'v'):
    kernel = params[part]['kernel']
    params[part] = {'kernel': kernel.at[0].set(3.0 * (part == 'v'))}
  return params, x.at[..., 0].set(jnp.arange(60.)[None] / 10)


def check(name, params, x, cuts):
  whole, _ = single.run(MIXERS[name], params, x)
  pieces, _ = single.run(MIXERS[name], params, x, tuple(cuts))
  np.testing.assert_allclose(pieces, whole, atol=5e-6)
  return whole


@pytest.mark.slow
@pytest.mark.parametrize('name', SILENT)
def test_all_scores_are_equal(name):
  params, x = single.draw(MIXERS[name], 24)
  params[SILENT[name]] = jax.tree.map(jnp.zeros_like, params[SILENT[name]])
  whole = check(name, params, x, (13, 14, 15, 16, 17))
  if name == 'kpool':
    alone, _ = single.run(MIXERS[name], params, x[1:])
    np.testing.assert_allclose(alone, whole[1:], atol=5e-6)


@pytest.mark.parametrize('name, cuts', [
    pytest.param(name, cuts, marks=[] if (name, cuts) == ('dsa', 'ones') else
                 pytest.mark.slow)
    for name in MIXERS if name not in ('nsa', 'csa') for cuts in CUTS])
def test_text_repeats(name, cuts):
  """Keys of equal tokens are equal but for rounding, which must not choose: of
  the values that are seen the positions differ."""
  check(name, *draw(name), CUTS[cuts])
