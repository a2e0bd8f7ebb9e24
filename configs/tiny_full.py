r"""Full attention with rope in every layer (Llama-like), for tests.

    python -m statejax.main train --config=configs/tiny_full.py \
        --workdir=/tmp/tiny_full
    pytest tests/test_laws.py -k tiny_full

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 2 layers of width 32."""
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              c.LayerConfig('full', c.AttentionConfig(
                  heads=4, kv_heads=2, key=8, value=8), c.SwiGLUConfig(64)),),
          groups=(c.GroupConfig(('full',), 2),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
