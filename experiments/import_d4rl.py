"""Turn files of D4RL (HDF5) or OGBench (npz) into a Minari dataset, D4RL's with its reference scores.

python -m experiments.import_d4rl --files=hopper_medium.hdf5,hopper_expert.hdf5 --env=Hopper-v5 \
    --dataset=d4rl/hopper/medium-expert-v0

Each file is a path or a URL (those of D4RL stand in its infos.py); the layout is recognised. Several are put one after
the other, which is how medium-expert is made from medium and expert. D4RL's -v2 data fits today's -v5 bodies, except
that ant has 111 observed dimensions of which the first 27 agree: use data.observation_slice=27. Ant mazes want
AntMaze_*-v4. Without --env the spaces are those of the data, and plan needs an --env of its own; OGBench's
environments are --env=ogbench:ID, where that package is installed.
"""

import itertools
import tempfile

import gymnasium
import tqdm
from absl import flags, logging

from experiments.common import d4rl, entry, recording, run_flags
from tt_jax import environments

FILES = flags.DEFINE_list("files", None, "Paths or URLs of HDF5 or npz files, separated by commas.", required=True)
DATASET = run_flags.new_dataset()
ENV = flags.DEFINE_string("env", None, "Gymnasium id of the environment, such as Hopper-v5.")
REF_MIN = flags.DEFINE_float("ref_min_score", None, "Return of a random policy; by default D4RL's for --env.")
REF_MAX = flags.DEFINE_float("ref_max_score", None, "Return of an expert; by default D4RL's for --env.")
OVERWRITE = run_flags.overwrite()


def main(_):
    run_flags.check_range(REF_MIN, REF_MAX)
    recording.check_id(DATASET.value, overwrite=OVERWRITE.value)
    if not FILES.value or not all(FILES.value):
        raise ValueError(f"--files={','.join(FILES.value)} must be paths or URLs, separated by commas.")
    env = environments.make(ENV.value) if ENV.value else None
    maze_space = env.observation_space if env and isinstance(env.observation_space, gymnasium.spaces.Dict) else None
    with tempfile.TemporaryDirectory() as folder:
        paths = [d4rl.fetch(source, folder) for source in FILES.value]
        limit = env and env.spec.max_episode_steps
        readers = [d4rl.read_episodes(path, max_episode_steps=limit, space=maze_space) for path in paths]
        episodes = list(itertools.chain.from_iterable(readers))

    if not episodes:
        raise ValueError(f"The files of --files={','.join(FILES.value)} hold no step whose next observation is known.")
    space = d4rl.unbounded_space(episodes[0].observations)
    if any(d4rl.unbounded_space(episode.observations) != space for episode in episodes):
        raise ValueError(f"The files of --files={','.join(FILES.value)} differ in their observations.")
    action_space = env.action_space if env else d4rl.unbounded_space(episodes[0].actions)
    if any(episode.actions.shape[1:] != action_space.shape for episode in episodes):
        raise ValueError(f"The files' actions do not fit --env={ENV.value}, which has {action_space}.")
    if env and not maze_space and space.shape != env.observation_space.shape:
        logging.warning("The files have observations %s, %s %s.", space.shape, ENV.value, env.observation_space.shape)

    minimum, maximum = d4rl.reference_scores(ENV.value or "")
    recording.write(
        DATASET.value,
        tqdm.tqdm(episodes, unit="episode", desc="write"),
        env=env,
        overwrite=OVERWRITE.value,
        observation_space=space,
        action_space=action_space,
        ref_min_score=minimum if REF_MIN.value is None else REF_MIN.value,
        ref_max_score=maximum if REF_MAX.value is None else REF_MAX.value,
        algorithm_name="D4RL",
        description=f"Data for {ENV.value or 'no environment'} from {', '.join(FILES.value)}.",
    )
    logging.info("%s: %d steps in %d episodes", DATASET.value, sum(map(len, episodes)), len(episodes))


if __name__ == "__main__":
    entry.run(main)
