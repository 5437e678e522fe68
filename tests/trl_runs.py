"""Short runs of TRL's `GRPOTrainer` on the tiny mixture, which keep what passes through them."""

import copy

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from minirl_nb.integrations.trl import MiniRL
from minirl_nb.routing import record

PROMPTS = ["1+1=", "12+3=", "4*15=", "7-2=", "100+23=", "9*9=", "3+4=", "61-7="]


def odd(completion_ids, **more):
    "A reward with signal in most groups: is the sum of the tokens odd?"
    return [float(sum(c) % 2) for c in completion_ids]


class Plain(MiniRL, GRPOTrainer):
    "The class as a user writes it."


class Watched(MiniRL, GRPOTrainer):
    """Keeps, for each micro-batch: inputs, loss, log-probabilities, experts used, gradients (summed
    over the micro-batches of the step) and the weights before."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def training_step(self, model, *args, **kwargs):
        before = copy.deepcopy(self.model.state_dict())
        loss = super().training_step(model, *args, **kwargs)
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        self.seen[-1] |= dict(weights=before, gradients=gradients)
        return loss

    def _scored(self, loss, now, inputs):
        self.logp = now.detach()
        return super()._scored(loss, now, inputs)

    def _compute_loss(self, model, inputs):
        with record(self.model) as used:
            loss = super()._compute_loss(model, inputs)
            routes = used.pop(len(inputs["prompt_ids"]))
        self.seen.append(
            dict(inputs=dict(inputs), loss=loss.detach(), logp=self.logp, routes=routes)
        )
        return loss


def config(folder, **changes):
    base = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=9,
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=0,
        scale_rewards="none",
        router_aux_loss_coef=0.0,
        gradient_checkpointing=False,
    )
    return GRPOConfig(**base | changes)


def trainer(model_folder, folder, kind=Watched, options=None, **changes):
    "A trainer on the model of a folder; `options` are those of `MiniRL`."
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    return kind(
        model=model,
        reward_funcs=odd,
        args=config(folder, **changes),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        **options or {},
    )
