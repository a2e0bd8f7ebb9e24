r"""Two window layers with sinks to one full layer (MiMo-like), for tests.

    python -m statejax.main train --config=configs/tiny_window.py \
        --workdir=/tmp/tiny_window
    pytest tests/test_laws.py -k tiny_window

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 3 layers of width 32."""
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              # The window is short, so the sink takes what finds no match.
              c.LayerConfig('window', c.AttentionConfig(
                  heads=4, kv_heads=2, key=8, value=8, window=5, sink=True),
                            c.SwiGLUConfig(64)),
              c.LayerConfig('full', c.AttentionConfig(
                  heads=4, kv_heads=1, key=12, value=8,
                  rope=c.RopeConfig(theta=1e6, fraction=0.5)),
                            c.SwiGLUConfig(64))),
          groups=(c.GroupConfig(('window', 'window', 'full'), 1),),
          tied=False),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
