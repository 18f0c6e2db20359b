"""Attention of a trained transformer over held-out windows: maps, shares, losses with parts of the past hidden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from experiments.common import figures, held_out
from tt_jax import attention, trajectories, transformer

TITLES = {
    "near": "current and previous transition",
    "same_dimension": "same dimension, earlier",
    "target_dimension": "dimension to predict, earlier",
    "past_actions": "for actions: past actions",
    "past_observations": "for actions: past observations",
}
KIND_COLOURS = {"goal": "0.6"} | figures.LOSS_COLOURS


def read_windows(run: held_out.Run, ids: np.ndarray) -> list:
    """Gather the windows `ids` in batches that fit a device's memory; the last may be smaller."""
    config, size = run.checkpoint.config, held_out.rows_at_once(run.checkpoint.config)
    gather = functools.partial(
        trajectories.windows, spec=config.spec, config=run.data.config, max_transitions=config.max_transitions
    )
    return [gather(run.data.held_out, ids[start : start + size]) for start in range(0, len(ids), size)]


def _goal(batch, config):
    return batch.goal if config.goal_conditioned else None


def measure(params, batches, *, config, title):
    """Return the mean maps [L, H, T, T] and the shares [W, L, H, R] of each of R relations, layer by layer."""
    pairs = list(attention.relations(config, batches[0].inputs.shape[1]).values())
    params = jax.device_put(params)

    @functools.partial(jax.jit, static_argnames="layer")
    def read(params, batch, layer):
        weights = transformer.attention(
            params, batch.inputs, config=config, goal=_goal(batch, config), layer=layer
        )  # [B, H, T, T]
        return jnp.sum(weights, axis=0), jnp.stack([attention.shares(weights, each) for each in pairs], axis=-1)

    maps, shares = [], []
    for layer in tqdm.trange(config.num_layers, unit="layer", desc=title):
        totals, parts = zip(*(read(params, batch, layer) for batch in batches), strict=True)
        maps.append(sum(np.asarray(total, np.float64) for total in totals))
        shares.append(np.concatenate(parts))
    return np.stack(maps).astype(np.float32) / len(shares[0]), np.stack(shares, axis=1)


def intervene(params, batches, *, config) -> dict[str, np.ndarray]:
    """Return the losses [W, T] in nats with nothing hidden ("none"), and with each part of the past hidden."""
    length = batches[0].inputs.shape[1]
    visible = {"none": transformer.visible_keys(config, length)} | attention.masks(config, length)
    params = jax.device_put(params)

    @jax.jit
    def nats(params, batch, visible):
        logits = transformer.apply(params, batch.inputs, config=config, goal=_goal(batch, config), visible=visible)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]

    return {
        name: np.concatenate([nats(params, batch, mask) for batch in batches])
        for name, mask in tqdm.tqdm(visible.items(), unit="mask", desc="hide")
    }


def summarize_shares(shares, untrained_shares, episodes, *, config) -> list[dict]:
    """Describe each head: mean and error of each share, that of uniform attention and of an untrained model."""
    length = config.block_size
    equal = attention.uniform(config, length)
    expected = {name: float(attention.shares(equal, p)) for name, p in attention.relations(config, length).items()}
    return [
        {
            "layer": layer,
            "head": head,
            "shares": {
                name: held_out.mean_and_error(shares[:, layer, head, i], episodes)
                | {"uniform": expected[name], "untrained": float(untrained_shares[:, layer, head, i].mean())}
                for i, name in enumerate(attention.RELATIONS)
            },
        }
        for layer in range(shares.shape[1])
        for head in range(shares.shape[2])
    ]


def summarize_losses(losses, episodes, *, config) -> dict:
    """Average the losses per kind over tokens with a past that can be hidden, and what hiding adds to them."""
    places = np.arange(1, losses["none"].shape[1] + 1)
    kinds = held_out.kinds_of_dimensions(config.spec)[places % config.spec.transition_dim]
    num_without_past = min(2, config.max_transitions - 1)  # transitions
    is_late = places >= num_without_past * config.spec.transition_dim
    found = {}
    for name, values in losses.items():
        by_kind = {}
        for kind in held_out.KINDS:
            columns = (kinds == kind) & is_late
            if columns.any():
                each, before = values[:, columns].mean(axis=1), losses["none"][:, columns].mean(axis=1)
                by_kind[kind] = held_out.mean_and_error(each, episodes)
                by_kind[kind]["added"] = held_out.mean_and_error(each - before, episodes)
        found[name] = by_kind
    return found


def table(found: dict) -> list[str]:
    """Write shares and losses as lines."""
    lines = [
        f"{found['dataset']}, step {found['checkpoint_step']}: {found['windows']} windows of {found['episodes']} "
        "held-out episodes",
        "share of attention (uniform, untrained)",
    ]
    names = attention.RELATIONS
    lines += [f"{'':<17}" + "".join(f"{name.replace('_', ' '):>26}" for name in names)]
    for row in found["heads"]:
        cells = [row["shares"][name] for name in names]
        texts = [f"{c['mean']:.3f} ({c['uniform']:.3f}, {c['untrained']:.3f})" for c in cells]
        lines += [f"layer {row['layer']}, head {row['head']:<3}" + "".join(f"{text:>26}" for text in texts)]
    lines += ["loss in nats per token where there is a past to hide, and what hiding adds"]
    for name, row in found["losses"].items():
        texts = [
            f"{kind} {each['mean']:.3f} ({each['added']['mean']:+.3f} ± {each['added']['standard_error'] or 0:.3f})"
            for kind, each in row.items()
        ]
        lines += [f"  hidden: {name.replace('_', ' '):<20}{', '.join(texts)}"]
    return lines


def draw_maps(maps, found, path, *, config) -> None:
    """Draw the mean map of each head: rows ask, columns are looked at; ticks where transitions begin."""
    num_layers, num_heads, length, _ = maps.shape
    kinds = attention.kinds(config, config.block_size)
    colours = ListedColormap(list(KIND_COLOURS.values()))
    strip = np.array([list(KIND_COLOURS).index(kind) for kind in kinds])
    dim, num_goals = config.spec.transition_dim, int(np.sum(kinds == "goal"))
    starts = np.arange(num_goals, length, dim)
    ages = np.arange(len(starts)) - len(starts) + 1
    labels = ["t" if not age else f"t\N{MINUS SIGN}{-age}" for age in ages]
    figure = Figure(figsize=(1 + 4.2 * num_heads, 0.8 + 4.2 * num_layers), layout="constrained")
    grid = figure.subplots(num_layers, num_heads, squeeze=False)
    for (layer, head), axes in np.ndenumerate(grid):
        image = axes.imshow(
            np.maximum(maps[layer, head], 1e-4), norm=LogNorm(1e-3, 1.0), cmap="magma", interpolation="nearest"
        )
        for bounds, values in (((0, -0.035, 1, 0.03), strip[None]), ((-0.035, 0, 0.03, 1), strip[:, None])):
            inset = axes.inset_axes(bounds)
            inset.imshow(values, cmap=colours, vmin=0, vmax=colours.N - 1, aspect="auto", interpolation="nearest")
            inset.set_axis_off()
        for start in starts[1:]:
            axes.axhline(start - 0.5, color="0.5", linewidth=0.4)
            axes.axvline(start - 0.5, color="0.5", linewidth=0.4)
        axes.set_xticks(starts + dim / 2 - 0.5, labels)
        axes.set_yticks(starts + dim / 2 - 0.5, labels)
        axes.tick_params(length=0, pad=9)
        axes.set_title(f"layer {layer}, head {head}")
        if head == 0:
            axes.set_ylabel("token that asks, by transition")
        if layer == num_layers - 1:
            axes.set_xlabel("token that is looked at")
    handles = [
        grid[0, 0].plot([], [], "s", color=colour, label=kind)[0]
        for kind, colour in KIND_COLOURS.items()
        if kind in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.colorbar(image, ax=grid, label="mean attention", shrink=0.6, extend="min")
    figure.suptitle(f"{found['dataset']}, step {found['checkpoint_step']}, {found['windows']} held-out windows")
    figures.save(figure, path)


def draw_numbers(found, path) -> None:
    """Draw the shares of each head beside their standards, and what hiding adds to the loss of each kind."""
    heads = found["heads"]
    figure = Figure(figsize=(16, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    places = np.arange(len(heads))
    panels = top.subplots(1, len(attention.RELATIONS))
    for axes, name in zip(panels, attention.RELATIONS, strict=True):
        rows = [head["shares"][name] for head in heads]
        axes.bar(places, [r["mean"] for r in rows], yerr=[r["standard_error"] or 0 for r in rows], color=figures.BLUE)
        axes.plot(places, [r["untrained"] for r in rows], "x", color=figures.VERMILION, label="untrained model")
        axes.axhline(rows[0]["uniform"], color="0.3", linestyle=":", label="uniform attention")
        axes.set_xticks(places, [f"{head['layer']}.{head['head']}" for head in heads], rotation=90)
        axes.set(title=TITLES[name], xlabel="layer.head", ylim=(0, None))
    panels[0].set_ylabel("share of attention")
    top.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    hidden = [name for name in found["losses"] if name != "none"]
    for axes, kind in zip(bottom.subplots(1, len(found["losses"]["none"])), found["losses"]["none"], strict=True):
        rows = [found["losses"][name][kind]["added"] for name in hidden]
        means, errors = [row["mean"] for row in rows], [row["standard_error"] or 0 for row in rows]
        axes.barh(range(len(rows)), means, xerr=errors, color=figures.LOSS_COLOURS[kind])
        axes.set_yticks(range(len(rows)), [f"hide {name.replace('_', ' ')}" for name in hidden])
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set(xlabel="nats per token added", title=f"{kind}: {found['losses']['none'][kind]['mean']:.2f} nats")
    figure.suptitle(f"{found['dataset']}, step {found['checkpoint_step']}, {found['windows']} held-out windows")
    figures.save(figure, path)
