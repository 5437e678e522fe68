"""The modules of `vllm`.

- `requests`: vLLM rollouts: the same policy, in another program (page `11_vllm`)
- `names`: Names of vLLM that must exist (page `11b_vllm_names`)
- `emulation`: Emulated FP8 inside vLLM (page `11c_vllm_emulation`)
- `worker`: Inside vLLM's worker (page `11d_vllm_worker`)
- `transfer`: Weights on their way to vLLM (page `11e_vllm_transfer`)
- `base`: What all vLLM engines share (page `11f_vllm_base`)
- `fences`: Fences around vLLM (page `11g_vllm_fences`)
- `engine`: vLLM inside the trainer's processes (page `11h_vllm_engine`)
- `server`: A vLLM server (page `11i_vllm_server`)
- `served`: vLLM apart: rollouts from servers on other machines (page `11j_vllm_served`)
"""
