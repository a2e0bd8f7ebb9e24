r"""Gated linear attention in every layer, for tests.

    python -m statejax.main train --config=configs/tiny_gla.py \
        --workdir=/tmp/tiny_gla
    pytest -m slow tests/test_laws_delta.py -k tiny_gla

Expected: every law of `statejax.laws` within 1e-5 in float32, by the second
command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 2 layers of width 32."""
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              c.LayerConfig('gla', c.GLAConfig(
                  heads=2, key=8, value=12, rank=4, chunk=8),
                            c.SwiGLUConfig(64)),),
          groups=(c.GroupConfig(('gla',), 2),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
