"""Groups of layers: one scan per group, or every layer in turn."""

import dataclasses

import jax
import jax.numpy as jnp

from statejax import state as st
from statejax.layers import block, common, hyper, ksa


def named(config):
  """Returns {key of its parameters: `GroupConfig`}, in order."""
  return {f'group_{i}': g for i, g in enumerate(config.groups)}


def declare(config, key, layer_state):
  """Returns the parameters' `Weight` of one repeat of each group.

  Args:
    config: `ModelConfig`.
    key: typed key.
    layer_state: from a layer's name to an empty state of one row.
  """
  x = jnp.zeros((1, 1, config.width), config.dtype)
  one, out = jnp.ones((1,), jnp.int32), {}
  summary = (None if config.summary is None else
             jnp.zeros((config.summary.count, config.width)))
  x, context = enter(config, {'summary': summary}, x,
                     common.context(0 * one, one, None, 1))
  for name, group in named(config).items():
    inner, out[name] = context, {}
    for j, layer in enumerate(group.pattern):
      found = _block(config, layer).init(key, x, layer_state(layer), inner)
      out[name][f'layer_{j}'] = found['params']
      inner = _with_lent(inner, layer, found)
    context = _after(group, context, inner)
  return out


def enter(config, params, x, context):
  """Returns what runs through the layers, and the context that says so.

  Summary tokens stand behind the tokens, and each of all these has its streams.

  Args:
    config: `ModelConfig`.
    params: with the embedding `summary`, where the config has summaries.
    x: embedded tokens, [B, T, D].
    context: of the step.
  """
  if config.summary is not None:
    x, context = ksa.append(config.summary, params['summary'], x, context)
  if config.streams is not None:
    x = hyper.repeat(x, config.streams.count)
  return x, context


def leave(config, params, x, context):
  """Returns what the head reads of the tokens, [B, T, D]; undoes `enter`.

  Args:
    config: `ModelConfig`.
    params: with `streams`, where the config has them.
    x: of `run`.
    context: of the step.
  """
  if config.summary is not None:
    x = x[:, :context.positions.shape[1]]
  if config.streams is not None:
    x = hyper.read(params['streams'], x, norm_eps=config.norm.eps,
                   eps=config.streams.eps)
  return x


def run(config, params, x, layers, context):
  """Runs all groups.

  Args:
    config: `ModelConfig`.
    params: with a subtree for each group, stacked or unstacked.
    x: [B, T, D], or what `enter` has made of it.
    layers: states by layer name, stacked.
    context: `statejax.layers.common.Context`.

  Returns:
    x, the new layer states, and {layer: {name: total}} of their losses.
  """
  return run_and_lend(config, params, x, layers, context)[:3]


def run_and_lend(config, params, x, layers, context):
  """`run`, and what layers lend to whoever comes after the last:
  {layer: {name: array}}, see `statejax.layers.common.lend`."""
  used, losses = dict.fromkeys(layers, 0), {}
  for name, group in named(config).items():
    run_one = _unrolled if 'repeat_0' in params[name] else _scanned
    x, layers, context, more = run_one(
        config, group, params[name], x, layers, dict(used), context)
    losses = _add(losses, more)
    for layer in group.pattern:
      used[layer] += group.repeats
  return x, layers, losses, context.lent


def _block(config, name):
  return block.Block(config.layer(name), config.norm, config.streams)


def _block_fn(config, name):
  """Returns a function of (params, x, state, context) that gives x, the state,
  and what the layer's mixer lends and loses."""
  module = _block(config, name)
  def run(params, x, state, context):
    (x, state), said = module.apply({'params': params}, x, state, context,
                                    mutable=('lent', 'losses'))
    return x, state, said
  return jax.checkpoint(run, prevent_cse=False) if config.remat else run


def _with_lent(context, layer, said):
  """The context for what follows a layer, whatever it had lent before."""
  if 'lent' not in said:
    return context
  lent = context.lent | {layer: dict(said['lent']['mixer'])}
  return dataclasses.replace(context, lent=lent)


def _after(group, before, inner):
  """The context behind a group: repeats see each other's loans no more than
  in a scan, and neither does what comes after several of them."""
  return inner if group.repeats == 1 else before


def _add(losses, more):
  """Sums dicts of dicts."""
  out = {layer: dict(named) for layer, named in losses.items()}
  for layer, named in more.items():
    mine = out.setdefault(layer, {})
    for name, total in named.items():
      mine[name] = mine[name] + total if name in mine else total
  return out


def _losses(layer, said):
  return {layer: dict(said['losses']['mixer'])} if 'losses' in said else {}


def _unrolled(config, group, params, x, layers, used, context):
  """Every layer in turn.

  Fixed leaves are read from the stacks that came in and stacked anew at the
  end: writing them one by one makes XLA copy all layers for each.
  """
  first, old, losses = dict(used), layers, {}
  new = {name: [] for name in dict.fromkeys(group.pattern)}
  layers, inner = dict(layers), context
  for r in range(group.repeats):
    inner = context
    for j, name in enumerate(group.pattern):
      at = used[name]
      used[name] += 1
      stores = _only(layers[name], 'growing')
      x, state, said = _block_fn(config, name)(
          params[f'repeat_{r}'][f'layer_{j}'], x, dataclasses.replace(
              layers[name],
              **{f: st.Store(a, jnp.int32(at)) for f, a in stores.items()},
              **{f: a[at] for f, a in _only(old[name], 'fixed').items()}),
          inner)
      inner = _with_lent(inner, name, said)
      losses = _add(losses, _losses(name, said))
      new[name].append(state)
      layers[name] = dataclasses.replace(
          layers[name], **{f: getattr(state, f).data for f in stores})
  for name, states in new.items():
    layers[name] = dataclasses.replace(layers[name], **{
        f: _put(whole, first[name], jnp.stack([getattr(s, f) for s in states]))
        for f, whole in _only(old[name], 'fixed').items()})
  return x, layers, _after(group, context, inner), losses


def _put(whole, low, part):
  """`whole` with the layers from `low` on replaced by `part`."""
  if part.shape == whole.shape:
    return part
  return whole.at[low:low + part.shape[0]].set(part)


def _scanned(config, group, params, x, layers, used, context):
  """One scan over the repeats: stores in the carry, fixed leaves in and out."""
  counts = {name: group.pattern.count(name)
            for name in dict.fromkeys(group.pattern)}
  mine = {name: layers[name] for name in counts}
  stores = {n: _only(s, 'growing') for n, s in mine.items()}
  fixed = {}
  for name, count in counts.items():
    low, high = used[name], used[name] + count * group.repeats
    fixed[name] = jax.tree.map(
        lambda a, low=low, high=high, count=count: a[low:high].reshape(
            group.repeats, count, *a.shape[1:]), _only(mine[name], 'fixed'))

  def body(carry, slices):
    x, stores = carry
    r, params, fixed = slices
    stores, fixed, inner, losses = dict(stores), dict(fixed), context, {}
    seen = dict.fromkeys(counts, 0)
    for j, name in enumerate(group.pattern):
      i = seen[name]
      seen[name] += 1
      at = (used[name] + r * counts[name] + i).astype(jnp.int32)
      views = {f: st.Store(data, at) for f, data in stores[name].items()}
      values = {f: value[i] for f, value in fixed[name].items()}
      x, new, said = _block_fn(config, name)(
          params[f'layer_{j}'], x,
          dataclasses.replace(mine[name], **views, **values), inner)
      inner = _with_lent(inner, name, said)
      losses = _add(losses, _losses(name, said))
      stores[name] = {f: getattr(new, f).data for f in stores[name]}
      fixed[name] = {f: value.at[i].set(getattr(new, f))
                     for f, value in fixed[name].items()}
    # Several repeats do not stack what only the next layer reads.
    lent = inner.lent if group.repeats == 1 else {}
    return (x, stores), (fixed, lent, losses)

  (x, stores), (fixed, lent, losses) = jax.lax.scan(
      body, (x, stores), (jnp.arange(group.repeats), params, fixed))
  losses = jax.tree.map(lambda a: jnp.sum(a, axis=0), losses)
  if group.repeats == 1:
    context = dataclasses.replace(
        context, lent=jax.tree.map(lambda a: a[0], lent))
  layers = dict(layers)
  for name in counts:
    low, whole = used[name], layers[name]
    values = {}
    for f, value in fixed[name].items():
      # Of every repeat, of every turn; a leaf may have a dimension of 0.
      repeats, turns, *rest = value.shape
      values[f] = _put(getattr(whole, f), low,
                       value.reshape(repeats * turns, *rest))
    layers[name] = dataclasses.replace(whole, **stores[name], **values)
  return x, layers, context, losses


def _only(layer, kind):
  """The leaves of one kind, as a dict by field name."""
  return {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)
          if f.metadata['kind'] == kind and getattr(layer, f.name) is not None}
