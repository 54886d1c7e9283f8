"""Real processes: how many there are, and who dies when, changes nothing."""

import pytest

from tests.multihost import pods

pytestmark = [pytest.mark.multiprocess, pytest.mark.e2e]

REWARD_MODEL = (
  "--config.data.kind=preference",
  "--config.objective.preset=bradley_terry",
  "--config.optimizer.learning_rate=1e-2",
  "--config.train.num_steps=2",
)
ALONE = pods.Topology(hosts=1, devices=1, fsdp=1, tensor=1)
TWO = pods.Topology(hosts=2, devices=2, fsdp=4, tensor=1)
# Two hosts share each part of the batch, and read the same rows.
FOUR = pods.Topology(hosts=4, devices=1, fsdp=2, tensor=2)
# By replica x fsdp x tensor, in one process.
MESHES = {
  "2x1x2": pods.Topology(hosts=1, devices=4, replica=2, fsdp=1, tensor=2),
  "2x2x1": pods.Topology(hosts=1, devices=4, replica=2, fsdp=2, tensor=1),
  "4x1x1": pods.Topology(hosts=1, devices=4, replica=4, fsdp=1, tensor=1),
}


@pytest.fixture(scope="module")
def machine(compiled, tmp_path_factory):
  return pods.Machine(tmp_path_factory.mktemp("machine"), compiled)


@pytest.fixture(scope="module")
def new_pod(machine, tmp_path_factory):
  return lambda *settings: pods.Pod(
    machine, tmp_path_factory.mktemp("pod") / "a run", *settings
  )


@pytest.fixture(scope="module")
def alone(new_pod):
  return new_pod().finish(ALONE)


@pytest.fixture(scope="module")
def two(new_pod):
  return new_pod().finish(TWO)


@pytest.fixture(scope="module")
def four(new_pod):
  return new_pod().finish(FOUR)


def assert_same_run(pod, other):
  """The same prompts and completions; numbers to the rounding of fp32."""
  text = ("step", "pid", "prompt", "completion", "answer")
  assert len(pod.samples()) == 5 * 8 * 4
  assert [[x[k] for k in text] for x in pod.samples()] == [
    [x[k] for k in text] for x in other.samples()
  ]
  rows, others = pod.rows(), other.rows()
  assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
  for row, expected in zip(rows, others, strict=True):
    for name, value in expected.items():
      # What measures rounding itself is of another size on each topology.
      if value is None:  # Of no row, as of right completions if none is.
        assert row[name] is None, name
      elif not name.startswith(("train/sampler_", "train/update_below_")):
        assert row[name] == pytest.approx(value, rel=5e-5, abs=2e-6), name
  # The KL grows, so that losses are not all alike.
  assert abs(rows[-1]["train/loss"]) > 1e-4


def test_two_hosts_train_as_one_does(alone, two):
  assert_same_run(two, alone)


@pytest.mark.nightly
def test_rewards_of_networks_are_the_same_on_two_hosts(new_pod):
  """And after the second host is killed while both sample."""
  trained = new_pod(*REWARD_MODEL).finish(ALONE)
  settings = (
    f"--config.rewards.models={((f'run:{trained.workdir}', 0.5),)}",
    "--config.rewards.model_normalization=running",
    "--config.rewards.judges=(('self', 'agreement', 2.0),)",
  )
  alone = new_pod(*settings).finish(ALONE)
  two = new_pod(*settings).finish(TWO)
  assert_same_run(two, alone)
  broken = new_pod(*settings)
  assert broken.start(TWO, "kill@4:1:rollout+0.2") != 0
  broken.finish(TWO)
  assert broken.rows() == two.rows()
  assert broken.samples() == two.samples()
  for name in ("model_1", "judge_1"):
    assert min(row[f"reward/{name}_std"] for row in two.rows()[1:]) > 0


@pytest.mark.nightly
def test_four_hosts_of_which_two_share_rows_train_as_one_does(alone, four):
  assert_same_run(four, alone)


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", MESHES)
def test_replicas_train_as_one_device_does(alone, new_pod, mesh):
  assert_same_run(new_pod().finish(MESHES[mesh]), alone)


@pytest.fixture(scope="module")
def killed_in_two(new_pod):
  """Two hosts; the second is killed while both sample for step 4."""
  pod = new_pod()
  assert pod.start(TWO, "kill@4:1:rollout+0.2") != 0
  return pod


@pytest.mark.nightly
@pytest.mark.parametrize("topology", [ALONE, FOUR], ids=["one", "four"])
def test_a_run_of_two_hosts_goes_on_with(
  topology, killed_in_two, alone, tmp_path
):
  pod = killed_in_two.copy(tmp_path / "moved").finish(topology)
  assert_same_run(pod, alone)


@pytest.mark.nightly
def test_a_run_of_four_hosts_goes_on_with_two(new_pod, alone):
  pod = new_pod()
  assert pod.start(FOUR, "kill@4:2:update") != 0
  assert_same_run(pod.finish(TWO), alone)


@pytest.mark.nightly
def test_a_run_that_is_killed_and_killed_again_is_the_unbroken_one(
  two, killed_in_two, tmp_path
):
  """Host 1 in a rollout, host 0 in an update, host 1 while it saves."""
  pod = killed_in_two.copy(tmp_path / "again")
  for fault in ("kill@3:0:update+0.1", "kill@4:1:save"):
    assert pod.start(TWO, fault) != 0, fault
    assert any(f"FAULT {fault} strikes" in pod.log(host) for host in (0, 1))
  pod.finish(TWO)
  assert pod.rows() == two.rows()
  assert pod.samples() == two.samples()


@pytest.mark.nightly
def test_a_mixture_of_pictures_and_text_is_the_same_on_any_hosts(
  machine, new_pod
):
  """Also after the second of two hosts is killed while both sample."""
  alone = new_pod(machine.mixture()).finish(ALONE)
  two = new_pod(machine.mixture()).finish(TWO)
  assert_same_run(two, alone)
  shares = [row["data/sums/share"] for row in two.rows()[1:]]
  assert shares == [2 / 8, 3 / 8, 2 / 8, 2 / 8, 3 / 8]
  sets = [sample["set"] for sample in two.samples()]
  assert (sets.count("data"), sets.count("sums")) == (4 * 28, 4 * 12)
  broken = new_pod(machine.mixture())
  assert broken.start(TWO, "kill@4:1:rollout+0.2") != 0
  broken.finish(TWO)
  assert broken.rows() == two.rows()
  assert broken.samples() == two.samples()


@pytest.mark.nightly
def test_sets_and_samples_are_evaluated_by_two_hosts_as_by_one(
  machine, new_pod
):
  sets = ((name, str(machine.data), name) for name in ("train", "eval"))
  settings = (
    f"--config.eval.sets={tuple((f'{x}_set', y, z) for x, y, z in sets)}",
    "--config.train.num_steps=2",
    "--config.eval.every_steps=1",
    # Neither hosts nor batches divide it.
    "--config.eval.num_problems=13",
    "--config.eval.batch_size=8",
    "--config.eval.num_samples=4",
    "--config.eval.temperature=0.7",
  )
  one, two = (new_pod(*settings).finish(x) for x in (ALONE, TWO))
  for row, wanted in zip(two.rows(), one.rows(), strict=True):
    names = [name for name in wanted if name.startswith("eval/")]
    assert "eval/pass_at_2/eval_set" in names
    assert {k: row[k] for k in names} == {k: wanted[k] for k in names}
  assert one.rows()[-1]["eval/reward/train_set"] > 0
