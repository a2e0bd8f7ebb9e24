r"""Layers that read what earlier ones chose: HySparse, kpool with IndexShare.

    python -m statejax.main train --config=configs/tiny_sharing.py \
        --workdir=/tmp/tiny_sharing
    pytest -m slow tests/test_laws_attention.py -k tiny_sharing

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32, by the second command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 8 layers of width 32."""
  heads = c.AttentionConfig(heads=4, kv_heads=2, key=8, value=8, sink=True)
  latent = c.MLAConfig(heads=4, nope=8, rope_width=4, value=8, rank=16,
                       q_rank=12)
  sizes = dict(block=4, k=2)
  mlp = c.SwiGLUConfig(64)
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              c.LayerConfig('full', c.HySparseConfig(heads, **sizes), mlp),
              c.LayerConfig('reader', c.HySparseConfig(
                  heads, **sizes, owner='full', window=3), mlp),
              c.LayerConfig('pools', c.PooledDSAConfig(
                  latent, **sizes, index_heads=8, index_width=8), mlp),
              c.LayerConfig('shared', c.DSAConfig(latent, owner='pools'),
                            mlp)),
          groups=(c.GroupConfig(('full', 'reader', 'reader'), 2),
                  c.GroupConfig(('pools', 'shared')))),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
