"""The modules of `integrations`.

- `generation`: Other trainers: what replay needs from them (page `18_integrations`)
- `trl_checks`: TRL: what must hold before anything runs (page `18_trl_checks`)
- `trl_vllm`: TRL's own vLLM, with routes (page `18_trl_vllm`)
- `trl`: TRL: routing replay and MiniRL in `GRPOTrainer` (page `18a_trl`)
- `verl`: verl: MiniRL as a policy loss (page `18b_verl`)
"""
