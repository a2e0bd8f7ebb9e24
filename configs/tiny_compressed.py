r"""DeepSeek-V4 in miniature: window, compressed sparse, heavily compressed.

    python -m statejax.main train --config=configs/tiny_compressed.py \
        --workdir=/tmp/tiny_compressed
    pytest -m slow tests/test_laws_attention.py -k tiny_compressed

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32, by the second command.
"""

import functools

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 5 layers of width 32."""
  sizes = dict(heads=4, width=16, q_rank=12, window=5, out_groups=2,
               out_rank=8)
  far = c.RopeConfig(
      theta=160_000.0, fraction=0.5, layout='interleaved', side='trailing',
      scaling=c.YarnConfig(factor=16.0, original=64, attention_factor=1.0))
  layer = functools.partial(c.LayerConfig, mlp=c.SwiGLUConfig(64))
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              layer('window', c.CompressedConfig.sliding(**sizes)),
              layer('csa', c.CompressedConfig(
                  **sizes, ratio=4, index=c.IndexConfig(k=3, heads=8, width=12),
                  rope=far)),
              layer('hca', c.CompressedConfig.heavily(
                  **(sizes | {'ratio': 6}), rope=far))),
          groups=(c.GroupConfig(('window',)),
                  c.GroupConfig(('csa', 'hca'), 2))),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
