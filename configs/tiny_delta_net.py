r"""DeltaNet with an output gate in every layer, for tests.

    python -m statejax.main train --config=configs/tiny_delta_net.py \
        --workdir=/tmp/tiny_delta_net
    pytest -m slow tests/test_laws_delta.py -k tiny_delta_net

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
              c.LayerConfig('delta', c.DeltaNetConfig(
                  heads=2, key=8, value=12, output_gate=True, chunk=8),
                            c.SwiGLUConfig(64)),),
          groups=(c.GroupConfig(('delta',), 2),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
