# %% [markdown]
# # A state that survives its process
#
# A sequence model's state is one pytree. Here it is filled from a prompt,
# saved, restored in **another process**, and continued there: same tokens, same
# bits as if nothing had happened. CPU, under a minute.

# %%
import subprocess
import sys

REPOSITORY = 'git+https://github.com/statejax/statejax'
if 'google.colab' in sys.modules:
  subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', REPOSITORY],
                 check=True)

# %% [markdown]
# Three KDA layers, which carry a fixed matrix each, and one attention layer,
# which carries the keys and values of every token.

# %%
import pathlib
import tempfile

setup = '''
import jax
from statejax import config as c
from statejax.artifact import serving
from statejax.generate import Sampling, generate, prefill
from statejax.model import LanguageModel

layers = (c.LayerConfig('kda', c.KDAConfig(heads=2, key=16, value=16, rank=8)),
          c.LayerConfig('full', c.AttentionConfig(4, 2, 16, 16, rope=None)))
model = LanguageModel(c.ModelConfig(
    vocab=256, width=64, layers=layers,
    groups=(c.GroupConfig(('kda', 'kda', 'kda', 'full'), 1),)))
params = model.init(jax.random.key(0))
sampling = Sampling(temperature=1.0)
'''
exec(setup)

# %% [markdown]
# Prefill a prompt, emit 16 tokens, save.

# %%
prompt = jax.random.randint(jax.random.key(1), (1, 40), 0, 256)
state = model.init_state(rows=1, capacity=128)
state = prefill(model, params, state, prompt, sampling=sampling)
first, state = generate(model, params, state, 16, sampling=sampling)

folder = pathlib.Path(tempfile.mkdtemp())
digest = serving.save_state(folder / 'state', model, params, state)
print('saved', digest[:16], 'after', int(state.length[0]), 'tokens')

# %% [markdown]
# A new process restores the state and goes on.

# %%
script = setup + f'''
state = serving.load_state({str(folder / 'state')!r}, model, params)
tokens, state = generate(model, params, state, 16, sampling=sampling)
print(*tokens[0], serving.state_digest(state))
'''
done = subprocess.run([sys.executable, '-c', script], capture_output=True,
                      text=True, check=True)
*resumed, resumed_digest = done.stdout.split()

# %% [markdown]
# Never having stopped gives the same.

# %%
tokens, state = generate(model, params, state, 16, sampling=sampling)
print('expected', *tokens[0], serving.state_digest(state)[:16])
print('obtained', *resumed, resumed_digest[:16])
assert [int(t) for t in resumed] == tokens[0].tolist()
assert resumed_digest == serving.state_digest(state)
