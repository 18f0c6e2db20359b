"""Environments of stored specifications: what is made, what is refused, and that nothing runs before it is trusted."""

import json
import pathlib
import sys

import gymnasium
import pytest

from tt_jax import environments, rollouts

PENDULUM = {
    "id": "Pendulum-v1",
    "entry_point": "gymnasium.envs.classic_control.pendulum:PendulumEnv",
    "reward_threshold": None,
    "nondeterministic": False,
    "max_episode_steps": 200,
    "order_enforce": True,
    "disable_env_checker": False,
    "kwargs": {},
    "additional_wrappers": [],
    "vector_entry_point": None,
}
HARMLESS = """
import pathlib
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv

def note(*args, **kwargs):
    (pathlib.Path(__file__).parent / "ran").touch()

note()

class Env(PendulumEnv):
    pass

class Wrapper(gymnasium.Wrapper):
    pass
"""


def stored(**changes):
    return json.dumps(PENDULUM | changes)


def wrapper(entry_point, **kwargs):
    return {"name": "wrapper", "entry_point": entry_point, "kwargs": kwargs}


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported or called; returns a function that says whether it did."""
    (tmp_path / "stranger_to_us.py").write_text(HARMLESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: (tmp_path / "ran").exists()
    sys.modules.pop("stranger_to_us", None)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"entry_point": "stranger_to_us:note"}, "stranger_to_us:note"),
        ({"entry_point": "stranger_to_us:Env", "id": "Mine-v0"}, "stranger_to_us:Env"),
        ({"entry_point": "stranger_to_us:Env", "id": "stranger/Mine-v0"}, "stranger_to_us:Env"),
        ({"additional_wrappers": [wrapper("stranger_to_us:Wrapper")]}, "the wrapper stranger_to_us:Wrapper"),
        # Functions of gymnasium that import what their arguments name.
        (
            {
                "entry_point": "gymnasium.envs.registration:load_env_creator",
                "kwargs": {"name": "stranger_to_us:Env"},
            },
            "load_env_creator",
        ),
        ({"entry_point": "gymnasium:make", "kwargs": {"id": "stranger_to_us:Mine-v0"}}, "gymnasium:make"),
        ({"additional_wrappers": [wrapper("gymnasium:make", id="stranger_to_us:Mine-v0")]}, "gymnasium:make"),
        ({"entry_point": "gymnasium.core:importlib", "id": "Mine-v0"}, "cannot be loaded"),
        ({"entry_point": "gymnasiumx.fake:Env", "id": "Mine-v0"}, "gymnasiumx.fake:Env"),
        ({"entry_point": None, "id": "Mine-v0"}, "Mine-v0, which has no entry point"),
        ({"entry_point": None, "id": "GymV21Environment-v0", "kwargs": {"env_id": "stranger_to_us:Mine-v0"}}, "GymV21"),
        ({"entry_point": "os:system", "kwargs": {"command": "touch ran"}}, "os:system"),
    ],
)
def test_code_of_strangers_is_named_and_not_run(stranger, changes, named):
    with pytest.raises(environments.Unavailable, match=named):
        environments.make_stored(stored(**changes))
    assert not stranger() and "stranger_to_us" not in sys.modules
    assert not pathlib.Path("ran").exists()


def test_trusted_code_of_strangers_runs(stranger):
    text = stored(entry_point="stranger_to_us:Env", additional_wrappers=[wrapper("stranger_to_us:Wrapper")])
    env = environments.make_stored(text, trust=True)
    assert stranger() and type(env).__name__ == "Wrapper" and env.spec.max_episode_steps == 200


def test_an_environment_registered_here_is_made(stranger, monkeypatch):
    mine = gymnasium.envs.registration.EnvSpec("Mine-v0", entry_point="stranger_to_us:Env")
    monkeypatch.setitem(gymnasium.registry, "Mine-v0", mine)
    env = environments.make_stored(stored(id="Mine-v0", entry_point="stranger_to_us:Env"))
    assert type(env.unwrapped).__name__ == "Env"
    with pytest.raises(environments.Untrusted, match="stranger_to_us:note"):  # the id alone is not enough
        environments.make_stored(stored(id="Mine-v0", entry_point="stranger_to_us:note"))


@pytest.mark.parametrize(
    "env_id, kwargs",
    [("Pendulum-v1", {"g": 5.0}), ("CartPole-v1", {}), ("PointMaze_UMaze-v3", {"reward_type": "dense"})],
)
def test_environments_of_gymnasium_and_gymnasium_robotics_come_back_with_their_arguments(env_id, kwargs):
    env = environments.make(env_id, max_episode_steps=7, **kwargs)
    again = environments.make_stored(env.spec.to_json())
    assert again.spec == env.spec and again.spec.max_episode_steps == 7
    assert again.unwrapped.spec.kwargs == env.unwrapped.spec.kwargs


def test_wrappers_of_gymnasium_and_of_this_package_come_back():
    env = rollouts.ActionRepeat(gymnasium.wrappers.ClipAction(environments.make("Pendulum-v1")), 3)
    text = env.spec.to_json()
    assert isinstance(environments.make_stored(text), rollouts.ActionRepeat)
    earlier = text.replace("tt_jax.rollouts:ActionRepeat", "experiments.action_repeat:ActionRepeat")
    assert earlier != text and isinstance(environments.make_stored(earlier), rollouts.ActionRepeat)


def test_specifications_of_other_versions_of_gymnasium_are_read():
    """gymnasium 0.29 wrote `autoreset` and `apply_api_compatibility`; later versions may write what none knows yet."""
    earlier = stored(autoreset=False, apply_api_compatibility=False)
    later = stored(novelty=1, additional_wrappers=[wrapper("gymnasium.wrappers:TimeAwareObservation") | {"novelty": 2}])
    assert environments.read_spec(earlier) == gymnasium.spec("Pendulum-v1")
    assert environments.make_stored(later).spec.additional_wrappers[0].name == "TimeAwareObservation"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        stored(id="no id!"),
        stored(id=3),
        stored(kwargs=[1]),
        stored(additional_wrappers=[{}]),
    ],
)
def test_what_is_no_specification_is_told(text):
    with pytest.raises(environments.Unavailable, match="specification of the environment cannot be read"):
        environments.make_stored(text)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"entry_point": "gymnasium.envs.classic_control.pendulum:Gone"}, "Gone, which cannot be loaded"),
        ({"entry_point": "gymnasium.envs.gone:Env"}, "gone:Env, which cannot be loaded"),
        ({"kwargs": {"gone": 1}}, "Pendulum-v1 cannot be made: .*gone"),
        ({"additional_wrappers": [wrapper("gymnasium.wrappers:TimeLimit") | {"kwargs": None}]}, "cannot be made"),
    ],
)
def test_what_is_not_there_any_more_is_told(changes, match):
    with pytest.raises(environments.Unavailable, match=match):
        environments.make_stored(stored(**changes))


def test_an_environment_whose_own_import_fails_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_env.py").write_text("raise RuntimeError('no\\nlicence')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="^Environment broken_env:Mine-v0 cannot be made: no licence$"):
        environments.make("broken_env:Mine-v0")
