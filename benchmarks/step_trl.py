"""TRL's GRPO trainer, for `grpo_step.py`; runs in `.venv-peers`.

These are its best settings on a CPU: float32, no gradient checkpointing, which
would compute more, scaled-dot-product attention, its own rollout by `generate`,
and no logs or checkpoints.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tempfile  # noqa: E402

import step_workload as workload  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import models, pre_tokenizers, processors  # noqa: E402


def words(args) -> transformers.PreTrainedTokenizerFast:
  """A tokenizer whose words are ids."""
  vocabulary = {str(i): i for i in range(args.vocab)}
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel(vocabulary, unk_token=str(workload.PAD))
  )
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  bos = str(workload.BOS)
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{bos} $A", special_tokens=[(bos, workload.BOS)]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=str(workload.PAD),
    eos_token=str(workload.EOS),
    bos_token=bos,
    unk_token=str(workload.PAD),
    padding_side="left",
  )


def save_model(args, folder: str) -> None:
  """Saves random weights for the trainer and its reference to load."""
  config = transformers.Gemma3TextConfig(
    vocab_size=args.vocab,
    hidden_size=args.width,
    intermediate_size=args.ffn,
    num_hidden_layers=args.layers,
    num_attention_heads=args.heads,
    num_key_value_heads=args.kv_heads,
    head_dim=args.head_dim,
    query_pre_attn_scalar=args.head_dim,
    sliding_window=args.window,
    max_position_embeddings=args.prompt_length + args.completion_length + 8,
    pad_token_id=workload.PAD,
    eos_token_id=workload.EOS,
    bos_token_id=workload.BOS,
    initializer_range=0.02,
    tie_word_embeddings=True,
  )
  transformers.Gemma3ForCausalLM(config).float().save_pretrained(folder)


class Steps(transformers.TrainerCallback):
  """Makes the trainer wait until the parent asks for a step."""

  def __init__(self, runner: workload.Runner):
    self._runner = runner
    self.tokens = 0

  def on_step_begin(self, *_, **__):
    """Waits before each step, before the trainer fetches its batch."""
    self._runner.wait()

  def on_step_end(self, *_, **__):
    """Reports the step after the update."""
    self._runner.done(tokens=self.tokens)


def main() -> None:
  """Runs one step for each line on stdin."""
  args = workload.parse(workload.parser(__doc__))
  runner = workload.Runner()
  transformers.logging.set_verbosity_error()
  torch.set_num_threads(args.torch_threads)
  torch.manual_seed(args.seed)
  steps = Steps(runner)

  def rewards(completions, completion_ids, **_):
    steps.tokens = sum(len(row) for row in completion_ids)
    return workload.rewards(completions, completions)

  with tempfile.TemporaryDirectory() as folder:
    save_model(args, folder)
    trainer = trl.GRPOTrainer(
      model=folder,
      reward_funcs=rewards,
      processing_class=words(args),
      train_dataset=Dataset.from_list(
        [
          {"prompt": workload.text(row[1:])}
          for rows in workload.prompts(args)
          for row in rows
        ]
      ),
      callbacks=[steps],
      args=trl.GRPOConfig(
        output_dir=folder,
        max_steps=10**6,
        per_device_train_batch_size=args.micro_prompts * args.num_generations,
        gradient_accumulation_steps=args.prompts // args.micro_prompts,
        num_generations=args.num_generations,
        num_iterations=1,
        max_completion_length=args.completion_length,
        beta=args.beta,
        epsilon=0.2,
        loss_type="grpo",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        # All rows have full length.
        generation_kwargs={"suppress_tokens": [workload.EOS]},
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="adamw_torch",
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=args.seed,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        model_init_kwargs={
          "dtype": "float32",
          "attn_implementation": "sdpa",
        },
      ),
    )
    time_phases(trainer, runner)
    trainer.train()


def time_phases(trainer: trl.GRPOTrainer, runner: workload.Runner) -> None:
  """Times rollout, reference and update, as far as hooks allow."""
  trainer._generate_single_turn = runner.time_phase(
    "rollout", trainer._generate_single_turn
  )
  logps = trainer._get_per_token_logps_and_entropies
  reference_logps = runner.time_phase("reference", logps)

  def select(*args, **kwargs):
    # With gradients this call is part of the loss, which is timed below.
    function = logps if torch.is_grad_enabled() else reference_logps
    return function(*args, **kwargs)

  trainer._get_per_token_logps_and_entropies = select
  trainer.compute_loss = runner.time_phase("update", trainer.compute_loss)
  trainer.accelerator.backward = runner.time_phase(
    "update", trainer.accelerator.backward
  )


if __name__ == "__main__":
  main()
