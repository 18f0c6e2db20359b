"""Measure planning, training and IQL on this machine, with random weights of the paper's sizes.

python -m experiments.benchmark                                             # everything, several minutes
python -m experiments.benchmark --only=plan --setting=hopper --json=FILE    # one row: at once with the plain search
python -m experiments.benchmark --suite=accelerator --json=FILE             # what a GPU is for, in under 4 minutes

On CPU everything is pinned to one core, since idle threads spin and would count. The ceilings in the first row, a large
matrix product and a large copy, are taken in the same run; operations are counted by formula (see docs/performance.md).
"""

import contextlib
import functools
import json
import os
import pathlib
import resource
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.experimental.compilation_cache import compilation_cache

from experiments.common import entry, files, plain_search
from tt_jax import data_parallel, iql, sequence_planner, tokenization, training, trajectories, transformer, types

ONLY = flags.DEFINE_enum("only", None, ["plan", "train", "iql"], "Measure this alone.")
SETTING = flags.DEFINE_enum("setting", None, ["hopper", "halfcheetah", "ant", "tiny"], "Measure this setting alone.")
SUITE = flags.DEFINE_enum("suite", None, ["accelerator"], "Rows for a GPU in bfloat16, the most important first.")
JSON = flags.DEFINE_string("json", None, "File for the rows.")
NUM_ENVS = flags.DEFINE_multi_integer("num_envs", [1], "Environments that are planned at once; may be repeated.")
WINDOW = flags.DEFINE_list("window", ["5", "4"], "max,keep transitions of the planner's window.")
BATCH_SIZE = flags.DEFINE_multi_integer("batch_size", [64], "Windows per train step; may be repeated.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Number format of the transformer's matrix products."
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls per row.", 1)
ORACLE = flags.DEFINE_bool("oracle", True, "Also time the plain uncached search.")

ALL_CORES = os.sched_getaffinity(0)
SETTINGS = {  # observation and action sizes, the paper's planning settings, changes of its model
    "hopper": (11, 3, {"beam_width": 128, "horizon": 15}, {}),
    "halfcheetah": (17, 6, {"beam_width": 32, "horizon": 5}, {}),
    "ant": (27, 8, {"beam_width": 128, "horizon": 5}, {}),
    "tiny": (3, 1, {"beam_width": 2, "horizon": 2}, {"num_layers": 1, "embed_dim": 16}),  # to try this file
}
SUITE_SECONDS = 220  # after which no other row of a suite begins
QUICK = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
}  # compiles in seconds, see docs/performance.md
GRAPHS = QUICK | {  # loops as CUDA graphs
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE,CONDITIONAL"
}


def main(_):
    if len(WINDOW.value) != 2 or not all(number.isdecimal() for number in WINDOW.value):
        raise ValueError(f"--window={','.join(WINDOW.value)} must be two numbers, such as 5,4.")
    if JSON.value:
        files.result_file(JSON.value, flag="json")
    if jax.default_backend() != "cpu":
        _pin(ALL_CORES)
    rows = [ceilings()]
    if SUITE.value:
        rows += accelerator_rows(SETTING.value or "hopper", peak=rows[0]["flops_per_second"])
    names = [SETTING.value] if SETTING.value else ["hopper", "halfcheetah", "ant"]
    for name in [] if SUITE.value else names:
        if ONLY.value in (None, "plan"):
            rows += [plan_row(name, num_envs, peak=rows[0]["flops_per_second"]) for num_envs in NUM_ENVS.value]
        if ONLY.value in (None, "train"):
            rows += [train_row(name, size, peak=rows[0]["flops_per_second"]) for size in BATCH_SIZE.value]
    if ONLY.value in (None, "iql") and not SUITE.value:
        rows += [iql_row(num_seeds) for num_seeds in (1, 8)]
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(rows, indent=2) + "\n")


def accelerator_rows(name, *, peak):
    """Measure what decides on a GPU until the time is up: training without dropout, plans, IQL; CUDA graphs last."""
    started = time.monotonic()
    sizes = BATCH_SIZE.value if BATCH_SIZE.present else [256, 64]
    envs = NUM_ENVS.value if NUM_ENVS.present else [1, 64]
    no_dropout = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), 0.0)
    plain, fused = ({"dtype": "bfloat16", "attention": each} | no_dropout for each in ("plain", "fused"))

    def train(size, changes, options=QUICK, **settings):
        return functools.partial(train_row, name, size, peak=peak, changes=changes, options=options, **settings)

    def plan(num_envs, options=QUICK):
        return functools.partial(plan_row, name, num_envs, peak=peak, changes=plain, options=options)

    measurements = [
        *(train(size, changes) for size in sizes for changes in (fused, plain)),
        *(plan(num_envs) for num_envs in envs),
        *(functools.partial(iql_row, num_seeds, options=QUICK) for num_seeds in (1, 8)),
        train(sizes[0], fused, optimizer="muon"),
        plan(envs[0], GRAPHS),
        functools.partial(iql_row, 1, options=GRAPHS),
        train(sizes[0], fused, GRAPHS),
    ]
    rows = []
    for measure in measurements:
        if time.monotonic() - started > SUITE_SECONDS:
            logging.info("%d s are over; %d rows are left out", SUITE_SECONDS, len(measurements) - len(rows))
            break
        rows.append(measure())
    return rows


def ceilings():
    """Time a product of two large matrices and a copy of a large array."""
    matrix, array = jnp.ones([2048, 2048]), jnp.ones([2**26])
    product = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    row = {"name": f"ceilings of {jax.devices()[0].device_kind}"} | _timed(product, matrix, matrix)
    row["flops_per_second"] = 2 * 2048**3 / _seconds(row)
    copy = _timed(jax.jit(lambda x: x + 1), array)
    row["bytes_per_second"] = 2 * array.nbytes / _seconds(copy)
    return _told(row)


def plan_row(name, num_envs, *, peak, changes=None, options=None):
    """Time one plan for each of `num_envs` environments whose past fills the context.

    `changes` are those of the model, `options` those of the compiler.
    """
    observation_dim, _, settings, _ = SETTINGS[name]
    window = tuple(int(size) for size in WINDOW.value)
    plan_config = sequence_planner.PlanConfig(window=window, **settings)
    config, params = _model(name, changes)
    spec = config.spec
    rng = np.random.default_rng(0)
    values = rng.normal(size=(10_000, spec.transition_dim))
    discretizer = tokenization.fit(values, num_bins=spec.num_bins)
    past = tokenization.encode(discretizer, values[: 5 * num_envs].reshape(num_envs, 5, -1))
    arguments = (
        sequence_planner.PlannerParams(transformer=params, discretizer=discretizer),
        jax.random.split(jax.random.key(0), num_envs),
        types.Context(tokens=jnp.asarray(past), length=jnp.full([num_envs], 5)),
        jnp.asarray(rng.normal(size=(num_envs, observation_dim)), jnp.float32),
    )
    make = {"config": config, "plan_config": plan_config}
    label = f"plan {name}, {num_envs} envs, window {window[0]},{window[1]}, {config.dtype}{_graphs(options)}"
    row = {"name": label} | _timed(jax.jit(sequence_planner.make_plan_fn(**make)), *arguments, options=options)
    row["plans_per_second"] = num_envs / row["wall_seconds"]
    row["share_of_peak"] = _share(num_envs * plan_flops(config, plan_config), row, peak)
    if ORACLE.value and not SUITE.value:
        plain = plain_search.make_plan_fn(**make)
        plain(*arguments)  # compiles
        wall, cpu = time.perf_counter(), time.process_time()
        plain(*arguments)
        oracle_row = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        row["oracle_wall_seconds"], row["oracle_cpu_seconds"] = oracle_row.values()
        row["ratio"] = _seconds(oracle_row) / _seconds(row)
    return _told(row)


def train_row(name, batch_size, *, peak, changes=None, options=None, optimizer="adamw"):
    """Time train steps on windows of 10 transitions, gathered from a store on the device; by default with dropout."""
    config, params = _model(name, changes)
    spec, num_steps = config.spec, 5 if _on_cpu() else 50  # per call, which asks the system for its memory once
    store = trajectories.TokenStore(
        tokens=np.random.default_rng(0).integers(0, spec.num_bins, (100_000, spec.transition_dim), np.uint8),
        offsets=np.arange(0, 100_001, 1000, dtype=np.int32),
        terminated=np.ones(100, bool),
    )
    num_windows = trajectories.num_windows(store.offsets)
    train_config = training.with_token_schedule(
        training.TrainConfig(batch_size=batch_size * jax.device_count(), steps_per_call=num_steps, optimizer=optimizer),
        num_windows=num_windows,
        block_size=config.block_size,
    )
    windows_fn = functools.partial(
        trajectories.windows,
        spec=spec,
        config=trajectories.DataConfig(max_path_length=1000),
        max_transitions=config.max_transitions,
    )
    train_fn = training.make_train_fn(
        config=train_config, model_config=config, windows_fn=windows_fn, num_windows=num_windows
    )
    state = training.init(jax.random.key(0), config=train_config, model_config=config)
    fixed = data_parallel.replicate((store, np.uint32(0), np.int32(num_steps)))
    parts = [f"train {name}", f"batch {batch_size}", config.dtype]
    parts += [f"{config.attention} attention", optimizer] if SUITE.value else []
    row = {"name": ", ".join(parts) + _graphs(options)}
    row |= _timed(train_fn, data_parallel.replicate(state), *fixed, carry=True, steps=num_steps, options=options)
    row["steps_per_second"] = 1 / row["wall_seconds"]
    row["tokens_per_second"] = batch_size * config.block_size / row["wall_seconds"]
    row["share_of_peak"] = _share(3 * batch_size * config.block_size * token_flops(config), row, peak)
    return _told(row)


def iql_row(num_seeds, *, options=None):
    """Time updates of `num_seeds` learners in one program, on batches of 256 gathered on the device."""
    config = iql.IQLConfig(observation_dim=17, action_dim=6)
    num_steps = 100 if _on_cpu() else 2000
    rng = np.random.default_rng(0)
    data = types.Transitions(
        observations=jnp.asarray(rng.normal(size=(100_000, 17)), jnp.float32),
        actions=jnp.asarray(rng.uniform(-1, 1, size=(100_000, 6)), jnp.float32),
        rewards=jnp.asarray(rng.normal(size=100_000), jnp.float32),
        not_terminal=jnp.ones(100_000),
        next_observations=jnp.asarray(rng.normal(size=(100_000, 17)), jnp.float32),
    )

    def learn(state, key, data):
        def step(state, index):
            rows = jax.random.randint(jax.random.fold_in(key, index), [256], 0, 100_000)
            return iql.update(state, jax.tree.map(lambda leaf: leaf[rows], data), config=config)

        return jax.lax.scan(step, state, jnp.arange(num_steps))

    keys = jax.random.split(jax.random.key(0), num_seeds)
    state = jax.vmap(functools.partial(iql.init, config=config))(keys)
    learn = jax.jit(jax.vmap(learn, in_axes=(0, 0, None)), donate_argnums=0)
    row = {"name": f"iql, {num_seeds} seeds, batch 256{_graphs(options)}"}
    row |= _timed(learn, state, keys, data, carry=True, steps=num_steps, options=options)
    row["updates_per_second"] = num_seeds / row["wall_seconds"]
    return _told(row)


def token_flops(config):
    """Count the operations of one token's forward pass in a full window, attention to half of it included."""
    linear = 12 * config.embed_dim**2 + config.embed_dim * config.block_size  # per layer, in multiply-adds
    return 2 * (config.num_layers * linear + config.embed_dim * (config.spec.num_bins + 1))


def plan_flops(config, plan):
    """Count the operations of one plan: tokens that are decoded, and windows that are read anew as they slide."""
    spec, (window_max, window_keep) = config.spec, plan.window
    per_layer = 12 * config.embed_dim**2 + 2 * config.embed_dim * window_keep * spec.transition_dim
    decoded = (plan.horizon - 1) * (spec.observation_dim + 1) + plan.num_expand * plan.horizon * (spec.action_dim + 1)
    slots, slides = min(plan.context_transitions, window_keep), 0
    for _ in range(plan.horizon - 1):
        slots += 1
        if slots == window_max:
            slots, slides = window_keep, slides + 1
    read = slides * window_keep * (spec.transition_dim - 1)  # whose last layer needs keys and values alone
    layers = config.num_layers * decoded + (config.num_layers - 1) * read
    return 2 * plan.beam_width * (layers * per_layer + 2 * config.embed_dim**2 * read)


def _graphs(options):
    return ", CUDA graphs" if options == GRAPHS else ""


def _model(name, changes):
    observation_dim, action_dim, _, size = SETTINGS[name]
    spec = types.TransitionSpec(observation_dim=observation_dim, action_dim=action_dim, num_bins=100)
    config = transformer.TransformerConfig(spec=spec, **{"dtype": DTYPE.value} | size | (changes or {}))
    params = transformer.init(jax.random.key(0), config=config)
    # Larger embeddings make predictions differ, so that plans branch as they do with a trained model.
    return config, params | {"token_embedding": {"embedding": 20 * params["token_embedding"]["embedding"]}}


def _timed(fn, *arguments, carry=False, steps=1, options=None):
    """Compile and time `fn`; with `carry` its first result replaces its first argument, which is donated.

    It is compiled twice, traced anew each time: from nothing, and, but for a suite, from the persistent cache.
    """
    compile_seconds = []
    with tempfile.TemporaryDirectory() as folder, _compilation_cache(folder):
        for _ in range(1 if SUITE.value else 2):
            jax.clear_caches()
            started = time.perf_counter()
            compiled = fn.lower(*arguments).compile(compiler_options=options)
            compile_seconds.append(time.perf_counter() - started)
    walls, cpus = [], []
    for _ in range(REPEATS.value + 1):  # the first is not counted
        wall, cpu = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(compiled(*arguments))
        walls.append((time.perf_counter() - wall) / steps)
        cpus.append((time.process_time() - cpu) / steps)
        if carry:
            arguments = (result[0], *arguments[1:])
    memory, device_memory = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    return {
        "wall_seconds": float(np.median(walls[1:])),
        "wall_seconds_p95": float(np.quantile(walls[1:], 0.95)),
        "cpu_seconds": float(np.median(cpus[1:])),
        "compile_seconds": compile_seconds[0],
        "cached_compile_seconds": compile_seconds[1] if compile_seconds[1:] else None,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "peak_device_bytes": device_memory.get("peak_bytes_in_use"),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@contextlib.contextmanager
def _compilation_cache(folder):
    """Use `folder` as the persistent cache for a while."""

    def use(path):
        jax.config.update("jax_compilation_cache_dir", path)
        compilation_cache.reset_cache()

    before = jax.config.jax_compilation_cache_dir
    use(folder)
    yield
    use(before)


def _seconds(row):
    """Return the time to compare: of a CPU, which may be shared, that of the process."""
    return row["cpu_seconds" if _on_cpu() else "wall_seconds"]


def _share(flops, row, peak):
    return flops / _seconds(row) / peak


def _told(row):
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, (int, float)))
    logging.info("%-45s %s", row["name"], numbers)
    return row


def _on_cpu():
    return jax.default_backend() == "cpu"


def _pin(cores):
    """Keep all threads of this process on `cores`."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


if __name__ == "__main__":
    _pin([max(ALL_CORES)])  # before the backend counts the cores for its threads
    entry.run(main)
