r"""Four residual streams (mHC) around a window and full attention.

    python -m statejax.main train --config=configs/tiny_hyper.py \
        --workdir=/tmp/tiny_hyper
    pytest -m slow tests/test_laws_attention.py -k tiny_hyper

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32, by the second command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 4 layers of width 32."""
  sizes = dict(heads=4, kv_heads=2, key=8, value=8)
  mlp = c.SwiGLUConfig(64)
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              c.LayerConfig('window', c.AttentionConfig(**sizes, window=5),
                            mlp),
              c.LayerConfig('full', c.AttentionConfig(**sizes), mlp)),
          groups=(c.GroupConfig(('window', 'full'), 2),),
          streams=c.HyperConfig()),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
