r"""Multi-scale retention in every layer, for tests.

    python -m statejax.main train --config=configs/tiny_retnet.py \
        --workdir=/tmp/tiny_retnet
    pytest -m slow tests/test_laws_delta.py -k tiny_retnet

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
              c.LayerConfig('retnet', c.RetNetConfig(
                  heads=2, key=8, value=12, chunk=8),
                            c.SwiGLUConfig(64)),),
          groups=(c.GroupConfig(('retnet',), 2),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
