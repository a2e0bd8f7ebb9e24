"""Multi-query associative recall by two KDA layers (zoology, 2312.04927).

  python -m statejax.main train --config=configs/mqar_kda.py --workdir=runs/mqar
"""

from statejax import config as c


def get_config():
  """Returns the configuration."""
  layer = c.LayerConfig('kda', c.KDAConfig(heads=2, key=32, value=32, rank=16),
                        c.SwiGLUConfig(128))
  return c.Config(
      model=c.ModelConfig(vocab=64, width=64, layers=(layer,),
                          groups=(c.GroupConfig(('kda',), 2),)),
      train=c.TrainConfig(
          steps=300, rows=64, length=40, peak=8e-3, warmup=20, decay=180,
          save_every=75),
      task=c.TaskConfig('mqar', pairs=8, items=100_000, vocab=64))
