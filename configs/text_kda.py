"""Byte-level language model of the Python standard library, on two CPU cores.

  python -m statejax.main train --config=configs/text_kda.py --workdir=runs/text

Three KDA layers to one NoPE attention layer: the recurrent layers carry order,
so attention needs no positions.
"""

from statejax import config as c


def get_config():
  """Returns the configuration."""
  mlp = c.SwiGLUConfig(256)
  return c.Config(
      model=c.ModelConfig(
          vocab=257, width=128,
          layers=(
              c.LayerConfig('kda', c.KDAConfig(
                  heads=4, key=32, value=32, rank=32), mlp),
              c.LayerConfig('full', c.AttentionConfig(
                  heads=4, kv_heads=2, key=32, value=32, rope=None), mlp)),
          groups=(c.GroupConfig(('kda',), 3), c.GroupConfig(('full',), 1))),
      train=c.TrainConfig(
          steps=76, rows=16, length=256, peak=6e-3, warmup=15, decay=46,
          save_every=38),
      task=c.TaskConfig('text'))
