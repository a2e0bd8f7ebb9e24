r"""Latent attention, one layer with rope and YaRN to one NoPE, for tests.

    python -m statejax.main train --config=configs/tiny_mla.py \
        --workdir=/tmp/tiny_mla
    pytest -m slow tests/test_laws_attention.py -k tiny_mla

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32, by the second command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 2 layers of width 32."""
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              # DeepSeek-V3-like, already stretched beyond 16 positions.
              c.LayerConfig('mla', c.MLAConfig(
                  heads=4, nope=8, rope_width=4, value=8, rank=16, q_rank=12,
                  rope=c.RopeConfig(layout='interleaved', scaling=c.YarnConfig(
                      factor=8.0, original=16, mscale=1.0,
                      mscale_all_dim=1.0))), c.SwiGLUConfig(64)),
              # Kimi-Linear-like.
              c.LayerConfig('nope', c.MLAConfig(
                  heads=4, nope=8, rope_width=4, value=8, rank=16, rope=None),
                            c.SwiGLUConfig(64))),
          groups=(c.GroupConfig(('mla', 'nope')),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
