r"""Sparse latent attention: an indexer and a layer that reads its choice.

    python -m statejax.main train --config=configs/tiny_dsa.py \
        --workdir=/tmp/tiny_dsa
    pytest -m slow tests/test_laws_attention.py -k tiny_dsa

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32, by the second command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 4 layers of width 32."""
  mla = c.MLAConfig(heads=4, nope=8, rope_width=4, value=8, rank=16, q_rank=12)
  owner = c.DSAConfig(mla=mla, k=6, index_heads=8, index_width=8)
  reader = c.DSAConfig(mla=mla, k=6, owner='dsa')
  mlp = c.SwiGLUConfig(64)
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(c.LayerConfig('dsa', owner, mlp),
                  c.LayerConfig('shared', reader, mlp)),
          groups=(c.GroupConfig(('dsa', 'shared'), 2),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
