"""GRPO, left to right: task -> rollout -> rewards -> advantages -> update. Each file talks to its neighbours alone."""
