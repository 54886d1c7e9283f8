"""The training loop: collect, score, update, evaluate, write, save.

Nothing is computed here. A step follows from the settings, the state and the
step's number, so a resumed run continues as if it had never stopped.
"""

from data_pipelines import dataset
from grpo_tpu.config.schema import Config
from grpo_tpu.observability import exit_report
from grpo_tpu.train import setup


def train(
  config: Config,
  workdir: str,
  data: dataset.Dataset,
  report: exit_report.ExitReport,
) -> None:
  """Trains to `train.num_steps` or `train.stop_when`; resumes a workdir's run.

  Raises:
    SettingError: A setting that only the devices or the workdir can refute.
    Preempted: This machine will be taken away; everything done is saved.
    Exception: Any other error, in a run of one process. A process of several
      exits instead.
  """
  with setup.start(config, workdir, data, report) as run:
    trainer, state = run.trainer, run.state
    for step in run.steps():
      with run.step(step):
        batch, rollout_metrics = trainer.collect(state, step)
        batch = trainer.score(state, batch)
        state, update_metrics = trainer.update(state, batch)
        eval_metrics = run.evaluate(state, step)
      del batch  # Its memory belongs to the next rollout.
      run.write(step, rollout_metrics | update_metrics | eval_metrics)
      run.save(step, state)
