"""The algorithms and the loop: settings, a run and what a step may do to it, grpo, sft and es, the trainer above all."""
