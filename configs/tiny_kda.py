"""Three KDA layers to one full attention layer, small enough for tests."""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 4 layers of width 32."""
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              c.LayerConfig('kda', c.KDAConfig(heads=2, key=8, value=8, rank=8),
                            c.SwiGLUConfig(64)),
              c.LayerConfig('full', c.AttentionConfig(
                  heads=4, kv_heads=2, key=8, value=8, rope=None),
                            c.SwiGLUConfig(64))),
          groups=(c.GroupConfig(('kda', 'kda', 'kda', 'full'), 1),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
