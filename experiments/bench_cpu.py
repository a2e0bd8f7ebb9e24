"""Train step, prefill and decode on a CPU against transformers' qwen3_next.

  pip install -e '.[peers]'
  python -m experiments.bench_cpu

One Gated DeltaNet hybrid (three delta layers to one attention layer) with the
same weights in both libraries, float32, the same two threads, one process,
interleaved repeats, medians. Also measures what the machine can do at best:
matrix products and reading memory. Aim: train 1.5x, prefill 1.2x, decode 1.2x
at batch 1 and 2x at batch 8. About five minutes.
"""

import functools
import json
import os
import pathlib
import statistics
import time

from absl import app, flags, logging

from experiments import process, report
from statejax import config as c

REPEATS = flags.DEFINE_integer('repeats', 9, 'interleaved repeats')
OUT = flags.DEFINE_string('out', 'experiments/results/bench_cpu.json', 'file')
SMOKE = flags.DEFINE_bool('smoke', False, 'tiny sizes, one repeat')

AIMS = {'train': 1.5, 'prefill': 1.2, 'decode, batch 1': 1.2,
        'decode, batch 8': 2.0}


def config(smoke=False):
  """Eight layers of width 256, in the proportions of Qwen3-Next-80B-A3B.

  There the delta layers' keys are as wide as the model and their values twice
  as wide, attention is twice as wide, and eleven active experts of a quarter
  of the width make a feed-forward block 2.75 times as wide.
  """
  mlp = c.SwiGLUConfig(64 if smoke else 704)
  return c.ModelConfig(
      vocab=1024, width=64 if smoke else 256,
      layers=(
          c.LayerConfig('gdn', c.GatedDeltaNetConfig(4, 8, 64, 64), mlp),
          c.LayerConfig('full', c.AttentionConfig(
              heads=8, kv_heads=2, key=64, value=64, qk_norm=True,
              output_gate=True, rope=c.RopeConfig(fraction=0.25)), mlp)),
      groups=(c.GroupConfig(('gdn', 'gdn', 'gdn', 'full'), 2),),
      norm=c.NormConfig(offset=1.0), tied=False)


def peer(model_config):
  """Returns the transformers model of the same shape."""
  from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
  m = model_config
  gdn, full = m.layer('gdn').mixer, m.layer('full').mixer
  return Qwen3NextForCausalLM(Qwen3NextConfig(
      vocab_size=m.vocab, hidden_size=m.width,
      intermediate_size=m.layer('gdn').mlp.hidden,
      num_hidden_layers=len(m.names), num_attention_heads=full.heads,
      num_key_value_heads=full.kv_heads, head_dim=full.key,
      rope_parameters={'rope_type': 'default', 'rope_theta': full.rope.theta,
                       'partial_rotary_factor': full.rope.fraction},
      linear_num_key_heads=gdn.heads, linear_num_value_heads=gdn.value_heads,
      linear_key_head_dim=gdn.key, linear_value_head_dim=gdn.value,
      linear_conv_kernel_dim=gdn.conv, rms_norm_eps=m.norm.eps,
      mlp_only_layers=list(range(len(m.names))), num_experts=0,
      tie_word_embeddings=m.tied, use_cache=True,
      attn_implementation='sdpa')).float()


def copy_weights(params, model, target):
  """Writes our parameters into the transformers model."""
  import numpy as np
  import torch
  flat = model.unstack(params)['group_0']
  state = {'model.embed_tokens.weight': params['embed'],
           'model.norm.weight': params['norm'],
           'lm_head.weight': np.asarray(params['head']).T}
  size = len(model.config.groups[0].pattern)
  for i, name in enumerate(model.config.names):
    ours = flat[f'repeat_{i // size}'][f'layer_{i % size}']
    mixer, where = ours['mixer'], f'model.layers.{i}.'
    matrix = lambda p, n=1: np.asarray(p['kernel']).reshape(
        int(np.prod(p['kernel'].shape[:n])), -1).T
    state[where + 'input_layernorm.weight'] = ours['norm_mixer']['weight']
    state[where + 'post_attention_layernorm.weight'] = (
        ours['norm_mlp']['weight'])
    for key in ('gate', 'up', 'down'):
      state[f'{where}mlp.{key}_proj.weight'] = matrix(ours['mlp'][key])
    copy = _copy_gdn if name == 'gdn' else _copy_full
    copy(state, where, mixer, matrix, model.config.layer(name).mixer)
  tensors = {k: torch.from_numpy(np.array(v, np.float32))
             for k, v in state.items()}
  target.load_state_dict(tensors, strict=True)


def _copy_gdn(state, where, mixer, matrix, gdn):
  import numpy as np
  where += 'linear_attn.'
  heads, per = gdn.heads, gdn.value_heads // gdn.heads
  rows = {n: matrix(mixer[n]) for n in
          ('q', 'k', 'v', 'gate', 'beta', 'rate')}
  # Fused rows are grouped per key head: q, k, its values, its gates.
  group = lambda n, width: rows[n].reshape(heads, width, -1)
  state[where + 'in_proj_qkvz.weight'] = np.concatenate(
      [group('q', gdn.key), group('k', gdn.key), group('v', per * gdn.value),
       group('gate', per * gdn.value)], axis=1).reshape(-1, rows['q'].shape[1])
  state[where + 'in_proj_ba.weight'] = np.concatenate(
      [group('beta', per), group('rate', per)], axis=1).reshape(
          -1, rows['q'].shape[1])
  taps = [np.asarray(mixer[f'conv_{n}']['weight']).reshape(gdn.conv, -1).T
          for n in 'qkv']
  state[where + 'conv1d.weight'] = np.concatenate(taps)[:, None]
  state[where + 'A_log'] = mixer['a_log']
  state[where + 'dt_bias'] = mixer['dt_bias']
  state[where + 'norm.weight'] = mixer['norm']
  state[where + 'out_proj.weight'] = matrix(mixer['out'], 2)


def _copy_full(state, where, mixer, matrix, full):
  import numpy as np
  where += 'self_attn.'
  pair = [matrix(mixer[n]).reshape(full.heads, full.key, -1)
          for n in ('q', 'gate')]
  state[where + 'q_proj.weight'] = np.concatenate(pair, axis=1).reshape(
      2 * full.heads * full.key, -1)
  state[where + 'k_proj.weight'] = matrix(mixer['k'])
  state[where + 'v_proj.weight'] = matrix(mixer['v'])
  state[where + 'o_proj.weight'] = matrix(mixer['out'], 2)
  # Theirs multiplies by (1 + w), ours by w.
  state[where + 'q_norm.weight'] = np.asarray(mixer['norm_q']['weight']) - 1
  state[where + 'k_norm.weight'] = np.asarray(mixer['norm_k']['weight']) - 1


def our_jobs(model, params, sizes, tokens):
  """Returns name -> function that runs one job and waits for it."""
  import dataclasses

  import jax
  import jax.numpy as jnp
  import optax

  from statejax import generate as gen
  from statejax import model as lm
  train_tokens, prompt, context = tokens
  chain = optax.adamw(1e-4)

  def loss(params, tokens):
    state = model.init_state(tokens.shape[0], 0)
    logits, _ = lm.apply(model, params, state, tokens)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, moments, tokens):
    value, grads = jax.value_and_grad(loss)(params, tokens)
    updates, moments = chain.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, value

  # One subtree per layer: on a CPU that saves copies in and out of the stacks.
  serving = model.unstack(params)
  own = jax.tree.map(jnp.copy, serving)
  held = [own, chain.init(own)]
  def train():
    held[0], held[1], value = update(held[0], held[1], train_tokens)
    return float(value)

  fresh = model.init_state(1, prompt.shape[1])
  def prefill():
    jax.block_until_ready(
        gen.prefill(model, serving, fresh, prompt, chunk=256))

  def decode(rows):
    state = model.init_state(rows, sizes['context'] + 256)
    state = gen.prefill(model, serving, state, context[:rows], chunk=128)
    held = [state]
    def run(steps=sizes['decode']):
      # The context stays as long as it was: what is timed does not drift.
      state = dataclasses.replace(
          held[0], length=jnp.full((rows,), sizes['context'], jnp.int32))
      for _ in range(steps):
        tokens, state = gen.decode(model, serving, state)
      jax.block_until_ready(tokens)
      held[0] = state
    return run

  return {'train': train, 'prefill': prefill,
          'decode, batch 1': decode(1), 'decode, batch 8': decode(8)}


def peer_jobs(target, sizes, tokens):
  """The same jobs for the transformers model."""
  import copy

  import torch
  train_tokens, prompt, context = (
      torch.from_numpy(t.astype('int64')) for t in tokens)
  trained = copy.deepcopy(target).train()
  optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)

  def train():
    optimizer.zero_grad(set_to_none=True)
    loss = trained(input_ids=train_tokens, labels=train_tokens).loss
    loss.backward()
    optimizer.step()
    return loss.item()

  @torch.inference_mode()
  def prefill():
    target(input_ids=prompt, use_cache=True, logits_to_keep=1)

  @torch.inference_mode()
  def start(rows):
    return target(input_ids=context[:rows], use_cache=True, logits_to_keep=1)

  def decode(rows):
    begin = start(rows)
    @torch.inference_mode()
    def run(steps=sizes['decode']):
      cache = copy.deepcopy(begin.past_key_values)
      token = begin.logits[:, -1].argmax(-1, keepdim=True)
      clock = time.perf_counter()
      for _ in range(steps):
        out = target(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
      return time.perf_counter() - clock  # without the copy of the cache
    return run

  return {'train': train, 'prefill': prefill,
          'decode, batch 1': decode(1), 'decode, batch 8': decode(8)}


def machine_jobs():
  """Best cases: a large product in each library, and reading memory."""
  import jax
  import jax.numpy as jnp
  import torch
  a = jnp.ones((1024, 1024))
  product = jax.jit(lambda x: x @ x)
  b = torch.ones(1024, 1024)
  big = torch.ones(64 * 2 ** 20)
  return {'matmul, jax': lambda: jax.block_until_ready(product(a)),
          'matmul, torch': lambda: b @ b,
          'read 256 MiB': lambda: big.sum()}


def interleave(jobs, repeats):
  """Runs every job in turn `repeats` times; returns medians in seconds."""
  for job in jobs.values():
    job()
  spent = {name: [] for name in jobs}
  for _ in range(repeats):
    for name, job in jobs.items():
      clock = time.perf_counter()
      inside = job()
      outside = time.perf_counter() - clock
      own = isinstance(inside, float) and 'decode' in name[1]
      spent[name].append(inside if own else outside)
  return {name: statistics.median(times) for name, times in spent.items()}


def main(_):
  """Checks that both compute the same, times them, prints ratios."""
  logging.set_verbosity(logging.WARNING)
  import jax
  import numpy as np
  import torch

  from statejax.model import LanguageModel
  torch.set_num_threads(os.cpu_count())
  smoke = SMOKE.value
  sizes = (dict(rows=1, length=64, prompt=64, context=32, decode=4) if smoke
           else dict(rows=4, length=512, prompt=1024, context=512, decode=32))
  model = LanguageModel(config(smoke))
  params = model.init(jax.random.key(0))
  target = peer(model.config).eval()
  copy_weights(params, model, target)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.integers(0, 1024, shape).astype(np.int32)
  tokens = (draw(sizes['rows'], sizes['length']), draw(1, sizes['prompt']),
            draw(8, sizes['context']))

  state = model.init_state(8, sizes['context'])
  ours = np.asarray(model.step(params, state, tokens[2])[0])
  with torch.inference_mode():
    theirs = target(torch.from_numpy(tokens[2].astype('int64'))).logits.numpy()
  difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())

  mine, other = our_jobs(model, params, sizes, tokens), peer_jobs(
      target, sizes, tokens)
  jobs = {}
  for name in mine:
    jobs['statejax', name] = mine[name]
    jobs['transformers', name] = other[name]
  jobs |= {('machine', k): v for k, v in machine_jobs().items()}
  times = interleave(jobs, 1 if smoke else REPEATS.value)

  rows = [report.Row('same logits (relative)', '< 2e-5', f'{difference:.1e}',
                     difference < 2e-5)]
  for name, aim in AIMS.items():
    a, b = times['statejax', name], times['transformers', name]
    per = sizes['decode'] if 'decode' in name else 1
    rows.append(report.Row(
        name, f'>= {aim:.1f}x', f'{b / a:.2f}x  ({1e3 * a / per:.2f} ms '
        f'against {1e3 * b / per:.2f} ms)', smoke or b / a >= aim))
  print(report.table(rows))
  limits = bounds(model, params, sizes, times)
  print(json.dumps(limits, indent=1))
  pathlib.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
  report.write(OUT.value, rows, 'python -m experiments.bench_cpu',
               repeats=REPEATS.value, sizes=sizes, limits=limits,
               torch=torch.__version__,
               milliseconds={' '.join(k): round(1e3 * v, 3)
                             for k, v in times.items()})
  raise SystemExit(0 if all(r.ok for r in rows) else 1)


def bounds(model, params, sizes, times):
  """How far each job is from the machine's own limits, in this run."""
  import jax

  from statejax import state as st
  count = sum(x.size for x in jax.tree.leaves(params))
  ours, theirs = (2 * 1024 ** 3 / times['machine', f'matmul, {name}']
                  for name in ('jax', 'torch'))
  flops = max(ours, theirs)
  read = 2 ** 28 / times['machine', 'read 256 MiB']
  train = 6 * count * sizes['rows'] * sizes['length']
  out = {
      'parameters': count,
      'matmul GFLOP/s, jax': round(ours / 1e9, 1),
      'matmul GFLOP/s, torch': round(theirs / 1e9, 1),
      'memory GB/s': round(read / 1e9, 1),
      'train: share of matmul peak (6 N T)': round(
          train / times['statejax', 'train'] / flops, 3),
      'prefill: share of matmul peak (2 N T)': round(
          2 * count * sizes['prompt'] / times['statejax', 'prefill'] / flops,
          3)}
  embedding = params['embed'].size
  for rows in (1, 8):
    state = sum(st.nbytes(model.state_schema(
        rows, sizes['context'] + 256)).values())
    # Weights once, the state read and (its fixed part) written.
    moved = 4 * (count - embedding) + 2 * state
    seconds = times['statejax', f'decode, batch {rows}'] / sizes['decode']
    out[f'decode, batch {rows}: share of memory limit'] = round(
        moved / seconds / read, 3)
  return out


if __name__ == '__main__':
  process.start_with_huge_pages()
  app.run(main)
