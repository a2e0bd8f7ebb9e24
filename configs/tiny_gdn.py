r"""Three Gated DeltaNet layers to one gated attention layer, for tests.

    python -m statejax.main train --config=configs/tiny_gdn.py \
        --workdir=/tmp/tiny_gdn
    pytest tests/test_laws.py -k tiny_gdn

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 4 layers of width 32."""
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              # Two value heads share a key head, and K != V.
              c.LayerConfig('gdn', c.GatedDeltaNetConfig(
                  heads=1, value_heads=2, key=8, value=12, chunk=8),
                            c.SwiGLUConfig(64)),
              c.LayerConfig('full', c.AttentionConfig(
                  heads=4, kv_heads=2, key=8, value=8,
                  rope=c.RopeConfig(fraction=0.5), qk_norm=True,
                  output_gate=True),
                            c.SwiGLUConfig(64))),
          groups=(c.GroupConfig(('gdn', 'gdn', 'gdn', 'full'), 1),),
          norm=c.NormConfig(offset=1.0)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
