r"""Two lightning layers to one full attention layer (MiniMax-like), for tests.

    python -m statejax.main train --config=configs/tiny_lightning.py \
        --workdir=/tmp/tiny_lightning
    pytest -m slow tests/test_laws_delta.py -k tiny_lightning

Expected: every law of `statejax.laws` within 1e-5 in float32, by the second
command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 3 layers of width 32."""
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              # The decay depends on the depth, so every depth is a kind.
              *(c.LayerConfig(f'lightning_{i}', c.LightningConfig.of_layer(
                  i, 3, heads=2, key=8, value=12, chunk=8),
                              c.SwiGLUConfig(64)) for i in (0, 1)),
              c.LayerConfig('full', c.AttentionConfig(
                  heads=4, kv_heads=2, key=8, value=8), c.SwiGLUConfig(64)),),
          groups=(c.GroupConfig(('lightning_0', 'lightning_1', 'full')),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
