"""A short run of TRL with the vLLM that TRL itself starts; `test_trl_vllm.py` runs it in a process of
its own, because TRL leaves vLLM's process group and variables behind.

    python trl_vllm_run.py MODEL_FOLDER FOLDER REPAIRED

What the trainer saw goes to FOLDER/seen.pt. Without REPAIRED (0) weights go to vLLM as TRL hands
them over.
"""

import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
# one thread, a small cache, no compilation: vLLM is as slow to start as it is large
os.environ |= dict(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")
os.environ |= dict(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ |= dict(TORCH_COMPILE_DISABLE="1")

from functools import partial

import torch
from trl.generation import vllm_generation
from trl_runs import Watched, trainer

from minirl_nb import objective


def main(model_folder, folder, repaired):
    torch.set_num_threads(1)
    # TRL gives no type, and vLLM takes bfloat16 for a float32 model; float32 is the control
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32")
    options = dict(replay="R3", objective=objective.MINIRL, monitor=4)
    settings = dict(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=64)
    settings |= dict(gradient_accumulation_steps=2, steps_per_generation=4, max_steps=4)
    t = trainer(model_folder, Path(folder) / "trl", Watched, options, temperature=0.8, **settings)
    if not repaired:
        del t.vllm_generation.sync_weights  # the method of TRL's class is there again
    t.train()
    logs = [row for row in t.state.log_history if "loss" in row]
    torch.save(dict(seen=t.seen, logs=logs, mode=t.replay_mode), Path(folder) / "seen.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "1")
