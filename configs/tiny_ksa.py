r"""Kwai summary attention in miniature: three layers with summaries, one full.

    python -m statejax.main train --config=configs/tiny_ksa.py \
        --workdir=/tmp/tiny_ksa
    pytest -m slow tests/test_laws_attention.py -k tiny_ksa

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32, by the second command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 4 layers of width 32."""
  summary = c.SummaryConfig(chunk=3, count=1)
  sizes = dict(heads=4, kv_heads=2, key=8, value=8, summary=summary)
  mlp = c.SwiGLUConfig(64)
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              c.LayerConfig('ksa', c.KSAConfig(**sizes, chunks=1), mlp),
              c.LayerConfig('full', c.KSAConfig(**sizes, chunks=None), mlp)),
          groups=(c.GroupConfig(('ksa', 'ksa', 'ksa', 'full')),),
          summary=summary),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
