"""The accelerator's rows of the benchmark, on a CPU with tiny sizes."""

import json

import pytest

pytest_plugins = ["entry_fixtures"]


@pytest.mark.slow  # nine programs
def test_the_accelerator_suite_measures_training_plans_and_learners_with_their_compilation(entry_point, tmp_path):
    arguments = ["--suite=accelerator", "--setting=tiny", "--batch_size=2", "--num_envs=2", "--repeats=1"]
    done = entry_point("benchmark")(*arguments, f"--json={tmp_path}/rows.json")
    assert done.code == 0, done.stderr
    first, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert first["flops_per_second"] > 0
    assert [row["name"] for row in rows] == [
        "train tiny, batch 2, bfloat16, fused attention, adamw",
        "train tiny, batch 2, bfloat16, plain attention, adamw",
        "plan tiny, 2 envs, window 5,4, bfloat16",
        "iql, 1 seeds, batch 256",
        "iql, 8 seeds, batch 256",
        "train tiny, batch 2, bfloat16, fused attention, muon",
        "plan tiny, 2 envs, window 5,4, bfloat16, CUDA graphs",
        "iql, 1 seeds, batch 256, CUDA graphs",
        "train tiny, batch 2, bfloat16, fused attention, adamw, CUDA graphs",
    ]
    assert all(row["compile_seconds"] > 0 and row["wall_seconds"] > 0 for row in rows)
