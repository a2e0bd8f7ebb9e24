r"""Three Gated DeltaNet layers to one full layer (OLMo-Hybrid-like), for tests.

    python -m statejax.main train --config=configs/tiny_olmo.py \
        --workdir=/tmp/tiny_olmo
    pytest -m slow tests/test_laws_delta.py -k tiny_olmo

Expected: every law of `statejax.laws` within 1e-5 in float32, by the second
command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 4 layers of width 32."""
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(
              # Negative eigenvalues; only NoPE attention has its norms behind.
              c.LayerConfig('gdn', c.GatedDeltaNetConfig.olmo(
                  heads=2, value_heads=2, key=8, value=12, chunk=8),
                            c.SwiGLUConfig(64)),
              c.LayerConfig('full', c.AttentionConfig(
                  heads=4, kv_heads=4, key=8, value=8, rope=None),
                            c.SwiGLUConfig(64), norm='post'),),
          groups=(c.GroupConfig(('gdn', 'gdn', 'gdn', 'full')),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
